"""What the user sees while a conversion runs: a bar, plain lines, or JSON events.

A bar in a terminal, a line every ten seconds elsewhere, one JSON object a line with `--json`.
Knows byte counts and labels only. Everything but JSON goes to stderr.
"""

import json
import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

from mlx_dsv3.errors import in_line
from mlx_dsv3.sizes import size

LINE_SECONDS = 10.0


class Progress:
    """Progress in bytes written; `style` is `bar`, `lines` or `json`."""

    def __init__(self, style: str):
        self.style = style
        self.total = self.done = self.done_before = 0
        self._began = self._last_line = time.monotonic()
        self._bar = self._task = None

    def start(self, total: int, done: int) -> None:
        """Begin at `done` of `total` bytes; an earlier run may have written some."""
        self.total, self.done, self.done_before = total, done, done
        self._began = self._last_line = time.monotonic()
        self._emit("start", bytes_done=done, bytes_total=total)
        if self.style == "bar":
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
            rest = (TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, *rest, console=Console(stderr=True))
            self._task = self._bar.add_task("converting", total=total, completed=done)
            self._bar.start()
        elif done:
            self.note(f"continuing at {size(done)} of {size(total)}")

    def advance(self, nbytes: int, label: str) -> None:
        """Count `nbytes` more; `label` names the file at work."""
        self.done += nbytes
        if self._bar:
            self._bar.update(self._task, advance=nbytes, description=label)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            self._report(now - self._began, label)

    def _report(self, seconds: float, label: str) -> None:
        rate = (self.done - self.done_before) / seconds
        left_s = (self.total - self.done) / rate if rate else 0.0
        self._emit("progress", bytes_done=self.done, file=label, bytes_per_s=round(rate))
        if self.style == "lines":
            self.note(
                f"{size(self.done)} of {size(self.total)}, {size(rate)}/s, "
                f"{left_s / 60:.0f} min left, {label}"
            )

    def note(self, text: str) -> None:
        """Say one line, whatever the style."""
        self._emit("note", text=text)
        if self.style != "json":
            print(in_line(text), file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()

    def _emit(self, event: str, **values) -> None:
        if self.style == "json":
            print(json.dumps({"event": event, **values}), flush=True)


def choose_style(as_json: bool) -> str:
    """Return the style for this run's output."""
    if as_json:
        return "json"
    return "bar" if sys.stderr.isatty() else "lines"
