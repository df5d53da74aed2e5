"""Attention of a verification: L tokens over a cached context, ours beside mlx-lm's, true V3 sizes.

    python benchmarks/bench_attention.py [--context N] [--queries L] [--rounds N]

One layer in float32, from the queries (after q_b_proj) to the heads' outputs (before o_proj): both
projections are the same product on both sides. The two run in turn in one process; memory is MLX's
peak above what was active before. Run it once with MLX's own BLAS and once with OpenBLAS:

    export LD_PRELOAD=/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3
    python benchmarks/bench_attention.py
"""

import argparse
import json
import statistics
import time

import mlx.core as mx
import mlx.nn as nn
from conditions import print_conditions
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache
from mlx_lm.models.deepseek_v3 import DeepseekV3Attention
from mlx_lm.models.deepseek_v3 import ModelArgs as TheirArgs
from rich.console import Console
from rich.table import Table

from mlx_dsv3.config import ModelArgs
from mlx_dsv3.errors import run_program
from mlx_dsv3.model.cache import LatentCache
from mlx_dsv3.model.mla import MLA

V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 163840,
}


class Given(nn.Module):
    """Stands for a projection whose output is known: what is beside it gets measured."""

    def __init__(self, output: mx.array | None = None):
        super().__init__()
        self._output = output

    def __call__(self, x: mx.array) -> mx.array:
        return x if self._output is None else self._output


class Pair(nn.Module):
    """The joined first projections: nothing for the queries, kv_a for the latent row."""

    def __init__(self, kv_a: nn.Linear):
        super().__init__()
        self.kv_a = kv_a

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        return x, self.kv_a(x)


class Ours:
    def __init__(self, q: mx.array):
        layer = MLA(ModelArgs.from_dict(V3))
        layer.qkv_a_proj = Pair(layer.kv_a_proj_with_mqa)
        layer.q_a_layernorm, layer.q_b_proj, layer.o_proj = Given(), Given(q), Given()
        for name in ("q_a_proj", "kv_a_proj_with_mqa"):
            layer.pop(name)
        self.layer, self.cache = layer, LatentCache()
        mx.eval(layer.parameters())

    def fill(self, rows: mx.array) -> None:
        self.cache.append(rows)
        mx.eval(self.cache.state)

    def __call__(self, x: mx.array) -> mx.array:
        return self.layer(x, self.cache)


class Theirs(Ours):
    def __init__(self, q: mx.array, ours: Ours):
        layer = DeepseekV3Attention(TheirArgs.from_dict(V3))
        layer.q_a_proj, layer.q_a_layernorm = Given(), Given()
        layer.q_b_proj, layer.o_proj = Given(q), Given()
        layer.embed_q, layer.unembed_out = ours.layer.embed_q, ours.layer.unembed_out
        layer.kv_a_proj_with_mqa = ours.layer.qkv_a_proj.kv_a
        self.layer, self.cache = layer, KVCache()
        mx.eval(layer.parameters())

    def fill(self, rows: mx.array) -> None:
        latent, k_pe = mx.split(rows[:, None], [V3["kv_lora_rank"]], axis=-1)
        self.cache.update_and_fetch(latent, k_pe)
        mx.eval(self.cache.state)

    def __call__(self, x: mx.array) -> mx.array:
        mask = create_attention_mask(x, self.cache, return_array=True)
        return self.layer(x, mask, self.cache)


def make_sides(context: int, queries: int) -> tuple[Ours, Theirs, mx.array]:
    """Return both attentions with the same weights and the same cached rows, and an input."""
    mx.random.seed(0)
    heads, width = V3["num_attention_heads"], V3["qk_nope_head_dim"] + V3["qk_rope_head_dim"]
    q = mx.random.normal((1, queries, heads * width))
    rows = mx.random.normal((1, context, V3["kv_lora_rank"] + V3["qk_rope_head_dim"]))
    x = mx.random.normal((1, queries, V3["hidden_size"]))
    mx.eval(q, rows, x)
    ours = Ours(q)
    theirs = Theirs(q, ours)
    ours.fill(rows)
    theirs.fill(rows)
    return ours, theirs, x


def run(side: Ours, x: mx.array) -> tuple[mx.array, float, int]:
    """Attend once; return the output, seconds, and peak bytes above those active before."""
    mx.clear_cache()
    mx.reset_peak_memory()
    active, start = mx.get_active_memory(), time.perf_counter()
    out = side(x)
    mx.eval(out, side.cache.state)
    seconds, peak = time.perf_counter() - start, mx.get_peak_memory()
    side.cache.trim(x.shape[1])
    return out, seconds, peak - active


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=int, default=2048, help="cached tokens")
    parser.add_argument("--queries", type=int, default=2, help="tokens verified at once")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    conditions = print_conditions(context=args.context, queries=args.queries)
    ours, theirs, x = make_sides(args.context, args.queries)
    sides = {"ours": ours, "mlx_lm": theirs}
    outs = {name: run(side, x)[0] for name, side in sides.items()}  # warm-up; caches have grown
    difference = mx.abs(outs["ours"] - outs["mlx_lm"]).max().item()
    runs: dict[str, list] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            runs[name].append(run(side, x)[1:])
    result = {"max_difference": difference}
    table = Table("attention core", "milliseconds", "extra memory")
    for name, measured in runs.items():
        milliseconds = 1e3 * statistics.median(seconds for seconds, _ in measured)
        megabytes = max(nbytes for _, nbytes in measured) / 1e6
        result |= {f"{name}_ms": round(milliseconds, 2), f"{name}_mb": round(megabytes, 1)}
        table.add_row(name, f"{milliseconds:.1f}", f"{megabytes:.1f} MB")
    ratios = [a / b for (a, _), (b, _) in zip(runs["mlx_lm"], runs["ours"], strict=True)]
    result["times_faster"] = round(statistics.median(ratios), 1)
    table.add_row("mlx_lm / ours", f"{result['times_faster']:.1f} x", "")
    Console().print(table)
    print(json.dumps({"bench": "attention", **conditions, **result}))


if __name__ == "__main__":
    run_program(main)
