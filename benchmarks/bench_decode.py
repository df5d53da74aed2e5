"""Decoding and prefill beside mlx-lm: same folder, same tokens, everything resident, no drafts.

    python benchmarks/bench_decode.py [MODEL] [--pairs N] [--tokens N]

Without MODEL a random model of about 0.5 GB at 4 bits is made in a temporary folder. The programs
run in one process, alternating; a row gives the median of the paired ratios (above 1: ours is
faster). `ids read` forces full banks to read the chosen experts back, as streaming does.
Prints conditions, a table, and one JSON line last.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from conditions import print_conditions
from mlx_lm.utils import load_model as load_in_mlx_lm
from synthetic import BASE, write_folder

from mlx_dsv3.errors import run_program
from mlx_dsv3.load import load_model


def decode(model, ids: mx.array, num_tokens: int) -> tuple[float, float, list[int]]:
    """Prefill and decode greedily, double-buffered; return tokens/s of both and the tokens."""
    cache = model.make_cache() if hasattr(model, "make_cache") else None
    if cache is None:
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(model)
    start = time.perf_counter()
    token = mx.argmax(model(ids, cache=cache)[:, -1], axis=-1)
    mx.eval(token)
    prompt_s, start, tokens = time.perf_counter() - start, time.perf_counter(), []
    for _ in range(num_tokens):
        upcoming = mx.argmax(model(token[None], cache=cache)[:, -1], axis=-1)
        mx.async_eval(upcoming)
        tokens.append(token.item())
        token = upcoming
    mx.eval(token)
    return ids.size / prompt_s, num_tokens / (time.perf_counter() - start), tokens


def forced(folder: Path):
    """Load with full banks that read their ids back."""
    loaded = load_model(folder, experts="resident")
    loaded.store.on_route = lambda layer, experts: None
    return loaded.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or write_folder(Path(scratch) / "model", BASE)
        theirs, config = load_in_mlx_lm(folder, strict=True)
        ours = load_model(folder, experts="resident").model
        if mx.default_device() == mx.Device(mx.cpu):
            theirs.set_dtype(mx.float32)
        models = {"mlx-lm": theirs, "ours": ours, "ours, ids read": forced(folder)}
        rng = np.random.default_rng(0)
        ids = mx.array(rng.integers(2, 1000, (1, 16)))
        conditions = print_conditions(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            pairs=options.pairs,
            tokens=options.tokens,
        )
        speeds = {name: [] for name in models}
        texts = {name: decode(model, ids, 4)[2] for name, model in models.items()}  # warm-up
        for _ in range(options.pairs):
            for name, model in models.items():
                prompt_tps, tps, texts[name] = decode(model, ids, options.tokens)
                speeds[name].append((prompt_tps, tps))
    result = {"same_tokens": len({tuple(text) for text in texts.values()}) == 1}
    for name, measured in speeds.items():
        row = {"prompt_tps": statistics.median(p for p, _ in measured)}
        row["decode_tps"] = statistics.median(d for _, d in measured)
        for i, what in enumerate(("prompt_ratio", "decode_ratio")):
            pairs = zip(measured, speeds["mlx-lm"], strict=True)
            row[what] = statistics.median(a[i] / b[i] for a, b in pairs)
        result[name] = row
        print(
            f"{name:<15} prompt {row['prompt_tps']:7.1f}/s ({row['prompt_ratio']:.2f} x), "
            f"decode {row['decode_tps']:7.1f}/s ({row['decode_ratio']:.2f} x mlx-lm)"
        )
    print(f"same tokens: {result['same_tokens']}")
    print(json.dumps({"bench": "decode", **conditions, **result}))


if __name__ == "__main__":
    run_program(main)
