"""The products of the chosen experts: where states meet the slots of a bank.

A MoE layer calls `RoutedExperts`, which takes one of three ways:

- *lazy*, where every expert has a slot: one graph, and the host never learns what was chosen;
- *streamed*, where there are fewer slots: the host reads the ids, and the experts that are there
  compute while the others are read, or all come in waves;
- *by id*, for a prompt on a CPU with every expert in memory: one product in NumPy for each expert
  of many rows (`model/cpu.py`); streamed prompts on a CPU do the same with the experts of a wave.

Whichever it is, a (token, choice) product is a row of its own and has the same bits, on a CPU
within MLX or within NumPy. Knows no router, no files and no threads.
"""

# T tokens (B L)  D hidden  K experts per token  F expert width

from itertools import pairwise

import mlx.core as mx
import numpy as np

from mlx_dsv3.model import cpu
from mlx_dsv3.model.linear import swiglu

# Splitting a step into hits and misses costs two launches more; not worth it for shorter reads.
HITS_FIRST_AFTER_S = 0.0005


class RoutedExperts:
    """The routed experts of one layer; not a module, so they are not parameters of the model."""

    def __init__(self, bank):
        self.bank = bank

    def __call__(self, x: mx.array, indices: mx.array, meanwhile: mx.array | None) -> mx.array:
        """Return each chosen expert's output, (..., K, D), for x (..., D) and indices (..., K).

        `meanwhile` is computed while the host waits for the indices, where it needs them.
        """
        tokens, chosen = x.flatten(0, -2), indices.flatten(0, -2)  # (T, D), (T, K)
        if self.bank.wants_ids or goes_to_numpy(self.bank, tokens):
            mx.async_eval(chosen)
            if meanwhile is not None:
                mx.async_eval(meanwhile)  # a call of its own, or the ids would come with it
            y = compute_by_id(self.bank, tokens, np.array(chosen))
        else:
            y = compute_lazily(self.bank, tokens, chosen)
        return y.reshape(*indices.shape, -1)


def compute_experts(bank, x: mx.array, slots: mx.array, is_sorted: bool) -> mx.array:
    """Return SwiGLU(x) through the expert in each slot: x (..., 1, D), slots (...) -> (..., D)."""
    gate_up = bank.gate_up.gather(x, slots, is_sorted)  # (..., 1, 2 F)
    gate, up = mx.split(gate_up, 2, axis=-1)
    return bank.down.gather(swiglu(gate, up), slots, is_sorted).squeeze(-2)


def compute_in_numpy(bank, x: np.ndarray, tokens: np.ndarray, slots: np.ndarray) -> mx.array:
    """Return (n, D) for rows of x (T, D), sorted by slot (n,): one dense product per expert."""
    outs = []
    bounds = [*np.flatnonzero(np.diff(slots, prepend=-1)), len(slots)]
    for begin, end in pairwise(bounds):
        gate_up = bank.gate_up.multiply(x[tokens[begin:end]], slots[begin])  # (rows, 2 F)
        hidden = swiglu(*mx.split(mx.array(gate_up), 2, axis=-1))
        outs.append(bank.down.multiply(np.array(hidden), slots[begin]))
    return mx.array(np.concatenate(outs))


def wants_sorted(num_rows: int, bank) -> bool:
    """Say whether rows are sorted by expert.

    Metal picks its kernel for sorted rows by rows per bank row, and its kernels round differently.
    So this is decided from the model, never from the bank's capacity.
    """
    return num_rows >= 4 * bank.num_experts


def goes_to_numpy(bank, x: mx.array) -> bool:
    """Say whether some experts may have so many rows of x (T, D) that they leave MLX."""
    return cpu.takes(x, len(x), bank.dearest)


def compute_lazily(bank, x: mx.array, indices: mx.array) -> mx.array:
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


def compute_by_id(bank, x: mx.array, experts: np.ndarray) -> mx.array:
    """As `compute_lazily`, with experts (T, K) on the host and, where they stream, read there."""
    if bank.on_route is not None:
        bank.on_route(bank.layer, experts)
    choices = Choices(bank, x, experts)
    if bank.wants_ids:
        stream(choices)
    else:
        choices.compute(np.unique(experts))
    return choices.result()


class Choices:
    """The (token, choice) products of a call, computed in parts and put together in order."""

    def __init__(self, bank, x: mx.array, experts: np.ndarray):
        self.bank, self.x, self.shape = bank, x, experts.shape
        self.experts = experts.reshape(-1)
        self.is_sorted = wants_sorted(self.experts.size, bank)
        counts = np.bincount(self.experts, minlength=bank.num_experts)
        has_many_rows = counts >= cpu.fewest_rows(bank.dearest)
        self.is_for_numpy = has_many_rows & goes_to_numpy(bank, x)  # by expert
        self.parts: list[mx.array] = []
        self.places: list[np.ndarray] = []  # of the parts' rows among all T K

    def compute(self, experts: np.ndarray) -> None:
        """Submit the products of these experts, which are in their slots."""
        places = np.flatnonzero(np.isin(self.experts, experts))
        slots = self.bank.slot_of[self.experts[places]]
        order = np.argsort(slots, kind="stable")
        places, slots = places[order], slots[order]
        is_for_numpy = self.is_for_numpy[self.experts[places]]
        if is_for_numpy.any():
            many = places[is_for_numpy]
            tokens, x = many // self.shape[1], np.array(self.x, copy=False)
            self.places.append(many)
            self.parts.append(compute_in_numpy(self.bank, x, tokens, slots[is_for_numpy]))
        if not is_for_numpy.all():
            self.gather(places[~is_for_numpy], slots[~is_for_numpy])

    def gather(self, places: np.ndarray, slots: np.ndarray) -> None:
        """Submit some of them as one product of MLX's."""
        self.places.append(places)
        count, used = len(places), np.unique(slots)
        if self.is_sorted and count < self.bank.min_sorted_rows:
            # Enough rows for the kernel that a full bank would have used.
            padding = (0, self.bank.min_sorted_rows - count)
            places, slots = np.pad(places, padding, "edge"), np.pad(slots, padding, "edge")
        x = self.x[mx.array(places // self.shape[1])][:, None]
        y = compute_experts(self.bank, x, mx.array(slots), self.is_sorted)[:count]
        mx.async_eval(y)
        if not self.bank.is_resident:  # whose slots never change
            self.bank.note_use(used, y)
        self.parts.append(y)

    def result(self) -> mx.array:
        """Return (T, K, D)."""
        order = np.argsort(np.concatenate(self.places))
        return mx.unflatten(mx.concatenate(self.parts)[mx.array(order)], 0, self.shape)


def stream(choices: Choices) -> None:
    """Compute all choices over a bank that may lack some of their experts."""
    bank = choices.bank
    bank.join()  # nothing is under way, unless a second Ctrl-C came while the first was served
    needed, counts = np.unique(choices.experts, return_counts=True)
    try:
        if len(needed) > bank.capacity or choices.is_sorted:
            compute_in_waves(bank, choices, needed[np.argsort(counts, kind="stable")])
        else:
            compute_hits_first(bank, choices, needed)
    except BaseException:
        bank.join()
        raise


def compute_hits_first(bank, choices: Choices, needed: np.ndarray) -> None:
    """Compute what is there while the rest is read; one product where the disk is fast enough."""
    fetch = bank.begin(needed)
    if len(fetch.missing) and not fetch.is_done(HITS_FIRST_AFTER_S):
        hits = np.setdiff1d(needed, fetch.missing)
        if len(hits):
            choices.compute(hits)
            needed = fetch.missing
    fetch.wait()
    choices.compute(needed)


def compute_in_waves(bank, choices: Choices, needed: np.ndarray) -> None:
    """Compute expert by expert, each read once: one half of the slots works, the other loads.

    `needed` is in ascending order of use, so the experts that most tokens chose come last and
    are still there for the next step.
    """
    is_hit = bank.slot_of[needed] != -1
    hits, missing = needed[is_hit], needed[~is_hit]
    if len(hits):
        bank.begin(hits)
        choices.compute(hits)
    half = max(1, bank.capacity // 2)
    waves = [missing[i : i + half] for i in range(0, len(missing), half)]
    upcoming = bank.begin(waves[0]) if waves else None
    for i, wave in enumerate(waves):
        fetch = upcoming
        if i + 1 < len(waves):
            upcoming = bank.begin(waves[i + 1], keep=bank.slot_of[wave])
        fetch.wait()
        choices.compute(wave)
