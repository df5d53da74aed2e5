"""The turns of `--turn`, which conftest.py adds to pytest."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import TURNS, share

ROOT = Path(__file__).parents[1]


def test_turns_leave_nothing_out():
    """A slow test that no day runs, or that always stands behind one that takes all the time."""
    items = list(range(37))
    assert sorted(sum((share(items, day) for day in range(TURNS)), [])) == items
    assert {share(items, day)[0] for day in range(TURNS * len(items))} == set(items)
    assert share([], 5) == []


def test_a_turn_takes_slow_tests_and_ends_in_time(tmp_path):
    """Turns of all tests left days without a slow one; a late alarm ended pytest in an error."""
    test = "import pytest, time\n\n"
    for i in range(TURNS * TURNS):
        mark = "@pytest.mark.slow\n" if i % TURNS == 0 else ""
        test += f"{mark}def test_{i}():\n    time.sleep(0.01)\n\n"
    (tmp_path / "test_mixed.py").write_text(test)
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n  cuda\n  metal\n  hub\n")

    def run(*argv: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider", *argv]
        env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)

    assert run("-m", "slow", "--turn", "9").stdout.count("PASSED") == 1
    none_left = run("--turn", "1e-9")
    assert none_left.returncode == 0, none_left.stdout
    assert none_left.stdout.count("SKIPPED (out of time)") == TURNS
