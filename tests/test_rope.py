"""Yarn frequencies and scales against golden numbers, the rotation against complex numbers."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_dsv3.config import ModelArgs
from mlx_dsv3.model.rope import Rope, rope_frequencies, rotation_factor, softmax_scale
from mlx_dsv3.reference import model as reference

# spec 3.2: DeepSeek-V3's radians per position of pairs 0..31
GOLDEN = """
1.0            1.0e-1         5.5e-3         2.5e-5
7.498942093e-1 7.498942093e-2 3.561997494e-3 1.874735523e-5
5.623413252e-1 5.623413252e-2 2.249365301e-3 1.405853313e-5
4.216965034e-1 3.900692657e-2 1.370513636e-3 1.054241259e-5
3.162277660e-1 2.687936011e-2 7.905694150e-4 7.905694150e-6
2.371373706e-1 1.837814622e-2 4.149903985e-4 5.928434264e-6
1.778279410e-1 1.244795587e-2 1.778279410e-4 4.445698525e-6
1.333521432e-1 8.334508951e-3 3.333803580e-5 3.333803580e-6
"""
YARN_V3 = tiny.YARN
YARN_K2 = YARN_V3 | {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0}
WIDTHS = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
V3 = ModelArgs.from_dict(tiny.A | WIDTHS)
MODELS = {
    "V3": V3,
    "Kimi-K2, 131072": dataclasses.replace(V3, rope_theta=5e4, rope_scaling=YARN_K2),
    "Kimi-K2, 262144": dataclasses.replace(
        V3, rope_theta=5e4, rope_scaling=YARN_K2 | {"factor": 64.0}
    ),
    "Moonlight": dataclasses.replace(V3, rope_theta=5e4, rope_scaling=None),
    "V2-Lite": dataclasses.replace(
        V3, rope_scaling=YARN_V3 | {"mscale": 0.707, "mscale_all_dim": 0.707}
    ),
}
SOFTMAX_SCALES = {  # spec 1.2
    "V3": 0.1352337788608801,
    "Kimi-K2, 131072": 0.1308607999,
    "Kimi-K2, 262144": 0.1446796258,
    "Moonlight": 0.0721687836,
    "V2-Lite": 0.1147213868,
}


def reference_args(args: ModelArgs) -> reference.Args:
    known = {field.name for field in dataclasses.fields(reference.Args)}
    return reference.Args(**{k: v for k, v in vars(args).items() if k in known})


def test_golden_frequencies_of_v3():
    """A ramp clamped, rounded or blended wrongly: fluent text, worse with every position."""
    golden = np.array(GOLDEN.split(), float).reshape(8, 4).T.ravel()
    np.testing.assert_allclose(rope_frequencies(V3), golden, rtol=1e-9)


def test_frequencies_of_other_models():
    """Kimi-K2's equal betas make a ramp of one step (19 to 20); Moonlight has no scaling."""
    plain = 5e4 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(rope_frequencies(MODELS["Moonlight"]), plain, rtol=1e-12)
    kimi = np.where(np.arange(32) <= 19, plain, plain / 32)
    np.testing.assert_allclose(rope_frequencies(MODELS["Kimi-K2, 131072"]), kimi, rtol=1e-12)


@pytest.mark.parametrize("theta", [1e4, 3.0])
@pytest.mark.parametrize("length", [4096, 283, 40, 6])
def test_clamps_of_the_ramp(theta, length):
    """A short original length or small theta pushes the ramp's ends out of 0..R-1, or together."""
    scaling = YARN_V3 | {"original_max_position_embeddings": length}
    args = dataclasses.replace(V3, rope_theta=theta, rope_scaling=scaling)
    freqs = rope_frequencies(args)
    plain = theta ** (-np.arange(32) / 32)
    assert np.isfinite(freqs).all()
    assert (freqs <= plain * (1 + 1e-12)).all() and (freqs >= plain / 40 * (1 - 1e-12)).all()
    expected = reference.rope_frequencies(reference_args(args)).numpy()
    np.testing.assert_allclose(freqs, expected, rtol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_softmax_scales(name):
    """A missing or unsquared mscale: attention too flat by 1.37 to 1.87, nothing else."""
    assert softmax_scale(MODELS[name]) == pytest.approx(SOFTMAX_SCALES[name], rel=1e-9)
    expected = reference.softmax_scale(reference_args(MODELS[name]))
    assert softmax_scale(MODELS[name]) == pytest.approx(expected, rel=1e-15)


def test_rotation_factor():
    """cos and sin carry M(mscale) / M(mscale_all_dim): 1 in every release, 1.0857 in config C."""
    assert [rotation_factor(args) for args in MODELS.values()] == [1.0] * 5
    assert rotation_factor(ModelArgs.from_dict(tiny.C)) == pytest.approx(1.0857264, rel=1e-7)
    without = YARN_V3 | {"mscale_all_dim": 0.0}
    args = dataclasses.replace(V3, rope_scaling=without)
    assert rotation_factor(args) == pytest.approx(1.3688879454, rel=1e-9)
    assert softmax_scale(args) == pytest.approx(192**-0.5, rel=1e-12)


def test_attention_factor():
    """Ignored, it left cos and sin alone; it never enters the softmax scale."""
    args = dataclasses.replace(V3, rope_scaling=YARN_V3 | {"attention_factor": 2.0})
    assert rotation_factor(args) == 2.0 and softmax_scale(args) == softmax_scale(V3)
    x = mx.random.normal((1, 1, 3, 64), key=mx.random.key(0))
    assert mx.allclose(Rope(args)(x, 7), 2 * Rope(V3)(x, 7), rtol=0, atol=1e-6)


def test_ramp_that_is_not_truncated():
    """`truncate: false` was ignored: V3's ramp then runs from 10.4722 to 22.5134, not 10 to 23."""
    args = dataclasses.replace(V3, rope_scaling=YARN_V3 | {"truncate": False})
    plain = 1e4 ** (-np.arange(32) / 32)
    ramp = np.clip((np.arange(32) - 10.4722) / (22.5134 - 10.4722), 0, 1)
    expected = plain * (1 - ramp) + plain / 40 * ramp
    np.testing.assert_allclose(rope_frequencies(args), expected, rtol=1e-3)


@pytest.mark.parametrize("offset", [0, 1, 255, 4095, 163_839 - 5])
@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_rotation_turns_adjacent_pairs(name, offset):
    """Pairs (i, i + R/2), a period for a frequency, an offset that is dropped.

    The float32 angle of position p is off by up to p x 2^-24 rad in every implementation.
    """
    args = ModelArgs.from_dict(tiny.CONFIGS[name])
    x = np.random.default_rng(0).standard_normal((2, 3, 5, args.qk_rope_head_dim))
    angles = np.outer(np.arange(offset, offset + 5), rope_frequencies(args))
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles) * rotation_factor(args)
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    actual = np.array(Rope(args)(mx.array(x.astype(np.float32)), offset))
    np.testing.assert_allclose(actual, expected, atol=5 * (1e-6 + (offset + 5) * 2**-24))


@pytest.mark.parametrize("offset", [0, 4095])
def test_rotation_turns_halves(offset):
    """`rope_interleave: false` was ignored: the pairs are (i, i + R/2)."""
    args = dataclasses.replace(V3, rope_interleave=False)
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 64))
    angles = np.outer(np.arange(offset, offset + 5), rope_frequencies(args))
    turned = (x[..., :32] + 1j * x[..., 32:]) * np.exp(1j * angles)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    actual = np.array(Rope(args)(mx.array(x.astype(np.float32)), offset))
    np.testing.assert_allclose(actual, expected, atol=5 * (1e-6 + (offset + 5) * 2**-24))


def test_one_position_at_a_time_equals_all_at_once():
    """Positions of a single query must be the cache's, not 0."""
    rope = Rope(V3)
    x = mx.random.normal((1, 2, 7, 64), key=mx.random.key(0))
    whole = rope(x, 300)
    steps = mx.concatenate([rope(x[:, :, i : i + 1], 300 + i) for i in range(7)], axis=2)
    assert mx.allclose(whole, steps, rtol=0, atol=1e-6)
