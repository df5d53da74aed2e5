"""Mixture of experts: the router, and the experts computed over the slots of a bank.

`route` is the whole selection rule as one function. Expert weights are not parameters of the
module: they lie in a `Bank` of C slots that the expert store owns and fills, with gate and up
fused; a layer sees only slot numbers. Nothing here reads files.
"""

# B batch  L queries  T tokens (B L)  D hidden  E routed experts  K experts per token  G groups
# F expert width

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu

from mlx_dsv3.config import ModelArgs
from mlx_dsv3.linear import Joined


def route(logits: mx.array, bias: mx.array, args: ModelArgs) -> tuple[mx.array, mx.array]:
    """Choose experts for router logits (T, E), float32 (spec 3.5).

    Returns ids (T, K) in ascending order and weights (T, K) float32. The selection bias chooses
    but never weighs; dropped groups are -inf (zero would win over negative scores); ties go to
    the lower id (argsort is stable).
    """
    scores = mx.sigmoid(logits)
    biased = scores + bias
    if args.n_group > 1:
        groups = mx.unflatten(biased, -1, (args.n_group, -1))  # (T, G, E / G)
        group_scores = mx.sort(groups, axis=-1)[..., -2:].sum(-1)  # (T, G): the best two
        rank = mx.argsort(mx.argsort(-group_scores, axis=-1), axis=-1)
        groups = mx.where((rank < args.topk_group)[..., None], groups, -mx.inf)
        biased = groups.flatten(-2)
    indices = mx.argsort(-biased, axis=-1)[..., : args.num_experts_per_tok]
    indices = mx.sort(indices, axis=-1)  # one order of summation on every backend
    weights = mx.take_along_axis(scores, indices, axis=-1)
    if args.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return indices, weights * args.routed_scaling_factor


class Gate(nn.Module):
    """Router: float32 weights, scores and selection bias, whatever the model's dtype."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.weight = mx.zeros((args.n_routed_experts, args.hidden_size))
        self.e_score_correction_bias = mx.zeros((args.n_routed_experts,))

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Return expert ids and weights, each (..., K), for x (..., D)."""
        logits = x.astype(mx.float32) @ self.weight.T
        return route(logits, self.e_score_correction_bias, self.args)


class MLP(nn.Module):
    """SwiGLU with gate and up as one product."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def join(self) -> None:
        """Merge gate and up, once weights are loaded."""
        self.gate_up_proj = Joined(self.pop("gate_proj"), self.pop("up_proj"))

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(*self.gate_up_proj(x)))


def compute_experts(bank, x: mx.array, slots: mx.array, is_sorted: bool) -> mx.array:
    """Return SwiGLU(x) through the expert in each slot: x (..., 1, D), slots (...) -> (..., D)."""
    gate_up = bank.gate_up.gather(x, slots, is_sorted)  # (..., 1, 2 F)
    gate, up = mx.split(gate_up, 2, axis=-1)
    return bank.down.gather(swiglu(gate, up), slots, is_sorted).squeeze(-2)


class MoE(nn.Module):
    """Routed experts of a bank plus the shared expert.

    `bank` is set by the loader. Each (token, choice) product has its own row and the rows of a
    token are summed once, in ascending expert id, so the result does not depend on slots.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.gate = Gate(args)
        self.num_experts = args.n_routed_experts
        if args.n_shared_experts:
            width = args.moe_intermediate_size * args.n_shared_experts
            self.shared_experts = MLP(args.hidden_size, width)
        self.bank = None

    def __call__(self, x: mx.array) -> mx.array:
        indices, weights = self.gate(x)  # (B, L, K)
        y = self.routed(x.flatten(0, -2), indices.flatten(0, -2))  # (T, K, D)
        y = (y * weights.flatten(0, -2)[..., None]).sum(-2).astype(x.dtype)
        y = y.reshape(x.shape)
        return y + self.shared_experts(x) if "shared_experts" in self else y

    def routed(self, x: mx.array, indices: mx.array) -> mx.array:
        """Return (T, K, D): each chosen expert's output for x (T, D), indices (T, K)."""
        K = indices.shape[-1]
        # Metal picks a kernel by rows per expert and its kernels round differently: decide from
        # the model, never from the bank, so that output does not depend on the capacity.
        if indices.size < 4 * self.num_experts:
            return compute_experts(self.bank, x[:, None, None], indices, is_sorted=False)
        slots = indices.flatten()
        order = mx.argsort(slots)
        y = compute_experts(self.bank, x[order // K][:, None], slots[order], is_sorted=True)
        return mx.unflatten(y[mx.argsort(order)], 0, indices.shape)
