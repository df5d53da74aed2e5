"""What a folder or a repository holds, from its headers alone; the converter reads it too.

Read in this order: `headers` (safetensors headers), `format` (names of files and tensors, packing,
index, manifest), `unfinished` (what a conversion left), `hub` (repositories), `folder` (an MLX
folder, here or on the hub), and `importance` (a file of its own, whose values are read). Everything
is checked here, where it enters. Knows no weights, and no model.
"""
