"""How much each input channel of a linear layer counts: mean squares over a text.

Read in this order: `watch` (what a model's layers are given, summed), `texts` (files to windows of
tokens, and what a measurement is known by), `sums` (so far, in memory and on disk), `measure` (the
run), `__main__` (the command line). The file is described in `mlx_dsv3/checkpoint/importance.py`,
which reads it for the converter.
"""
