"""Replacement policies simulated on a routing trace: which expert to drop when a slot is needed.

A trace has one line for each MoE layer and call: [layer, [[expert ids of a token], ...]].
`optimal` (Belady) knows the future; it bounds what any policy can reach.
"""

import json
from collections import Counter, defaultdict
from pathlib import Path

AGE_EVERY, CAP = 64, 12  # of the frequency policy: counts are halved and capped


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


POLICIES = {"lru": lru, "frequency": frequency, "optimal": optimal}


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
        print(f"{capacity:4d} slots a layer: {rates}")
    return rows
