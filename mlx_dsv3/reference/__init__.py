"""A plain PyTorch DeepSeek-V3: the second opinion. Imports neither mlx nor the MLX modules.

Read in this order: `model` (the arithmetic, literally), `fp8` (that of the original: activations
quantised too), `kernels` (the same in Triton), `backends` (which one a device uses), `weights` (the
hub's names and bytes), `stream` (one layer in memory at a time), `parallel` (one layer over several
GPUs), `golden` (the file that a recording is), `source` (what both programs begin with), `record`
and `generate` (the two programs).
"""
