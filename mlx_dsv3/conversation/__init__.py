"""A chat without a screen.

`messages` are the turns and their token ids. Knows no terminal and prints nothing.
"""
