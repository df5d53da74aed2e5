"""Mixture of experts: router and weighted sum (DeepSeek-V3 report 2.1.2, spec 3.5).

`route` is the whole selection rule as one function. The routed experts are not parameters of the
module: the loader sets `experts`, which alone knows where their weights lie and in which order
they are computed (`mlx_dsv3/experts/products.py`).
"""

# B batch  L queries  T tokens (B L)  D hidden  E routed experts  K experts per token  G groups

import mlx.core as mx
import mlx.nn as nn

from mlx_dsv3.config import ModelArgs
from mlx_dsv3.model.linear import Joined, Linear, swiglu


def route(logits: mx.array, bias: mx.array, args: ModelArgs) -> tuple[mx.array, mx.array]:
    """Choose experts for router logits (T, E), float32 (spec 3.5).

    Returns ids (T, K) in ascending order and weights (T, K) float32. The bias chooses but never
    weighs. Ties go to the lower id: argsort is stable.
    """
    scores = mx.sigmoid(logits)
    biased = scores + bias
    if args.n_group > 1:
        groups = mx.unflatten(biased, -1, (args.n_group, -1))  # (T, G, E / G)
        group_scores = mx.sort(groups, axis=-1)[..., -2:].sum(-1)  # (T, G): the best two
        rank = mx.argsort(mx.argsort(-group_scores, axis=-1), axis=-1)
        # Not 0, as in older code: it would win over every negative score of the kept groups.
        groups = mx.where((rank < args.topk_group)[..., None], groups, -mx.inf)
        biased = groups.flatten(-2)
    indices = mx.argsort(-biased, axis=-1)[..., : args.num_experts_per_tok]
    indices = mx.sort(indices, axis=-1)  # one order of summation on every backend
    weights = mx.take_along_axis(scores, indices, axis=-1)
    if args.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)  # scores may all underflow
    return indices, weights * args.routed_scaling_factor


class Gate(nn.Module):
    """Router: float32 weights, scores and selection bias, whatever the model's dtype.

    The bias is a large offset of small spread: in bfloat16 few values of it are left, and up to
    half of all tokens get other experts (spec 3.5).
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.weight = mx.zeros((args.n_routed_experts, args.hidden_size))
        self.e_score_correction_bias = mx.zeros((args.n_routed_experts,))
        # Of `args` alone: through `self` it would keep the layer until the garbage is collected.
        self.route = mx.compile(lambda logits, bias: route(logits, bias, args))

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Return expert ids and weights, each (..., K), for x (..., D)."""
        logits = x.astype(mx.float32) @ self.weight.T
        return self.route(logits, self.e_score_correction_bias)


class MLP(nn.Module):
    """SwiGLU with gate and up as one product."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def join(self) -> None:
        """Merge gate and up, once weights are loaded."""
        self.gate_up_proj = Joined(self.pop("gate_proj"), self.pop("up_proj"))

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(*self.gate_up_proj(x)))


class MoE(nn.Module):
    """Routed experts, weighed and summed, plus the shared expert.

    `experts(x, indices, meanwhile)` is set by the loader and returns (B, L, K, D): each (token,
    choice) product has its own row, and the rows of a token are summed once, in ascending expert
    id, so the result does not depend on where an expert lies or when it was computed.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.gate = Gate(args)
        if args.n_shared_experts:
            width = args.moe_intermediate_size * args.n_shared_experts
            self.shared_experts = MLP(args.hidden_size, width)
        self.experts = None

    def __call__(self, x: mx.array) -> mx.array:
        indices, weights = self.gate(x)  # (B, L, K)
        shared = self.shared_experts(x) if "shared_experts" in self else None
        y = self.experts(x, indices, meanwhile=shared)  # (B, L, K, D)
        y = (y * weights[..., None]).sum(-2).astype(x.dtype)  # (B, L, D)
        return y if shared is None else y + shared
