"""Measure every recipe on the demo model against its golden files: the source of `bounds.py`.

    python benchmarks/bench_parity.py [--folder DIR] [--recipes q8 q4 ...] [--golden FILE ...]
    python benchmarks/bench_parity.py --short 6 [--seed 1] [--recipes q8 q4 ...]
    python benchmarks/bench_parity.py --checkpoint demo/judge/checkpoint --golden FILE ...

Converts demo/checkpoint, or another one, with each recipe and replays tests/golden/, free and
teacher-forced. Prints the largest value of each measure over all stages, and the text's. Errors of
one source alone are the rows against `demo-float32`; what FP8 arithmetic adds shows where the
recipe is float32 and the golden file is FP8.

`--short` asks another question: of so many texts of 20, 50 and 100 tokens, drawn from the corpus of
the demo model and recorded here, how many is a right conversion outside the bounds of?
"""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

import mlx.core as mx
import torch
from conditions import print_conditions
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from convert.__main__ import main as convert
from convert.recipe import RECIPES
from demo.corpus import corpus
from demo.tokenizer import render
from mlx_dsv3.errors import run_program
from mlx_dsv3.parity.__main__ import main as parity
from mlx_dsv3.reference import record

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "demo/checkpoint"
COLUMNS = ("error", "worst", "channel", "router", "outside ties", "KL", "perplexity", "best token")


def convert_to(folder: Path, checkpoint: Path = CHECKPOINT) -> Path:
    """Convert a checkpoint with the recipe of the folder's name."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        convert(["run", str(checkpoint), str(folder), "--recipe", folder.name])
    return folder


def report_of(folder: Path, golden: Path, *more: str) -> dict:
    """Return the JSON report of one replay, whatever its verdict."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        parity([str(folder), str(golden), "--json", *more])
    return json.loads(out.getvalue())


def summary(report: dict) -> dict:
    """Return the worst of each measure over stages, and of the text's over both modules."""
    texts = [text for text in (report["text"], report["mtp"]) if text]
    routed = [stage for stage in report["stages"] if stage["router"] is not None]
    return {
        "error": max(stage["error"] for stage in report["stages"]),
        "worst": max(stage["worst"] for stage in report["stages"]),
        "channel": max(stage["channel"] for stage in report["stages"]),
        "router": min(stage["router"] for stage in routed),
        "outside ties": min(stage["router_outside_ties"] for stage in routed),
        "KL": max(text["kl"] for text in texts),
        "perplexity": max(abs(t["perplexity"] / t["golden_perplexity"] - 1) for t in texts),
        "best token": min(text["top1_outside_ties"] for text in texts),
        "breaches": len(report["breaches"]),
    }


def texts(num: int, length: int, seed: int) -> list[list[int]]:
    """Return ids of the first tokens of conversations that nobody trained on."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    talks, found = corpus(10**9, seed), []
    while len(found) < num:
        ids = []
        while len(ids) < length:
            more = tokenizer.encode(render(next(talks)), add_special_tokens=False).ids
            ids += more if not ids else more[1:]  # one BOS
        found.append(ids[:length])
    return found


def record_each(prompts: list[list[int]], arithmetic: str, work: Path) -> list[Path]:
    """Return a golden file for each prompt, from one recording."""
    argv = [str(CHECKPOINT), str(work / "all"), "--arithmetic", arithmetic, "--device", "cpu"]
    for p, ids in enumerate(prompts):
        (work / f"{p}.json").write_text(json.dumps(ids))
        argv += ["--prompt-file", str(work / f"{p}.json")]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        record.main(argv)
    tensors, about = mx.load(str(work / "all"), format="safetensors", return_metadata=True)
    parts = [dict() for _ in prompts]
    for name, tensor in tensors.items():
        p, _, rest = name.partition(".")
        parts[int(p)][f"0.{rest}"] = tensor
    files = [work / f"{p}.safetensors" for p in range(len(prompts))]
    for file, part in zip(files, parts, strict=True):
        mx.save_safetensors(str(file), part, about)
    return files


def measure_short(args: argparse.Namespace, folders: dict[str, Path], work: Path) -> list[dict]:
    """Return how many of the texts each recipe is outside of, by length and arithmetic."""
    rows = []
    for length in (20, 50, 100):
        for arithmetic in ("float32", "fp8"):
            place = work / f"{arithmetic}-{length}"
            place.mkdir()
            goldens = record_each(texts(args.short, length, args.seed), arithmetic, place)
            for recipe, folder in folders.items():
                outside = sum(bool(report_of(folder, golden)["breaches"]) for golden in goldens)
                row = {"recipe": recipe, "arithmetic": arithmetic, "tokens": length}
                rows.append(row | {"texts": len(goldens), "outside": outside})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to convert (default: temporary)")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="of --golden's files")
    parser.add_argument("--golden", type=Path, nargs="+", help="default: tests/golden/")
    parser.add_argument("--short", type=int, metavar="N", help="texts of each length to judge")
    parser.add_argument("--seed", type=int, default=1, help="of --short's texts (default: 1)")
    args = parser.parse_args()
    files = args.golden or sorted((ROOT / "tests/golden").glob("*.safetensors"))
    conditions = print_conditions()
    table, rows = Table("recipe", "golden", "mode", *COLUMNS, ""), []
    if args.short:
        torch.set_num_threads(1)  # at these sizes threads cost more than they give
        with tempfile.TemporaryDirectory(dir=args.folder) as work:
            folders = {recipe: convert_to(Path(work) / recipe) for recipe in args.recipes}
            rows = measure_short(args, folders, Path(work))
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*map(str, row.values()))
        Console(width=140).print(table)
        print(json.dumps({"bench": "parity, short texts", **conditions, "rows": rows}))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        for recipe in args.recipes:
            folder = convert_to(Path(work) / recipe, args.checkpoint)
            for golden in files:
                modes = [("free",)]
                if recipe not in ("float32", "bf16"):  # MLX's CPU backend multiplies those in F32
                    modes.append(("free, bf16", "--dtype", "bfloat16"))
                if "long" not in golden.name:
                    modes.append(("teacher-forced", "--teacher-forced"))
                for mode, *flags in modes:
                    found = summary(report_of(folder, golden, *flags))
                    rows.append({"recipe": recipe, "golden": golden.stem, "mode": mode} | found)
                    values = [found[column] for column in COLUMNS]
                    mark = "outside" if found["breaches"] else ""
                    table.add_row(recipe, golden.stem, mode, *(f"{v:.2g}" for v in values), mark)
    Console(width=140).print(table)
    print(json.dumps({"bench": "parity", **conditions, "rows": rows}))


if __name__ == "__main__":
    run_program(main)
