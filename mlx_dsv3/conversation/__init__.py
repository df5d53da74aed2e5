"""A chat without a screen: what a terminal and an endpoint have in common.

`template` renders messages, `messages` are the turns and their token ids, `thoughts` tells a
reply's thoughts from its answer, `session` is a conversation
with a loaded model, whose turns are streams of events, `settings` the numbers that a user may give,
`transcript` a chat as a file.
Knows no terminal and prints nothing.
"""
