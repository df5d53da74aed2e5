"""Run the lane: `python -m fuzz --seed S --count N`, or `--seconds T`, `--only NUMBER`, `--plants`.

This process imports everything once and never runs an MLX operation, so that it may fork: each
input runs in a child with limits of time and memory, in a folder of its own. An input that the
judge does not like is kept in `build/fuzz/SEED-NUMBER`, with its command line and what it printed.
"""

import argparse
import gc
import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

from fuzz import inputs
from fuzz.judge import PEAK_BYTES, SECONDS, Outcome, fault
from fuzz.plants import PLANTS, Plant
from fuzz.seeds import build
from mlx_dsv3.errors import run_program

KEPT = Path("build/fuzz")
LATE = (  # what programs and packages import when they need it: here once for all children
    *("mlx_dsv3.conversation.session", "mlx_dsv3.terminal.repl", "mlx_dsv3.terminal.start"),
    *("torch._dynamo", "numpy.ctypeslib", "numpy.ma", "rich._emoji_codes"),
    *("mlx_lm.models.deepseek_v3", "encodings.utf_8_sig", "encodings.unicode_escape"),
)


class Lane:
    """Inputs of one seed, by their numbers; `found` are the faults by number."""

    def __init__(self, seed: int, jobs: list[str] | None, processes: int):
        self.seed, self.jobs, self.processes = seed, jobs, processes
        self.plant: Plant | None = None
        self.places: list[str] | None = None
        self.root = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.seeds = self.root / "seeds"
        self.seeds.mkdir()
        build(self.seeds)
        self.running: dict[int, int] = {}
        self.found: dict[int, str] = {}
        self.ran, self.statuses, self.cpu_s = Counter(), Counter(), Counter()
        self.peak_bytes, self.longest = 0, 0.0

    def start(self, number: int) -> None:
        folder = self.root / str(number)
        folder.mkdir()
        if pid := os.fork():
            self.running[pid] = number
            return
        child(self, number, folder)

    def finish_one(self) -> None:
        pid, status, usage = os.wait4(-1, 0)
        number = self.running.pop(pid)
        folder, peak = (
            self.root / str(number),
            usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        )
        about = {"job": "none", "argv": ["none"], "what": "the generator failed", "is_good": False}
        if (folder / ".about").exists():
            about = json.loads((folder / ".about").read_text())
        outcome = Outcome.read(status, peak, folder)
        self.ran[about["job"]] += 1
        self.cpu_s[about["job"]] += usage.ru_utime + usage.ru_stime
        self.statuses[os.waitstatus_to_exitcode(status)] += 1
        self.peak_bytes = max(self.peak_bytes, peak)
        self.longest = max(self.longest, usage.ru_utime + usage.ru_stime)
        if wrong := fault(outcome, about["argv"], about["is_good"]):
            self.found[number] = wrong
            self.keep(number, folder, about, wrong)
        shutil.rmtree(folder, ignore_errors=True)

    def keep(self, number: int, folder: Path, about: dict, wrong: str) -> None:
        if self.plant:
            return
        print(f"{self.seed} {number} {about['job']}: {ascii(wrong)[1:-1]}")
        print(f"    {ascii(about['what'])[1:-1]}", flush=True)
        kept = KEPT / f"{self.seed}-{number}"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept, symlinks=True, ignore=no_pipes)
        (kept / ".fault").write_text(wrong + "\n", errors="replace")

    def run(self, numbers: Iterable[int], until: float = math.inf) -> None:
        """Run inputs until they or the time are over, or a planted mistake is found."""
        for number in numbers:
            if time.monotonic() > until or self.shown():
                break
            while len(self.running) >= self.processes:
                self.finish_one()
            self.start(number)
        while self.running:
            self.finish_one()

    def search(self, plant: Plant, numbers: Iterable[int]) -> int | None:
        """Return the number of an input that shows a planted mistake, as the plant says."""
        self.plant, self.jobs, self.places, self.found = plant, [plant.job], [plant.place], {}
        self.run(numbers)
        return min(self.shown(), default=None)

    def shown(self) -> list[int]:
        """Return the numbers of inputs that show the planted mistake, if there is one."""
        if self.plant is None:
            return []
        return [n for n, wrong in self.found.items() if wrong.startswith(self.plant.shows)]

    def tell(self, seconds: float) -> None:
        num, by_job = sum(self.ran.values()), sorted(self.ran.items())
        print(f"seed {self.seed}: {num:,} inputs in {seconds:.0f} s, {len(self.found)} found")
        print(
            f"largest process {self.peak_bytes / 1e6:.0f} MB, longest {self.longest:.1f} s of CPU"
        )
        print("statuses:", ", ".join(f"{n} {k:,} times" for n, k in sorted(self.statuses.items())))
        for job, count in by_job:
            print(f"{job:16} {count:6,} inputs, {self.cpu_s[job] / count:.3f} s of a CPU each")

    def close(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def no_pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_fifo()]


def child(lane: Lane, number: int, folder: Path) -> None:
    """Be the program of one input; never return."""
    status = 70
    try:
        os.chdir(folder)
        signal.alarm(
            10 if lane.plant else SECONDS
        )  # ends the process by its default, whatever runs
        redirect()
        damaged = inputs.make(lane.seed, number, lane.seeds, lane.jobs, lane.places)
        Path(".about").write_text(json.dumps(asdict(damaged)))
        if lane.plant:
            lane.plant.put()
        limit_memory()
        try:
            run_program(damaged.run)
        except SystemExit as end:
            status = end.code
        threading._shutdown()  # a thread that does not end would keep the program
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def redirect() -> None:
    """Be as a shell starts a program, with files for its output."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for fd, name, mode in ((0, os.devnull, os.O_RDONLY), (1, ".out", flags), (2, ".err", flags)):
        os.dup2(file := os.open(name, mode, 0o644), fd)
        os.close(file)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False, errors="backslashreplace", buffering=1)


def limit_memory() -> None:
    """Let an allocation fail that would be found by its peak anyway, before the machine is full."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        words = Path("/proc/self/status").read_text().split()
        limit = int(words[words.index("VmData:") + 1]) * 1024 + 2 * PEAK_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the clock")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--count", type=int, default=10**9)
    parser.add_argument("--only", type=int, help="one input, kept in build/fuzz if it is a find")
    parser.add_argument("--jobs", nargs="+", choices=[*inputs.JOBS, inputs.LINE])
    parser.add_argument("--plants", action="store_true", help="find the mistakes of plants.py")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def main() -> int:
    args, began = parse(), time.monotonic()
    for name in LATE:
        import_module(name)
    torch.set_num_threads(1)
    gc.freeze()
    lane = Lane(args.seed, args.jobs, args.processes)
    numbers = range(args.count) if args.only is None else [args.only]
    try:
        if args.plants:
            return find_plants(lane, numbers)
        lane.run(numbers, began + args.seconds)
        lane.tell(time.monotonic() - began)
        return bool(lane.found)
    finally:
        lane.close()


def find_plants(lane: Lane, numbers: Iterable[int]) -> int:
    """Look for each planted mistake; return 1 where one stays hidden."""
    hidden = 0
    for name, plant in PLANTS.items():
        before = sum(lane.ran.values())
        number = lane.search(plant, numbers)
        words = "stays hidden" if number is None else f"found by input {number}"
        print(f"{name}: {words}, {sum(lane.ran.values()) - before} inputs", flush=True)
        hidden += number is None
    return bool(hidden)


if __name__ == "__main__":
    sys.exit(main())
