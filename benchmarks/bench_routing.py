"""What routing tells: which expert to evict, and whether the next layer's experts can be foreseen.

    python benchmarks/bench_routing.py --replay TRACE [--slots N ...]
    python benchmarks/bench_routing.py --predict MODEL --text FILE
    python benchmarks/bench_routing.py --record MODEL --text FILE --out TRACE

--replay  hit rates of replacement policies at several capacities, on a trace that `chat.py --trace`
          or `--record` wrote; `fading` is that of the bank; `optimal` (Belady) knows the future
--record  the trace of a text, as if each of its tokens had been decoded: the judge has no chat
--predict how many of a layer's experts its router names when it is asked one layer early

A trace has one line for each MoE layer and call: [layer, [[expert ids of a token], ...]].
Prints conditions, a table, and one JSON line last.
"""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

import mlx.core as mx
import numpy as np
from conditions import print_conditions

from mlx_dsv3.errors import run_program
from mlx_dsv3.load import load
from mlx_dsv3.model.moe import MoE
from mlx_dsv3.terminal.trace import Trace

AGE_EVERY, CAP = 64, 12  # of the frequency policy: counts are halved and capped
CONTEXT = 512  # tokens of a recorded window; each one knows nothing of the others


def read_trace(path: Path) -> dict[int, list[list[int]]]:
    """Return layer -> the distinct experts of each step, calls of many tokens taken one by one."""
    steps = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        layer, tokens = json.loads(line)
        steps[layer].extend(sorted(set(experts)) for experts in tokens)
    return steps


def lru(steps: list[list[int]], capacity: int) -> int:
    """Return the hits of least recently used."""
    last, hits = {}, 0
    for now, step in enumerate(steps):
        hits += sum(expert in last for expert in step)
        for expert in step:
            last[expert] = now
        while len(last) > capacity:
            del last[min((e for e in last if e not in step), key=last.get)]
    return hits


def frequency(steps: list[list[int]], capacity: int) -> int:
    """Return the hits of least frequently used, counts capped and halved now and then."""
    counts, last, held, hits = Counter(), {}, set(), 0
    for now, step in enumerate(steps):
        hits += sum(expert in held for expert in step)
        for expert in step:
            counts[expert] = min(counts[expert] + 1, CAP)
            last[expert] = now
        held |= set(step)
        while len(held) > capacity:
            held.remove(min(held - set(step), key=lambda e: (counts[e], last[e])))
        if now % AGE_EVERY == AGE_EVERY - 1:
            for expert in counts:
                counts[expert] /= 2
    return hits


def fading(steps: list[list[int]], capacity: int) -> int:
    """Return the hits of least used of late, as in `Bank`: a use fades by half in E / K steps."""
    experts, each = 1 + max(map(max, steps)), max(map(len, steps))
    uses, held, hits = np.zeros(experts), set(), 0
    for step in steps:
        hits += sum(expert in held for expert in step)
        uses *= 0.5 ** (each / experts)
        uses[step] += 1
        held |= set(step)
        while len(held) > capacity:
            held.remove(min(held - set(step), key=uses.__getitem__))
    return hits


def optimal(steps: list[list[int]], capacity: int) -> int:
    """Return the hits of dropping what is needed again latest."""
    uses = defaultdict(list)
    for now in range(len(steps) - 1, -1, -1):
        for expert in steps[now]:
            uses[expert].append(now)
    held, hits = set(), 0
    for step in steps:
        hits += sum(expert in held for expert in step)
        for expert in step:
            uses[expert].pop()
        held |= set(step)
        while len(held) > capacity:
            never = len(steps)
            held.remove(max(held - set(step), key=lambda e: uses[e][-1] if uses[e] else never))
    return hits


POLICIES = {"lru": lru, "frequency": frequency, "fading": fading, "optimal": optimal}


def replay(path: Path, capacities: list[int] | None) -> list[dict]:
    """Print and return hit rates by capacity and policy, and the overlap of neighbour steps."""
    layers = read_trace(path)
    num_steps = sum(map(len, layers.values()))
    lookups = sum(len(step) for steps in layers.values() for step in steps)
    experts = 1 + max(e for steps in layers.values() for step in steps for e in step)
    each = max(len(step) for steps in layers.values() for step in steps)
    capacities = capacities or sorted({each, experts // 8, experts // 4, experts // 2} - {0})
    shared = sum(
        len(set(a) & set(b))
        for steps in layers.values()
        for a, b in zip(steps, steps[1:], strict=False)
    )
    print(
        f"trace: {len(layers)} layers, {num_steps // len(layers)} tokens, up to {experts} experts, "
        f"{shared / lookups:.1%} of a token's experts were the last token's"
    )
    rows = []
    for capacity in capacities:
        if capacity < each:
            continue
        row = {"slots": capacity}
        for name, policy in POLICIES.items():
            row[name] = sum(policy(steps, capacity) for steps in layers.values()) / lookups
        rows.append(row)
        rates = ", ".join(f"{name} {row[name]:.1%}" for name in POLICIES)
        print(f"{capacity:4d} slots per layer: {rates}")
    return rows


def prefetched(true: list[list[int]], guess: list[list[int]], experts: int) -> dict[str, float]:
    """Return the share of misses that the guess names, and reads in vain for each one of these.

    With a quarter of the experts held, the least recently used replaced.
    """
    last, misses, found, wasted = {}, 0, 0, 0
    for now, (needed, named) in enumerate(zip(true, guess, strict=True)):
        missing, read = set(needed) - set(last), set(named) - set(last)
        misses, found = misses + len(missing), found + len(missing & read)
        wasted += len(read - missing)
        last |= dict.fromkeys(needed, now)
        for expert in sorted(last, key=last.get)[: len(last) - experts // 4]:
            del last[expert]
    return {"misses named": found / misses, "in vain for each": wasted / max(found, 1)}


def record(folder: Path, text: str, out: Path) -> list[dict]:
    """Write the experts of each token of a text; a token's choice needs no step of its own."""
    with load(folder) as loaded:
        ids = loaded.tokenizer.encode(text, add_special_tokens=False)
        trace = Trace(loaded.store, out)
        for first in range(0, len(ids), CONTEXT):
            mx.eval(loaded.model.hidden(mx.array([ids[first : first + CONTEXT]])))
        trace.close()
    print(f"recorded {len(ids)} tokens in windows of {CONTEXT}")
    return [{"tokens": len(ids)}]


def predict(folder: Path, text: str) -> list[dict]:
    """Apply each MoE layer's router to the state one layer earlier; return its recall.

    A prefetcher would read the experts so named while the layer before still computes. Reads of
    wrongly named ones are the price: `wasted` counts them for each useful one. Most of the experts
    so named are held already; what a prefetcher would read is in the last two columns.
    """
    loaded = load(folder)
    ids = mx.array([loaded.tokenizer.encode(text, add_special_tokens=False)[:2048]])
    h, early, rows = loaded.model.model.embed_tokens(ids), {}, []
    K = loaded.args.num_experts_per_tok
    layers = loaded.model.layers
    for i, layer in enumerate(layers):
        following = layers[i + 1] if i + 1 < len(layers) else None
        attended = h + layer.self_attn(layer.input_layernorm(h))
        x = layer.post_attention_layernorm(attended)
        if i in early:
            true = np.array(layer.mlp.gate(x)[0]).reshape(-1, K)
            row = {"layer": i}
            for count in (K, 2 * K):
                guess = early[i][:, :count]
                found = sum(len(np.intersect1d(a, b)) for a, b in zip(true, guess, strict=True))
                row[f"recall@{count}"] = found / true.size
                row[f"wasted@{count}"] = (guess.size - found) / max(found, 1)
            row |= prefetched(true.tolist(), early[i][:, :K].tolist(), loaded.args.n_routed_experts)
            rows.append(row)
            print("predict  " + ", ".join(f"{k} {v:.2f}" for k, v in row.items()))
        h = attended + layer.mlp(x)
        if following is not None and isinstance(following.mlp, MoE):
            gate = following.mlp.gate
            ahead = following.post_attention_layernorm(attended)
            scores = mx.sigmoid(ahead.astype(mx.float32) @ gate.weight.T)
            scores = scores + gate.e_score_correction_bias
            early[i + 1] = np.array(mx.argsort(-scores, axis=-1))[0]
    loaded.store.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--replay", type=Path, metavar="TRACE")
    what.add_argument("--predict", type=Path, metavar="MODEL")
    what.add_argument("--record", type=Path, metavar="MODEL")
    parser.add_argument("--slots", type=int, nargs="+", help="capacities for --replay")
    parser.add_argument("--text", type=Path, help="text for --predict and --record")
    parser.add_argument("--out", type=Path, metavar="TRACE", help="file for --record")
    options = parser.parse_args()
    if not options.replay and options.text is None:
        parser.error("`--predict` and `--record` need a `--text`")
    if options.record and options.out is None:
        parser.error("`--record` needs an `--out`")
    conditions = print_conditions()
    if options.replay:
        result = {"replay": replay(options.replay, options.slots)}
    elif options.record:
        text = options.text.read_text(encoding="utf-8")
        result = {"record": record(options.record, text, options.out)}
    else:
        text = options.text.read_text(encoding="utf-8")
        result = {"predict": predict(options.predict, text)}
    print(json.dumps({"bench": "routing", **conditions, **result}))


if __name__ == "__main__":
    run_program(main)
