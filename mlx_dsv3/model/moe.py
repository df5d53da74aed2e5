"""Mixture of experts: the router, and the experts computed over the slots of a bank.

`route` is the whole selection rule as one function. Expert weights are not parameters of the
module: they lie in a `Bank` of C slots that the expert store owns and fills, with gate and up
fused; a layer sees only slot numbers. Nothing here reads files.
"""

# B batch  L queries  T tokens (B L)  D hidden  E routed experts  K experts per token  G groups
# F expert width

from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.activations import swiglu

from mlx_dsv3.config import ModelArgs
from mlx_dsv3.model.linear import Joined, Linear, fewest_rows, goes_to_numpy

# Splitting a step into hits and misses costs two launches more; not worth it for shorter reads.
HITS_FIRST_AFTER_S = 0.0005


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
        self.route = mx.compile(lambda logits, bias: route(logits, bias, self.args))

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


def compute_experts(bank, x: mx.array, slots: mx.array, is_sorted: bool) -> mx.array:
    """Return SwiGLU(x) through the expert in each slot: x (..., 1, D), slots (...) -> (..., D)."""
    gate_up = bank.gate_up.gather(x, slots, is_sorted)  # (..., 1, 2 F)
    gate, up = mx.split(gate_up, 2, axis=-1)
    return bank.down.gather(swiglu(gate, up), slots, is_sorted).squeeze(-2)


def compute_on_host(bank, x: np.ndarray, slots: np.ndarray) -> mx.array:
    """Return the same for x (n, D) sorted by slot (n,), with one dense product an expert."""
    out = np.empty_like(x)
    bounds = [*np.flatnonzero(np.diff(slots, prepend=-1)), len(slots)]
    for begin, end in pairwise(bounds):
        gate_up = bank.gate_up.multiply(x[begin:end], slots[begin])
        hidden = swiglu(*mx.split(mx.array(gate_up), 2, axis=-1))
        out[begin:end] = bank.down.multiply(np.array(hidden), slots[begin])
    return mx.array(out)


def routed_resident(bank, x: mx.array, indices: mx.array) -> mx.array:
    """Return each chosen expert's output, (T, K, D), for x (T, D) and indices (T, K).

    Slot e holds expert e, so nothing is read back to the host.
    """
    K = indices.shape[-1]
    if not wants_sorted(indices.size, bank):
        return compute_experts(bank, x[:, None, None], indices, is_sorted=False)
    slots = indices.flatten()
    order = mx.argsort(slots)
    y = compute_experts(bank, x[order // K][:, None], slots[order], is_sorted=True)
    return mx.unflatten(y[mx.argsort(order)], 0, indices.shape)


def wants_sorted(num_rows: int, bank) -> bool:
    """Say whether rows are sorted by expert.

    Metal picks its kernel for sorted rows by rows per bank row, and its kernels round differently.
    So this is decided from the model, never from the bank's capacity.
    """
    return num_rows >= 4 * bank.num_experts


def wants_host(bank, x: mx.array) -> bool:
    """Say whether some experts may have many rows of x (T, D) on a CPU (`linear.py`)."""
    return goes_to_numpy(x, len(x), bank.dearest)


class Rows:
    """The (token, choice) products of a call, computed in parts and put together in order."""

    def __init__(self, bank, x: mx.array, experts: np.ndarray):
        self.bank, self.x, self.shape = bank, x, experts.shape
        self.experts = experts.reshape(-1)
        self.is_sorted = wants_sorted(self.experts.size, bank)
        if wants_host(bank, x):
            self.x_on_host = np.array(x, copy=False)
            counts = np.bincount(self.experts, minlength=bank.num_experts)
            self.is_on_host = counts >= fewest_rows(bank.dearest)
        else:
            self.is_on_host = np.zeros(bank.num_experts, bool)
        self.parts: list[mx.array] = []
        self.places: list[np.ndarray] = []

    def compute(self, experts: np.ndarray) -> None:
        """Submit the rows of these experts, which are in their slots."""
        rows = np.flatnonzero(np.isin(self.experts, experts))
        is_on_host = self.is_on_host[self.experts[rows]]
        if is_on_host.any():
            many, slots = self.sorted_by_slot(rows[is_on_host])
            y = compute_on_host(self.bank, self.x_on_host[many // self.shape[1]], slots)
            self.places.append(many)
            self.parts.append(y)
        if not is_on_host.all():
            self.gather(rows[~is_on_host])

    def sorted_by_slot(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return rows in the order of their slots, and the slots."""
        slots = self.bank.slot_of[self.experts[rows]]
        order = np.argsort(slots, kind="stable")
        return rows[order], slots[order]

    def gather(self, rows: np.ndarray) -> None:
        """Submit rows as one product of MLX's."""
        if self.is_sorted:
            rows, slots = self.sorted_by_slot(rows)
        else:
            slots = self.bank.slot_of[self.experts[rows]]
        tokens = rows // self.shape[1]
        self.places.append(rows)
        used = np.unique(slots)
        padding = max(0, self.bank.min_sorted_rows - len(rows)) if self.is_sorted else 0
        if padding:  # enough rows for the kernel that a full bank would have used
            slots, tokens = np.pad(slots, (0, padding), "edge"), np.pad(tokens, (0, padding))
        x = self.x[mx.array(tokens)][:, None]
        y = compute_experts(self.bank, x, mx.array(slots), self.is_sorted)[: len(rows)]
        mx.async_eval(y)
        if not self.bank.is_resident:  # whose slots never change
            self.bank.read_by(used, y)
        self.parts.append(y)

    def result(self) -> mx.array:
        """Return (T, K, D)."""
        order = np.argsort(np.concatenate(self.places))
        return mx.unflatten(mx.concatenate(self.parts)[mx.array(order)], 0, self.shape)


def routed_streamed(bank, x: mx.array, experts: np.ndarray) -> mx.array:
    """As `routed_resident`, with experts (T, K) on the host and fewer slots than experts."""
    if bank.store.trace is not None:
        bank.store.record(bank.layer, experts)
    bank.join()  # nothing is under way, unless a second Ctrl-C came while the first was served
    rows = Rows(bank, x, experts)
    needed, counts = np.unique(experts, return_counts=True)
    try:
        if len(needed) > bank.capacity or rows.is_sorted:
            compute_in_waves(bank, rows, needed[np.argsort(counts, kind="stable")])
        else:
            compute_hits_first(bank, rows, needed)
    except BaseException:
        bank.join()
        raise
    return rows.result()


def compute_hits_first(bank, rows: Rows, needed: np.ndarray) -> None:
    """Compute what is there while the rest is read; one product where the disk is fast enough."""
    fetch = bank.begin(needed)
    if len(fetch.missing) and not fetch.is_done(HITS_FIRST_AFTER_S):
        hits = np.setdiff1d(needed, fetch.missing)
        if len(hits):
            rows.compute(hits)
            needed = fetch.missing
    fetch.wait()
    rows.compute(needed)


def compute_in_waves(bank, rows: Rows, needed: np.ndarray) -> None:
    """Compute expert by expert, each read once: one half of the slots works, the other loads.

    `needed` is in ascending order of use, so the experts that most tokens chose come last and
    are still there for the next step.
    """
    is_hit = bank.slot_of[needed] != -1
    hits, missing = needed[is_hit], needed[~is_hit]
    if len(hits):
        bank.begin(hits)
        rows.compute(hits)
    half = max(1, bank.capacity // 2)
    waves = [missing[i : i + half] for i in range(0, len(missing), half)]
    upcoming = bank.begin(waves[0]) if waves else None
    for i, wave in enumerate(waves):
        fetch = upcoming
        if i + 1 < len(waves):
            upcoming = bank.begin(waves[i + 1], keep=bank.slot_of[wave])
        fetch.wait()
        rows.compute(wave)


class MoE(nn.Module):
    """Routed experts of a bank plus the shared expert.

    `bank` is set by the loader. Each (token, choice) product has its own row and the rows of a
    token are summed once, in ascending expert id, so the result does not depend on slots.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.gate = Gate(args)
        if args.n_shared_experts:
            width = args.moe_intermediate_size * args.n_shared_experts
            self.shared_experts = MLP(args.hidden_size, width)
        self.bank = None

    def __call__(self, x: mx.array) -> mx.array:
        indices, weights = self.gate(x)  # (B, L, K)
        shared = self.shared_experts(x) if "shared_experts" in self else None
        flat, K = x.flatten(0, -2), indices.shape[-1]
        if not (self.bank.wants_ids or wants_host(self.bank, flat)):
            y = routed_resident(self.bank, flat, indices.reshape(-1, K))
        else:
            mx.async_eval(indices)
            if shared is not None:  # a call of its own: work for the time that the ids need
                mx.async_eval(shared)
            y = routed_streamed(self.bank, flat, np.array(indices).reshape(-1, K))
        y = (y * weights.reshape(-1, K)[..., None]).sum(-2).astype(x.dtype)
        y = y.reshape(x.shape)
        return y if shared is None else y + shared
