"""From BF16 to what is stored: the second rounding, and how much it changes.

Quantised as `mx.quantize` does it, or with levels fitted to each group; widened to float32; or
left as it is. Both kinds of levels are stored in the same way and read by the same kernels.

*Extremes* puts the ends of a group's 2^bits levels at its least and its largest weight. *Fitted*
puts them where the squared error is least, each input channel weighed by its importance: from
levels over a part of the range, codes and levels are found in turns (the codes by rounding, scale
and bias by least squares), and the best is compared with `extremes` as it is stored, in BF16. So no
group has more error than with `extremes`. The same on every run; no random numbers.
"""

from typing import NamedTuple

import mlx.core as mx

from mlx_dsv3.checkpoint.format import Quantization

# Measured on 2 cores: errors over all rows take 170 % of the conversion's own time, so large
# matrices are sampled.
SAMPLE_STRIDE = 16
SAMPLE_FROM = 1 << 20
# Starts cover this part of a group's range, by bits: the fewer levels, the more is worth clipping.
CLIP = {2: (0.45, 0.85), 3: (0.6, 0.95), 4: (0.75, 1), 5: (0.85, 1), 6: (0.92, 1), 8: (0.98, 1)}
STARTS, TURNS, LAST_TURNS = 8, 2, 6  # turns of each start, and more of the best one
BLOCK = 1 << 20  # weights that are fitted at once: a dozen float32 arrays of that size


class Derived(NamedTuple):
    """A target's arrays as bytes, in the order of its writes; error sums where it is quantised."""

    arrays: list[mx.array] | list[memoryview]  # views once they are evaluated
    errors: mx.array | None


def store(
    matrix: mx.array,
    quantization: Quantization | None,
    dtype: str,
    is_fitted: bool = False,
    importance: mx.array | None = None,
) -> Derived:
    """Quantise a bfloat16 matrix, or widen it to float32 where `dtype` is `F32`, or leave it.

    `importance` weighs the input channels of fitted levels; its shape broadcasts to the matrix.
    """
    errors = None
    if quantization:
        arrays = extremes(matrix, quantization)
        errors = error_sums(matrix, arrays, quantization, importance)
        if is_fitted and quantization.mode == "affine":
            plain, arrays = errors, fit(matrix, quantization, importance)
            errors = error_sums(matrix, arrays, quantization, importance)
            errors = mx.concatenate([errors, plain[:1]])
    else:
        arrays = [matrix.astype(mx.float32) if dtype == "F32" else matrix]
    return Derived([mx.contiguous(array).view(mx.uint8) for array in arrays], errors)


def extremes(matrix: mx.array, quantization: Quantization) -> list[mx.array]:
    return list(mx.quantize(matrix, **quantization.as_config()))


def error_sums(
    matrix: mx.array,
    arrays: list[mx.array],
    quantization: Quantization,
    importance: mx.array | None = None,
) -> mx.array:
    """Return [sum of squared errors, sum of squares] in float32, sampled for large matrices.

    With an importance each square is multiplied by that of its channel.
    """
    if matrix.size >= SAMPLE_FROM:
        matrix, *arrays = (array[..., ::SAMPLE_STRIDE, :] for array in (matrix, *arrays))
    restored = mx.dequantize(*arrays, **quantization.as_config()).astype(mx.float32)
    matrix = matrix.astype(mx.float32)
    weights = 1 if importance is None else importance
    return mx.stack([(weights * mx.square(values)).sum() for values in (restored - matrix, matrix)])


def fit(
    matrix: mx.array, quantization: Quantization, importance: mx.array | None = None
) -> list[mx.array]:
    """Return packed weight, scales and biases with fitted levels, as `mx.quantize` returns them.

    The matrix is bfloat16 (..., rows, width); `importance` float32, broadcast to it: mean squares
    of the input channels. Unevaluated, block of rows by block of rows.
    """
    rows = max(1, BLOCK // (matrix.size // matrix.shape[-2]))
    blocks = [
        _fit_block(matrix[..., i : i + rows, :], quantization, importance)
        for i in range(0, matrix.shape[-2], rows)
    ]
    if len(blocks) == 1:
        return blocks[0]
    return [mx.concatenate(parts, axis=-2) for parts in zip(*blocks, strict=True)]


def _fit_block(
    matrix: mx.array, quantization: Quantization, importance: mx.array | None
) -> list[mx.array]:
    bits, size, last = quantization.bits, quantization.group_size, 2**quantization.bits - 1
    _, scales, biases = extremes(matrix, quantization)
    x = mx.unflatten(matrix.astype(mx.float32), -1, (-1, size))
    weights = _weights(importance, size)
    best = _Levels(x, weights, scales.astype(mx.float32), biases.astype(mx.float32), last)
    least, most = x.min(-1), x.max(-1)
    found = None
    for start in range(STARTS):
        part = CLIP[bits][0] + (CLIP[bits][1] - CLIP[bits][0]) * start / (STARTS - 1)
        scale = (most - least) * (part / last)
        levels = _Levels(x, weights, scale, (most + least - scale * last) / 2, last)
        for _ in range(TURNS):
            levels = levels.refitted()
        found = levels if found is None else found.or_better(levels)
    for _ in range(LAST_TURNS):
        found = found.refitted()
    best = best.or_better(found.refitted(is_stored=True))
    stored = [values.astype(mx.bfloat16) for values in (best.scale, best.bias)]
    return [pack(best.codes.astype(mx.uint32).flatten(-2), bits), *stored]


def _weights(importance: mx.array | None, size: int) -> mx.array:
    """Return the weights (..., 1, groups, size) of the channels in their groups, about 1.

    A group of channels that the text never used counts evenly.
    """
    if importance is None:
        return mx.ones((1, 1, size))
    groups = mx.unflatten(importance, -1, (-1, size))
    mean = groups.mean(-1, keepdims=True)
    groups = mx.where(mean > 0, groups / mx.where(mean > 0, mean, 1), 1)
    return groups if groups.ndim > 2 else groups[None]


class _Levels:
    """Levels of every group: `bias + scale * code`, codes 0 to `last`; all float32.

    x (..., groups, size); scale and bias (..., groups).
    """

    def __init__(self, x: mx.array, weights: mx.array, scale: mx.array, bias: mx.array, last: int):
        self.x, self.weights, self.scale, self.bias, self.last = x, weights, scale, bias, last
        step = mx.where(scale == 0, 1, scale)[..., None]
        self.codes = mx.clip(mx.round((x - bias[..., None]) / step), 0, last)

    @property
    def error(self) -> mx.array:
        """Return the weighted sum of squared errors of each group."""
        restored = self.codes * self.scale[..., None] + self.bias[..., None]
        return (self.weights * mx.square(restored - self.x)).sum(-1)

    def refitted(self, is_stored: bool = False) -> "_Levels":
        """Return the levels of least error for these codes, and the codes that follow from them.

        With `is_stored` they are BF16, the bias the best one for the scale as it is stored.
        """
        total = self.weights.sum(-1)
        mean_code = (self.weights * self.codes).sum(-1) / total
        mean = (self.weights * self.x).sum(-1) / total
        centred = self.weights * (self.codes - mean_code[..., None])
        variance = (centred * self.codes).sum(-1)
        slope = (centred * self.x).sum(-1) / mx.where(variance > 0, variance, 1)
        scale = mx.where(variance > 0, slope, self.scale)
        scale = _in_bfloat16(scale) if is_stored else scale
        bias = mean - scale * mean_code
        bias = _in_bfloat16(bias) if is_stored else bias
        return _Levels(self.x, self.weights, scale, bias, self.last)

    def or_better(self, other: "_Levels") -> "_Levels":
        """Return for each group the levels of `other` where their error is less, else these."""
        is_better = other.error < self.error
        scale = mx.where(is_better, other.scale, self.scale)
        bias = mx.where(is_better, other.bias, self.bias)
        return _Levels(self.x, self.weights, scale, bias, self.last)


def _in_bfloat16(values: mx.array) -> mx.array:
    return values.astype(mx.bfloat16).astype(mx.float32)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack codes (..., width) uint32 as `mx.quantize` does: a stream of bits, lowest first."""
    codes = mx.unflatten(codes, -1, (-1, 32))  # fill whole words, whatever the number of bits
    words = []
    for word in range(bits):
        first, end = 32 * word // bits, -(-32 * (word + 1) // bits)
        shifts = [i * bits - 32 * word for i in range(first, end)]
        left, right = (mx.array([max(sign * n, 0) for n in shifts], mx.uint32) for sign in (1, -1))
        words.append(((codes[..., first:end] << left) >> right).sum(-1).astype(mx.uint32))
    return mx.stack(words, axis=-1).flatten(-2)
