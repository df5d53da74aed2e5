"""Fitted levels: how much less error, never more, in MLX's own format."""

import mlx.core as mx
import numpy as np
import pytest

from convert.quantize import extremes, fit, pack
from mlx_dsv3.checkpoint.format import Quantization

GROUPS = 4096


def weights(shape: str, seed: int = 0) -> mx.array:
    rng = np.random.default_rng(seed)
    size = (GROUPS // 4, 256)
    values = rng.standard_normal(size) if shape == "normal" else rng.standard_t(5, size)
    return mx.array((values * 0.02).astype(np.float32)).astype(mx.bfloat16)


def group_errors(matrix, arrays, quantization, importance=None) -> np.ndarray:
    """Return the weighted squared errors of each group, from what MLX makes of stored values."""
    weight, *levels = arrays
    levels = [part.astype(mx.float32) for part in levels]
    restored = mx.dequantize(weight, *levels, **quantization.as_config())
    squares = mx.square(restored - matrix.astype(mx.float32))
    squares = squares if importance is None else squares * importance
    return np.array(mx.unflatten(squares, -1, (-1, quantization.group_size)).sum(-1))


@pytest.mark.parametrize("shape", ["normal", "student"])
@pytest.mark.parametrize(("bits", "most"), [(2, 0.68), (3, 0.77), (4, 0.85)])
def test_error_is_less_and_in_no_group_more(shape, bits, most):
    matrix, quantization = weights(shape), Quantization(bits)
    ours = group_errors(matrix, fit(matrix, quantization), quantization)
    plain = group_errors(matrix, extremes(matrix, quantization), quantization)
    assert ours.sum() < most * plain.sum()
    assert (ours <= plain * (1 + 1e-5)).all()


def test_weighed_channels_lose_less():
    """The fit minimises what it is asked to: with importance, without it, never both."""
    matrix, quantization = weights("normal"), Quantization(2)
    rng = np.random.default_rng(1)
    importance = mx.array(rng.lognormal(0, 1.5, 256).astype(np.float32))
    even, weighed = fit(matrix, quantization), fit(matrix, quantization, importance)
    plain = extremes(matrix, quantization)
    errors = [
        group_errors(matrix, arrays, quantization, importance) for arrays in (weighed, even, plain)
    ]
    assert errors[0].sum() < 0.85 * errors[1].sum()
    assert (errors[0] <= errors[2] * (1 + 1e-5)).all()
    sums = [group_errors(matrix, arrays, quantization).sum() for arrays in (even, weighed)]
    assert sums[0] < sums[1]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_codes_are_packed_as_mlx_does(bits, size):
    codes = mx.array(np.random.default_rng(0).integers(0, 2**bits, (3, 256)).astype(np.uint32))
    ones, zeros = mx.ones((3, 256 // size)), mx.zeros((3, 256 // size))
    settings = Quantization(bits, size).as_config()
    assert mx.array_equal(mx.dequantize(pack(codes, bits), ones, zeros, **settings), codes)


def test_odd_groups():
    """Zeros, constants, one weight alone, and channels that no text used."""
    rows = [np.zeros(64), np.full(64, 0.37), np.eye(1, 64, 5)[0], np.linspace(-1, 1, 64)]
    matrix = mx.array(np.stack(rows).astype(np.float32)).astype(mx.bfloat16)
    quantization = Quantization(2)
    for importance in (None, mx.zeros(64), mx.array(np.eye(1, 64, 5)[0].astype(np.float32))):
        arrays = fit(matrix, quantization, importance)
        assert all(mx.isfinite(part).all() for part in arrays[1:])
        errors = group_errors(matrix, arrays, quantization)
        assert errors[0] == 0 and errors[1] < 1e-8
    assert group_errors(matrix, fit(matrix, quantization), quantization)[2] < 1e-5


def test_blocks_of_rows_change_nothing(monkeypatch):
    """Matrices of heads too, whose importance differs by head."""
    matrix = weights("normal").reshape(4, -1, 256)
    importance = mx.random.uniform(shape=(4, 1, 256), key=mx.random.key(0))
    whole = fit(matrix, Quantization(3), importance)
    monkeypatch.setattr("convert.quantize.BLOCK", 7 * 4 * 256)
    parts = fit(matrix, Quantization(3), importance)
    assert all(map(mx.array_equal, whole, parts))
    head = fit(matrix[2], Quantization(3), importance[2])
    assert all(mx.array_equal(a[2], b) for a, b in zip(whole, head, strict=True))
