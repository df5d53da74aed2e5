"""Fixtures of both sides. Those that need MLX are in mlx_fixtures.py: a CUDA machine has none."""

import atexit
import importlib.util
import math
import os
import shutil
import signal
import tempfile
import time
from datetime import date
from pathlib import Path

import pytest
import torch

# A chat keeps its history and sessions in the home folder, and a test's has none of a person's.
HOME = tempfile.mkdtemp(prefix="home-")
os.environ["HOME"] = HOME
atexit.register(shutil.rmtree, HOME, ignore_errors=True)

if importlib.util.find_spec("mlx"):
    pytest_plugins = ["mlx_fixtures"]

# Threads cost more than they give at these sizes: 5 s against 0.05 s a forward, 2 busy cores.
torch.set_num_threads(1)
# A suite started in the background ignores Ctrl-C, and so would the programs that it interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

TURNS = 6  # days in which `--turn` comes round
BEGAN = time.monotonic()


def pytest_addoption(parser):
    parser.addoption(
        "--turn", type=float, metavar="MINUTES", help="run the day's share, for so long at most"
    )


def share(items: list, day: int) -> list:
    """Return every TURNS-th item; another one is first each time round, for when time runs out."""
    chosen = items[day % TURNS :: TURNS]
    first = day // TURNS % max(1, len(chosen))
    return chosen[first:] + chosen[:first]


@pytest.hookimpl(trylast=True)  # what other lanes hold is deselected first
def pytest_collection_modifyitems(config, items):
    if config.getoption("turn"):
        items[:] = share(items, date.today().toordinal())


def out_of_time(*_):
    pytest.skip("out of time")


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no NVIDIA GPU")
    if seconds_left(item.config) <= 0:
        out_of_time()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Cut the test off when the turn is over; never pytest itself, which would end in an error."""
    if item.config.getoption("turn"):
        signal.signal(signal.SIGALRM, out_of_time)
        signal.setitimer(signal.ITIMER_REAL, max(1e-3, seconds_left(item.config)))
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def seconds_left(config) -> float:
    minutes = config.getoption("turn")
    return BEGAN + 60 * minutes - time.monotonic() if minutes else math.inf


@pytest.fixture(autouse=True)
def same_start():
    """Give every test the same random state, whatever ran before it, and a Ctrl-C that raises."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return Path(__file__).parents[1] / "demo" / "checkpoint"
