"""From the command to the first prompt, and to the answer of a question typed there, beside mlx-lm.

    python benchmarks/bench_start.py [MODEL] [--runs N] [--without-torch]

Without MODEL the demo model. `chat.py` and mlx-lm's chat start in turn, each on a terminal of its
own, idle and with one core busy; a figure is the ratio of the medians (below 1: ours is faster).
The question is typed as soon as the prompt shows. Ours shows it before the model is there, and
leaves out torch where that is installed, which mlx-lm imports; `--without-torch` hides it from
both. Prints conditions, a table, and one JSON line last.
"""

import argparse
import importlib.util
import json
import os
import pty
import select
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from conditions import busy_core, print_conditions

from mlx_dsv3.errors import UserError, run_program

ROOT = Path(__file__).parents[1]
QUESTION, ANSWER = b"What is the capital of France?\r", b"Paris"
LONGEST_S = 120
CURSOR_WANTED, CURSOR = b"\x1b[6n", b"\x1b[1;1R"  # a terminal says where its cursor is
PROGRAMS = {
    "ours": ([str(ROOT / "chat.py")], b">>>"),
    "mlx-lm": (["-m", "mlx_lm", "chat", "--model"], "›".encode()),
}


def read_until(fd: int, words: bytes) -> None:
    """Read what a program writes until the words are there, as a terminal would."""
    seen, deadline = b"", time.monotonic() + LONGEST_S
    while words not in seen:
        ready, _, _ = select.select([fd], [], [], max(deadline - time.monotonic(), 0))
        try:
            data = os.read(fd, 1 << 16) if ready else b""
        except OSError:  # it has ended
            data = b""
        if not data:
            raise UserError(f"`{words.decode()}` did not come; the last words: {seen[-300:]!r}")
        if CURSOR_WANTED in data:
            os.write(fd, CURSOR)
        seen += data


def start(name: str, model: Path) -> tuple[float, float]:
    """Start a chat; return the seconds to its first prompt and to the answer."""
    words, sign = PROGRAMS[name]
    began = time.perf_counter()
    pid, fd = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, *words, str(model)])
    try:
        read_until(fd, sign)
        prompt_s = time.perf_counter() - began
        os.write(fd, QUESTION)
        read_until(fd, ANSWER)
        return prompt_s, time.perf_counter() - began
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(fd)


def sweep(model: Path, runs: int, load: str) -> list[dict]:
    """Start both in turn; print and return a row for the prompt and one for the answer."""
    taken = {name: [] for name in PROGRAMS}
    for _ in range(runs):
        for name in PROGRAMS:
            taken[name].append(start(name, model))
    rows = []
    for i, what in enumerate(("first prompt", "answer")):
        row = {"load": load, "what": what}
        row |= {name: statistics.median(each[i] for each in taken[name]) for name in PROGRAMS}
        row["ratio"] = row["ours"] / row["mlx-lm"]
        rows.append(row)
        print(
            f"{load:<9} {what:<13} ours {row['ours']:.2f} s, mlx-lm {row['mlx-lm']:.2f} s, "
            f"ratio {row['ratio']:.2f}"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=ROOT / "build/demo-q4")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--without-torch", action="store_true")
    options = parser.parse_args()
    has_torch = importlib.util.find_spec("torch") is not None and not options.without_torch
    conditions = print_conditions(runs=options.runs, with_torch=has_torch)
    with tempfile.TemporaryDirectory() as scratch:
        if options.without_torch:
            hiding = 'import sys; sys.modules["torch"] = None'
            Path(scratch, "sitecustomize.py").write_text(hiding)  # Python runs it at each start
        os.environ |= {"TERM": "xterm", "PYTHONPATH": f"{ROOT}{os.pathsep}{scratch}"}
        for name in PROGRAMS:
            start(name, options.model)  # warm-up: files into memory
        rows = sweep(options.model, options.runs, "idle")
        with busy_core():
            rows += sweep(options.model, options.runs, "one busy")
    print(json.dumps({"bench": "start", **conditions, "rows": rows}))


if __name__ == "__main__":
    run_program(main)
