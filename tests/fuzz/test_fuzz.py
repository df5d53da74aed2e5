"""The fuzz lane in short, the same inputs each time; `make fuzz` goes on from there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz import judge, keys
from fuzz.judge import Outcome, fault
from fuzz.plants import PLANTS
from mlx_dsv3.terminal.commands import ALIASES, COMMANDS

ROOT = Path(__file__).parents[2]


def lane(*words: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", "fuzz", "--seed", "0", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


forks = pytest.mark.skipif(
    sys.platform != "linux", reason="Apple's frameworks do not outlive a fork"
)


@forks
def test_damaged_inputs_are_answered():
    """The first run of the lane found 55 tracebacks and hangs in 481 inputs."""
    done = lane("--count", "200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 inputs" in done.stdout


@forks
def test_a_line_without_words():
    """The generator replaced a word where an earlier change had dropped the last one."""
    done = lane("--seed", "1007", "--only", "1995")
    assert done.returncode == 0, done.stdout + done.stderr


@forks
@pytest.mark.slow
def test_planted_mistakes_are_found():
    """A lane that finds nothing proves nothing: so mistakes are planted in eleven checks."""
    done = lane("--count", "1000", "--plants")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("found by") >= 10


@pytest.mark.parametrize("name", PLANTS)
def test_plants_stand_in_the_code(name):
    """A check that was rewritten would leave a plant that is none."""
    assert PLANTS[name].instead in PLANTS[name].changed()


GOOD = "error: `x` is not a folder\n\nhint: give a folder\n"
FAULTS = {
    "hang": (14, "", ""),
    "crash: signal 11": (11, "", ""),
    "Traceback: KeyError: 1": (1 << 8, "", "Traceback (most recent call last):\nKeyError: 1\n"),
    "Exception ignored: x": (0, "", "Exception ignored in: y\nx\n"),
    "status 2 without one sentence": (2 << 8, "", ""),
    "status 70": (70 << 8, "", "error: x\n"),
    "status 1": (1 << 8, "", "error: x\n"),
    "prints '\\x1b'": (2 << 8, "", "error: \x1b[2J\n"),
    "prints '\\x9b'": (0, "\x9b", ""),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_a_fault(name):
    """The rule itself, on the endings that it is there for."""
    assert fault(Outcome(*FAULTS[name], 0), ["convert", "plan"]) == name


@pytest.mark.parametrize(
    "status, out, err, argv",
    [
        (0, "", "", ["convert", "plan"]),
        (2, "", GOOD, ["convert", "plan"]),
        (2, "", f"a note\n{GOOD}", ["convert", "run"]),
        (2, "", "error: no hint\n", ["chat"]),
        (1, "", "`a` is missing\n", ["convert", "verify"]),
        (1, "", "error: layer 1\n", ["parity", "x"]),
        (0, "\x1b[2J", "", ["chat"]),  # a reply goes into a file as it is
    ],
)
def test_what_is_none(status, out, err, argv):
    assert fault(Outcome(status << 8, out, err, 0), argv) is None
    large = Outcome(status << 8, out, err, judge.PEAK_BYTES + 1)
    assert fault(large, argv).startswith("memory: ")


def test_a_good_input_is_no_error():
    """A lane whose files are all refused finds nothing, and says that all is well."""
    refused = Outcome(2 << 8, "", GOOD, 0)
    assert fault(refused, ["chat"], is_good=True) == "status 2"


@pytest.mark.parametrize("err", [f"{GOOD}{GOOD}", f"{GOOD}more\n", "error: a\nb\n", "errors: x\n"])
def test_a_refusal_is_one_sentence(err):
    assert fault(Outcome(2 << 8, "", err, 0), ["chat"]) == "status 2 without one sentence"


def test_chats_survive_random_keys(converted):
    """Ctrl-C between two prompts ended a chat, in a traceback of prompt_toolkit's."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    words = ["--seed", "0", "--count", "20", "--processes", "1", "--model", str(converted("q4"))]
    command = [sys.executable, "-m", "fuzz.chat", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 sequences" in done.stdout and ", 0 found" in done.stdout


def test_the_commands_that_are_typed():
    """A command that is new is typed too."""
    assert sorted(keys.COMMANDS) == sorted([*COMMANDS, *ALIASES])
