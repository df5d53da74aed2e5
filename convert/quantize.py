"""From BF16 to what is stored: the second rounding, and how much it changes.

Quantised as `mx.quantize` does it, widened to float32, or left as it is.
"""

from typing import NamedTuple

import mlx.core as mx

from mlx_dsv3.checkpoint.format import Quantization

# Measured on 2 cores: errors over all rows take 170 % of the conversion's own time, so large
# matrices are sampled.
SAMPLE_STRIDE = 16
SAMPLE_FROM = 1 << 20


class Derived(NamedTuple):
    """A target's arrays as bytes, in the order of its writes; error sums where it is quantised."""

    arrays: list[mx.array] | list[memoryview]  # views once they are evaluated
    errors: mx.array | None


def store(matrix: mx.array, quantization: Quantization | None, dtype: str) -> Derived:
    """Quantise a bfloat16 matrix, or widen it to float32 where `dtype` is `F32`, or leave it."""
    errors = None
    if quantization:
        arrays = list(mx.quantize(matrix, **quantization.as_config()))
        errors = error_sums(matrix, arrays, quantization)
    else:
        arrays = [matrix.astype(mx.float32) if dtype == "F32" else matrix]
    return Derived([mx.contiguous(array).view(mx.uint8) for array in arrays], errors)


def error_sums(matrix: mx.array, arrays: list[mx.array], quantization: Quantization) -> mx.array:
    """Return [sum of squared errors, sum of squares] in float32, sampled for large matrices."""
    if matrix.size >= SAMPLE_FROM:
        matrix, *arrays = (array[..., ::SAMPLE_STRIDE, :] for array in (matrix, *arrays))
    restored = mx.dequantize(*arrays, **quantization.as_config()).astype(mx.float32)
    matrix = matrix.astype(mx.float32)
    return mx.stack([mx.square(restored - matrix).sum(), mx.square(matrix).sum()])
