"""Draw docs/chat.svg: a real chat with the demo model on a pseudo-terminal. `make picture` runs it.

The text is the same each time, but for what the clock measures.
"""

import io
import re
import sys
import tempfile
from itertools import groupby
from pathlib import Path

from pseudo_terminal import CTRL_D, ROOT, Terminal
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import MONOKAI
from rich.text import Text

PICTURE, DEMO = ROOT / "docs/chat.svg", "build/demo-q4"
COLUMNS, ROWS = 100, 80
OPTIONS = ("--drafts", "3")
LINES = (
    "Hello! What is the capital of France?",
    "And of Japan?",
    "What is speculative decoding?",
    "/stats",
    "/context",
)
COLOURS = {"brown": "yellow", "brightbrown": "bright_yellow"}  # pyte's names of rich's
TITLE = "a chat with the demo model"
FONT = re.compile(r"@font-face \{.*?\}\n", re.S)  # of a web site: a picture asks nobody
MONOSPACE = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def style(cell) -> Style:
    """Return rich's style of pyte's cell."""
    colours = [
        COLOURS.get(name, re.sub(r"^bright(?=[a-z])", "bright_", name))
        for name in (cell.fg, cell.bg)
    ]
    fg, bg = (f"#{name}" if re.fullmatch("[0-9a-f]{6}", name) else name for name in colours)
    return Style(
        color=fg, bgcolor=bg, bold=cell.bold, italic=cell.italics, underline=cell.underscore
    )


def drawn(display) -> Text:
    """Return what a display shows, its colours too, without the empty rows at the end."""
    rows = [*display.history.top, *(display.buffer[y] for y in range(display.lines))]
    out = Text()
    for row in rows[: len("\n".join(display.rows_from(0)).rstrip().split("\n"))]:
        line = Text()
        for look, cells in groupby((row[x] for x in range(display.columns)), style):
            line.append("".join(cell.data for cell in cells), look)
        line.rstrip()
        out.append_text(line).append("\n")
    return out


def record() -> Text:
    """Hold the chat and return what it looks like when it is over."""
    with tempfile.TemporaryDirectory() as home:
        terminal = Terminal(DEMO, *OPTIONS, columns=COLUMNS, rows=ROWS, home=home)
        terminal.until_prompt()
        for line in LINES:
            terminal.ask(line)
        terminal.type(CTRL_D)
        assert terminal.end() == 0
        return drawn(terminal.display)[: -len(">>>\n")]


def svg(text: Text, command: str) -> str:
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "bold"), command))
    console.print(text, end="", soft_wrap=True)
    picture = console.export_svg(title=TITLE, theme=MONOKAI, unique_id="chat")
    return FONT.sub("", picture).replace("Fira Code, monospace", MONOSPACE)


def main() -> int:
    command = " ".join(("python chat.py", DEMO, *OPTIONS))
    PICTURE.write_text(svg(record(), command))
    print(f"{PICTURE.relative_to(Path.cwd())}: look at it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
