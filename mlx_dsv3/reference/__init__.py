"""A plain PyTorch DeepSeek-V3: the second opinion. Imports neither mlx nor the MLX modules.

Read in this order: `files` (files of others, checked; files of ours, whole), `args` (config.json,
checked), `model` (the arithmetic, literally), `fp8` (that of the original: activations quantised
too), `kernels` (the same in Triton), `backends` (which one a device uses), `hub` (a checkpoint's
tensors by name), `weights` (a model filled with them), `stream` (one layer in memory at a time),
`parallel` (one layer over several GPUs), `golden` (the file that a recording is), `work` (what a
recording keeps until then), `source` (what both programs begin with), `record` and `generate` (the
two programs).
"""
