"""The whole reference model over several processes: heads and experts divided, the rest copied.

    torchrun --nproc-per-node 8 -m mlx_dsv3.reference.generate SOURCE -p TEXT --device cuda

For those with 8 GPUs who can hold 671B. Each process holds H / n heads of every attention and
a contiguous E / n of every layer's experts; o_proj and the routed experts are summed over all
processes in float32 (NCCL on CUDA, gloo on a CPU). Sums in another order round otherwise, so
logits agree to float32's precision and not bit for bit. Embedding, head, router, shared experts
and dense MLPs are copied: 12 GB of 671B's weights in BF16.
"""

import dataclasses
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlx_dsv3.errors import UserError
from mlx_dsv3.reference.args import Args
from mlx_dsv3.reference.backends import check_device
from mlx_dsv3.reference.fp8 import BLOCK, dequantize
from mlx_dsv3.reference.hub import HubTensors, Stored, check_tensors
from mlx_dsv3.reference.model import Model, MoE, add_expert, at_least_float32
from mlx_dsv3.reference.weights import Arithmetic, fill


def num_processes() -> int:
    """Return how many processes torchrun started, 1 without it."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() else 1


def rank() -> int:
    """Return which of them this is."""
    return dist.get_rank() if num_processes() > 1 else 0


def start(device: str) -> str:
    """Join the processes that torchrun started; return this one's device."""
    if "LOCAL_RANK" not in os.environ:
        hint = "start it with `torchrun --nproc-per-node N`, or unset WORLD_SIZE"
        raise UserError("WORLD_SIZE is set, and no torchrun started this process", hint)
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        check_device(device)
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        hint = "`torchrun --nproc-per-node N` on one machine needs no more"
        raise UserError(f"the processes cannot reach each other: {reason}", hint) from None
    return device


class SummedLinear(nn.Module):
    """A linear layer of which each process has some input columns; the outputs add up."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        y = at_least_float32(self.linear(x)).contiguous()
        dist.all_reduce(y)
        return y.to(x.dtype)


class ParallelMoE(MoE):
    """Every process routes every token and computes the experts it has."""

    def __init__(self, args: Args, mine: range):
        super().__init__(args)
        self.mine = mine

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)  # (T, D)
        indices, weights = self.gate(flat)
        out = torch.zeros_like(flat, dtype=weights.dtype)
        for idx in indices.unique().tolist():
            if idx in self.mine:
                out = add_expert(out, self.experts[idx], idx, flat, indices, weights)
        dist.all_reduce(out)
        return self.with_shared(out, x)


def share_of(count: int, what: str) -> range:
    """Return this process's contiguous share of heads or experts."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if count % world:
        raise UserError(
            f"{count} {what} cannot be divided among {world} processes",
            "choose a number of processes that divides heads and experts",
        )
    return range(rank * count // world, (rank + 1) * count // world)


def cut(name: str, stored: Stored, dim: int, rows: range, arithmetic: Arithmetic) -> Stored:
    """Return rows (dim 0) or columns (dim 1) of a stored matrix.

    FP8 that stays FP8 can be cut between blocks only: a scale belongs to a whole block.
    """
    tensor, scale = stored
    if scale is not None and not arithmetic.keeps_fp8(name):
        tensor, scale = dequantize(tensor, scale), None  # on the CPU, where it was read
    if scale is not None:
        if rows.start % BLOCK or (rows.stop % BLOCK and rows.stop != tensor.shape[dim]):
            raise UserError(
                f"`{name}` would be cut at {rows.start}, which is not a multiple of {BLOCK}",
                "`--arithmetic bf16` cuts anywhere, or choose fewer processes",
            )
        first, last = rows.start // BLOCK, -(-rows.stop // BLOCK)
        scale = scale.narrow(dim, first, last - first).contiguous()
    return Stored(tensor.narrow(dim, rows.start, len(rows)).contiguous(), scale)


def load(folder: str | Path, arithmetic: Arithmetic) -> Model:
    """Read this process's part of a checkpoint; call `start` before.

    Raises `UserError` where heads, experts or FP8 blocks cannot be divided.
    """
    tensors = HubTensors(folder)
    if tensors.block != BLOCK:
        raise UserError(f"`{folder}` has FP8 blocks of {tensors.block}; only {BLOCK} is divided")
    args = Args.from_dict(tensors.config)
    check_tensors(tensors, args)
    heads = share_of(args.num_attention_heads, "heads")
    experts = share_of(args.n_routed_experts, "experts")
    widths = {  # rows or columns of one head
        "self_attn.q_proj": (0, args.qk_nope_head_dim + args.qk_rope_head_dim),
        "self_attn.q_b_proj": (0, args.qk_nope_head_dim + args.qk_rope_head_dim),
        "self_attn.kv_b_proj": (0, args.qk_nope_head_dim + args.v_head_dim),
        "self_attn.o_proj": (1, args.v_head_dim),
    }
    with torch.device("meta"):
        model = Model(dataclasses.replace(args, num_attention_heads=len(heads))).eval()
        for layer in model.model.layers:
            if isinstance(layer.mlp, MoE):
                layer.mlp = ParallelMoE(args, experts).eval()
    for name in model.state_dict():
        words = name.split(".")
        if ".mlp.experts." in name and int(words[words.index("experts") + 1]) not in experts:
            continue
        stored = tensors.stored(name)
        if (width := widths.get(".".join(words[3:5]))) is not None:
            dim, each = width
            rows = range(heads.start * each, heads.stop * each)
            stored = cut(name, stored, dim, rows, arithmetic)
        fill(model, {name: stored}, arithmetic, tensors.block)
    for layer in model.model.layers:
        layer.self_attn.o_proj = SummedLinear(layer.self_attn.o_proj)
    return model
