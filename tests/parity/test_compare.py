"""The comparison itself: each bound must be able to fail alone, and say where."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from compare import Bound, assert_close, position_factor, relative_error, same_bits

LOOSE = Bound(absolute=np.inf, relative=np.inf, cosine=np.inf)
EXPECTED = np.arange(1.0, 25.0).reshape(2, 3, 4)


def nudged(by: float) -> np.ndarray:
    actual = EXPECTED.copy()
    actual[1, 0, 2] += by
    return actual


@pytest.mark.parametrize(
    "bound",
    [Bound(0.09, np.inf, np.inf), Bound(np.inf, 0.003, np.inf), Bound(np.inf, np.inf, 1e-6)],
)
def test_each_bound_fails_alone(bound):
    """A bound that is never looked at, or compared with the wrong sign."""
    assert_close("equal", EXPECTED, EXPECTED, Bound(0, 0, 1e-15))
    assert_close("near", nudged(0.1), EXPECTED, LOOSE)
    with pytest.raises(AssertionError, match=r"layer 3: max abs 1.0e-01 at \[1, 0, 2\] \(mlx 15.1"):
        assert_close("layer 3", nudged(0.1), EXPECTED, bound)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_fail(value):
    """NaN compares false with everything, so a careless maximum lets it through."""
    with pytest.raises(AssertionError, match=r"at \[1, 0, 2\]"):
        assert_close("nan", nudged(value), EXPECTED, Bound(1e9, 1e9, 1e9))
    assert relative_error(nudged(value), EXPECTED) == np.inf


def test_shapes_must_agree():
    """Broadcasting one row against many hides that the others are missing."""
    with pytest.raises(AssertionError, match="shape"):
        assert_close("rows", EXPECTED[:, :1], EXPECTED, LOOSE)


def test_factor_loosens_its_own_rows_only():
    """A bound scaled everywhere by the last position's factor."""
    bound, factor = Bound(0.06, 1, 1), np.array([1.0, 1.0, 2.0])
    actual = EXPECTED.copy()
    actual[:, 2] += 0.1
    assert_close("last", actual, EXPECTED, bound, factor)
    with pytest.raises(AssertionError):
        assert_close("first", nudged(0.1), EXPECTED, bound, factor)
    assert position_factor(4, start=999).tolist() == [1.0, 1.0, 1.001, 1.002]


def test_sides_of_any_kind():
    """bfloat16 must not be compared in bfloat16, nor torch and MLX by accident of one dtype."""
    bound = Bound(0, 0, 1e-15)
    assert_close("torch", torch.tensor(EXPECTED), EXPECTED, bound)
    assert_close("mlx", mx.array(EXPECTED.astype(np.float32)).astype(mx.bfloat16), EXPECTED, bound)


def test_same_bits_sees_sign_and_dtype():
    """-0.0 equals 0.0, and 1.0 in bfloat16 equals 1.0 in float32: not the same bytes."""
    zero = mx.array([0.0, 1.0])
    assert same_bits(zero, mx.array([0.0, 1.0]))
    assert not same_bits(zero, mx.array([-0.0, 1.0]))
    assert not same_bits(zero, zero.astype(mx.bfloat16))
    assert not same_bits(zero, zero[None])
