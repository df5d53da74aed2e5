"""What begins with a slash: one dictionary from a word to what it does."""

import sys
from collections.abc import Callable

from mlx_dsv3.errors import visible
from mlx_dsv3.options import first_line
from mlx_dsv3.terminal.statistics import stats_lines


class Leave(Exception):
    """Raised by /exit."""


def show_help(chat) -> None:
    """Show these commands."""
    for name, command in COMMANDS.items():
        print(f"  {name:<8} {first_line(command.__doc__)}", file=sys.stderr)
    print("  Ctrl-C   Stop the reply and keep what was said.", file=sys.stderr)


def clear(chat) -> None:
    """Forget the conversation; the system prompt stays."""
    chat.session.clear()
    print("(cleared)", file=sys.stderr)


def show_stats(chat) -> None:
    """Show what the last reply took, in full."""
    lines = stats_lines(chat.last, chat.session) if chat.last else ["no reply yet"]
    print("\n".join(lines), file=sys.stderr)


def leave(chat) -> None:
    """Leave the chat (Ctrl-D does too)."""
    raise Leave


COMMANDS: dict[str, Callable] = {
    "/help": show_help,
    "/clear": clear,
    "/stats": show_stats,
    "/exit": leave,
}


def run_command(chat, line: str) -> None:
    """Run a line that begins with a slash; what is no command is told, and never sent."""
    word = line.split()[0]
    if word in COMMANDS:
        COMMANDS[word](chat)
    else:
        print(f"unknown command `{visible(word)}`; /help lists them", file=sys.stderr)
