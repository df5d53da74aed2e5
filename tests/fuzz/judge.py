"""What a program may do with a damaged input: 0, or 2 and one sentence. Anything else is a find."""

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

SECONDS = 20  # on a machine that does other work too; most inputs take 0.1
PEAK_BYTES = 10**9  # of a process, what it has imported included
REFUSAL = re.compile(r"(?:.*\n)*error: [^\n]+\n(?:\nhint: [^\n]+\n)?")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
BROKEN = ("Traceback", "Exception ignored", "Fatal Python error", "MemoryError")
SPEAKS = ("chat", "generate")  # what a model says goes into a pipe or a file as it is


@dataclass
class Outcome:
    """How a process ended: its status as `os.wait4` gives it, its output, its largest size."""

    status: int
    out: str
    err: str
    peak_bytes: int

    @classmethod
    def read(cls, status: int, peak_bytes: int, folder: Path) -> "Outcome":
        texts = [
            (folder / name).read_bytes().decode("utf-8", "replace") for name in (".out", ".err")
        ]
        return cls(status, *texts, peak_bytes)


def fault(outcome: Outcome, argv: list[str], is_good: bool = False) -> str | None:
    """Return what is wrong with an outcome, None where nothing is; a good input is not refused."""
    if os.WIFSIGNALED(outcome.status):
        number = os.WTERMSIG(outcome.status)
        return "hang" if number == signal.SIGALRM else f"crash: signal {number}"
    status, err = os.WEXITSTATUS(outcome.status), outcome.err
    if found := next((word for word in BROKEN if word in err), None):
        return f"{found}: {err.strip().splitlines()[-1]}"
    if outcome.peak_bytes > PEAK_BYTES:
        return f"memory: {outcome.peak_bytes / 1e6:.0f} MB"
    if status == 2 and (not REFUSAL.fullmatch(err) or len(re.findall("^error: ", err, re.M)) > 1):
        return "status 2 without one sentence"
    if status not in (0, 2) and not is_verdict(status, argv, err) or is_good and status == 2:
        return f"status {status}"
    printed = err if argv[0] in SPEAKS else err + outcome.out
    if control := CONTROL.search(printed):
        return f"prints {control[0]!r}"
    return None


def is_verdict(status: int, argv: list[str], err: str) -> bool:
    """Say whether status 1 is what a check found; `verify` and `parity` say it on stderr."""
    checks = argv[:2] == ["convert", "verify"] or argv[0] == "parity"
    return status == 1 and checks and bool(err.strip() or "capacities" in argv)
