"""A chat without a screen: what a terminal and an endpoint have in common.

`template` renders messages, `messages` are the turns and their token ids, `thoughts` tells a
reply's thoughts from its answer, `session` a conversation
with a loaded model, whose turns are streams of events, `settings` the numbers that a user may give.
Knows no terminal and prints nothing.
"""
