"""The fuzz lane: programs against damaged files and command lines, by the thousand.

Read `seeds` (the files that are damaged), `changes` (how), `inputs` (which program reads what),
`judge` (what is allowed), `__main__` (the runner: one process that forks for each input) and
`plants` (mistakes in our checks, which the lane must find). An input is a function of a seed and a
number: `make fuzz ARGS='--seed S --only N'` repeats one.
"""
