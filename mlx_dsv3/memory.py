"""The memory plan: what a folder needs, from headers alone, before anything is loaded.

Adds up trunk, MTP module, latent cache at the context asked for, transients and expert slots;
chooses how many slots each MoE layer gets; or refuses, naming the shortfall and the flags that
fit. Only this file knows what the machine allows.
"""

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import mlx.core as mx

from mlx_dsv3.checkpoint.format import EXPERT_KEY, PROJECTIONS, mtp_prefix
from mlx_dsv3.checkpoint.headers import TensorInfo
from mlx_dsv3.config import ModelArgs
from mlx_dsv3.device import (
    BUFFER_CACHE_BYTES,
    available_bytes,
    buffer_cache_bytes,
    most_wired_bytes,
)
from mlx_dsv3.errors import UserError
from mlx_dsv3.experts.files import FLOAT_BYTES, LayerExperts
from mlx_dsv3.options import SETTINGS
from mlx_dsv3.sizes import GB, gigabytes, round_down, round_up
from mlx_dsv3.transients import transient_bytes

# MLX's Metal allocator changes its behaviour when 95 % of the recommended working set is active.
USABLE_SHARE = 0.92
# Reader threads, headers of the experts, MLX's own buffers (its CPU backend keeps 32 MB of freed
# ones): 50-60 MB measured with 960 experts on the CPU backend (bench_experts.py memory).
OVERHEAD_BYTES = 64 << 20
PREFILL_CHUNKS = (8192, 4096, 2048, 1024, 512)  # tokens
RESIDENT_CHUNK = 2048  # at most: only streamed experts are read again for every chunk
CHUNK_SHARE = 0.05  # of the memory for experts, that a larger chunk may take from them
DEFAULT_CONTEXT = 32768
LEAST_CONTEXT = 1024  # that is planned for where none was asked for
MODES = ("auto", "resident", "streamed")


def sold_limit_bytes(gb: float) -> int:
    """Return what a plan may use on a Mac that is sold with `gb` GB (of 2^30), wherever asked.

    Metal recommends about two thirds of memory up to 32 GB and three quarters above, as owners
    report; less what MLX keeps there of freed buffers, which a plan made here leaves out.
    """
    recommended = gb * 2**30 * (2 / 3 if gb <= 32 else 3 / 4)
    return int(recommended * USABLE_SHARE) - (BUFFER_CACHE_BYTES - buffer_cache_bytes())


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose. `slots` and `slot_bytes` are by layer; the MTP layer is the last."""

    trunk_bytes: int
    mtp_bytes: int
    cache_bytes: int
    transient_bytes: int
    context: int
    prefill_chunk: int
    num_experts: int
    slots: dict[int, int]
    slot_bytes: dict[int, int]
    limit_bytes: int

    @property
    def expert_bytes(self) -> int:
        return sum(self.slots[layer] * self.slot_bytes[layer] for layer in self.slots)

    @property
    def resident_bytes(self) -> int:
        """What all experts would take."""
        return sum(self.num_experts * nbytes for nbytes in self.slot_bytes.values())

    @property
    def loaded_bytes(self) -> int:
        """What is read before the first prompt: streamed experts come when they are asked for."""
        full = [i for i, count in self.slots.items() if count == self.num_experts]
        experts = self.num_experts * sum(self.slot_bytes[i] for i in full)
        return self.trunk_bytes + self.mtp_bytes + experts

    @property
    def fixed_bytes(self) -> int:
        return self.trunk_bytes + self.mtp_bytes + self.cache_bytes + self.transient_bytes

    @property
    def total_bytes(self) -> int:
        return self.fixed_bytes + self.expert_bytes

    @property
    def is_resident(self) -> bool:
        return all(count == self.num_experts for count in self.slots.values())

    @property
    def experts_words(self) -> str:
        """Say how many experts are in memory."""
        slots = sorted(set(self.slots.values()))
        count = "-".join(str(slots[i]) for i in sorted({0, len(slots) - 1})) if slots else "0"
        kind = "resident" if self.is_resident else "streamed"
        return f"{kind}: {count} of {self.num_experts} per layer"

    def rows(self) -> list[tuple[str, int, str]]:
        """Return (what, bytes, remark) for a table."""
        chunk = f"{self.prefill_chunk:,} tokens of prompt at once"
        return [
            ("trunk", self.trunk_bytes, "everything but routed experts"),
            ("MTP module", self.mtp_bytes, "without its experts"),
            ("latent cache", self.cache_bytes, f"{self.context:,} tokens"),
            ("transients", self.transient_bytes, chunk),
            ("experts", self.expert_bytes, self.experts_words),
        ]


def held_bytes(info: TensorInfo, dtype: mx.Dtype, name: str = "") -> int:
    """Return what a tensor takes in memory: packed as on disk, floats in the activation dtype."""
    if info.dtype not in FLOAT_BYTES:
        return info.nbytes
    itemsize = 4 if ".mlp.gate." in name else dtype.size
    return info.nbytes // FLOAT_BYTES[info.dtype] * itemsize


def slot_bytes(layer: int, tensors: dict[str, TensorInfo], args: ModelArgs, dtype) -> int:
    """Return the bytes of one expert of a layer in memory."""
    experts = LayerExperts(layer, tensors, args)
    return sum(
        held_bytes(info, dtype)
        for projection in PROJECTIONS
        for info in experts.parts(projection).values()
    )


def choose_chunk(args: ModelArgs, dtype: mx.Dtype, context: int, most: int, spare: int) -> int:
    """Return the tokens of a prefill chunk: at most so many, and what `spare` bytes allow.

    They are beside what the smallest chunk takes.
    """
    sizes = [min(tokens, context) for tokens in PREFILL_CHUNKS]
    least = transient_bytes(args, dtype, sizes[-1], context)
    for tokens in sizes:
        if tokens <= most and transient_bytes(args, dtype, tokens, context) - least <= spare:
            return tokens
    return sizes[-1]


class Sizes(NamedTuple):
    """Bytes of the parts of a model in memory; `slots` by layer, the MTP layer last."""

    trunk: int
    mtp: int
    row: int  # of one token in all latent caches
    slots: dict[int, int]


def sizes_of(tensors: dict[str, TensorInfo], args: ModelArgs, dtype: mx.Dtype) -> Sizes:
    """Return what the parts of a model take, from headers."""
    prefix = mtp_prefix(args)
    num_layers = args.num_hidden_layers + any(name.startswith(prefix) for name in tensors)
    trunk = {name: info for name, info in tensors.items() if not EXPERT_KEY.fullmatch(name)}
    held = {name: held_bytes(info, dtype, name) for name, info in trunk.items()}
    mtp_bytes = sum(nbytes for name, nbytes in held.items() if name.startswith(prefix))
    width = args.kv_lora_rank + args.qk_rope_head_dim
    layers = [i for i in range(num_layers) if args.is_moe_layer(i)]
    return Sizes(
        trunk=sum(held.values()) - mtp_bytes,
        mtp=mtp_bytes,
        row=width * dtype.size * num_layers,
        slots={i: slot_bytes(i, tensors, args, dtype) for i in layers},
    )


def make_plan(
    tensors: dict[str, TensorInfo],
    args: ModelArgs,
    dtype: mx.Dtype,
    *,
    experts: str = "auto",
    expert_memory_gb: float | None = None,
    context: int | None = None,
    limit_bytes: int | None = None,
) -> MemoryPlan:
    """Plan a load from headers (`tensors`: main model and sidecar); raise `UserError` if it fails.

    `limit_bytes` is what may be used in all; by default 0.92 of what the machine recommends.
    Without a `context` (tokens) the default one is halved until the plan fits.
    """
    if experts not in MODES:
        raise UserError(f"`--experts` is `{experts}`", f"choose one of {', '.join(MODES)}")
    if expert_memory_gb is not None and experts == "resident":
        raise UserError(
            f"`--expert-memory {expert_memory_gb:g}` bounds the experts in memory and "
            "`--experts resident` keeps all of them there",
            "drop one of the two",
        )
    if expert_memory_gb is not None:
        SETTINGS["expert_memory"].check(expert_memory_gb, "`--expert-memory`")
    limit = int(available_bytes() * USABLE_SHARE) if limit_bytes is None else limit_bytes
    sizes = sizes_of(tensors, args, dtype)
    length = DEFAULT_CONTEXT if context is None else context
    length = min(length, args.max_position_embeddings)
    plan = plan_at(length, sizes, args, dtype, experts, expert_memory_gb, limit)
    while plan.total_bytes > limit and context is None and length >= 2 * LEAST_CONTEXT:
        length //= 2
        plan = plan_at(length, sizes, args, dtype, experts, expert_memory_gb, limit)
    if plan.total_bytes > limit:
        refuse(plan, args)
    return plan


def plan_at(
    context: int,
    sizes: Sizes,
    args: ModelArgs,
    dtype: mx.Dtype,
    experts: str,
    expert_memory_gb: float | None,
    limit: int,
) -> MemoryPlan:
    """Return the plan for a context, which may be larger than the limit."""

    def transients(tokens: int) -> int:
        return transient_bytes(args, dtype, min(tokens, context), context)

    extra, least = OVERHEAD_BYTES + buffer_cache_bytes(), transients(PREFILL_CHUNKS[-1])
    room = limit - sizes.trunk - sizes.mtp - sizes.row * context - extra - least
    everything = sum(sizes.slots.values()) * args.n_routed_experts
    budget = room + least - transients(RESIDENT_CHUNK)
    if expert_memory_gb is not None:
        budget = int(expert_memory_gb * GB)
    is_resident = experts == "resident" or (experts == "auto" and everything <= budget)
    if is_resident:
        chunk = choose_chunk(args, dtype, context, RESIDENT_CHUNK, room - everything)
    else:  # experts are read once for every chunk
        spare = room - budget if expert_memory_gb is not None else room
        spare = min(spare, int(room * CHUNK_SHARE))
        chunk = choose_chunk(args, dtype, context, PREFILL_CHUNKS[0], spare)
    if is_resident or not sizes.slots:
        slots = dict.fromkeys(sizes.slots, args.n_routed_experts)
    else:
        room += least - transients(chunk)
        slots = choose_slots(args, sizes.slots, room, expert_memory_gb)
    return MemoryPlan(
        trunk_bytes=sizes.trunk,
        mtp_bytes=sizes.mtp,
        cache_bytes=sizes.row * context,
        transient_bytes=extra + transients(chunk),
        context=context,
        prefill_chunk=chunk,
        num_experts=args.n_routed_experts,
        slots=slots,
        slot_bytes=sizes.slots,
        limit_bytes=limit,
    )


def choose_slots(
    args: ModelArgs, sizes: dict[int, int], room: int, expert_memory_gb: float | None
) -> dict[int, int]:
    """Return slots by layer for streamed experts, as many as fit.

    From half of the experts up, what is lacking is lacking in few layers, the last ones: the
    others are resident and never wait for the host. Below that it is shared out evenly.
    """
    budget = room if expert_memory_gb is None else int(expert_memory_gb * GB)
    K = args.num_experts_per_tok
    each = min(budget // sum(sizes.values()), args.n_routed_experts)
    if each < K and expert_memory_gb is not None:
        least = sum(sizes.values()) * K
        raise UserError(
            f"`--expert-memory {expert_memory_gb:g}` is below the least, {gigabytes(least)} "
            f"({K} experts in each of {len(sizes)} layers)",
            f"`--expert-memory {round_up(least)}` is the smallest that runs",
        )
    each = max(each, K)  # a total that is too much is refused with its own message
    if 2 * each >= args.n_routed_experts:
        return slots_in_few_layers(args, sizes, budget)
    left = budget - each * sum(sizes.values())
    slots = {}
    for layer, nbytes in sizes.items():  # what is left buys one slot more for some layers
        more = left >= nbytes and each < args.n_routed_experts
        slots[layer] = each + more
        left -= nbytes * more
    return slots


def slots_in_few_layers(args: ModelArgs, sizes: dict[int, int], budget: int) -> dict[int, int]:
    """Return slots that leave the last layers half of their experts at least, others all."""
    slots = dict.fromkeys(sizes, args.n_routed_experts)
    lacking = sum(sizes.values()) * args.n_routed_experts - budget
    spare = args.n_routed_experts - max(args.n_routed_experts // 2, args.num_experts_per_tok)
    for layer in reversed(sizes):
        if lacking > 0:
            fewer = min(spare, -(-lacking // sizes[layer]))
            slots[layer] -= fewer
            lacking -= fewer * sizes[layer]
    return slots


def refuse(plan: MemoryPlan, args: ModelArgs) -> None:
    """Say what is short and which flags fit."""
    kind = "resident" if plan.is_resident else "with these expert slots"
    least = sum(plan.slot_bytes.values()) * args.num_experts_per_tok
    room = plan.limit_bytes - plan.fixed_bytes
    message = (
        f"the model needs {gigabytes(plan.total_bytes)} {kind} and this machine allows "
        f"{gigabytes(plan.limit_bytes)}"
    )
    if room >= least:
        hint = (
            f"`--experts streamed --expert-memory {round_down(room)}` keeps everything "
            f"but routed experts in memory ({gigabytes(plan.fixed_bytes)})"
        )
    else:
        hint = (
            f"the least is {gigabytes(plan.fixed_bytes + least)} for a context of "
            f"{plan.context:,} tokens; a recipe with fewer bits needs less"
            + (", and so does a smaller `--context`" if plan.context > LEAST_CONTEXT else "")
        )
    wanted = ceil(plan.total_bytes / USABLE_SHARE / 2**20)
    if wanted << 20 < most_wired_bytes():
        hint += f"; or allow the GPU more: `sudo sysctl iogpu.wired_limit_mb={wanted}`"
    raise UserError(message, hint)
