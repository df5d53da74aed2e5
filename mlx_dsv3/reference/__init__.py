"""A plain PyTorch DeepSeek-V3: the second opinion. Imports neither mlx nor the MLX modules."""
