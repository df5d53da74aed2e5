"""From BF16 to what is stored: the second rounding, and how much it changes.

Quantised with one of two kinds of levels, widened to float32, or left as it is. `extremes` is
`mx.quantize`: a group's least and largest weight are its ends, and 0 is met exactly. `fitted` looks
for the scale and bias, as BF16 stores them, that make the squared error least: 0 is a weight as any
other, a scale is never negative unless the extremes of a group stay the best that was found. Both
have the same format; the block formats (`mxfp4` and others) know extremes alone.

How a group is fitted: every start is a scale and a bias, which give codes, for which the best scale
and bias follow by least squares, and with them the error. The best start is refitted: its codes
are taken anew. Starts differ in how much of the range they cover and in where the levels lie
between the weights; one start with five refits has 4 to 12 % more error (docs/log.md).
"""

from typing import NamedTuple

import mlx.core as mx

from mlx_dsv3.checkpoint.format import Quantization

# Measured on 2 cores: errors over all rows take 170 % of the conversion's own time, so large
# matrices are sampled.
SAMPLE_STRIDE = 16
SAMPLE_FROM = 1 << 20
# Of a start: shares of the range that its levels cover, and how many steps they are shifted.
SHIFTS = (-1 / 3, 0.0, 1 / 3)
STARTS = {  # by bits; with more of them there is less to gain by clipping
    2: [(ratio, shift) for ratio in (0.4, 0.55, 0.7, 0.85, 1.0) for shift in SHIFTS],
    3: [(ratio, shift) for ratio in (0.6, 0.7, 0.8, 0.9, 1.0) for shift in SHIFTS],
    4: [(ratio, shift) for ratio in (0.7, 0.76, 0.82, 0.88, 0.94, 1.0) for shift in SHIFTS],
    5: [(ratio, shift) for ratio in (0.95, 1.0) for shift in SHIFTS],
    6: [(ratio, shift) for ratio in (0.95, 1.0) for shift in SHIFTS],
    8: [(1.0, 0.0)],  # the nearest codes for levels as stored are nearly all: .52, with 17 .519
}
REFITS = {2: 2, 3: 2, 4: 2}  # of the best start
FIT_ELEMENTS = 1 << 17  # at once; of 2^15 to 2^20 the fastest on a CPU, in whose cache it stays


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
        arrays = quantize(matrix, quantization, is_fitted, importance)
        errors = error_sums(matrix, arrays, quantization, is_fitted, importance)
    else:
        arrays = [matrix.astype(mx.float32) if dtype == "F32" else matrix]
    return Derived([mx.contiguous(array).view(mx.uint8) for array in arrays], errors)


def quantize(
    matrix: mx.array,
    quantization: Quantization,
    is_fitted: bool,
    importance: mx.array | None = None,
) -> list[mx.array]:
    """Return weight, scales and biases (those of `affine` alone) with the levels asked for."""
    if is_fitted and quantization.mode == "affine":
        return fit(matrix, quantization, importance)
    return extremes(matrix, quantization)


def extremes(matrix: mx.array, quantization: Quantization) -> list[mx.array]:
    return list(mx.quantize(matrix, **quantization.as_config()))


def fit(
    matrix: mx.array, quantization: Quantization, importance: mx.array | None = None
) -> list[mx.array]:
    """Return weight, scales and biases whose weighted squared error is least, lazily.

    `matrix` is bfloat16 (..., rows, width), `importance` float32 and broadcasts to it. No group is
    worse than with `mx.quantize`, by its own weighted error in float32; where the importance of a
    whole group is 0, all its weights count alike.
    """
    rows = matrix.shape[-2]
    step = max(1, FIT_ELEMENTS * rows // matrix.size)
    blocks = [
        _fit_block(matrix[..., start : start + step, :], quantization, importance)
        for start in range(0, rows, step)
    ]
    return [mx.concatenate(parts, axis=-2) for parts in zip(*blocks, strict=True)]


def _fit_block(
    matrix: mx.array, quantization: Quantization, importance: mx.array | None
) -> list[mx.array]:
    bits, size, _ = quantization
    _, *ends = extremes(matrix, quantization)
    x = mx.unflatten(matrix.astype(mx.float32), -1, (-1, size))  # (..., groups, size)
    w = _weights(importance, size)
    found = _search(x, w, bits)
    candidates = [[part[..., None].astype(mx.float32) for part in ends], found]
    codes, errors = zip(*(_codes(x, w, *pair, bits) for pair in candidates), strict=True)
    is_better = errors[1] < errors[0]  # not where the search came upon a scale of 0: NaN
    scale, bias = (mx.where(is_better, b, a)[..., 0] for a, b in zip(*candidates, strict=True))
    packed = pack(mx.where(is_better, codes[1], codes[0]).flatten(-2), bits)
    return [packed, scale.astype(mx.bfloat16), bias.astype(mx.bfloat16)]


def _weights(importance: mx.array | None, size: int) -> mx.array:
    """Return the importance by groups, with a mean of 1 in each: sums of 1e-30 would vanish."""
    if importance is None or importance.ndim == 0:
        return mx.ones(size)
    w = mx.unflatten(importance, -1, (-1, size))
    mean = w.mean(-1, keepdims=True)
    return mx.where(mean > 0, w / mean, 1)


def _search(x: mx.array, w: mx.array, bits: int) -> list[mx.array]:
    """Return the best scale and bias found for each group, rounded to bfloat16."""
    n = 2**bits - 1
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    total = w.sum(-1, keepdims=True)
    centre = (w * x).sum(-1, keepdims=True) / total
    middle, x = (low + high) / 2 - centre, x - centre  # centred: no sums that cancel out
    best = None
    for ratio, shift in STARTS[bits]:
        scale = (high - low) * (ratio / n)
        best = _better(best, _refit(x, w, total, scale, middle + (shift - n / 2) * scale, n))
    for _ in range(REFITS.get(bits, 0)):
        best = _better(best, _refit(x, w, total, *best[1:], n))
    return [part.astype(mx.bfloat16).astype(mx.float32) for part in (best[1], best[2] + centre)]


def _refit(
    x: mx.array, w: mx.array, total: mx.array, scale: mx.array, bias: mx.array, n: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Return what least squares give for the codes of a scale and bias: gain, scale, bias.

    The weighted mean of `x` is 0, so the error is that of no levels at all less the gain.
    """
    codes = mx.clip(mx.round((x - bias) * (1 / scale)), 0, n)
    weighted = w * codes
    mean = weighted.sum(-1, keepdims=True) / total
    squares = (weighted * codes).sum(-1, keepdims=True)
    product = (weighted * x).sum(-1, keepdims=True)
    scale = product / (squares - total * mean * mean)
    return product * scale, scale, -scale * mean


def _better(best: tuple | None, other: tuple) -> tuple:
    if best is None:
        return other
    is_better = other[0] > best[0]
    return tuple(mx.where(is_better, b, a) for a, b in zip(best, other, strict=True))


def _codes(
    x: mx.array, w: mx.array, scale: mx.array, bias: mx.array, bits: int
) -> tuple[mx.array, mx.array]:
    """Return the nearest codes and the weighted squared error of each group."""
    codes = mx.clip(mx.round((x - bias) / scale), 0, 2**bits - 1)
    return codes, (w * mx.square(codes * scale + bias - x)).sum(-1, keepdims=True)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack codes (..., width) into words as `mx.quantize` does: one stream of bits, lowest first.

    32 codes fill `bits` words; of 3, 5 and 6 bits some lie across two.
    """
    codes = mx.unflatten(codes.astype(mx.uint32), -1, (-1, 32))
    words = [mx.array(0, mx.uint32)] * bits
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[word] = words[word] | (codes[..., i] << shift)
        if shift + bits > 32:
            words[word + 1] = words[word + 1] | (codes[..., i] >> (32 - shift))
    return mx.stack(words, axis=-1).flatten(-2)


def error_sums(
    matrix: mx.array,
    arrays: list[mx.array],
    quantization: Quantization,
    is_fitted: bool = False,
    importance: mx.array | None = None,
) -> mx.array:
    """Return [squared errors, squares] as float32 sums, sampled for large matrices.

    With `fitted` levels a third has the squared errors that extremes would make, and where an
    importance is given the same three follow weighted by it.
    """
    if matrix.size >= SAMPLE_FROM:
        matrix, *arrays = (array[..., ::SAMPLE_STRIDE, :] for array in (matrix, *arrays))
    settings = quantization.as_config()
    candidates = [arrays, extremes(matrix, quantization)] if is_fitted else [arrays]
    exact = matrix.astype(mx.float32)
    restored = [mx.dequantize(*parts, **settings).astype(mx.float32) for parts in candidates]
    error, *beside = (mx.square(each - exact) for each in restored)
    terms = [error, mx.square(exact), *beside]
    if is_fitted and importance is not None:
        terms += [importance * term for term in terms]
    return mx.stack([term.sum() for term in terms])


def num_sums(is_fitted: bool, is_weighted: bool) -> int:
    """Return how many sums `error_sums` gives."""
    return (6 if is_weighted else 3) if is_fitted else 2
