"""Rotary embedding with yarn: frequencies, attention factor and softmax scale.

Rope dimensions are adjacent pairs (mlx calls it `traditional`), or halves where `rope_interleave`
is false. Yarn is static: the same frequencies at every length. Knows nothing of heads, caches or
layers.
"""

import math

import mlx.core as mx
import numpy as np

from mlx_dsv3.config import ModelArgs, yarn_mscale


def rope_frequencies(args: ModelArgs) -> np.ndarray:
    """Return the radians per position of each rope pair, float64, shape (R / 2,) (spec 3.2)."""
    dim, theta = args.qk_rope_head_dim, args.rope_theta
    freqs = theta ** (-np.arange(0, dim, 2) / dim)
    if not args.is_yarn:
        return freqs
    scaling = args.rope_scaling

    def correction(num_rotations: float) -> float:
        length = scaling["original_max_position_embeddings"]
        return dim * math.log(length / (num_rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = correction(scaling["beta_fast"]), correction(scaling["beta_slow"])
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0, 1)
    return freqs / scaling["factor"] * ramp + freqs * (1 - ramp)


def softmax_scale(args: ModelArgs) -> float:
    """Return the factor of attention scores: (N + R)^-1/2, times M(mscale_all_dim)^2 for yarn."""
    scale = (args.qk_nope_head_dim + args.qk_rope_head_dim) ** -0.5
    if args.is_yarn and args.rope_scaling["mscale_all_dim"]:
        mscale = yarn_mscale(args.rope_scaling["factor"], args.rope_scaling["mscale_all_dim"])
        scale *= mscale * mscale
    return scale


def rotation_factor(args: ModelArgs) -> float:
    """Return the factor of cos and sin: M(mscale) / M(mscale_all_dim), 1 in every release.

    yarn's `attention_factor` takes its place, and leaves the softmax scale alone.
    """
    if not args.is_yarn:
        return 1.0
    if (given := args.rope_scaling.get("attention_factor")) is not None:
        return given
    factor, all_dim = args.rope_scaling["factor"], args.rope_scaling["mscale_all_dim"]
    below = yarn_mscale(factor, all_dim) if all_dim else 1.0
    return yarn_mscale(factor, args.rope_scaling["mscale"]) / below


class Rope:
    """Rotate the last dimension of (B, H, L, R) for positions offset .. offset + L - 1."""

    def __init__(self, args: ModelArgs):
        self.dims = args.qk_rope_head_dim
        self.factor = rotation_factor(args)
        self.interleaved = args.rope_interleave
        # mx.fast.rope divides by `freqs`: it wants periods, not frequencies.
        self.periods = mx.array((1 / rope_frequencies(args)).astype(np.float32))

    def __call__(self, x: mx.array, offset: int) -> mx.array:
        if self.factor != 1.0:
            x = x * self.factor
        return mx.fast.rope(
            x,
            self.dims,
            traditional=self.interleaved,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self.periods,
        )
