"""The converter: a hub checkpoint (FP8 blocks or BF16) becomes a quantised MLX folder.

Reading order: `plan`, `transform`, `writer`; then `run`, which ties them together. Imports from
the rest of the project only `mlx_dsv3.config` and `mlx_dsv3.errors`.
"""
