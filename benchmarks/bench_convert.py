"""Time and peak memory of the converter, alone at true V3 shapes and beside mlx_lm.convert.

    python benchmarks/bench_convert.py [--folder DIR] [--pairs N] [--skip-large] [--recipe NAME]
                                       [--experts N]

Large: one dense and one MoE layer of DeepSeek-V3 (about 15 GB of FP8; with fewer experts less,
each of its true size), converted to q4 or another recipe. Mid-size: about 0.7 GB, converted by
both programs in turn, and with the fitted levels of q4-fit. Every conversion runs in a process of
its own; times exclude imports, memory is the process's peak less that of an interpreter with MLX
and numpy (the peak resident set; on a Mac that leaves Metal's memory out). Needs 25 GB of free
disk.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from math import ceil, prod
from pathlib import Path

import numpy as np
from conditions import print_conditions
from rich.console import Console
from rich.table import Table

from convert.inventory import HubTensor, main_tensors
from mlx_dsv3.checkpoint.headers import DTYPE_BYTES
from mlx_dsv3.config import ModelArgs
from mlx_dsv3.errors import run_program

ROOT = Path(__file__).parent.parent
SHARD_BYTES = 4_300_000_000
CHUNK = 64 << 20
FP8_ROLES = ("attention", "dense", "shared", "experts_gate_up", "experts_down")
V3 = {
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
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
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    },
}
MID = V3 | {
    "vocab_size": 16384,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "moe_intermediate_size": 1024,
    "num_attention_heads": 16,
    "q_lora_rank": 512,
    "n_routed_experts": 88,
    "n_group": 1,
    "topk_group": 1,
}
OURS = """
import sys, time
from convert.__main__ import main
began = time.perf_counter()
main(["run", *sys.argv[1:3], "--recipe", sys.argv[3]])
print(time.perf_counter() - began)
"""
PEER = """
import sys, time
from mlx_lm.convert import convert
began = time.perf_counter()
convert(sys.argv[1], sys.argv[2], quantize=True, q_bits=4, q_group_size=64)
print(time.perf_counter() - began)
"""
EMPTY = "import mlx.core, numpy; print(0.0)"


def write_checkpoint(folder: Path, config: dict, seed: int = 0) -> int:
    """Write random weights in the hub's layout, piece by piece; return the bytes of all shards."""
    folder.mkdir(parents=True)
    draw, shards, weight_map = np.random.default_rng(seed), [[]], {}
    for tensor in main_tensors(ModelArgs.from_dict(config)):
        stored = stored_tensors(tensor)
        if sum(nbytes(*entry) for entry in shards[-1] + stored) > SHARD_BYTES:
            shards.append([])
        shards[-1] += stored
    for i, entries in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):06d}.safetensors"
        write_shard(folder / name, entries, draw)
        weight_map |= {entry[0]: name for entry in entries}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def stored_tensors(tensor: HubTensor) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return (name, dtype, shape) of a weight and of its scales."""
    if tensor.role in FP8_ROLES:
        blocks = tuple(ceil(n / 128) for n in tensor.shape)
        scale = (tensor.name + "_scale_inv", "F32", blocks)
        return [(tensor.name, "F8_E4M3", tensor.shape), scale]
    return [(tensor.name, "F32" if tensor.role == "bias" else "BF16", tensor.shape)]


def nbytes(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * DTYPE_BYTES[dtype]


def write_shard(path: Path, entries: list, draw: np.random.Generator) -> None:
    header, place = {}, 0
    for name, dtype, shape in entries:
        end = place + nbytes(name, dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, dtype, shape in entries:
            left = nbytes(name, dtype, shape)
            while left:
                count = min(left, CHUNK)
                file.write(random_values(dtype, count, draw))
                left -= count


def random_values(dtype: str, count: int, draw: np.random.Generator) -> bytes:
    """Return `count` bytes of finite random values: codes of any size, scales near 1e-4."""
    size = DTYPE_BYTES[dtype]
    if dtype == "F8_E4M3":
        return (np.frombuffer(draw.bytes(count), np.uint8) & 0xF7).tobytes()  # 0x7F is NaN
    values = draw.random(count // size, np.float32) * 1e-4 + 1e-5
    if dtype == "F32":
        return values.tobytes()
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def write_tokenizer(folder: Path) -> None:
    """Write the smallest tokenizer that mlx_lm.convert accepts."""
    vocab = {"<s>": 0, "</s>": 1, "word": 2}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "word"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def measure(program: str, *argv: str) -> tuple[float, int]:
    """Run a program; return the seconds it prints last and its peak resident bytes."""
    command = [sys.executable, "-c", program, *argv]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    if status:
        raise SystemExit(f"a conversion failed:\n{errors.decode()}")
    scale = 1 if platform.system() == "Darwin" else 1024
    return float(output.split()[-1]), usage.ru_maxrss * scale


def timed(program: str, source: Path, out: Path, recipe: str = "q4") -> tuple[float, int]:
    """Convert into a fresh folder with the source in the page cache, and remove the result."""
    os.sync()
    seconds, peak = measure(program, str(source), str(out), recipe)
    shutil.rmtree(out)
    return seconds, peak


def bench_large(folder: Path, base: int, recipe: str, experts: int) -> dict:
    began = time.perf_counter()
    size = write_checkpoint(folder / "large", V3 | {"n_routed_experts": experts})
    print(f"wrote {size / 1e9:.1f} GB in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    seconds, peak = timed(OURS, folder / "large", folder / "out", recipe)
    shutil.rmtree(folder / "large")
    result = {"source_bytes": size, "seconds": seconds, "peak_bytes": peak - base}
    return result | {"recipe": recipe, "experts": experts}


def bench_mid(folder: Path, base: int, pairs: int) -> dict:
    """Convert with both programs in turn; the first round warms the page cache and is dropped."""
    size = write_checkpoint(folder / "mid", MID)
    programs = {"ours": (OURS, "q4"), "mlx_lm": (PEER, "q4")}
    programs |= {"mixed": (OURS, "q4-mixed"), "fitted": (OURS, "q4-fit")}
    runs: dict[str, list] = {name: [] for name in programs}
    for _ in range(pairs + 1):
        for name, (program, recipe) in programs.items():
            runs[name].append(timed(program, folder / "mid", folder / "out", recipe))
    shutil.rmtree(folder / "mid")
    result = {"source_bytes": size, "pairs": pairs}
    for name, measured in runs.items():
        result[f"{name}_seconds"] = [round(seconds, 3) for seconds, _ in measured[1:]]
        result[f"{name}_peak_bytes"] = max(peak for _, peak in measured[1:]) - base
    return result | {
        "time_ratio": ratio(result["ours_seconds"], result["mlx_lm_seconds"]),
        "fitted_ratio": ratio(result["fitted_seconds"], result["mixed_seconds"]),
    }


def ratio(ours: list[float], theirs: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def print_table(large: dict | None, mid: dict) -> None:
    table = Table("conversion", "source", "seconds", "peak memory")

    def add(name: str, source: int, seconds: float, peak: int) -> None:
        table.add_row(name, f"{source / 1e9:.2f} GB", f"{seconds:.1f}", f"{peak / 1e9:.2f} GB")

    if large:
        add(
            f"V3 shapes, {large['recipe']}",
            large["source_bytes"],
            large["seconds"],
            large["peak_bytes"],
        )
    names = {"ours": "q4", "mlx_lm": "mlx_lm.convert", "mixed": "q4-mixed", "fitted": "q4-fit"}
    for name, words in names.items():
        seconds = statistics.median(mid[f"{name}_seconds"])
        add(f"mid-size, {words}", mid["source_bytes"], seconds, mid[f"{name}_peak_bytes"])
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--pairs", type=int, default=3, help="timed runs of each program")
    parser.add_argument("--skip-large", action="store_true")
    parser.add_argument("--recipe", default="q4", help="of the large conversion (%(default)s)")
    parser.add_argument("--experts", type=int, default=256, help="of its layer (%(default)s)")
    args = parser.parse_args()
    conditions = print_conditions()
    _, base = measure(EMPTY)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        large = (
            None if args.skip_large else bench_large(Path(name), base, args.recipe, args.experts)
        )
        mid = bench_mid(Path(name), base, args.pairs)
    print_table(large, mid)
    print(json.dumps({"bench": "convert", **conditions, "large": large, "mid": mid}))


if __name__ == "__main__":
    run_program(main)
