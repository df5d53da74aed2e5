"""DeepSeek-V3 and R1 on Apple Silicon with MLX.

Importing this package loads nothing: `mlx_dsv3.config` needs only the standard library,
`mlx_dsv3.reference` only torch. Start with `mlx_dsv3.load.load` and `mlx_dsv3.generate.stream`.
"""
