"""Levels fitted to their groups: packing, error energies, no group worse, what is not ordinary."""

import mlx.core as mx
import numpy as np
import pytest

from convert import quantize
from convert.quantize import error_sums, extremes, fit, pack
from mlx_dsv3.checkpoint.format import Quantization

BITS, KINDS = (2, 3, 4, 5, 6, 8), ("normal", "student")


def draw(kind: str, shape: tuple[int, ...], seed: int = 0) -> mx.array:
    draws = np.random.default_rng(seed)
    values = draws.standard_normal(shape) if kind == "normal" else draws.standard_t(5, shape)
    return mx.array((0.02 * values).astype(np.float32)).astype(mx.bfloat16)


def unpacked(weight: mx.array, bits: int) -> np.ndarray:
    """Return codes (..., width): numpy's way, bit by bit."""
    stream = np.unpackbits(np.array(weight).view(np.uint8), axis=-1, bitorder="little")
    stream = stream.reshape(*weight.shape[:-1], -1, bits)
    return stream @ (1 << np.arange(bits))


def group_errors(matrix: mx.array, arrays: list[mx.array], q: Quantization, weights=1.0):
    """Return each group's weighted squared error in float64."""
    x = np.array(matrix.astype(mx.float32), np.float64).reshape(-1, q.group_size)
    weights = np.broadcast_to(weights, matrix.shape).reshape(x.shape)
    scale, bias = (np.array(a.astype(mx.float32), np.float64).reshape(-1, 1) for a in arrays[1:])
    codes = unpacked(arrays[0], q.bits).reshape(x.shape)
    return (weights * (codes * scale + bias - x) ** 2).sum(-1)


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_packed_as_mx_does(bits):
    """Of 3, 5 and 6 bits some lie across two words; mx.dequantize reads them back."""
    codes = mx.array(np.random.default_rng(0).integers(0, 2**bits, (3, 128)))
    ones, zeros = mx.ones((3, 2)), mx.zeros((3, 2))
    assert mx.array_equal(mx.dequantize(pack(codes, bits), ones, zeros, 64, bits), codes)
    weight, *_ = mx.quantize(draw("normal", (3, 128)), 64, bits)
    assert mx.array_equal(pack(mx.array(unpacked(weight, bits)), bits), weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "most"), [(2, 0.68), (3, 0.77), (4, 0.85), (8, 0.62)])
@pytest.mark.parametrize("count", [1 << 18, pytest.param(1 << 22, marks=pytest.mark.slow)])
def test_error_energy(kind, bits, most, count):
    """Over mx.quantize's; no group is worse."""
    matrix, q = draw(kind, (count // 512, 512)), Quantization(bits, 64)
    ours, theirs = (group_errors(matrix, a, q) for a in (fit(matrix, q), extremes(matrix, q)))
    assert ours.sum() <= most * theirs.sum()
    assert (ours <= theirs * (1 + 1e-6)).all()


SLOW = [pytest.param(bits, kind, marks=pytest.mark.slow) for bits in (2, 3) for kind in KINDS]
SLOW.append(pytest.param(4, "student", marks=pytest.mark.slow))


@pytest.mark.parametrize(("bits", "kind"), [(4, "normal"), *SLOW])
def test_brute_force(bits, kind):
    """Within 2 % of the best of 506 starts, each refitted three times, on 1,000 groups."""
    matrix, q, n = draw(kind, (1000, 64)), Quantization(bits, 64), 2**bits - 1
    x, w, best = matrix.astype(mx.float32)[:, None], mx.ones(64), mx.full((1000, 1, 1), mx.inf)
    centre, low, high = (f(x, axis=-1, keepdims=True) for f in (mx.mean, mx.min, mx.max))
    for ratio in np.linspace(0.25, 1.15, 46):
        for shift in np.linspace(-0.5, 0.5, 11):
            scale = (high - low) * (ratio / n)
            bias = (low + high) / 2 - centre + (shift - n / 2) * scale
            for _ in range(3):
                _, scale, bias = quantize._refit(x - centre, w, mx.array(64.0), scale, bias, n)
            stored = (
                each.astype(mx.bfloat16).astype(mx.float32) for each in (scale, bias + centre)
            )
            best = mx.minimum(best, quantize._codes(x, w, *stored, bits)[1])
        mx.eval(best)
    assert group_errors(matrix, fit(matrix, q), q).sum() <= 1.02 * best.sum().item()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_importance_weighs(bits):
    """What counts more is met better; by the weighted error no group is worse."""
    matrix, q = draw("normal", (64, 256)), Quantization(bits, 32)
    weights = np.exp(2 * np.random.default_rng(1).standard_normal(256)).astype(np.float32)
    weights[:32] = 0  # a group in which nothing counts: as if all did
    weighted, plain = fit(matrix, q, mx.array(weights) * 1e-20), fit(matrix, q)
    ours, theirs, unweighted = (
        group_errors(matrix, arrays, q, weights)
        for arrays in (weighted, extremes(matrix, q), plain)
    )
    assert (ours <= theirs * (1 + 1e-6)).all()
    assert ours.sum() < (0.9 if bits < 8 else 1.02) * unweighted.sum()
    groups = [np.array(arrays[1].astype(mx.float32)) for arrays in (weighted, plain)]
    assert (groups[0][:, 0] == groups[1][:, 0]).all()
    assert (groups[0][:, 1:] != groups[1][:, 1:]).mean() > 0.3


@pytest.mark.parametrize("bits", BITS)
def test_groups_that_are_not_ordinary(bits):
    """Zeros, constants, one weight alone, two values, weights near float32's least."""
    ramp = np.arange(64, dtype=np.float32)
    rows = [0 * ramp, 0 * ramp + 3, 0 * ramp - 1e-30, np.where(ramp == 7, -1, 0), ramp % 2]
    rows += [1e-38 * ramp, -1e-42 * ramp, 1e30 * (ramp - 31), 1e-8 * ramp, 100 + ramp / 64]
    matrix = mx.array(np.stack(rows).astype(np.float32)).astype(mx.bfloat16)
    for size in 32, 64:
        q = Quantization(bits, size)
        arrays = fit(matrix, q)
        assert all(mx.isfinite(part).all() for part in arrays[1:])
        ours, theirs = (group_errors(matrix, a, q) for a in (arrays, extremes(matrix, q)))
        assert (ours <= theirs * (1 + 1e-6)).all()
        ours = ours.reshape(len(rows), -1)
        assert ours[:2].sum() == 0 and ours[3:5].max() < 1e-3  # scales of 1/n are rounded


def test_blocks_of_rows_and_heads(monkeypatch):
    """However many rows are fitted at once, and for each head: the same bits."""
    matrix, q = draw("student", (3, 40, 128)), Quantization(3, 64)
    weights = mx.random.uniform(shape=(3, 1, 128))
    whole = fit(matrix, q, weights)
    monkeypatch.setattr(quantize, "FIT_ELEMENTS", 3 * 128 * 7)
    parts = fit(matrix, q, weights)
    heads = [fit(matrix[i], q, weights[i, 0]) for i in range(3)]
    for i, part in enumerate(parts):
        assert mx.array_equal(part, whole[i])
        assert mx.array_equal(part, mx.stack([head[i] for head in heads]))


def test_a_product_reads_the_codes():
    """mx.quantized_matmul, which the model calls, is not only mx.dequantize."""
    matrix, x = draw("normal", (64, 128)), mx.random.normal((2, 128))
    for bits in BITS:
        q = Quantization(bits, 64)
        arrays = [fit(matrix, q)[0], *(part.astype(mx.float32) for part in fit(matrix, q)[1:])]
        product = mx.quantized_matmul(x, *arrays, group_size=64, bits=bits)
        restored = mx.dequantize(*arrays, **q.as_config())
        assert mx.allclose(product, x @ restored.T, rtol=1e-4, atol=1e-5)


def test_error_sums():
    """Fitted beside extremes, plain and weighted, of the same rows."""
    matrix, q = draw("normal", (32, 128)), Quantization(4, 64)
    arrays, weights = fit(matrix, q), mx.random.uniform(shape=(128,))
    two, three = error_sums(matrix, arrays, q), error_sums(matrix, arrays, q, True)
    six = error_sums(matrix, arrays, q, True, weights)
    assert three[:2].tolist() == two.tolist() and six[:3].tolist() == three.tolist()
    assert three[2].item() == error_sums(matrix, extremes(matrix, q), q)[0].item()
    assert three[0] < three[2] and 0 < six[4] < six[1]
