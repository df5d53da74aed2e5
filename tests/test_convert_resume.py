"""Killed anywhere, by SIGKILL or by losing power, and resumed: the bytes of a straight run.

The conversions run in processes of their own, whose system calls are counted (and made to kill
the process in the middle of a write). A power loss is played by undoing, in random parts, the
writes that no flush had covered when the process died.
"""

import fcntl
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from convert.__main__ import main
from tests.tiny import A, D, write_hub

ROOT = Path(__file__).parent.parent
# argv: what ends it ("kill" or "interrupt" at a byte, "rename"), count, log, jobs, folders.
CHILD = """
import os, signal, sys, threading
import convert.disk, convert.run, convert.journal
from convert.__main__ import main
from mlx_dsv3.errors import run_main
convert.run.SYNC_BYTES = 100_000
what, left, log, jobs = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
real_write, real_flush, real_replace = os.pwrite, convert.disk.flush, os.replace
lock = threading.Lock()

def note(*words):
    os.write(log, ("\\t".join(map(str, words)) + "\\n").encode())

def die():
    os.kill(os.getpid(), signal.SIGINT if what == "interrupt" else signal.SIGKILL)

def pwrite(descriptor, data, offset):
    global left
    with lock:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        dies = what != "rename" and len(data) > left >= 0  # once: an interrupt lets it live on
        count = real_write(descriptor, data[:left] if dies else data, offset)
        note("write", path, offset, count)
        if dies:
            die()
        left -= 0 if what == "rename" else count + dies
        return count

def flush(descriptor):
    path = os.readlink(f"/proc/self/fd/{descriptor}")
    with lock:
        note("flushing", path)
    real_flush(descriptor)
    with lock:
        note("flushed", path)

def replace(old, new):
    global left
    if what == "rename":
        if left == 0:
            die()
        left -= 1
    real_replace(old, new)

os.pwrite, os.replace = pwrite, replace
convert.disk.flush = convert.journal.flush = flush
sys.exit(run_main(lambda: main(["run", *sys.argv[5:], "--jobs", jobs])))
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts through /proc")


def child(
    hub: Path,
    out: Path,
    what: str = "kill",
    count: int = 1 << 40,
    jobs: int = 2,
    flags: tuple[str, ...] = (),
) -> int:
    """Run a conversion that dies at `count`; return its status, leave its events in a log."""
    log = out.with_suffix(".log")
    log.unlink(missing_ok=True)
    argv = [sys.executable, "-c", CHILD, what, str(count), str(log), str(jobs), str(hub), str(out)]
    return subprocess.run([*argv, *flags], cwd=ROOT, stderr=subprocess.DEVNULL).returncode


def resume(hub: Path, out: Path, *flags: str) -> int:
    return main(["run", str(hub), str(out), *flags])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def events(out: Path) -> list[list[str]]:
    return [line.split("\t") for line in out.with_suffix(".log").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return a checkpoint, the files of its undisturbed conversion, and its events."""
    folder = tmp_path_factory.mktemp("straight")
    hub = write_hub(folder / "hub", A)
    assert child(hub, folder / "out") == 0
    return hub, contents(folder / "out"), events(folder / "out")


@pytest.mark.parametrize("kills", [8, pytest.param(25, marks=pytest.mark.slow)])
def test_sigkill_at_random_points(straight, tmp_path, kills):
    """Drawn over all bytes written; most fall between the first and the last tensor."""
    hub, want, log = straight
    writes = [
        (path, int(count)) for what, path, *rest in log if what == "write" for count in rest[1:]
    ]
    total = sum(count for _, count in writes)
    headers = len({path for path, _ in writes if path.endswith(".safetensors")}) + 1
    first = sum(count for _, count in writes[:headers])  # journal head, then a header for each file
    points = sorted(random.Random(1).sample(range(total), kills))
    assert sum(first < point < total for point in points) >= 0.75 * kills
    for i, point in enumerate(points):
        out = tmp_path / str(i)
        assert child(hub, out, "kill", point, jobs=1 + i % 3) == -9
        assert {path.name for path in out.iterdir()} == {".partial"}
        assert resume(hub, out, "--jobs", str(1 + i % 2)) == 0
        assert contents(out) == want, f"killed at byte {point:,} of {total:,}"


@pytest.mark.slow
def test_sigkill_of_a_fitted_conversion(tmp_path):
    """10 kills, with other numbers of jobs before and after: the bytes of a straight run."""
    flags = ("--recipe", "q2-fit")
    hub = write_hub(tmp_path / "hub", D)
    assert child(hub, tmp_path / "want", flags=flags) == 0
    want = contents(tmp_path / "want")
    total = sum(int(rest[1]) for what, _, *rest in events(tmp_path / "want") if what == "write")
    for i, point in enumerate(random.Random(2).sample(range(total), 10)):
        out = tmp_path / str(i)
        assert child(hub, out, "kill", point, 1 + i % 3, flags) == -9
        assert resume(hub, out, *flags, "--jobs", str(1 + i % 2)) == 0
        assert contents(out) == want, f"killed at byte {point:,} of {total:,}"


def test_sigkill_between_renames(straight, tmp_path):
    """config.json comes last: until then the folder must not look finished."""
    hub, want, _ = straight
    for i in range(len(want)):
        out = tmp_path / str(i)
        assert child(hub, out, "rename", i) == -9
        assert not (out / "config.json").exists() and (out / ".partial").exists()
        assert resume(hub, out) == 0
        assert contents(out) == want


def lose_power(out: Path, draw: random.Random, ends: dict[str, list[int]]) -> int:
    """Undo parts of what no flush had covered: zero it, and cut files off behind the rest.

    `ends` remembers from one loss to the next how far each file was written and, second, how far
    a flush has reached, whichever run had written that. Returns the number of bytes lost.
    """
    unsynced, flushing, lost = {}, {}, 0
    for what, path, *rest in events(out):
        pending, end = unsynced.setdefault(path, []), ends.setdefault(path, [0, 0])
        if what == "write":
            pending.append((int(rest[0]), int(rest[1])))
            end[0] = max(end[0], sum(pending[-1]))
        elif what == "flushing":
            flushing[path] = (len(pending), end[0])
        else:
            num_covered, end[1] = flushing.pop(path)
            del pending[:num_covered]
    for path, pending in unsynced.items():
        pending = pending[draw.randint(0, len(pending)) :]
        if not pending or not os.path.isfile(path):
            continue
        with open(path, "r+b") as file:
            for offset, count in pending:
                file.seek(offset)
                file.write(bytes(count))
                lost += count
            cut = max(ends[path][1], min(offset for offset, _ in pending))
            if draw.random() < 0.5 and cut < os.path.getsize(path):
                file.truncate(cut)
    return lost


@pytest.mark.parametrize("seed", range(3))
def test_power_loss(straight, tmp_path, seed):
    """One conversion that loses power again and again, in random places, and still ends well."""
    hub, want, log = straight
    total = sum(int(rest[1]) for what, _, *rest in log if what == "write")
    draw, lost, num_losses, ends = random.Random(seed), 0, 0, {}
    out = tmp_path / "out"
    while child(hub, out, "kill", draw.randrange(total // 2)) == -9:
        lost += lose_power(out, draw, ends)
        num_losses += 1
    assert contents(out) == want
    assert num_losses >= 2 and lost > 0


def test_ctrl_c_stops_and_says_how_to_go_on(straight, tmp_path):
    """Status 130, one line, no traceback; the same command completes the folder."""
    hub, want, _ = straight
    out = tmp_path / "out"
    argv = [sys.executable, "-c", CHILD, "interrupt", "300000", str(tmp_path / "log"), "2"]
    stopped = subprocess.run([*argv, str(hub), str(out)], cwd=ROOT, capture_output=True, text=True)
    assert stopped.returncode == 130
    assert stopped.stderr.strip() == "stopped; repeat the same command to continue"
    assert child(hub, out) == 0
    assert contents(out) == want


def test_a_second_run_beside_a_living_one_is_refused(straight, tmp_path):
    hub, _, _ = straight
    out = tmp_path / "out"
    assert child(hub, out, "kill", 300_000) == -9
    with open(out / ".partial" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        argv = [sys.executable, "-m", "convert", "run", str(hub), str(out)]
        second = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 2
    assert f"error: another conversion is running in `{out}`" in second.stderr
