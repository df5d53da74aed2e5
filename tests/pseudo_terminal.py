"""chat.py on a pseudo-terminal, seen as a person sees it: `pyte` draws what the program writes.

A chat takes seconds to start: one serves many steps of a test. `ask` types a line and returns what
stands between it and the next prompt. Knows keys and a screen, and nothing of what a chat says.
"""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from functools import partial
from pathlib import Path

import pyte

ROOT = Path(__file__).parents[1]
CHAT = ROOT / "chat.py"
PROMPT = ">>>"
ENTER, CTRL_C, CTRL_D, CTRL_R, TAB, UP, ALT_ENTER = (
    "\r",
    "\x03",
    "\x04",
    "\x12",
    "\t",
    "\x1b[A",
    "\x1b\r",
)
GREY = (38, 5, 245)  # of 256 colours
BRACKETED_PASTE = 2004 << 5  # as pyte counts private modes


class Display(pyte.HistoryScreen):
    """A terminal's screen, which answers when a program asks where the cursor is."""

    def __init__(self, columns: int, rows: int, answer):
        super().__init__(columns, rows, history=100_000)
        self.write_process_input = lambda text: answer(text.encode())

    def resize(self, lines: int, columns: int) -> None:
        """Keep the cursor's row, as windows do: rows leave at the top. Pyte's own drops them."""
        while self.cursor.y >= lines:
            self.history.top.append(self.buffer[0])
            for y in range(self.lines):
                self.buffer[y] = self.buffer[y + 1]
            self.cursor.y -= 1
        for y in range(lines, self.lines + 1):
            self.buffer.pop(y, None)
        self.lines = lines
        super().resize(lines, columns)

    def select_graphic_rendition(self, *codes: int, **options) -> None:
        """Draw in grey what is dim, which pyte does not know."""
        super().select_graphic_rendition(*(GREY if codes == (2,) else codes), **options)

    @property
    def cursor_row(self) -> int:
        return len(self.history.top) + self.cursor.y

    def rows_from(self, first: int) -> list[str]:
        """Return the rows from one on, those that have left the screen at the top included."""
        above = [
            "".join(row[i].data for i in range(self.columns))
            for row in list(self.history.top)[first:]
        ]
        return [
            row.rstrip() for row in above + self.display[max(0, first - len(self.history.top)) :]
        ]


def take_terminal(file: int) -> None:
    """Be a program of this terminal, whose Ctrl-C reaches it: one in the background ignores it."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    os.login_tty(file)


class Terminal:
    """chat.py in a terminal of so many columns and rows, with a home folder that is not a person's.

    `seen` is the first row that no call has returned yet.
    """

    def __init__(self, *arguments, columns=100, rows=40, home=None, cwd=ROOT, **environment):
        self.fd, self.slave = os.openpty()
        self.display = Display(columns, rows, self.type)
        self.stream = pyte.ByteStream(self.display)
        self.raw, self.seen = bytearray(), 0
        self.resize(columns, rows)
        self.modes = termios.tcgetattr(self.slave)
        os.set_blocking(self.fd, False)
        command = [sys.executable, str(CHAT), *map(str, arguments)]
        changed = {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **environment}
        changed |= {"HOME": str(home)} if home else {}
        begin = partial(take_terminal, self.slave)
        env = os.environ | changed
        self.process = subprocess.Popen(command, env=env, cwd=cwd, preexec_fn=begin, close_fds=True)

    def resize(self, columns: int, rows: int) -> None:
        """Change the size as a window does: the program gets SIGWINCH."""
        termios.tcsetwinsize(self.fd, (rows, columns))
        self.display.resize(rows, columns)

    def pump(self, timeout_s: float = 0.05) -> bool:
        """Draw what the program has written; say whether there was anything."""
        if not select.select([self.fd], [], [], timeout_s)[0]:
            return False
        with contextlib.suppress(OSError):  # the other side is closed
            data = os.read(self.fd, 1 << 16)
            self.raw += data
            self.stream.feed(data)
            return True
        return False

    def type(self, text: str | bytes) -> None:
        """Press keys; a program that is slow to read them goes on writing meanwhile."""
        left = text if isinstance(text, bytes) else text.encode()
        while left:
            with contextlib.suppress(BlockingIOError):
                left = left[os.write(self.fd, left) :]
            if left:
                self.pump()

    def paste(self, text: str) -> None:
        """Paste as a terminal does where the program has asked to be told."""
        assert BRACKETED_PASTE in self.display.mode
        self.type(f"\x1b[200~{text}\x1b[201~")

    def text(self) -> str:
        """Return what was not returned yet, as it stands on the screen."""
        return "\n".join(self.display.rows_from(self.seen)).rstrip()

    def until(self, pattern: str, timeout_s: float = 40) -> str:
        """Wait until the rows that are new show a pattern, and return them."""
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern, text := self.text()):
            assert time.monotonic() < deadline, f"no `{pattern}` on the screen:\n{text}"
            if not self.pump() and self.process.poll() is not None:
                while self.pump(0):
                    pass
                assert re.search(pattern, self.text()), (
                    f"it ended without `{pattern}`:\n{self.text()}"
                )
        self.seen = self.display.cursor_row
        return text

    def until_prompt(self, timeout_s: float = 40) -> str:
        """Wait for a new prompt, and return what stands above it."""
        return self.until(rf"(\A|\n){PROMPT}\Z", timeout_s).removesuffix(PROMPT).rstrip()

    def ask(self, line: str | bytes, timeout_s: float = 40) -> str:
        """Type a line at the prompt; return what stands between it and the next prompt.

        A line that is wider than the terminal is returned with what follows it.
        """
        self.type(line)
        self.type(ENTER)
        said = self.until(rf"\n{PROMPT}\Z", timeout_s)
        return said.removesuffix(PROMPT).partition("\n")[2].strip("\n")

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self, timeout_s: float = 30) -> int:
        """Return the exit status of a chat that is leaving; kill one that does not."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None and time.monotonic() < deadline:
            self.pump()
        while self.pump(0):
            pass
        if self.process.poll() is None:
            self.send(signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"the chat did not leave:\n{self.text()}")
        return self.process.returncode

    def hang_up(self) -> None:
        """Close the window: the program gets SIGHUP, and can neither read nor write any more."""
        os.close(self.slave)
        os.close(self.fd)
        self.fd, self.slave = os.openpty()  # nobody's, so that all else goes on

    def is_restored(self) -> bool:
        """Say whether the terminal is as it was before: its modes, the cursor, pasting."""
        same = termios.tcgetattr(self.slave) == self.modes
        return same and not self.display.cursor.hidden and BRACKETED_PASTE not in self.display.mode

    def close(self) -> None:
        if self.process.poll() is None:
            self.send(signal.SIGKILL)
            self.process.wait()
        for file in {self.fd, self.slave} - {-1}:
            os.close(file)
        self.fd = self.slave = -1
