"""Rotary embedding with yarn: frequencies, attention factor and softmax scale.

Rope dimensions are adjacent pairs (mlx calls it `traditional`), or halves where `rope_interleave`
is false. Yarn is static: the same frequencies at every length. Knows nothing of heads, caches or
layers.
"""

from functools import partial

import mlx.core as mx
import numpy as np

from mlx_dsv3.config import ModelArgs


def rope_frequencies(args: ModelArgs) -> np.ndarray:
    """Return the radians per position of each rope pair, float64, shape (R / 2,) (spec 3.2)."""
    dim, theta, yarn = args.qk_rope_head_dim, args.rope_theta, args.rope_scaling
    freqs = theta ** (-np.arange(0, dim, 2) / dim)
    if not args.is_yarn:
        return freqs
    # Pairs that turn more than beta_fast times within the original length keep their frequency,
    # those below beta_slow are slowed by the factor, and a ramp leads from one to the other.
    turns = np.array([yarn["beta_fast"], yarn["beta_slow"]])
    length = yarn["original_max_position_embeddings"]
    low, high = dim * np.log(length / (turns * 2 * np.pi)) / (2 * np.log(theta))
    if yarn.get("truncate", True):
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)  # not dim / 2 - 1, which would be the last pair
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0, 1)
    return freqs / yarn["factor"] * ramp + freqs * (1 - ramp)


def softmax_scale(args: ModelArgs) -> float:
    """Return the factor of attention scores: (N + R)^-1/2, times M(mscale_all_dim)^2 for yarn.

    N + R is the width of a head's keys. It counts in the absorbed form too, whose product has
    the width C + R (spec 3.4).
    """
    width = args.qk_nope_head_dim + args.qk_rope_head_dim
    return width**-0.5 * args.yarn_scale("mscale_all_dim") ** 2


def rotation_factor(args: ModelArgs) -> float:
    """Return the factor of cos and sin: M(mscale) / M(mscale_all_dim), 1 in every release.

    yarn's `attention_factor` takes its place, and leaves the softmax scale alone.
    """
    if args.is_yarn and (given := args.rope_scaling.get("attention_factor")) is not None:
        return given
    return args.yarn_scale("mscale") / args.yarn_scale("mscale_all_dim")


class Rope:
    """Rotate the last dimension of (B, H, L, R) for positions offset .. offset + L - 1."""

    def __init__(self, args: ModelArgs):
        self.factor = rotation_factor(args)
        periods = mx.array((1 / rope_frequencies(args)).astype(np.float32))  # MLX divides by them
        how = {"traditional": args.rope_interleave, "base": None, "scale": 1.0, "freqs": periods}
        self.turn = partial(mx.fast.rope, dims=args.qk_rope_head_dim, **how)

    def __call__(self, x: mx.array, offset: int) -> mx.array:
        return self.turn(x if self.factor == 1 else x * self.factor, offset=offset)
