"""The first prompt, shown at once: a person types while the model loads.

It is read in a thread, because MLX, signals and the time that a template may take need the main
one. When the model is there, what is typed so far moves to a prompt of the main thread; a line that
was sent before waits for it. Nothing is kept yet, so that leaving is the end of the process.
"""

import atexit
import io
import math
import os
import signal
import sys
import termios
import threading
import time
from contextlib import redirect_stderr, suppress

from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.utils import is_dumb_terminal

from mlx_dsv3.errors import UserError, leave_at_once
from mlx_dsv3.terminal.commands import Leave, choices, run_command
from mlx_dsv3.terminal.kept import Kept
from mlx_dsv3.terminal.lines import Lines
from mlx_dsv3.terminal.progress import LoadBar
from mlx_dsv3.terminal.repl import HINT_AT_CTRL_C

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
ANSWERED = {"/help", "/?", "/exit", "/bye", "/quit"}  # without a model
AS_BEFORE = b"\x1b[?2004l\x1b[?25h\n\x1b[J"  # no marked pastes, a cursor, nothing below
LOCAL, SPECIAL = 3, 6  # where `tcgetattr` has the local modes and the special characters
SHOWN_WITHIN_S = 1.0
GONE_WITHIN_S = 0.3  # an editor may be open
AGAIN_S = 0.02


def can_show() -> bool:
    """Say whether a prompt can be shown while others work: a plain terminal's is never redrawn."""
    is_seen = sys.stdout.isatty() or sys.stderr.isatty()
    return sys.stdin.isatty() and is_seen and not is_dumb_terminal()


def between_prompts(modes: list) -> list:
    """Return the modes in which keys wait for the next prompt, which shows them; Ctrl-D too."""
    modes = [*modes[:SPECIAL], list(modes[SPECIAL])]
    modes[LOCAL] &= ~(termios.ECHO | termios.ICANON)
    modes[SPECIAL][termios.VMIN], modes[SPECIAL][termios.VTIME] = 1, 0
    return modes


class Arrived(Exception):
    """Ends the first prompt; what is typed stays for the next."""


class FirstPrompt(LoadBar):
    """Within it a prompt is shown, and the bar is words below it; `line` is what was sent."""

    def __init__(self, is_quiet: bool):
        super().__init__()
        self.is_quiet, self.is_over, self.error = is_quiet, False, None
        self.lock = threading.Lock()

    def __enter__(self) -> "FirstPrompt":
        if not self.is_early:
            return self
        if not self.is_quiet:
            print("/help lists commands", file=sys.stderr)
        self.typed = Lines(Kept(), choices)
        self.typed.modes = termios.tcgetattr(sys.stdin)
        atexit.register(self.typed.restore_modes)
        termios.tcsetattr(sys.stdin, termios.TCSANOW, between_prompts(self.typed.modes))
        ends = [n for n in ENDS if signal.getsignal(n) is not signal.SIG_IGN]
        self.handlers = {n: signal.signal(n, self.leave_by_signal) for n in ends}
        shown = threading.Event()
        self.app.after_render += lambda _: shown.set()
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()
        shown.wait(SHOWN_WITHIN_S)  # imports would take the interpreter's time from it
        return self

    def __exit__(self, kind, *_) -> None:
        if self.typed is not None:
            with self.lock:
                self.is_over = True
            try:
                self.end_prompt()
            finally:
                for number, handler in self.handlers.items():
                    signal.signal(number, handler)
            if self.line or kind is not None:
                self.typed.restore_modes()
        self.erase()
        if kind is None and self.error is not None:
            raise self.error

    @property
    def app(self):
        return self.typed.session.app

    def progress(self, done: int, total: int) -> None:
        self.take(done, total)
        if self.typed is None or not self.thread.is_alive():
            self.show()

    def read(self) -> None:
        """Read one line for the model; on the thread."""
        try:
            while not self.is_over and not self.line:
                try:
                    line = self.typed.read(self.words)
                except KeyboardInterrupt:
                    self.say(HINT_AT_CTRL_C)
                    continue
                if set(line.split(None, 1)[:1]) & ANSWERED:
                    self.answer(line)
                else:
                    self.line = line
        except Arrived:
            pass
        except (EOFError, Leave):
            self.leave()
        except BaseException as error:  # for the main thread
            self.error = error

    def answer(self, line: str) -> None:
        """Run a command that needs no model."""
        said = io.StringIO()
        try:
            with redirect_stderr(said):
                run_command(None, line)
        except UserError as error:
            print(error, file=said)
        self.say(said.getvalue().rstrip("\n"))

    def say(self, text: str) -> None:
        """Print where the prompt is: stderr is silenced while the tokenizer loads."""
        self.app.output.write(f"{text}\n")
        self.app.output.flush()

    def leave(self) -> None:
        """End the process, or the chat that has begun meanwhile."""
        with self.lock:
            if not self.is_over:
                self.typed.restore_modes()
                os._exit(0)
        self.typed.is_ended = True

    def leave_by_signal(self, number: int, frame) -> None:
        """Give the terminal back, and end as the signal would; an editor has Ctrl-C as a key."""
        if number == signal.SIGINT and self.app._running_in_terminal:
            return
        self.is_over = True
        self.end_prompt(GONE_WITHIN_S)  # or it would be drawn once more
        self.typed.restore_modes()
        os.write(self.app.output.fileno(), AS_BEFORE)
        if number == signal.SIGINT:
            leave_at_once()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def end_prompt(self, within_s: float = math.inf) -> None:
        """Wait until the prompt lets go."""
        deadline = time.monotonic() + within_s
        while self.thread.is_alive() and time.monotonic() < deadline:
            if self.app.is_running:
                with suppress(RuntimeError):  # its loop has just ended
                    self.app.loop.call_soon_threadsafe(self.hand_over)
            self.thread.join(AGAIN_S)
        self.app.erase_when_done = False

    def hand_over(self) -> None:
        """End the prompt, unless a key is half read, an editor open or the history searched."""
        app, buffer = self.app, self.typed.session.default_buffer
        is_busy = app._running_in_terminal or app.key_processor.key_buffer
        if app.is_done or is_busy or not app.layout.has_focus(DEFAULT_BUFFER):
            return
        self.typed.default, app.erase_when_done = buffer.document, True
        app.exit(exception=Arrived())
