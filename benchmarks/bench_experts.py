"""Streamed experts: read bandwidth, overlap, prefill, page cache, memory.

    python benchmarks/bench_experts.py [--folder DIR] [reads overlap prefill regime memory]

reads     one MoE layer at true V3 shapes, 4 bits: GB/s of the store over GB/s of bare parallel
          reads of the same byte ranges, cold cache, alternating; records and stacked
overlap   reads slowed on purpose: a step should take max(compute, read), not the sum
prefill   512 tokens at a quarter of the slots: reads by layer, and time beside one by one
regime    decoding with slots alone, and with the system's page cache behind them (Linux)
memory    growth of resident memory beside the plan: prompts of 512 to 6,000 tokens

Prints conditions, tables, and one JSON line last. `reads` needs 13 GB of disk.
"""

import argparse
import dataclasses
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from conditions import print_conditions
from synthetic import BASE, drop_from_page_cache, write_folder

from mlx_dsv3.checkpoint.folder import open_folder
from mlx_dsv3.errors import run_program
from mlx_dsv3.experts.products import HITS_FIRST_AFTER_S, compute_by_id
from mlx_dsv3.experts.reader import NUM_READERS, Files, Job
from mlx_dsv3.experts.store import ExpertStore
from mlx_dsv3.load import load_model, plan_memory

V3_LAYER = BASE | {
    "vocab_size": 1024,
    "hidden_size": 7168,
    "intermediate_size": 256,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 2,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 0,
}
MID = BASE | {"num_hidden_layers": 15, "moe_intermediate_size": 640}
SLOTS = 32
STEPS, MISSES = 10, 8  # a trial: steps that each miss so many experts


def read_bare(requests, fds, buffers, num_threads: int) -> None:
    """Read requests into buffers of their own with threads and nothing else."""
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    for job in enumerate(requests):
        jobs.put(job)

    def work():
        while True:
            try:
                i, request = jobs.get_nowait()
            except queue.Empty:
                return
            view = memoryview(buffers[i])[: request.nbytes]
            done = 0
            while done < request.nbytes:
                done += os.preadv(fds[request.path], [view[done:]], request.offset + done)

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def bench_reads(root: Path, dtype: mx.Dtype = mx.bfloat16, trials: int = 7) -> list[dict]:
    """Compare the store with bare reads on cold files, in turn, by arrangement."""
    rows = []
    for layout in ("records", "stacked"):
        folder = root / f"v3-layer-{layout}"
        if not folder.is_dir():
            write_folder(folder, V3_LAYER, layout=layout)
        opened = open_folder(folder)
        store = ExpertStore(opened.all_tensors, opened.args, dtype, {1: SLOTS})
        bank = store.open_layer(1)
        buffers = [bytearray(16 << 20) for _ in range(9 * MISSES)]
        files = Files()  # bare reads bypass the page cache where the store's do
        fds = {path: files.open(path) for path in folder.glob("*.safetensors")}
        rng, ratios, speeds = np.random.default_rng(0), [], []
        for trial in range(trials):
            chosen = rng.permutation(256)[: STEPS * MISSES].reshape(STEPS, MISSES)
            nbytes = sum(r.nbytes for e in chosen.flat for r in bank.requests[e])
            seconds = {}
            for kind in ("store", "bare") if trial % 2 else ("bare", "store"):
                drop_from_page_cache(folder)
                bank.forget(bank.expert_in[bank.expert_in != -1])
                start = time.perf_counter()
                for experts in chosen:
                    if kind == "store":
                        bank.begin(experts.astype(np.int32)).wait()
                    else:
                        requests = [r for e in experts for r in bank.requests[e]]
                        read_bare(requests, fds, buffers, NUM_READERS)
                seconds[kind] = time.perf_counter() - start
            ratios.append(seconds["bare"] / seconds["store"])
            speeds.append(nbytes / seconds["store"] / 1e9)
        store.close()
        files.close()
        row = {"layout": layout, "dtype": str(dtype), "GB/s": statistics.median(speeds)}
        row |= {"ratio": statistics.median(ratios), "ratios": [round(r, 3) for r in ratios]}
        rows.append(row)
        print(
            f"reads  {layout:<8} {row['dtype'].removeprefix('mlx.core.'):<9}"
            f"{row['GB/s']:.2f} GB/s, {row['ratio']:.3f} of bare reads {row['ratios']}"
        )
    return rows


def slowed(read, delay_s: float):
    """Return a reader that takes `delay_s` longer for each request, side by side."""

    def slow(job: Job) -> None:
        time.sleep(delay_s)
        read(job)

    return slow


def throttled(read, bytes_per_s: float):
    """Return a reader behind one disk of the given bandwidth."""
    disk = threading.Lock()

    def slow(job: Job) -> None:
        with disk:
            time.sleep(job.nbytes / bytes_per_s)
        read(job)

    return slow


def bench_overlap(root: Path) -> list[dict]:
    """Slow every read and compare a step's time with max(compute, read) and with the sum."""
    folder = root / "v3-layer-records"
    if not folder.is_dir():
        write_folder(folder, V3_LAYER)
    opened = open_folder(folder)
    store = ExpertStore(opened.all_tensors, opened.args, mx.float32, {1: SLOTS})
    bank = store.open_layer(1)
    x = mx.random.normal((2, 7168), key=mx.random.key(0))
    read = store.reader.read
    hits = np.arange(12, dtype=np.int32)
    rows = []

    def step(experts: np.ndarray) -> float:
        start = time.perf_counter()
        mx.eval(compute_by_id(bank, x, experts.reshape(2, 8)))
        return time.perf_counter() - start

    def resident(experts: np.ndarray) -> float:
        bank.begin(np.unique(experts)).wait()
        return statistics.median(step(experts) for _ in range(5))

    hit_s = resident(np.concatenate([hits, hits[:4]]))  # 16 rows, all there
    for delay_s in (0.25 * hit_s, hit_s, 2 * hit_s):
        times = []
        for trial in range(5):
            missing = np.arange(20 + 4 * trial, 24 + 4 * trial, dtype=np.int32)
            experts = np.concatenate([hits, missing])  # 12 rows there, 4 to read
            bank.forget(bank.expert_in[bank.expert_in != -1])
            bank.begin(hits).wait()
            store.reader.read = slowed(read, delay_s)
            times.append(step(experts))
            store.reader.read = read
        per_row = hit_s / 16
        hits_s, misses_s = 12 * per_row, 4 * per_row
        predicted = max(hits_s, delay_s) + misses_s
        row = {"read_s": delay_s, "step_s": statistics.median(times), "predicted_s": predicted}
        row |= {"sum_s": hits_s + delay_s + misses_s, "over": row["step_s"] / predicted}
        rows.append(row)
        print(
            f"overlap  read {delay_s * 1e3:.0f} ms: step {row['step_s'] * 1e3:.0f} ms, predicted "
            f"{predicted * 1e3:.0f} ({row['over']:.2f}), the sum {row['sum_s'] * 1e3:.0f}"
        )
    store.close()
    return rows


def load_with_slots(folder: Path, share: float):
    plan = plan_memory(folder)
    slots = {layer: max(6, int(plan.num_experts * share)) for layer in plan.slots}
    return load_model(folder, plan=dataclasses.replace(plan, slots=slots))


def bench_prefill(root: Path) -> list[dict]:
    """Time 512 tokens at a quarter of the slots, in one chunk and (64 of them) one by one.

    Three times: in 4 bits, where MLX's CPU backend computes row by row, slower than this disk
    reads; the same behind a disk so slow that reading is dear, as it is beside a GPU (an expert
    takes as long as 30 rows of it; a Mac's ratio is above 100); and unquantised, where there is
    seven times as much to read. Files are cold each time.
    """
    config = BASE | {"num_hidden_layers": 4, "hidden_size": 512}
    rows = [prefill_row(root, config, "q4", slow) for slow in (False, True)]
    return [*rows, prefill_row(root, config, "float32", False)]


def prefill_row(root: Path, config: dict, recipe: str, is_slow: bool) -> dict:
    """Measure one folder; see `bench_prefill`."""
    folder = root / f"small-{recipe}"
    if not folder.is_dir():
        write_folder(folder, config, recipe)
    loaded = load_with_slots(folder, 0.25)
    model, store, args = loaded.model, loaded.store, loaded.args
    ids = mx.array(np.random.default_rng(0).integers(0, args.vocab_size, (1, 512)))
    bank, speed = store.banks[1], None
    if is_slow:
        start = time.perf_counter()
        mx.eval(compute_by_id(bank, mx.zeros((64, 512)), np.zeros((64, 1), np.int32)))
        row_s = (time.perf_counter() - start) / 64
        speed = sum(request.nbytes for request in bank.requests[0]) / (30 * row_s)
        store.reader.read = throttled(store.reader.read, speed)
    for each in store.banks.values():
        each.forget(each.expert_in[each.expert_in != -1])
    before = {layer: each.counters.misses for layer, each in store.banks.items()}
    drop_from_page_cache(folder)
    start = time.perf_counter()
    mx.eval(model.hidden(ids, model.make_cache()))
    chunk_s = time.perf_counter() - start
    most = max(each.counters.misses - before[layer] for layer, each in store.banks.items())
    drop_from_page_cache(folder)
    cache, start = model.make_cache(), time.perf_counter()
    for i in range(64):
        mx.eval(model.hidden(ids[:, i : i + 1], cache))
    single_s = (time.perf_counter() - start) * 8
    store.close()
    row = {"recipe": recipe, "disk_bytes_s": speed, "chunk_s": chunk_s, "one_by_one_s": single_s}
    row |= {"ratio": single_s / chunk_s, "reads_a_layer": most}
    disk = "this disk" if speed is None else f"a disk of {speed / 1e6:.0f} MB/s"
    print(
        f"prefill  512 tokens, {recipe}, {disk}: {chunk_s:.1f} s in one chunk, {single_s:.1f} s "
        f"one by one ({row['ratio']:.1f} x); reads per layer: {most} of {args.n_routed_experts}"
    )
    return row


def bench_regime(root: Path, tokens: int = 40) -> list[dict]:
    """Decode with slots alone, with the page cache behind them, and with it for half of them.

    Without the page cache every range is dropped from it once it was read (Linux): what the slots
    miss comes from the disk. Page cache and slots may hold the same bytes; `memory` counts both.
    """
    folder, rows = root / "mid", []
    if not folder.is_dir():
        write_folder(folder, MID)
    size = sum(path.stat().st_size for path in folder.glob("model-experts*"))
    for share, keeps in ((0.5, False), (0.25, True), (0.25, False), (0.5, True)):
        loaded = load_with_slots(folder, share)
        model, store, args = loaded.model, loaded.store, loaded.args
        if not keeps:
            store.reader.read = dropping(store)
        ids = np.random.default_rng(0).integers(0, args.vocab_size, 8 + tokens).tolist()
        cache, times = model.make_cache(), []
        drop_from_page_cache(folder)
        for i, token in enumerate(ids):
            start = time.perf_counter()
            mx.eval(model.hidden(mx.array([[token]]), cache))
            times += [time.perf_counter() - start] if i >= 8 else []
        slots = sum(bank.nbytes for bank in store.banks.values())
        memory = slots + (size if keeps else 0)
        store.close()
        row = {"slots": share, "page_cache": keeps, "ms": 1e3 * statistics.median(times)}
        rows.append(row | {"memory_gb": memory / 1e9})
        print(
            f"regime  {share:.0%} of the slots, page cache {'kept' if keeps else 'dropped'}: "
            f"{row['ms']:.0f} ms per token, at most {memory / 1e9:.2f} GB"
        )
    return rows


def dropping(store: ExpertStore):
    """Return the store's reader, after which the bytes leave the page cache."""
    read, files = store.reader.read, store.reader.files

    def read_and_drop(job: Job) -> None:
        read(job)
        os.posix_fadvise(files.open(job.path), job.offset, job.nbytes, os.POSIX_FADV_DONTNEED)

    return read_and_drop


CHILD = """
import sys, json, mlx.core as mx, numpy as np
from pathlib import Path
from mlx_dsv3.generate import make_state, prefill
from mlx_dsv3.load import load_model, plan_memory
def resident(what):
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))
folder, experts, budget, tokens = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
mx.eval(mx.zeros((64, 64)) @ mx.zeros((64, 64)))
before = resident('VmRSS')
budget = {} if experts == 'resident' else {'expert_memory_gb': float(budget)}
plan = plan_memory(folder, experts=experts, context=tokens + 16, **budget)
with load_model(folder, plan=plan) as loaded:
    mx.reset_peak_memory()
    ids = np.random.default_rng(0).integers(0, loaded.args.vocab_size, tokens).tolist()
    for _ in prefill(loaded.model, loaded.mtp, make_state(loaded), ids, plan.prefill_chunk):
        pass
    peak = mx.get_peak_memory()
print(json.dumps([resident('VmHWM') - before, peak, plan.total_bytes]))
"""
PROMPTS = (512, 2500, 6000)
SMALL = MID | {"num_hidden_layers": 3}  # what a prompt takes is of one layer


def bench_memory(root: Path) -> list[dict]:
    """Compare the growth of resident memory with the plan, each in a process of its own (Linux).

    At its worst moment, the load included: the peak that the system saw, of which malloc keeps
    some, and MLX's own peak, which NumPy's arrays and the threads are not in.
    """
    folder, rows = root / "small-memory", []
    if not folder.is_dir():
        write_folder(folder, SMALL)
    plan = plan_memory(folder, experts="resident")
    least = 1.01 * SMALL["num_experts_per_tok"] * sum(plan.slot_bytes.values()) / 1e9
    for experts in ("resident", "streamed"):
        for tokens in PROMPTS:
            command = [sys.executable, "-c", CHILD, str(folder), experts, str(least), str(tokens)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            grown, peak, planned = json.loads(done.stdout.splitlines()[-1])
            row = {"experts": experts, "tokens": tokens, "grown": grown, "mlx_peak": peak}
            rows.append(row | {"planned": planned, "ratio": grown / planned})
            print(
                f"memory  {experts}, prompt of {tokens:,} tokens: grew {grown / 1e6:.0f} MB (MLX's "
                f"peak {peak / 1e6:.0f}), planned {planned / 1e6:.0f} MB ({grown / planned:.3f})"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["reads", "overlap", "prefill", "regime", "memory"]
    parser.add_argument("parts", nargs="*", default=parts, metavar="PART")
    parser.add_argument("--folder", type=Path, help="where inputs are made and kept")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(parts):
        parser.error(f"`{min(unknown)}` is not a part; the parts are {', '.join(parts)}")
    conditions = print_conditions(readers=NUM_READERS, hits_first_after_ms=HITS_FIRST_AFTER_S * 1e3)
    with tempfile.TemporaryDirectory() as scratch:
        root = options.folder or Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        result = {}
        if "reads" in options.parts:
            result["reads"] = bench_reads(root) + bench_reads(root, mx.float32, trials=3)
        if "overlap" in options.parts:
            result["overlap"] = bench_overlap(root)
        if "prefill" in options.parts:
            result["prefill"] = bench_prefill(root)
        if "regime" in options.parts:
            result["regime"] = bench_regime(root)
        if "memory" in options.parts:
            result["memory"] = bench_memory(root)
    print(json.dumps({"bench": "experts", **conditions, **result}))


if __name__ == "__main__":
    run_program(main)
