"""A text -> the clipboard: by the system's own program, else by the terminal."""

import base64
import os
import re
import subprocess
import sys

from prompt_toolkit.utils import is_dumb_terminal

from mlx_dsv3.errors import UserError

# A program, and the variable that says whether its display is there.
PROGRAMS = (("pbcopy", None), ("wl-copy", "WAYLAND_DISPLAY"), ("xclip", "DISPLAY"))
OPTIONS = {"xclip": ("-selection", "clipboard")}
LONGEST_S = 5
CODE = re.compile(r"^ {0,3}(`{3,}|~{3,})[^\n]*\n(.*?)^ {0,3}\1", re.M | re.S)


def copy(text: str) -> str:
    """Put a text on the clipboard and return what took it."""
    data = text.encode("utf-8", "replace")
    for program, display in PROGRAMS:
        if (display is None or os.environ.get(display)) and runs(program, data):
            return program
    if not sys.stderr.isatty() or is_dumb_terminal():
        raise UserError(
            "there is no clipboard: `pbcopy`, `wl-copy` and `xclip` do not run",
            "`/save FILE` writes the chat to a file",
        )
    print(f"\x1b]52;c;{base64.b64encode(data).decode()}\x07", end="", file=sys.stderr, flush=True)
    return "the terminal, if it allows that (OSC 52)"


def runs(program: str, data: bytes) -> bool:
    """Run a program with the text; say whether it took it."""
    command, nowhere = [program, *OPTIONS.get(program, ())], subprocess.DEVNULL
    try:
        done = subprocess.run(
            command, input=data, stdout=nowhere, stderr=nowhere, timeout=LONGEST_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def code_block(answer: str, number: int) -> str:
    """Return a fenced block of an answer, the first is 1."""
    blocks = [found[2] for found in CODE.finditer(answer)]
    if not 1 <= number <= len(blocks):
        raise UserError(
            f"the last answer has no code block {number}; it has {len(blocks)}",
            "`/copy` copies all of it",
        )
    return blocks[number - 1]
