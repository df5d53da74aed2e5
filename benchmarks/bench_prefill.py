"""Prompts on a CPU: seconds by length, beside mlx-lm, idle and with one core busy.

    python benchmarks/bench_prefill.py [MODEL] [--runs N] [--tokens N ...]
    python benchmarks/bench_prefill.py --rows

Without MODEL a random model of 64 experts, about 0.5 GB at 4 bits, is made in a temporary folder.
Four programs take turns in one process: ours; ours with every product left to MLX and, the other
way round, with every product of six tokens or more in NumPy, both up to 64 tokens; and mlx-lm. The
busy core is a second process that counts. `--rows` measures from how many rows on unpacking a
weight and one product in NumPy is faster than MLX's product row by row, by format: the constants
of `cpu.py`. Prints conditions, a table, and one JSON line last.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
from conditions import busy_core, print_conditions
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model as load_in_mlx_lm
from synthetic import BASE, write_folder

from mlx_dsv3.checkpoint.format import Quantization
from mlx_dsv3.errors import run_program
from mlx_dsv3.load import load_model
from mlx_dsv3.model import cpu

TOKENS = (8, 16, 24, 32, 64, 128, 256, 512)
MOST_FORCED = 64  # tokens, of the programs that must not choose
SIZES = ((512, 256), (1024, 1024), (2048, 2048))


def seconds_of(model, ids: mx.array) -> float:
    """Return how long a prompt takes, up to the logits of its last token."""
    cache, start = make_prompt_cache(model), time.perf_counter()
    mx.eval(model(ids, cache=cache)[:, -1], [layer.state for layer in cache])
    return time.perf_counter() - start


@contextmanager
def all_in_mlx() -> Iterator[None]:
    """Leave every product to MLX, as on a GPU."""
    with mock.patch.object(cpu, "takes", lambda *call: False):
        yield


@contextmanager
def all_in_numpy() -> Iterator[None]:
    """Take NumPy for a single row of an expert too."""
    one = mock.patch.object(cpu, "fewest_rows", lambda packing: 1)
    with one, mock.patch.object(cpu, "WAIT_ROWS", 0):
        yield


def programs(folder: Path) -> dict[str, Callable[[mx.array], float | None]]:
    """Return the programs by name; each takes ids (1, L) and returns seconds."""
    ours = load_model(folder, experts="resident").model
    theirs, _ = load_in_mlx_lm(folder, strict=True)
    if mx.default_device() == mx.Device(mx.cpu):
        theirs.set_dtype(mx.float32)

    def forced(how) -> Callable[[mx.array], float | None]:
        def run(ids: mx.array) -> float | None:
            if ids.size > MOST_FORCED:
                return None
            with how():
                return seconds_of(ours, ids)

        return run

    return {
        "ours": lambda ids: seconds_of(ours, ids),
        "MLX": forced(all_in_mlx),
        "NumPy": forced(all_in_numpy),
        "mlx-lm": lambda ids: seconds_of(theirs, ids),
    }


def sweep(sides: dict, tokens: list[int], runs: int, where: str) -> list[dict]:
    """Run every program at every length in turn; print and return one row for each length."""
    rng, rows = np.random.default_rng(0), []
    for length in tokens:
        ids = mx.array(rng.integers(2, 4000, (1, length)))
        times = {name: [] for name in sides}
        for _ in range(runs):
            for name, run in sides.items():
                if (seconds := run(ids)) is not None:
                    times[name].append(seconds)
        row = {"cores": where, "tokens": length}
        for name, measured in times.items():
            if measured:
                row[name] = {"median": statistics.median(measured), "worst": max(measured)}
        rows.append(row)
        cells = [
            f"{name} {row[name]['median']:6.2f} ({row[name]['worst']:6.2f})"
            for name in sides
            if name in row
        ]
        print(f"{where:<9} {length:4d} tokens: {'  '.join(cells)} s", flush=True)
    return rows


def least(function: Callable[[], object], runs: int = 7) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_rows() -> list[dict]:
    """Measure, for each format and size, the rows at which both products take the same time."""
    found = []
    for mode, bits in ((mode, bits) for mode, rows in cpu.FEWEST_ROWS.items() for bits in rows):
        group_size = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}.get(mode, 64)
        for shape in SIZES:
            equal = equal_rows(Quantization(bits, group_size, mode), shape)
            found.append({"mode": mode, "bits": bits, "shape": shape, "rows": equal})
            print(f"{mode} {bits} bits, {shape[0]} x {shape[1]}: equal at {equal:.1f} rows")
    return found


def equal_rows(packing: Quantization, shape: tuple[int, int]) -> float:
    """Return the time of five rows in NumPy, most of it unpacking, over that of a row of MLX's."""
    settings = packing._asdict()
    weight, scales, *rest = mx.quantize(mx.random.normal(shape), **settings)
    biases = rest[0] if rest else None
    x = mx.random.normal((32, shape[1]))
    mx.eval(weight, scales, biases, x)
    few = np.array(x[:5])
    row_s = least(
        lambda: mx.eval(mx.quantized_matmul(x, weight, scales, biases, transpose=True, **settings))
    )
    return least(lambda: cpu.multiply(few, weight, scales, biases, packing)) / (row_s / 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--rows", action="store_true", help="measure the constants of cpu.py")
    options = parser.parse_args()
    if options.rows:
        conditions = print_conditions()
        print(json.dumps({"bench": "rows", **conditions, "rows": measure_rows()}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or write_folder(Path(scratch) / "model", BASE)
        sides = programs(folder)
        conditions = print_conditions(runs=options.runs)
        print("seconds: median (worst)")
        sweep(sides, options.tokens[:2], 1, "warm-up")
        rows = sweep(sides, options.tokens, options.runs, "idle")
        with busy_core():
            rows += sweep(sides, options.tokens, options.runs, "one busy")
    print(json.dumps({"bench": "prefill", **conditions, "rows": rows}))


if __name__ == "__main__":
    run_program(main)
