"""What each recipe costs in quality: KL to float32 on a held-out text, beside its bytes.

    python benchmarks/bench_quality.py [--windows N] [--plot FILE.svg] [--folder DIR]

Converts demo/judge/checkpoint to float32, to every built-in recipe, and with its routed experts
alone at 2, 3 and 4 bits in groups of 32, 64 and 128, all else left in BF16: levels at the extremes,
fitted, and fitted with the weights of an importance file, which it makes from a third text. And
for the bytes of some built-in recipes what `--fit-memory` chooses by layer, with that importance.
`--demo` does the same with demo/checkpoint and conversations that it was not trained on.

Bytes and bits are the main model's, without the MTP module. Bytes per token are what the experts'
counters saw come from disk with a quarter of the slots, after 64 tokens. What is earned is a ratio
of two KLs over the same windows. Prints conditions, tables, and one JSON line last.
"""

import argparse
import contextlib
import io
import json
import math
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from conditions import print_conditions
from rich.console import Console
from rich.table import Table

from convert.__main__ import main as convert
from convert.fit_memory import survey
from convert.planner import build
from convert.recipe import RECIPES, Recipe
from convert.source import Source, open_folder
from demo.corpus import corpus
from demo.tokenizer import render
from mlx_dsv3.checkpoint.folder import Folder, open_model
from mlx_dsv3.checkpoint.importance import Importance
from mlx_dsv3.checkpoint.importance import read as read_importance
from mlx_dsv3.errors import run_program
from mlx_dsv3.importance.__main__ import main as measure_importance
from mlx_dsv3.load import load_model, plan_memory
from mlx_dsv3.memory import sold_limit_bytes
from mlx_dsv3.parity.compare import DRAWS, Comparison, compare, draws, same_windows
from mlx_dsv3.parity.report import check_plot

ROOT = Path(__file__).parent.parent
JUDGE = ROOT / "demo/judge"
LIKE = ("q2-mixed", "q3", "q3-mixed", "q4", "q4-mixed", "q6")  # whose bytes are spent by layer
KINDS = ("extremes", "fitted", "weighted")
BITS, GROUPS = (2, 3, 4), (32, 64, 128)
WARM, COUNTED, SLOTS = 64, 192, 0.25  # tokens; share of the experts in memory
DTYPE = mx.float32


@dataclass(frozen=True)
class Variant:
    """A recipe to measure; bits and group are those of the experts, None for a built-in one."""

    name: str
    kind: str
    bits: int | None = None
    group: int | None = None

    @property
    def recipe(self) -> dict | None:
        """Return the JSON of a recipe for routed experts alone, None for a built-in one."""
        if self.bits is None:
            return None
        experts = {"bits": self.bits, "group_size": self.group}
        levels = "extremes" if self.kind == "extremes" else "fitted"
        roles = {"experts_gate_up": experts, "experts_down": experts}
        return {"name": self.name, "default": None, "mtp": None, "levels": levels} | roles


def variants() -> list[Variant]:
    """Return the built-in recipes, those that are fitted also weighted; then experts alone."""
    found = []
    for name, recipe in RECIPES.items():
        found.append(Variant(name, recipe.levels))
        if recipe.levels == "fitted":
            found.append(Variant(f"{name}, weighted", "weighted"))
    for bits in BITS:
        for group in GROUPS:
            found += [Variant(f"experts {bits}/{group}, {k}", k, bits, group) for k in KINDS]
    return found + [Variant(f"by layer, bytes of {name}", "by layer") for name in LIKE]


def of_size(source: Source, importance: Importance, nbytes: int) -> Recipe:
    """Return the largest recipe of `--fit-memory` whose folder has at most so many bytes."""
    offers, low, high = survey(source, importance=importance), 0.0, 64.0
    while high - low > 1e-7:
        gb = (low + high) / 2
        fits = sold_limit_bytes(gb) < offers.least_bytes
        fits = fits or build(source, offers.fit(gb).recipe).nbytes <= nbytes
        low, high = (gb, high) if fits else (low, gb)
    return offers.fit(low).recipe


@dataclass
class Row:
    """What was measured of one variant."""

    variant: Variant
    nbytes: int
    bits_per_weight: float
    bytes_per_token: float
    numbers: Comparison
    figures: dict

    def as_dict(self) -> dict:
        kept = ("nbytes", "bits_per_weight", "bytes_per_token")
        return asdict(self.variant) | {name: getattr(self, name) for name in kept} | self.figures


def quietly(run, *words) -> None:
    """Run a command line; it says something only where it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = run([str(word) for word in words])
    assert not status, said.getvalue()


class Bench:
    """The folders of one checkpoint, each measured over the same windows."""

    def __init__(self, checkpoint: Path, text: Path, importance_text: Path, work: Path):
        self.checkpoint, self.text, self.work = checkpoint, text, work
        self.float32 = self.convert(Variant("float32", "extremes"))
        self.importance = work / "importance.safetensors"
        if not self.importance.exists():
            words = (self.float32.path, "--text", importance_text, self.importance)
            quietly(measure_importance, *words)
        self.windows: list[list[int]] = []

    def cut(self, context: int, most: int | None) -> None:
        """Cut the text; take `most` windows of it, evenly spaced, so that every kind is there."""
        windows = same_windows(self.float32, self.float32, [self.text], context, False)
        most = min(most or len(windows), len(windows))
        self.windows = [windows[i] for i in np.linspace(0, len(windows) - 1, most).astype(int)]

    def convert(self, variant: Variant) -> Folder:
        name = variant.name.replace(", ", "-").replace(" ", "-").replace("/", "-")
        folder = self.work / name
        if not folder.exists():
            recipe = variant.name.removesuffix(", weighted")
            if variant.recipe is not None:
                recipe = self.work / f"{name}.json"
                recipe.write_text(json.dumps(variant.recipe))
            if variant.kind == "by layer":
                recipe = self.work / f"{name}.json"
                recipe.write_text(json.dumps(self.by_layer(variant.name.split()[-1]).as_dict()))
            words = ["run", self.checkpoint, folder, "--recipe", recipe]
            if variant.kind in ("weighted", "by layer"):
                words += ["--importance", self.importance]
            quietly(convert, *words)
        return open_model(folder, with_mtp=False)

    def by_layer(self, like: str) -> Recipe:
        source = open_folder(self.checkpoint)
        nbytes = build(source, RECIPES[like]).nbytes
        return of_size(source, read_importance(self.importance), nbytes)

    def measure(self, variant: Variant) -> Row:
        folder = self.convert(variant)
        loaders = [partial(load_model, each, dtype=DTYPE) for each in (folder, self.float32)]
        with contextlib.redirect_stderr(io.StringIO()):
            kept = self.work / "kept"
            numbers = compare(folder, self.float32, self.windows, *loaders, DTYPE, kept)
        nbytes = sum(info.nbytes for info in folder.tensors.values())
        num = sum(math.prod(info.shape) for info in self.float32.tensors.values())
        read = bytes_per_token(folder, self.windows[0])
        return Row(variant, nbytes, 8 * nbytes / num, read, numbers, numbers.intervals())


def bytes_per_token(folder: Folder, ids: list[int]) -> float:
    """Return what the counters saw of each token, decoded one by one with a part of the slots."""
    plan = plan_memory(folder, dtype=DTYPE)
    slots = {layer: int(SLOTS * plan.num_experts) for layer in plan.slots}
    with load_model(folder, plan=replace(plan, slots=slots), dtype=DTYPE) as loaded:
        cache, before = loaded.model.make_cache(), 0
        for i, token in enumerate(ids[: WARM + COUNTED]):
            before = loaded.store.counters.nbytes if i == WARM else before
            mx.eval(loaded.model.hidden(mx.array([[token]]), cache))
        return (loaded.store.counters.nbytes - before) / (i + 1 - WARM)


def ratio(a: Row, b: Row) -> tuple[float, float, float]:
    """Return KL of a over KL of b, and its interval: the same draws for both."""

    def mean(counts: np.ndarray) -> np.ndarray:
        x, y = (counts @ row.numbers.sums(row.numbers.divergences) for row in (a, b))
        return x / y

    low, high = np.percentile(mean(draws(len(a.numbers.sizes))), (2.5, 97.5))
    return float(mean(np.ones((1, len(a.numbers.sizes))))[0]), float(low), float(high)


def earned(rows: list[Row]) -> list[dict]:
    """Return what fit, weights and smaller groups change, as ratios of KL."""
    by_key = {(row.variant.bits, row.variant.group, row.variant.kind): row for row in rows}
    pairs = []
    for bits in BITS:
        for group in GROUPS:
            plain, fitted, weighted = ((bits, group, kind) for kind in KINDS)
            pairs += [("fit", fitted, plain), ("weights", weighted, fitted)]
            pairs += [("both", weighted, plain)]
        for kind in KINDS:
            for small, large in ((32, 64), (64, 128)):
                key = f"groups of {small} over {large}, {kind}"
                pairs.append((key, (bits, small, kind), (bits, large, kind)))
    return [
        {"what": what, "bits": a[0], "group": a[1]}
        | dict(zip(("value", "low", "high"), ratio(by_key[a], by_key[b]), strict=True))
        for what, a, b in pairs
        if a in by_key and b in by_key
    ]


def equals(rows: list[Row]) -> list[dict]:
    """Return for each plain recipe the smallest weighted one that is no worse, if it is smaller."""
    found, experts = [], [row for row in rows if row.variant.bits]
    for plain in experts:
        if plain.variant.kind != "extremes":
            continue
        better = [
            row
            for row in experts
            if row.variant.kind == "weighted"
            and row.nbytes < plain.nbytes
            and ratio(row, plain)[0] <= 1
        ]
        if better:
            best = min(better, key=lambda row: row.nbytes)
            names = {"plain": plain.variant.name, "weighted": best.variant.name}
            shares = {"bytes": best.nbytes / plain.nbytes, "kl": ratio(best, plain)}
            found.append(names | shares)
    return found


def print_rows(rows: list[Row]) -> None:
    columns = ("MB", "bits", "KL (95 %)", "p99", "best token", "perplexity", "KB/token")
    table = Table("recipe", *columns)
    for row in rows:
        kl, found = row.figures["kl"], row.figures
        table.add_row(
            row.variant.name,
            f"{row.nbytes / 1e6:.2f}",
            f"{row.bits_per_weight:.2f}",
            f"{kl['value']:.2e} ({kl['low']:.2e} to {kl['high']:.2e})",
            f"{found['kl_p99']['value']:.3g}",
            f"{found['best_token']['value']:.1%}",
            f"x {found['perplexity_ratio']['value']:.4f}",
            f"{row.bytes_per_token / 1e3:.0f}",
        )
    Console(width=130).print(table)


def print_earned(ratios: list[dict], equal: list[dict]) -> None:
    table = Table("what", "bits", "group", "KL over KL (95 %)")
    for each in ratios:
        words = f"{each['value']:.3f} ({each['low']:.3f} to {each['high']:.3f})"
        table.add_row(each["what"], str(each["bits"]), str(each["group"]), words)
    Console(width=130).print(table)
    for each in equal:
        print(
            f"{each['weighted']} for {each['plain']}: {each['bytes']:.2f} of the bytes, "
            f"{each['kl'][0]:.2f} of the KL ({each['kl'][1]:.2f} to {each['kl'][2]:.2f})"
        )


def plot(rows: list[dict], file: Path) -> None:
    """Draw bytes against KL, a line for each way to find the levels; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "quality"  # the same picture each time
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for kind, color in zip(KINDS, ("#888888", "#1f77b4", "#d62728"), strict=True):
        for bits, marker in zip(BITS, "o^s", strict=True):
            of = [row for row in rows if row["kind"] == kind and row["bits"] == bits]
            of.sort(key=lambda row: row["nbytes"])
            x = [row["nbytes"] / 1e6 for row in of]
            y = [row["kl"]["value"] for row in of]
            ends = [[abs(row["kl"][end] - row["kl"]["value"]) for row in of] for end in ENDS]
            label = f"{kind}, {bits} bits"
            axes.errorbar(x, y, ends, color=color, marker=marker, label=label, capsize=3)
    built_in = [row for row in rows if row["bits"] is None and row["kl"]["value"] > 1e-6]
    for row in built_in:
        if row["kind"] == "by layer":
            label = (
                "" if row["name"] != f"by layer, bytes of {LIKE[0]}" else "by layer (--fit-memory)"
            )
            axes.plot(row["nbytes"] / 1e6, row["kl"]["value"], "D", color="#2ca02c", label=label)
            continue
        at = row["nbytes"] / 1e6, row["kl"]["value"]
        axes.plot(*at, "x", color="black", markersize=4)
        axes.annotate(row["name"], at, (4, 3), textcoords="offset points", fontsize=7)
    axes.set(yscale="log", xlabel="MB of the main model", ylabel="KL to float32, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(ncols=3, fontsize=8, title="routed experts alone, groups of 128, 64, 32")
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


ENDS = ("low", "high")


def talks(file: Path, seed: int, num: int = 400) -> Path:
    """Write conversations that the demo model was not trained on."""
    conversations = corpus(num, seed)
    file.write_text("".join(render(each) for each in conversations), encoding="utf-8")
    return file


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", action="store_true", help="the demo model, on conversations")
    parser.add_argument("--checkpoint", type=Path, default=JUDGE / "checkpoint")
    parser.add_argument("--text", type=Path, default=JUDGE / "held_out.txt")
    parser.add_argument("--importance-text", type=Path, default=JUDGE / "importance.txt")
    parser.add_argument("--context", type=int, default=256, help="tokens in a window (256)")
    parser.add_argument("--windows", type=int, help="take so many of them (default: all)")
    parser.add_argument("--only", nargs="+", help="words that a recipe's name begins with")
    parser.add_argument("--folder", type=Path, help="where folders are made and kept")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="bytes against KL")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.plot:
        check_plot(args.plot)
    conditions = print_conditions()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.folder or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        if args.demo:
            args.checkpoint = ROOT / "demo/checkpoint"
            args.text, args.importance_text = (
                talks(work / f"talks-{seed}.txt", seed) for seed in (7, 8)
            )
        bench = Bench(args.checkpoint, args.text, args.importance_text, work)
        bench.cut(args.context, args.windows)
        chosen = [v for v in variants() if v.name.startswith(tuple(args.only or ("",)))]
        rows = [bench.measure(variant) for variant in chosen]
    num = int(rows[0].numbers.sizes.sum())
    print(f"{num:,} tokens in {len(bench.windows)} windows of {args.context}; {DRAWS:,} draws")
    print_rows(rows)
    ratios, equal = earned(rows), equals(rows)
    print_earned(ratios, equal)
    told = [row.as_dict() for row in rows]
    if args.plot:
        plot(told, args.plot)
    about = {"tokens": num, "context": args.context, "demo": args.demo}
    result = {"rows": told, "ratios": ratios, "equals": equal}
    print(json.dumps({"bench": "quality", **conditions, **about, **result}))


if __name__ == "__main__":
    run_program(main)
