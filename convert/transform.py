"""Source bytes to output arrays: one function a rule, all of it MLX.

Every weight passes through BF16: FP8 is dequantised in float32 and rounded, F32 is rounded, and
only then quantised or widened. No other rounding exists. This file knows neither the order of
work nor the output files; the caller chooses the stream and evaluates.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from convert.fp8 import decode_scales, dequantize_blocks
from convert.outputs import Target, Unit
from convert.source import Source
from mlx_dsv3.checkpoint.format import Quantization
from mlx_dsv3.config import ModelArgs
from mlx_dsv3.errors import UserError

BF16_MAX = 3.3895e38
FP8_MAX = 448.0
# Measured on 2 cores: errors over all rows take 170 % of the conversion's own time, so large
# matrices are sampled.
SAMPLE_STRIDE = 16
SAMPLE_FROM = 1 << 20


class Raw(NamedTuple):
    """A weight's bytes as stored; `scale` is decoded, and None unless the weight is FP8."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytearray
    scale: np.ndarray | None


class Derived(NamedTuple):
    """A target's arrays as bytes, in the order of its writes; error sums where it is quantised."""

    arrays: list[mx.array] | list[memoryview]  # views once they are evaluated
    errors: mx.array | None


def read_unit(source: Source, unit: Unit) -> list[Raw]:
    """Read what a unit needs; makes no MLX call, so that threads may call it.

    Raises `UserError` where values are not finite, or where the MTP layer's copy of embedding or
    head is none. A comparison leaves nothing to derive.
    """
    raws = [read_raw(source, name, unit.rows) for name in unit.sources]
    if unit.rule != "compare":
        return raws
    copy, original = raws
    if copy.data != original.data or not np.array_equal(copy.scale, original.scale):
        raise UserError(
            f"`{copy.name}` differs from `{original.name}`; a folder has room for one of them",
            "report the checkpoint: every known release stores the same values twice",
        )
    return []


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


def derive(unit: Unit, raws: list[Raw], args: ModelArgs, block: tuple[int, int]) -> list[Derived]:
    """Build the output of a unit, unevaluated, target by target."""
    if unit.rule == "keep":  # the selection bias, the one tensor that is never rounded
        return [Derived([mx.array(np.frombuffer(raws[0].data, np.uint8))], None)]
    matrices = [to_bfloat16(raw, block) for raw in raws]
    if unit.rule == "split_kv_b":
        matrices = split_kv_b(matrices[0], args)
    return [store(target, matrix) for target, matrix in zip(unit.targets, matrices, strict=True)]


def to_bfloat16(raw: Raw, block: tuple[int, int]) -> mx.array:
    """Return a stored weight in bfloat16, dequantised where it is FP8."""
    if raw.dtype == "F8_E4M3":
        codes = mx.array(np.frombuffer(raw.data, np.uint8).reshape(raw.shape))
        return dequantize_blocks(codes, mx.array(raw.scale), block)
    if raw.dtype == "BF16":
        return mx.array(np.frombuffer(raw.data, np.uint16).reshape(raw.shape)).view(mx.bfloat16)
    return mx.array(np.frombuffer(raw.data, np.float32).reshape(raw.shape)).astype(mx.bfloat16)


def split_kv_b(weight: mx.array, args: ModelArgs) -> list[mx.array]:
    """Split kv_b_proj per head into `embed_q` and `unembed_out` (spec 2.4.5).

    The rows of a head are its keys' nope part, then its values.
    """
    heads, nope = args.num_attention_heads, args.qk_nope_head_dim
    weight = weight.reshape(heads, nope + args.v_head_dim, -1)  # (H, N + V, C)
    embed_q = mx.contiguous(weight[:, :nope].swapaxes(-1, -2))  # (H, C, N)
    return [embed_q, mx.contiguous(weight[:, nope:])]  # (H, V, C)


def store(target: Target, matrix: mx.array) -> Derived:
    """Quantise a bfloat16 matrix as its target says, or widen it to float32, or leave it."""
    quantization, errors = target.quantization, None
    if quantization:
        arrays = list(mx.quantize(matrix, **quantization.as_config()))
        errors = error_sums(matrix, arrays, quantization)
    else:
        arrays = [matrix.astype(mx.float32) if target.dtype == "F32" else matrix]
    return Derived([mx.contiguous(array).view(mx.uint8) for array in arrays], errors)


def error_sums(matrix: mx.array, arrays: list[mx.array], quantization: Quantization) -> mx.array:
    """Return [sum of squared errors, sum of squares] in float32, sampled for large matrices."""
    if matrix.size >= SAMPLE_FROM:
        matrix, *arrays = (array[..., ::SAMPLE_STRIDE, :] for array in (matrix, *arrays))
    restored = mx.dequantize(*arrays, **quantization.as_config()).astype(mx.float32)
    matrix = matrix.astype(mx.float32)
    return mx.stack([mx.square(restored - matrix).sum(), mx.square(matrix).sum()])
