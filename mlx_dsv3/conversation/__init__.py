"""A chat without a screen: what a terminal and an endpoint have in common.

`template` renders messages, `messages` are the turns and their token ids, `thoughts` tells a
reply's thoughts from its answer, `reply` is a reply as it comes, `settings` are the numbers that a
user may give, `transcript` is a chat as a file, `session` a conversation with a loaded model, whose
turns are streams of events.
Knows no terminal and prints nothing.
"""
