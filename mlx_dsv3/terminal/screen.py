"""A reply on a terminal or a pipe: the answer on stdout, everything else on stderr.

A person at a terminal sees thoughts too, dim; what reads a pipe gets the answer alone, as the model
wrote it.
"""

import json
import sys
import time

from mlx_dsv3.conversation.session import End, Event, Text
from mlx_dsv3.errors import visible
from mlx_dsv3.generate import Prefill
from mlx_dsv3.terminal.drawing import (
    RESET,
    can_show,
    dim,
    duration,
    is_redrawn,
    takes_attributes,
)
from mlx_dsv3.terminal.markdown import Markdown
from mlx_dsv3.terminal.progress import PromptBar
from mlx_dsv3.terminal.statistics import reply_values, stats_values, stats_words

REMARKS = {"length": "(cut off at the token limit)", "interrupted": "(stopped)"}


class Screen:
    """Shows replies; `stats` is what `--stats` says: line, json or off.

    The attributes may change between replies. `raw` shows a reply without any attribute;
    `as_json` prints it as one object when it has ended.
    """

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
        self.on_terminal = sys.stdout.isatty()  # a pipe or a file gets what the model wrote
        self.prompt_bar = PromptBar()
        self.begin()

    def begin(self) -> None:
        """Forget the reply before."""
        self.began, self.prefill = time.perf_counter(), None
        self.is_inside_line, self.marks = False, Markdown()
        self.thought_s: int | None = None  # whole seconds, while a thought lasts
        self.thought_end = ""

    def show(self, event: Event) -> None:
        """Show an event of a turn, the answer on stdout."""
        if isinstance(event, Prefill):
            self.began, self.prefill = time.perf_counter(), event
            self.prompt_bar.show(event)
            return
        self.prompt_bar.erase()
        if isinstance(event, End):
            self.show_end(event)
        elif not self.as_json:
            self.show_text(event)

    def show_text(self, event: Text) -> None:
        if event.is_thought:
            self.show_thought(event.text)
        elif event.text:
            self.end_thought()
            print(self.shown(event.text), end="", flush=True)
            self.is_inside_line = True

    def shown(self, text: str) -> str:
        """Return a piece of the answer as stdout gets it."""
        text = visible(text) if self.on_terminal else text
        return self.marks.feed(text) if self.is_marked else text

    @property
    def is_marked(self) -> bool:
        """Say whether Markdown is shown by attributes."""
        may = self.markdown and not self.raw
        return may and self.on_terminal and takes_attributes(sys.stdout)

    @property
    def beside(self):
        """Return the stream of what a person alone sees, None where nobody does."""
        return sys.stdout if self.on_terminal else sys.stderr if sys.stderr.isatty() else None

    def show_thought(self, text: str) -> None:
        """Show a piece of a thought, or for how long it has lasted."""
        if (stream := self.beside) is None or self.thought_s is None and not text:
            return
        seconds = int(time.perf_counter() - self.began)
        if not self.hide_thinking:
            text = visible(text)
            print(text if self.raw else dim(text, stream), end="", file=stream, flush=True)
            self.thought_end = text[-1:] or self.thought_end
        elif seconds != self.thought_s:
            words = "thinking … " if can_show("…", stream) else "thinking ... "
            if is_redrawn(stream):
                words = "\r" + dim(f"{words}{seconds} s", stream)
            elif self.thought_s is not None:
                words = ""
            print(words, end="", file=stream, flush=True)
        self.thought_s, self.is_inside_line = seconds, True

    def end_thought(self) -> None:
        """Say how long a thought took, below it or in the place of its seconds."""
        if self.thought_s is None:
            return
        stream, self.thought_s, self.is_inside_line = self.beside, None, False
        words = f"thought for {duration(time.perf_counter() - self.began)}"
        if self.hide_thinking:
            before = "\r\x1b[K" if is_redrawn(stream) else ""
        else:
            before = "" if self.thought_end == "\n" else "\n"
        print(f"{before}{dim(words, stream)}", file=stream, flush=True)

    def fail(self) -> None:
        """End what a reply left on the screen: the error begins its own line."""
        self.prompt_bar.erase()
        if self.is_inside_line:
            self.end_line()
        self.begin()

    def end_line(self) -> None:
        self.is_inside_line = False
        rest = self.marks.end() + RESET if self.is_marked else ""  # whatever Ctrl-C interrupted
        print(rest, flush=True)

    def show_end(self, end: End) -> None:
        """Show why a reply ended and what it took, as `--stats` and `--json` say."""
        if self.as_json:
            print_json(reply_values(end, self.prefill), sys.stdout)
        else:
            self.end_thought()
            self.end_line()
            if self.stats != "json" and end.finish_reason in REMARKS:
                print(REMARKS[end.finish_reason], file=sys.stderr)
        if end.stats is not None and self.stats == "json":
            print_json(stats_values(end), sys.stderr)
        elif end.stats is not None and self.stats == "line" and not self.as_json:
            words = f"[{'; '.join(stats_words(end.stats))}]"
            print(dim(words, sys.stderr), file=sys.stderr)
        self.begin()


def print_json(values: dict, stream) -> None:
    """Print an object on one line, in ASCII: every encoding has it, and no terminal obeys it."""
    print(json.dumps(values, allow_nan=False), file=stream, flush=True)
