"""Drafting with the MTP module: what it accepts, what a step costs, what comes of it.

    python benchmarks/bench_mtp.py [--only demo|mid|streamed|acceptance] [--prompts N] [--tokens N]
    python benchmarks/bench_mtp.py --model judge --only acceptance --prompts 10

For each model: acceptance by position; A, the mean tokens of a step; R, the time of a step with k
drafts (drafting and verification, alone, again and again from one state) over that of a plain
step; the ideal speed-up A / R; the realised one, of replies with k drafts over plain replies.
All modes take turns on every prompt in one process; `realised` is the ratio of their summed
seconds. `auto` is one control for all prompts, its search included. No reply ends at an end token.
Streamed: expert reads for each token. Acceptance: coupled sampling beside rejection sampling,
which accepts the sum of min(p, q).

MLX's CPU backend computes quantised products row by row, so there R is near 1 + k; with float32 and
a fast BLAS it is lower. Run it both ways (threads of OpenBLAS that wait for work disturb others):

    export OPENBLAS_NUM_THREADS=1
    export LD_PRELOAD=/usr/lib/x86_64-linux-gnu/openblas-pthread/libblas.so.3
    python benchmarks/bench_mtp.py
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import subjects
from conditions import print_conditions
from rich.console import Console
from rich.table import Table
from subjects import Subject

from mlx_dsv3.decoding.draft_control import MAX_DRAFTS, DraftControl
from mlx_dsv3.decoding.draft_stats import DraftStats
from mlx_dsv3.decoding.sampler import Sampler
from mlx_dsv3.decoding.state import State
from mlx_dsv3.decoding.steps import Stepper, decode
from mlx_dsv3.errors import run_program
from mlx_dsv3.generate import prefill

MODES = (0, 1, 2, 3, 4, "auto")
MAC_RATIOS = (1.2, 1.4, 1.6)  # R of one draft as reported for Macs
TEMPERATURES = (0.3, 0.6, 1.0)
COUPLED_SEEDS = 40


def start(subject: Subject, ids: list[int], drafts=1, sampler=None) -> Stepper:
    """Prefill a prompt; return what decodes on from there."""
    cache = None if drafts == 0 else subject.mtp.make_cache()
    state = State(subject.model.make_cache(), cache)
    for _ in prefill(subject.model, subject.mtp, state, ids, subject.chunk):
        pass
    return Stepper(subject.model, subject.mtp, state, sampler or Sampler(), subject.mask)


def reply(subject: Subject, ids: list[int], tokens: int, control: DraftControl) -> tuple:
    """Decode one reply; return its tokens, seconds, draft statistics, and expert counters."""
    stepper, stats = start(subject, ids, control.fixed), DraftStats()
    before, begin = subject.store.counters, time.perf_counter()
    text = list(decode(stepper, ids[-1], tokens, control, stats))
    return text, time.perf_counter() - begin, stats, subject.store.counters - before


def run_modes(subject: Subject, tokens: int, modes=MODES) -> dict:
    """Decode every prompt in every mode, in turn; the order changes from prompt to prompt."""
    controls = {mode: DraftControl(fixed=None if mode == "auto" else mode) for mode in modes}
    runs = {mode: [] for mode in modes}
    for mode in modes:
        reply(subject, subject.prompts[0], 6, DraftControl(fixed=controls[mode].fixed))  # warm-up
    for i, ids in enumerate(subject.prompts):
        order = modes[i % len(modes) :] + modes[: i % len(modes)]
        texts = {}
        for mode in order:
            texts[mode], *rest = reply(subject, ids, tokens, controls[mode])
            runs[mode].append(rest)
        assert all(text == texts[0] for text in texts.values()), f"prompt {i} differs"
    return runs


def step_ratios(subject: Subject, rounds: int) -> list[float]:
    """Return R by number of drafts: a step from one state over a plain step, in turn."""
    ids = subject.prompts[0]
    stepper = start(subject, ids)
    state, times = stepper.state, {k: [] for k in range(MAX_DRAFTS + 1)}
    length, pairs, pending = len(state.ids), state.mtp_pairs, list(state.pending)
    for _ in range(rounds):
        for k in times:
            begin = time.perf_counter()
            if k:
                stepper.speculate(ids[-1], k)
                times[k].append(time.perf_counter() - begin)
            else:  # plain steps overlap: a run of them
                run = stepper.plain(ids[-1], 5, lambda: True)
                next(run)
                begin = time.perf_counter()
                for _ in range(3):
                    next(run)
                times[0].append((time.perf_counter() - begin) / 3)
            del state.ids[length:]
            state.mtp_pairs, state.pending = pairs, list(pending)
            state.align()
    return [statistics.median(times[k]) / statistics.median(times[0]) for k in times]


def summarise(subject: Subject, tokens: int, rounds: int) -> dict:
    ratios, runs = step_ratios(subject, rounds), run_modes(subject, tokens)
    rows = {}
    for k in range(1, MAX_DRAFTS + 1):
        row = describe(runs, k)
        ideal, realised = row["A"] / ratios[k], row["realised"]
        row |= {"R": ratios[k], "ideal": ideal, "of ideal": realised / ideal}
        rows[str(k)] = row
    rows["auto"] = describe(runs, "auto")
    one = rows["1"]["A"]
    return {
        "model": subject.name,
        "plain_tokens_s": tokens * len(runs[0]) / sum(run[0] for run in runs[0]),
        "modes": rows,
        "one_draft_at_R": {str(ratio): one / ratio for ratio in MAC_RATIOS},
    }


def describe(runs: dict, mode: int | str) -> dict:
    """Return acceptance, tokens per step, speed-up over plain replies; for `auto`, its steps."""
    stats = [run[1] for run in runs[mode]]
    drafted, accepted, steps = (sum_of(stats, name) for name in ("drafted", "accepted", "steps"))
    row = {
        "accepted": [a / d for d, a in zip(drafted, accepted, strict=True) if d],
        "A": sum(s.tokens for s in stats) / sum(steps),
        "realised": sum(run[0] for run in runs[0]) / sum(run[0] for run in runs[mode]),
    }
    return row | ({"steps": steps} if mode == "auto" else {})


def sum_of(stats: list[DraftStats], name: str) -> list[int]:
    return np.sum([getattr(s, name) for s in stats], axis=0).tolist()


def summarise_noise(subject: Subject, tokens: int) -> dict:
    """Return what `auto` keeps of plain speed when every draft is in vain."""
    runs = run_modes(subject, tokens, (0, "auto"))
    return {"model": subject.name, "modes": {"auto": describe(runs, "auto")}}


def summarise_reads(subject: Subject, tokens: int) -> dict:
    """Return expert reads and milliseconds for each token, by mode, with experts streamed."""
    runs, rows = run_modes(subject, tokens), {}
    count = tokens * len(subject.prompts)
    for mode in MODES:
        misses = sum(counters.misses for _, _, counters in runs[mode])
        hits = sum(counters.hits for _, _, counters in runs[mode])
        seconds = sum(seconds for seconds, _, _ in runs[mode])
        rows[str(mode)] = {
            "reads per token": misses / count,
            "hit rate": hits / (hits + misses),
            "ms per token": 1e3 * seconds / count,
        }
    rows["auto"]["steps"] = sum_of([stats for _, stats, _ in runs["auto"]], "steps")
    return {"model": subject.name, "modes": rows}


def acceptance_rates(subject: Subject, tokens: int, temp: float) -> tuple[float, float]:
    """Return first-draft acceptance of coupled and of rejection sampling on sampled text."""
    coupled, rejection = [], []
    mask = 0 if subject.mask is None else subject.mask
    for i, ids in enumerate(subject.prompts):
        sampler = Sampler(temp=temp, seed=i)
        text = list(
            decode(
                start(subject, ids, 0, sampler),
                ids[-1],
                tokens,
                DraftControl(fixed=0),
                DraftStats(),
            )
        )
        full = mx.array([ids + text])
        g = subject.model.hidden(full)
        first = len(ids)  # row j of q and row j + 1 of p are about the token at j + 2
        p = subject.model.lm_head(g)[0, first:-1] + mask
        q = subject.mtp(g[:, :-1], full[:, 1:])[0][0, first - 1 : -1] + mask
        both = mx.minimum(mx.softmax(p / temp, axis=-1), mx.softmax(q / temp, axis=-1))
        rejection += both.sum(-1).tolist()
        for seed in range(COUPLED_SEEDS):
            sampler = Sampler(temp=temp, seed=1000 + seed)
            coupled.append((sampler(p, first + 1) == sampler(q, first + 1)).mean().item())
    return float(np.mean(coupled)), float(np.mean(rejection))


def rounded(value):
    """Return numbers with three decimals, inside lists and dictionaries too."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return round(value, 3) if isinstance(value, float) else value


def print_tables(results: list[dict]) -> None:
    for result in results:
        table, rows = Table(title=result["model"], title_justify="left"), result["modes"]
        columns = list(dict.fromkeys(key for row in rows.values() for key in row))
        for column in ("drafts", *columns):
            table.add_column(column)
        for mode, row in rows.items():
            words = [str(row.get(column, "")).strip("[]") for column in columns]
            table.add_row(mode, *words)
        Console(width=120).print(table)
        rest = {key: value for key, value in result.items() if key not in ("model", "modes")}
        if rest:
            print(json.dumps(rest), end="\n\n")


def measure(args: argparse.Namespace, work: Path) -> list[dict]:
    results, wanted = [], (args.only,) if args.only else ("demo", "mid", "streamed", "acceptance")
    if "demo" in wanted:
        for recipe in args.recipes:
            subject = subjects.trained(work, args.model, recipe, args.prompts)
            results.append(summarise(subject, args.tokens, rounds=40))
            results.append(summarise_noise(subjects.spoil(subject), args.tokens))
    if "mid" in wanted:
        for recipe in args.recipes:
            subject = subjects.mid(work, recipe, max(args.prompts // 2, 3))
            results.append(summarise(subject, args.tokens, rounds=7))
            results.append(summarise_noise(subjects.spoil(subject), args.tokens))
            shutil.rmtree(work / f"mid-{recipe}")
    if "streamed" in wanted:
        subject = subjects.trained(work, args.model, "q4", args.prompts, slots=8)
        results.append(summarise_reads(subject, args.tokens))
    if "acceptance" in wanted:
        subject, rows = subjects.trained(work, args.model, "q4", 3 * args.prompts), {}
        for temp in TEMPERATURES:
            coupled, rejection = acceptance_rates(subject, args.tokens, temp)
            rows[f"1 at {temp}"] = {"coupled": coupled, "rejection": rejection}
        results.append({"model": f"{subject.name}: acceptance at temperatures", "modes": rows})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("demo", "mid", "streamed", "acceptance"))
    parser.add_argument(
        "--model", choices=tuple(subjects.CHECKPOINTS), default="demo", help="in the demo's place"
    )
    parser.add_argument(
        "--recipes", nargs="+", choices=("q4", "float32"), default=("q4", "float32")
    )
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    conditions = print_conditions(prompts=args.prompts, tokens=args.tokens)
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        results = rounded(measure(args, Path(work)))
    print_tables(results)
    print(json.dumps({"bench": "mtp", **conditions, "results": results}))


if __name__ == "__main__":
    run_program(main)
