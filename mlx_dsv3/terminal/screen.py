"""A reply on a terminal or a pipe: the answer on stdout, everything else on stderr."""

import json
import sys

from mlx_dsv3.conversation.session import End, Event, Text
from mlx_dsv3.errors import visible
from mlx_dsv3.generate import Prefill
from mlx_dsv3.terminal.statistics import stats_values, stats_words

REMARKS = {"length": "(cut off at the token limit)", "interrupted": "(stopped)"}


class Screen:
    """Shows replies; `stats` is what `--stats` says: line, json or off."""

    def __init__(
        self,
        stats: str = "line",
        markdown: bool = True,
        raw: bool = False,
        hide_thinking: bool = False,
        as_json: bool = False,
    ):
        self.stats, self.markdown, self.raw = stats, markdown, raw
        self.hide_thinking, self.as_json = hide_thinking, as_json
        self.is_inside_line = False
        self.on_terminal = sys.stdout.isatty()  # a pipe or a file gets what the model wrote

    def show(self, event: Event) -> None:
        """Show an event of a turn, the text on stdout."""
        if isinstance(event, Prefill):
            return
        if isinstance(event, Text):
            print(visible(event.text) if self.on_terminal else event.text, end="", flush=True)
            self.is_inside_line |= bool(event.text)
            return
        if self.stats != "json" and event.finish_reason in REMARKS:
            print(f"\n{REMARKS[event.finish_reason]}", end="", file=sys.stderr)
        self.end_line()
        if event.stats is not None:
            self.show_end(event)

    def fail(self) -> None:
        """End what a reply left on the screen: the error begins its own line."""
        if self.is_inside_line:
            self.end_line()

    def end_line(self) -> None:
        self.is_inside_line = False
        print(flush=True)

    def show_end(self, end: End) -> None:
        """Show the statistics of a reply, as `--stats` says."""
        if self.stats == "json":
            print(json.dumps(stats_values(end), allow_nan=False), file=sys.stderr)
        elif self.stats == "line":
            print(f"[{'; '.join(stats_words(end.stats))}]", file=sys.stderr)
