"""Block FP8 to BF16 in MLX: weight * scale in float32, rounded once.

`weight_scale_inv` *multiplies*, despite its name. The block size comes from config.json and never
from a ratio of shapes: blocks at the lower and right edge may be partial (576 rows are 4.5 blocks
of 128). The arithmetic is mlx-lm's, operation for operation, so that the bits are its bits.
"""

import mlx.core as mx
import numpy as np


def dequantize_blocks(weight: mx.array, scale: mx.array, block: tuple[int, int]) -> mx.array:
    """Return bfloat16 (rows, columns) from e4m3 codes (uint8) and float32 block scales.

    `scale` has the shape (ceil(rows / block[0]), ceil(columns / block[1])).
    """
    rows, columns = weight.shape
    block_rows, block_columns = block
    pad_rows, pad_columns = -rows % block_rows, -columns % block_columns
    values = mx.from_fp8(weight, mx.bfloat16)
    if pad_rows or pad_columns:
        values = mx.pad(values, ((0, pad_rows), (0, pad_columns)))
    values = values.reshape(scale.shape[0], block_rows, scale.shape[1], block_columns)
    values = values * scale[:, None, :, None]
    values = values.reshape(rows + pad_rows, columns + pad_columns)
    return values[:rows, :columns].astype(mx.bfloat16)


def decode_scales(raw: bytes, dtype: str, shape: tuple[int, int]) -> np.ndarray:
    """Return float32 scales from their stored bytes; E8M0 codes are powers of two, 255 is NaN."""
    if dtype == "F32":
        scales = np.frombuffer(raw, np.float32)
    elif dtype == "BF16":
        scales = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        assert dtype == "F8_E8M0", dtype
        codes = np.frombuffer(raw, np.uint8)
        powers = np.ldexp(np.float32(1), np.minimum(codes, 254).astype(np.int32) - 127)
        scales = np.where(codes == 255, np.float32("nan"), powers)
    return scales.reshape(shape)
