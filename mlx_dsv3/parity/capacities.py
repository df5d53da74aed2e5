"""Logits with few experts in memory against those with all of them, bit by bit.

Streaming must not change a bit of the output: neither of a prefill, nor of single tokens after it,
nor of the MTP module.
"""

from collections.abc import Callable, Iterator

import mlx.core as mx

from mlx_dsv3.config import ModelArgs
from mlx_dsv3.load import Loaded


def compare_capacities(
    load: Callable[..., Loaded], slots: list[int], num_tokens: int
) -> Iterator[tuple[int, int, list[str]]]:
    """Yield slots, experts, and what differs from the resident model, for each number of slots."""
    loaded = load(experts="resident", expert_memory_gb=None)
    args, sizes = loaded.args, loaded.plan.slot_bytes
    ids = mx.array([[(7 * i + 3) % args.vocab_size for i in range(num_tokens)]])
    expected = logits_of(loaded, ids)
    del loaded  # two models at once may be more than the machine has
    slot_gb = sum(sizes.values()) / 1e9  # of one slot in every layer
    for count in slots or default_slots(args):
        budget = slot_gb * count * (1 + 1e-9)
        found = logits_of(load(experts="streamed", expert_memory_gb=budget), ids)
        names = [name for name in expected if not same_bits(found[name], expected[name])]
        yield count, args.n_routed_experts, names


def default_slots(args: ModelArgs) -> list[int]:
    """Return a few capacities from the least that runs to all but one."""
    least, most = args.num_experts_per_tok, args.n_routed_experts
    return sorted({least, least + 1, most // 4, most // 2, most - 1} & set(range(least, most)))


def logits_of(loaded: Loaded, ids: mx.array) -> dict[str, mx.array]:
    """Return logits of a prefill, of single tokens after it, and of the MTP module."""
    model, half = loaded.model, ids.shape[1] // 2
    with loaded:
        cache = model.make_cache()
        g = model.hidden(ids[:, :half], cache)
        found = {"prefill": model.lm_head(g)}
        single = [model(ids[:, i : i + 1], cache) for i in range(half, min(half + 8, ids.shape[1]))]
        found["decoding"] = mx.concatenate(single, axis=1)
        if loaded.mtp is not None:
            found["MTP"] = loaded.mtp(g[:, :-1], ids[:, 1:half])[0]
        mx.eval(found)
    return found


def same_bits(a: mx.array, b: mx.array) -> bool:
    kind = mx.uint16 if a.dtype == mx.bfloat16 else mx.uint32
    return a.dtype == b.dtype and bool(mx.array_equal(a.view(kind), b.view(kind)))
