"""Measure every recipe on the demo model against its golden files: the source of `bounds.py`.

    python benchmarks/bench_parity.py [--folder DIR] [--recipes q8 q4 ...] [--golden FILE ...]

Converts demo/checkpoint with each recipe and replays tests/golden/, free and teacher-forced.
Prints the largest value of each measure over all stages, and the text's. Errors of one source
alone are the rows against `demo-float32`; what FP8 arithmetic adds shows where the recipe is
float32 and the golden file is FP8.
"""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

from conditions import print_conditions
from rich.console import Console
from rich.table import Table

from convert.__main__ import main as convert
from convert.recipe import RECIPES
from mlx_dsv3.errors import run_program
from mlx_dsv3.parity.__main__ import main as parity

ROOT = Path(__file__).parent.parent
COLUMNS = ("error", "worst", "channel", "router", "outside ties", "KL", "perplexity", "best token")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to convert (default: temporary)")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--golden", type=Path, nargs="+", help="default: tests/golden/")
    args = parser.parse_args()
    files = args.golden or sorted((ROOT / "tests/golden").glob("*.safetensors"))
    conditions = print_conditions()
    table, rows = Table("recipe", "golden", "mode", *COLUMNS, ""), []
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        for recipe in args.recipes:
            folder = Path(work) / recipe
            with contextlib.redirect_stdout(io.StringIO()):
                convert(["run", str(ROOT / "demo/checkpoint"), str(folder), "--recipe", recipe])
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
