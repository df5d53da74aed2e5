"""MLX against the reference and against transformers, with the same hub tensors on every side."""
