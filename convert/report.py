"""What `plan` and `verify` print: tables for people, dictionaries for `--json`.

Sizes in memory are sums of what the files hold; what a run adds on top (activations, buffers) is
the runtime's to say.
"""

import sys
import time

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from convert.dequantize import dequantize_blocks
from convert.fit_memory import Fitted, fitted_rows
from convert.plan import Plan, role_rows
from convert.quantize import store
from mlx_dsv3.checkpoint.format import EXPERT_KEY
from mlx_dsv3.errors import in_line
from mlx_dsv3.sizes import gigabytes, size

CACHE_DTYPE_BYTES = 2
LEAST_WIDTH = 80  # a narrower terminal wraps the lines of a table
ERRORS = {  # keys of conversion.json's roles and their columns
    "relative_rms_error": "error",
    "extremes_rms_error": "extremes",
    "weighted_rms_error": "weighted",
    "weighted_extremes_rms_error": "extremes",
}
PROBE_SHAPE = (2048, 2048)


def compact_table(*columns: str) -> Table:
    """Return a table without lines: eight columns have to fit into 80 characters."""
    table = Table(*columns, box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in table.columns:
        column.no_wrap = True
    return table


def print_table(table: Table, to_stderr: bool = False) -> None:
    """Print a table whose words are nothing but words: `[/x]` and `:x:` are no markup."""
    console = Console(markup=False, emoji=False, stderr=to_stderr)
    console.width = max(console.width, LEAST_WIDTH)  # in `COLUMNS=1` rich leaves out every word
    console.print(table)


def print_plan(plan: Plan, disk_peak: int | None) -> None:
    """Print the table of roles, the totals, and what the result needs to run.

    `disk_peak` is the most that a source on the hub takes with `--discard-source`, else None.
    """
    table = compact_table("role", "tensors", "source", "stored as", "in", "out", "bits")
    for row in role_rows(plan):
        table.add_row(
            row.role,
            f"{len(row.tensors):,}",
            " ".join(sorted(row.source_types)),
            ", ".join(sorted(row.stored_as)) if len(row.stored_as) == 1 else "by layer",
            size(row.source_bytes),
            size(row.nbytes),
            f"{8 * row.nbytes / row.weights:.2f}",
        )
    print_table(table)
    source, memory, recipe = plan.source, memory_needs(plan), in_line(plan.recipe.name)
    print(
        f"\nsource  {len(source.tensors):,} tensors in {len(source.shard_bytes):,} shards, "
        f"{size(source.nbytes)}; {'with' if plan.with_mtp else 'without'} MTP layer\n"
        f"result  {len(plan.files):,} files, {size(plan.nbytes)} with `{recipe}`{weighed(plan)}\n"
        f"disk    {disk_needs(plan, disk_peak)}\n"
        f"memory  {size(memory['resident_bytes'])} to run resident; streamed from "
        f"{size(memory['streamed_bytes'])}, or {size(memory['quarter_bytes'])}\n"
        f"        with a quarter of the experts in memory; "
        f"and {memory['bytes_per_token'] / 1e3:.1f} KB per token of context\n"
        f"time    about {minutes_of_arithmetic(plan):.0f} min of arithmetic on one core or GPU "
        f"here, if the disk keeps up"
    )


def weighed(plan: Plan) -> str:
    """Say by which importance the levels are fitted."""
    return f", weighed by `{in_line(plan.importance.path.name)}`" if plan.importance else ""


def print_fitted(fitted: Fitted) -> None:
    """Print on stderr what `--fit-memory` chose, before the work begins."""
    table = compact_table("role", "layers x bits/group", "size", "error")
    for role, words, nbytes, error in fitted_rows(fitted):
        table.add_row(role, words, size(nbytes), f"{error:.1%}")
    table.columns[1].no_wrap = False
    print_table(table, to_stderr=True)
    how = (
        "measured on rows of the weights"
        if fitted.survey.is_measured
        else "of normal weights, computed"
    )
    print(
        f"memory  {gigabytes(fitted.total_bytes)} resident at a context of "
        f"{fitted.survey.context:,} tokens;\n        such a machine lets the model use "
        f"{gigabytes(fitted.limit_bytes)} (computed); errors {how}\n",
        file=sys.stderr,
    )


def disk_needs(plan: Plan, disk_peak: int | None) -> str:
    """Say how much free disk the conversion takes."""
    if disk_peak is None:
        return size(plan.nbytes)
    both = plan.source.nbytes + plan.nbytes
    return f"{size(both)} with the source, at most {size(disk_peak)} with `--discard-source`"


def memory_needs(plan: Plan) -> dict[str, int]:
    """Return the bytes that the result's weights take, resident and streamed.

    Streamed keeps everything but routed experts, and as many experts of each layer as one token
    needs; `quarter_bytes` is the same with a quarter of the experts.
    """
    args, total, experts = plan.source.args, 0, 0
    for file in plan.files.values():
        for part in file.parts:
            total += part.nbytes
            if EXPERT_KEY.fullmatch(part.name):
                experts += part.nbytes
    slot = experts // args.n_routed_experts  # one expert of every layer
    width = args.kv_lora_rank + args.qk_rope_head_dim
    return {
        "resident_bytes": total,
        "streamed_bytes": total - experts + slot * args.num_experts_per_tok,
        "quarter_bytes": total - experts + experts // 4,
        "bytes_per_token": args.num_hidden_layers * width * CACHE_DTYPE_BYTES,
    }


def minutes_of_arithmetic(plan: Plan) -> float:
    """Return the minutes that MLX needs for all weights, from a sample of the work done now."""
    rows, columns = PROBE_SHAPE
    # Values of both signs, none of them NaN: levels are fitted to zeros in half the time.
    codes = mx.arange(rows * columns).reshape(PROBE_SHAPE).astype(mx.uint8) & 0xF7
    mx.eval(codes)
    scale = mx.ones((rows // 128, columns // 128))
    settings = plan.recipe.default
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        matrix = dequantize_blocks(codes, scale, (128, 128))
        mx.eval(store(matrix, settings, plan.recipe.dtype, plan.recipe.is_fitted))
        seconds.append(time.perf_counter() - began)
    weights = sum(row.weights for row in role_rows(plan))
    return min(seconds) / (rows * columns) * weights / 60


def plan_as_dict(plan: Plan) -> dict:
    """Return the plan for `--json`."""
    roles = {
        row.role: {
            "tensors": len(row.tensors),
            "source_types": sorted(row.source_types),
            "stored_as": sorted(row.stored_as),
            "weights": row.weights,
            "source_bytes": row.source_bytes,
            "bytes": row.nbytes,
        }
        for row in role_rows(plan)
    }
    return {
        "recipe": plan.recipe.as_dict(),
        "source_tensors": len(plan.source.tensors),
        "source_bytes": plan.source.nbytes,
        "has_mtp": plan.with_mtp,
        "roles": roles,
        "files": {name: file.nbytes for name, file in plan.files.items()},
        "bytes": plan.nbytes,
        "memory": memory_needs(plan),
        "plan": plan.digest,
    }


def print_errors(roles: dict) -> None:
    """Print conversion.json's errors by role; they are root mean squares of samples.

    Where levels were fitted, `extremes` is what the same weights would have lost without. With
    weighted errors too the line has no room for the worst tensor, which `--json` names.
    """
    found = {"relative_rms_error"}.union(*roles.values())
    shown = {key: word for key, word in ERRORS.items() if key in found}
    last = ("worst", "worst tensor") if len(shown) < len(ERRORS) else ()
    table = compact_table("role", "size", "bits", *shown.values(), *last)
    table.columns[-1].no_wrap = not last
    for role, row in roles.items():
        worst = row.get("worst", {})
        cells = [
            in_line(role),
            size(row["bytes"]),
            f"{row['bits_per_weight']:.2f}",
            *(f"{row.get(key, 0):.2%}" for key in shown),
            f"{worst.get('relative_rms_error', 0):.2%}",
            in_line(worst.get("tensor", "").removeprefix("model.")),
        ]
        table.add_row(*cells[: len(table.columns)])
    print_table(table)
