"""How far a load or a prompt is: one line on stderr, drawn over itself and erased at the end.

A terminal alone gets it. Not rich's bar: that one hides the cursor and runs a thread, and here a
signal may end the process at any moment.
"""

import shutil
import sys
import time

from mlx_dsv3.generate import Prefill
from mlx_dsv3.sizes import GB, gigabytes
from mlx_dsv3.terminal.drawing import bar, duration, is_redrawn

WIDTH = 24  # columns of a bar
PATIENCE_S = 0.5  # what is done within it needs no bar
PAUSE_S = 0.1  # between two drawings
LONG_S = 2.0  # a load that took longer is worth a line


class Bar:
    """A share and words about it, once the work has taken PATIENCE_S."""

    def __init__(self):
        self.is_drawn = False
        self.restart()

    def restart(self) -> None:
        self.began = time.perf_counter()
        self.drawn_at = self.began + PATIENCE_S - PAUSE_S

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self.began, 1e-9)

    def draw(self, share: float, words: str) -> None:
        now = time.perf_counter()
        if now < self.drawn_at + PAUSE_S or not is_redrawn(sys.stderr):
            return
        line = f"{bar(share, WIDTH)} {words}"[: shutil.get_terminal_size().columns - 1]
        self.drawn_at, self.is_drawn = now, True  # before a Ctrl-C that strikes in `print`
        print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)

    def erase(self) -> None:
        if self.is_drawn:
            self.is_drawn = False
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class LoadBar(Bar):
    """How many bytes of a model are in memory; `progress` takes what `load` tells and draws it.

    Nothing is typed meanwhile: `typed` would be the lines, and `line` one that waits.
    """

    typed, line, is_early = None, "", True

    def __init__(self):
        super().__init__()
        self.done = self.total = 0

    def __enter__(self) -> "LoadBar":
        return self

    def __exit__(self, *_) -> None:
        self.erase()

    def progress(self, done: int, total: int) -> None:
        self.take(done, total)
        self.show()

    def take(self, done: int, total: int) -> None:
        if not done:
            self.restart()
        self.done, self.total, self.took_s = done, total, self.seconds

    def words(self) -> str:
        if not self.done:
            return "loading"
        speed = self.done / self.took_s / GB
        done = gigabytes(self.done).removesuffix(" GB")
        return f"loading {done} of {gigabytes(self.total)}, {speed:.1f} GB/s"

    def show(self) -> None:
        self.draw(self.done / max(self.total, 1), self.words())

    def long_load(self) -> list[str]:
        """Return what is worth saying of a load that was long."""
        if not self.done or self.took_s < LONG_S:
            return []
        speed = self.done / self.took_s / GB
        return [f"loaded {gigabytes(self.done)} in {duration(self.took_s)} ({speed:.1f} GB/s)"]


class PromptBar(Bar):
    """How many tokens of a prompt are computed or were held, and when the rest will be."""

    def show(self, event: Prefill) -> None:
        computed = event.done - event.reused
        if not computed:  # a prompt begins
            self.restart()
            return
        speed = computed / self.seconds
        left = duration((event.total - event.done) / speed)
        words = f"prompt {event.done:,} of {event.total:,} tokens, {speed:,.0f}/s, {left} left"
        self.draw(event.done / event.total, words)
