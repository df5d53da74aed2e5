"""One comparison for every parity test: three bounds at once, and the worst position by name.

A mean hides a wrong row and a maximum hides a wrong scale, so all three must hold: the largest
absolute difference, the largest relative error of a row (last axis), and the cosine difference of
the whole. NaN fails. Sides may be MLX, torch or numpy arrays; differences are taken in float64.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import torch


@dataclass(frozen=True)
class Bound:
    """Largest absolute difference, relative error of a row, cosine difference of everything."""

    absolute: float
    relative: float
    cosine: float


# The tolerance table, each number with its origin. Measured values are the worst over configs
# A-D, bias means +2, 0, -1, on MLX's Linux CPU backend.
#
# Logits against reference and transformers in float32. Relative: what the project asks for, times
# max(1, position / 1000), since a float32 angle is wrong by up to position x 2^-24 rad. Absolute:
# logits of the random models lie within +-6. Cosine: half the relative bound's square, rounded up.
# Measured: 2e-5 absolute, 8e-6 relative, 8e-12 (the 8,192 positions included).
LOGITS = Bound(absolute=3e-4, relative=1e-4, cosine=1e-8)
# One layer in float32, same input. Absolute: litgpt's MLA and MoE tests. Measured: 5e-6, 1e-6.
LAYER = Bound(absolute=1e-5, relative=1e-5, cosine=1e-10)
# Absorbed against expanded attention in float32: tinygrad's 1e-4; measured 1e-6.
FORMS = Bound(absolute=1e-4, relative=1e-4, cosine=1e-8)
# The reference against transformers, and in float32 against float64: transformers floors at 2e-6
# (spec 7.1). Measured: 1e-5, 3e-6, 1e-12.
ORACLE = Bound(absolute=3e-5, relative=1e-5, cosine=1e-10)
# A bfloat16 attention against a float64 one. Relative: FlashMLA's. Its 1e-3 and 5e-6 are for the
# core alone; ours rounds at two more products: four roundings of 2^-9 give a cosine of 3e-5 at
# worst, and outputs lie within +-1. Measured: 4e-3, 9e-3, 1e-5.
BF16_ATTENTION = Bound(absolute=8e-3, relative=2.01 / 128, cosine=2e-5)


def to_numpy(array) -> np.ndarray:
    """Return an MLX, torch or numpy array as float64."""
    if isinstance(array, mx.array):
        return np.array(array.astype(mx.float32)).astype(np.float64)
    if isinstance(array, torch.Tensor):
        return array.detach().double().numpy()
    return np.asarray(array, np.float64)


def row_errors(actual, expected) -> np.ndarray:
    """Return |actual - expected| / |expected| of each row (last axis), NaN where undefined."""
    actual, expected = to_numpy(actual), to_numpy(expected)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


def relative_error(actual, expected) -> float:
    """Return the largest relative error of a row; NaN counts as infinite."""
    errors = row_errors(actual, expected)
    return float(np.where(np.isnan(errors), np.inf, errors).max())


def cosine_difference(actual, expected) -> float:
    """Return 1 - 2 <a, b> / (|a|^2 + |b|^2), the measure of DeepGEMM and FlashMLA."""
    a, b = to_numpy(actual).ravel(), to_numpy(expected).ravel()
    with np.errstate(invalid="ignore"):
        return float(1 - 2 * (a @ b) / (a @ a + b @ b))


def position_factor(length: int, start: int = 0) -> np.ndarray:
    """Return max(1, position / 1000) for `length` positions, to scale a bound along a row axis."""
    return np.maximum(1, np.arange(start, start + length) / 1000)


def assert_close(name: str, actual, expected, bound: Bound, factor=1.0) -> None:
    """Fail with the worst position unless all three bounds hold.

    `factor` scales the absolute and relative bound of each row and broadcasts against the rows'
    shape (`position_factor`); the cosine bound grows with its largest square.
    """
    a, b = to_numpy(actual), to_numpy(expected)
    rows = row_errors(a, b)
    factor = np.broadcast_to(np.asarray(factor, np.float64), rows.shape)
    worst = np.abs(a - b) / factor[..., None]
    worst = np.where(np.isnan(worst), np.inf, worst)
    at = np.unravel_index(worst.argmax(), worst.shape)
    relative = np.where(np.isnan(rows), np.inf, rows) / factor
    row = np.unravel_index(relative.argmax(), relative.shape)
    cosine = cosine_difference(a, b)
    holds = (
        worst[at] <= bound.absolute
        and relative[row] <= bound.relative
        and cosine <= bound.cosine * factor.max() ** 2
    )
    if holds:
        return
    raise AssertionError(
        f"{name}: max abs {abs(a[at] - b[at]):.1e} at {[int(i) for i in at]} "
        f"(mlx {a[at]:.6g}, ref {b[at]:.6g}), row error {rows[row]:.1e} in "
        f"{[int(i) for i in row]}, cosine diff {cosine:.1e}; bounds {bound.absolute:.0e}, "
        f"{bound.relative:.0e}, {bound.cosine:.0e}, factor up to {factor.max():.3g}"
    )


def same_bits(actual: mx.array, expected: mx.array) -> bool:
    """Say whether two MLX arrays have one dtype, one shape and the same bytes."""
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        return False
    kind = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[actual.dtype.size]
    return bool(mx.array_equal(actual.view(kind), expected.view(kind)))
