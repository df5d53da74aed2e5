"""Bars of a load and of a prompt: a terminal alone gets them, late, and they leave nothing."""

import io
import re

import pytest

from mlx_dsv3.conversation.session import Text
from mlx_dsv3.generate import Prefill
from mlx_dsv3.terminal import progress
from mlx_dsv3.terminal.progress import LoadBar, PromptBar
from mlx_dsv3.terminal.screen import Screen


class Stderr(io.StringIO):
    """A stderr of 100 columns that is a terminal, or a file."""

    is_terminal = True

    def isatty(self):
        return self.is_terminal


@pytest.fixture
def to_stderr(monkeypatch):
    """Return what makes stderr a terminal; within the test, before which pytest sets its own."""
    return lambda: terminal(monkeypatch)


def terminal(monkeypatch) -> Stderr:
    stream = Stderr()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return stream


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes when it is told to."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def feed(bar: PromptBar | Screen, clock: list[float], seconds: float, total: int = 8000) -> None:
    """Show a prompt of 61 layers in chunks of 1000, of which 2000 were held."""
    bar.show(Prefill(2000, 2000, total))
    for done in range(2100, total + 1, 100):
        clock[0] += seconds / 60
        bar.show(Prefill(2000, done, total))


def test_a_prompt_has_tokens_speed_and_what_is_left(to_stderr, clock, monkeypatch):
    stderr = to_stderr()
    monkeypatch.setenv("NO_COLOR", "1")  # a bar has none
    bar = PromptBar()
    feed(bar, clock, 60)
    lines = stderr.getvalue().split("\r")[1:]
    assert re.fullmatch(r"\S+ +prompt 3,000 of 8,000 tokens, 100/s, 50 s left\x1b\[K", lines[9])
    assert len(lines) == 60 and all(len(line) < 100 for line in lines)
    bar.erase()
    assert stderr.getvalue().endswith("\r\x1b[K")


def test_a_quick_prompt_has_none_and_a_fast_one_few_drawings(to_stderr, clock):
    stderr = to_stderr()
    bar = PromptBar()
    feed(bar, clock, 0.45)
    bar.erase()
    assert stderr.getvalue() == ""
    feed(bar, clock, 2)  # of the second prompt's own time
    assert 14 <= stderr.getvalue().count("\r") <= 16


@pytest.mark.parametrize("then", [lambda screen: screen.show(Text("Hello")), Screen.fail])
def test_a_bar_is_gone_before_a_word_and_before_an_error(to_stderr, clock, then):
    stderr, screen = to_stderr(), Screen()
    feed(screen, clock, 60)
    then(screen)
    assert stderr.getvalue().endswith("left\x1b[K\r\x1b[K")


@pytest.mark.parametrize("why", ["file", "dumb"])
def test_what_takes_no_control_codes_gets_no_bar(to_stderr, clock, monkeypatch, why):
    stderr = to_stderr()
    stderr.is_terminal = why != "file"
    monkeypatch.setenv("TERM", "dumb" if why == "dumb" else "xterm")
    bar = LoadBar()
    feed(PromptBar(), clock, 60)
    for done in range(10):
        clock[0] += 1
        bar.progress(done, 10)
    bar.erase()
    assert stderr.getvalue() == ""


def test_a_load_says_its_speed_and_afterwards_how_long_it_took(to_stderr, clock):
    """Seconds of imports before the first byte are none of the disk's."""
    stderr = to_stderr()
    with LoadBar() as bar:
        clock[0] += 30
        for i in range(76):
            bar.progress(i * 5_200_000_000, 389_900_000_000)
            clock[0] += 1
    assert "loading 15.6 of 389.9 GB, 5.2 GB/s\x1b[K" in stderr.getvalue()
    assert bar.long_load() == ["loaded 390.0 GB in 75 s (5.2 GB/s)"]
    assert stderr.getvalue().endswith("\r\x1b[K")


def test_a_short_load_is_not_worth_a_line(to_stderr, clock):
    to_stderr()
    bar = LoadBar()
    bar.progress(0, 2)
    clock[0] += 1.9
    bar.progress(2, 2)
    assert bar.long_load() == LoadBar().long_load() == []


def test_a_narrow_terminal_is_not_wrapped(to_stderr, clock, monkeypatch):
    """A line that wraps cannot be erased by one return."""
    stderr = to_stderr()
    monkeypatch.setenv("COLUMNS", "30")
    feed(PromptBar(), clock, 60)
    assert {len(line) for line in stderr.getvalue().split("\r")[1:]} == {29 + len("\x1b[K")}
