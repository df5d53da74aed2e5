"""From a stored weight to BF16: the first of the two roundings that exist.

FP8 is multiplied by its block scales in float32 and rounded once, F32 is rounded, BF16 passes.
`weight_scale_inv` *multiplies*, despite its name. The block size comes from config.json and never
from a ratio of shapes: blocks at the lower and right edge may be partial (576 rows are 4.5 blocks
of 128). The arithmetic is mlx-lm's, operation for operation, so that the bits are its bits.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from convert.source import Source
from mlx_dsv3.errors import UserError

BF16_MAX = 3.3895e38
FP8_MAX = 448.0


class Raw(NamedTuple):
    """A weight's bytes as stored; `scale` is decoded, and None unless the weight is FP8."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytearray
    scale: np.ndarray | None


def read_raw(source: Source, name: str, rows: tuple[int, int] | None) -> Raw:
    """Read a weight, or rows of it, with its scales, and refuse values that are not finite."""
    tensor, scale = source.tensors[name], None
    if scale_name := source.scale_of(name):
        stored, block_rows = source.tensors[scale_name], source.block[0]
        blocks = (rows[0] // block_rows, -(-rows[1] // block_rows)) if rows else None
        shape = (blocks[1] - blocks[0], stored.shape[1]) if blocks else stored.shape
        scale = decode_scales(source.read(scale_name, blocks), stored.dtype, shape)
    shape = (rows[1] - rows[0], *tensor.shape[1:]) if rows else tensor.shape
    raw = Raw(name, tensor.dtype, shape, source.read(name, rows), scale)
    if not is_finite(raw):
        raise UserError(
            f"`{name}` has values that are not finite",
            "the shard is damaged; compare its sha256 with the hub's and fetch it again",
        )
    return raw


def is_finite(raw: Raw) -> bool:
    """Say whether no value is NaN or infinite: one bad scale would ruin a block unnoticed."""
    if raw.dtype == "F8_E4M3":
        largest = float(np.abs(raw.scale).max())
        has_nan = b"\x7f" in raw.data or b"\xff" in raw.data
        return not has_nan and largest * FP8_MAX < BF16_MAX  # also False for NaN
    return all_finite(raw.dtype, raw.data)


def all_finite(dtype: str, data: bytearray) -> bool:
    """Say whether BF16 or F32 values hold neither NaN nor infinity, also after rounding to BF16."""
    if dtype == "BF16":
        return int((np.frombuffer(data, np.uint16) & 0x7FFF).max()) < 0x7F80
    return bool((np.abs(np.frombuffer(data, np.float32)) < BF16_MAX).all())


def to_bfloat16(raw: Raw, block: tuple[int, int]) -> mx.array:
    """Return a stored weight in bfloat16, dequantised where it is FP8."""
    if raw.dtype == "F8_E4M3":
        codes = mx.array(np.frombuffer(raw.data, np.uint8).reshape(raw.shape))
        return dequantize_blocks(codes, mx.array(raw.scale), block)
    if raw.dtype == "BF16":
        return mx.array(np.frombuffer(raw.data, np.uint16).reshape(raw.shape)).view(mx.bfloat16)
    return mx.array(np.frombuffer(raw.data, np.float32).reshape(raw.shape)).astype(mx.bfloat16)


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
