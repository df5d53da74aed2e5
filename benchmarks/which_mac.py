"""Which Mac runs what: the README's table, computed from headers alone. Nothing here is measured.

    python benchmarks/which_mac.py [--bandwidth GB/s] [--context N] [--fit]

Each cell is the plan of `mlx_dsv3.memory` for that memory: 0.92 of the working set that Metal
recommends, less what MLX may keep in freed buffers; activations in bfloat16. Recommended is taken
as two thirds of memory up to 32 GB and three quarters above, about what owners report; on a Mac
`chat.py --plan` asks the machine itself.

A streamed model has a ceiling, the tokens per second that the disk alone allows: its bandwidth over
the bytes of the experts that a token misses. The share of hits is taken as the share of experts
held; on the demo model a quarter of the slots hits 39.9 % (docs/log.md). What arithmetic takes is
not in it.

With --fit: what `convert plan --fit-memory` chooses for V3 from headers, or the least memory that
would do.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import mlx.core as mx
from synthetic import BASE, source_of

from convert.fit_memory import survey
from convert.planner import build
from convert.recipe import EXPERTS, RECIPES
from mlx_dsv3.checkpoint.headers import TensorInfo
from mlx_dsv3.config import ModelArgs
from mlx_dsv3.errors import UserError, run_program
from mlx_dsv3.memory import MemoryPlan, make_plan, sold_limit_bytes
from mlx_dsv3.sizes import gigabytes

FITTED = (96, 128, 192, 256, 384, 512)
MEMORIES = (16, 24, 32, 64, 96, 128, 192, 256, 512)  # GB of 2^30 bytes, as they are sold
V3 = BASE | {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
}
MOONLIGHT = V3 | {
    "vocab_size": 163840,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 8192,
    "num_nextn_predict_layers": 0,
}
COLUMNS = (("Moonlight", "q4"), ("V3, R1", "q4"), ("V3, R1", "q3"), ("V3, R1", "q2-mixed"))
CONFIGS = {"Moonlight": MOONLIGHT, "V3, R1": V3}


def headers(config: dict, recipe: str) -> dict[str, TensorInfo]:
    """Return every tensor of the folder that `convert` would write, sidecar included."""
    files = build(source_of(config), RECIPES[recipe]).files
    return {
        part.name: TensorInfo(
            Path(name), part.dtype, part.shape, file.start_of[part.name], part.nbytes
        )
        for name, file in files.items()
        for part in file.parts
    }


def words(plan: MemoryPlan, args: ModelArgs, bandwidth: float) -> str:
    """Return a cell: resident, or the share held and the ceiling."""
    if plan.is_resident:
        return "resident"
    layers = [i for i in plan.slots if i < args.num_hidden_layers]  # a token without drafts
    read = sum(
        args.num_experts_per_tok * (1 - plan.slots[i] / plan.num_experts) * plan.slot_bytes[i]
        for i in layers
    )
    rate = bandwidth * 1e9 / read
    held = 100 * plan.expert_bytes / plan.resident_bytes
    return f"{held:.0f} %, {rate:.{0 if rate >= 10 else 1}f}/s"


def cell(tensors: dict, args: ModelArgs, memory: int, context: int, bandwidth: float) -> str:
    try:
        limit = sold_limit_bytes(memory)
        plan = make_plan(tensors, args, mx.bfloat16, context=context, limit_bytes=limit)
    except UserError:
        return "–"
    return words(plan, args, bandwidth)


def table(context: int = 8192, bandwidth: float = 6.0) -> list[list[str]]:
    """Return the rows: memory, then a cell for each model and recipe."""
    rows = [[f"{memory} GB"] for memory in MEMORIES]
    for model, recipe in COLUMNS:
        tensors, args = headers(CONFIGS[model], recipe), ModelArgs.from_dict(CONFIGS[model])
        for row, memory in zip(rows, MEMORIES, strict=True):
            row.append(cell(tensors, args, memory, context, bandwidth))
    return rows


def fit_rows(context: int) -> list[list[str]]:
    """Return memory, what it allows, what the fitted recipe takes, bits of the experts."""
    rows, offers = [], survey(source_of(V3), context)
    for memory in FITTED:
        allowed = gigabytes(sold_limit_bytes(memory))
        try:
            found = offers.fit(memory)
        except UserError as error:
            least = error.hint.split("`")[1].split()[1]
            rows.append([f"{memory} GB", allowed, f"– (from {least} GB)", ""])
            continue
        bits = Counter(c.quantization.bits for i, c in found.chosen if i.role in EXPERTS)
        words = ", ".join(f"{n} x {b} bits" for b, n in sorted(bits.items()))
        rows.append([f"{memory} GB", allowed, gigabytes(found.total_bytes), words])
    return rows


def print_rows(names: list[str], rows: list[list[str]]) -> None:
    for row in [names, ["---"] * len(names), *rows]:
        print(f"| {' | '.join(row)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bandwidth", type=float, default=6.0, metavar="GB/s")
    parser.add_argument("--context", type=int, default=8192, metavar="N")
    parser.add_argument("--fit", action="store_true", help="recipes that --fit-memory chooses")
    options = parser.parse_args()
    if options.fit:
        rows = fit_rows(options.context)
        print_rows(["memory", "the model may use", "resident", "experts, by layer and role"], rows)
        return
    rows = table(options.context, options.bandwidth)
    names = ["memory", *(f"{model} `{recipe}`" for model, recipe in COLUMNS)]
    print_rows(names, rows)
    print(json.dumps({"bandwidth": options.bandwidth, "context": options.context, "rows": rows}))


if __name__ == "__main__":
    run_program(main)
