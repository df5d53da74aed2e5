"""A session that a person sees: its events on the screen, lines of input, slash commands."""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from mlx_dsv3.conversation.messages import clean
from mlx_dsv3.conversation.session import End, Event, Session, Text
from mlx_dsv3.errors import UserError, visible
from mlx_dsv3.generate import Prefill
from mlx_dsv3.options import first_line
from mlx_dsv3.terminal.statistics import stats_lines, stats_values, stats_words

HINT_AT_CTRL_C = "(/exit or Ctrl-D leaves)"
REMARKS = {"length": "(cut off at the token limit)", "interrupted": "(stopped)"}


class Chat:
    """A session on a terminal or a pipe; `stats` is what `--stats` says: line, json or off."""

    def __init__(self, session: Session, stats: str = "line"):
        self.session, self.stats = session, stats
        self.last: End | None = None  # that has statistics
        self.is_inside_line = False
        self.on_terminal = sys.stdout.isatty()  # a pipe or a file gets what the model wrote

    def turn(self, text: str) -> End:
        """Answer one message; Ctrl-C ends the reply and keeps what was said."""
        events = self.session.turn(text)
        try:
            for event in events:
                try:
                    self.show(event)
                except BaseException as error:  # Ctrl-C gives the end, anything else comes back
                    event = events.throw(error)
                    self.show(event)
            return event
        except Exception:
            if self.is_inside_line:
                self.end_line()  # the error begins its own
            raise

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
            self.last = event
            self.show_end(event)

    def end_line(self) -> None:
        self.is_inside_line = False
        print(flush=True)

    def show_end(self, end: End) -> None:
        """Show the statistics of a reply, as `--stats` says."""
        if self.stats == "json":
            print(json.dumps(stats_values(end), allow_nan=False), file=sys.stderr)
        elif self.stats == "line":
            print(f"[{'; '.join(stats_words(end.stats))}]", file=sys.stderr)


class Leave(Exception):
    """Raised by /exit."""


def show_help(chat: Chat) -> None:
    """Show these commands."""
    for name, command in COMMANDS.items():
        print(f"  {name:<8} {first_line(command.__doc__)}", file=sys.stderr)
    print("  Ctrl-C   Stop the reply and keep what was said.", file=sys.stderr)


def clear(chat: Chat) -> None:
    """Forget the conversation; the system prompt stays."""
    chat.session.clear()
    print("(cleared)", file=sys.stderr)


def show_stats(chat: Chat) -> None:
    """Show what the last reply took, in full."""
    lines = stats_lines(chat.last, chat.session) if chat.last else ["no reply yet"]
    print("\n".join(lines), file=sys.stderr)


def leave(chat: Chat) -> None:
    """Leave the chat (Ctrl-D does too)."""
    raise Leave


COMMANDS: dict[str, Callable[[Chat], None]] = {
    "/help": show_help,
    "/clear": clear,
    "/stats": show_stats,
    "/exit": leave,
}


def answer_line(chat: Chat, line: str) -> None:
    """Run a slash command or take a turn; an error is told and the chat continues."""
    word = line.split()[0]
    try:
        if not word.startswith("/"):
            chat.turn(line)
        elif word in COMMANDS:
            COMMANDS[word](chat)
        else:
            print(f"unknown command `{visible(word)}`; /help lists them", file=sys.stderr)
    except Leave:
        raise
    except UserError as error:
        print(error, file=sys.stderr)
    except Exception as error:  # of any kind: loading the model took minutes
        print(told(error), file=sys.stderr)


def told(error: Exception) -> UserError:
    """Return a failure that nobody foresaw in one sentence, with its place."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    reason = next(iter(str(error).splitlines()), "no reason given")
    return UserError(
        f"the turn failed at `{Path(place.filename).name}` line {place.lineno}: "
        f"{type(error).__name__}: {clean(reason)}",
        "the conversation is as it was before the turn; `/clear` begins a new one",
    )


def repl(chat: Chat) -> None:
    """Read lines until /exit or Ctrl-D; Ctrl-C at the prompt says how to leave."""
    from prompt_toolkit import PromptSession  # a pipe needs none

    lines = PromptSession(">>> ")
    if chat.stats != "json":
        print("/help lists commands", file=sys.stderr)
    while True:
        try:
            if line := lines.prompt().strip():
                answer_line(chat, line)
        except KeyboardInterrupt:
            print(HINT_AT_CTRL_C, file=sys.stderr)
        except (EOFError, Leave):
            return
