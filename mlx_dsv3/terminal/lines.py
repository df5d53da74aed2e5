"""What a person types: one message or command at a time, edited by prompt_toolkit.

Enter sends, Alt-Enter begins a new line, and so does Enter after an open \"""; a pasted text is one
message. Works outside the main thread too, where prompt_toolkit leaves signals alone. Imports no
model code: the first prompt is shown while the model loads.
"""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app, get_app_or_none, run_in_terminal
from prompt_toolkit.completion import Completer, Completion
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.output import DummyOutput, Output, create_output
from prompt_toolkit.search import stop_search
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.utils import is_dumb_terminal

from mlx_dsv3.errors import UserError, in_line
from mlx_dsv3.terminal.kept import Kept
from mlx_dsv3.terminal.names import LAST

PROMPT, CONTINUATION = ">>> ", "... "
QUOTES = '"""'
EDITORS = ("/usr/bin/editor", "nano", "vi")


def is_open(text: str) -> bool:
    """Say whether a message begins with three quotes that no others close.

    Code may be pasted that begins with a text in such quotes, and goes on after it.
    """
    text = text.strip()
    is_closed = len(text) >= 6 and text.endswith(QUOTES)
    return text.startswith(QUOTES) and not is_closed and text.count(QUOTES) % 2 == 1


def unquoted(text: str) -> str:
    """Return a message without the quotes around it; quoted, a slash begins no command."""
    text = text.strip()
    if len(text) < 6 or not text.startswith(QUOTES) or not text.endswith(QUOTES):
        return text
    text = text[3:-3].strip("\n")
    return f"/{text}" if text.startswith("/") else text


@contextmanager
def on_ctrl_c(handler: Callable) -> Iterator[None]:
    """Let it take Ctrl-C meanwhile, where this is the main thread: others get no signal."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, handler) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)


def edited(text: str) -> str:
    """Return a text as the user's editor leaves it. Ctrl-C is a key of editors, and theirs."""
    named = [os.environ.get(name) for name in ("VISUAL", "EDITOR")]
    with tempfile.NamedTemporaryFile(prefix="mlx_dsv3-", suffix=".md") as file:
        file.write(text.encode("utf-8", "replace"))
        file.flush()
        for editor in filter(None, (*named, *EDITORS)):
            try:
                with on_ctrl_c(lambda *_: None):
                    status = subprocess.call([*shlex.split(editor), file.name])
            except (OSError, ValueError):  # not there, or an open quote
                continue
            if status:
                raise UserError(f"the editor `{editor}` ended with status {status}")
            with open(file.name, "rb") as changed:  # many editors write a new file
                return changed.read().decode("utf-8", "replace").removesuffix("\n")
    raise UserError("no editor was found", "`export EDITOR=nano` chooses one")


class History(InMemoryHistory):
    """The lines that the up-arrow goes through."""

    def append_string(self, string: str) -> None:
        if not string.startswith(" "):
            super().append_string(string)


class Words(Completer):
    """Completes the last word by what may stand there, given all that was typed."""

    def __init__(self, choices: Callable[[str], Iterable[str]]):
        self.choices = choices

    def get_completions(self, document, complete_event):
        text = document.text_before_cursor
        for word in self.choices(text):
            start = -len(LAST.search(text)[0])
            yield Completion(word, start, display=in_line(word))


def key_bindings(missed: Callable[[], None]) -> KeyBindings:
    """Return the keys that differ from those of a plain line; `missed` takes a late Ctrl-C."""
    keys = KeyBindings()
    is_typing = has_focus(DEFAULT_BUFFER)  # and does not search the history

    @keys.add("enter", filter=is_typing)
    def enter(event) -> None:
        buffer = event.current_buffer
        buffer.newline(False) if is_open(buffer.text) else buffer.validate_and_handle()

    @keys.add("c-c")
    @keys.add("<sigint>")
    def interrupt(event) -> None:
        if event.app._running_in_terminal:  # an editor, whose key it is
            return
        if event.app.layout.is_searching:  # else the next line would go into the search
            stop_search()
        elif event.app.is_running and not event.app.is_done:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")
        else:  # prompt_toolkit's own fails here
            missed()

    @keys.add("escape", "enter", filter=is_typing)
    def newline(event) -> None:
        event.current_buffer.newline(False)

    @keys.add("c-g", filter=is_typing)
    async def edit(event) -> None:
        buffer = event.current_buffer
        try:
            text = await run_in_terminal(lambda: edited(buffer.text), in_executor=True)
        except (UserError, OSError) as error:
            told = str(error)
            await run_in_terminal(lambda: print(told, file=sys.stderr))
        else:
            buffer.text = text
            buffer.cursor_position = len(text)

    return keys


def is_plain() -> bool:
    """Say whether what shows the prompt takes no control codes: it is dumb, or no terminal."""
    return is_dumb_terminal() or not (sys.stdout.isatty() or sys.stderr.isatty())


def plain_text(text: str) -> str:
    """Return a message, if there is none yet, as the terminal itself lets lines be edited."""
    sign, stream = PROMPT, sys.stdout if sys.stdout.isatty() else sys.stderr
    while not text or is_open(text):
        print(sign, end="", file=stream, flush=True)
        if not (line := sys.stdin.buffer.readline()):
            raise EOFError
        text, sign = text + line.decode("utf-8", "replace"), CONTINUATION
    return text


def own_output() -> Output:
    """Return where the prompt is shown: a terminal, and never a pipe for the answers.

    By a descriptor of its own: others are silenced while the tokenizer loads.
    """
    stream = sys.stdout if sys.stdout.isatty() else sys.stderr
    output = create_output(os.fdopen(os.dup(stream.fileno()), "w", encoding=stream.encoding))
    # Asked where the cursor is, a slow terminal answers into a reply, or a warning is printed.
    output.enable_cpr = False
    return output


class Lines:
    """Reads what is typed. `choices` completes words; `default` is put into the next line."""

    def __init__(self, kept: Kept | None = None, choices=lambda text: (), input=None, output=None):
        self.kept, self.default, self.is_ended = kept, "", False
        self.is_interrupted = False  # by a Ctrl-C that nobody has listened to yet
        self.is_plain, self.is_waiting = output is None and is_plain(), False
        self.modes: list | None = None  # of the terminal, which the next line gives back
        self.begin = partial(
            PromptSession,
            PROMPT,
            history=History(kept.history() if kept else []),
            completer=Words(choices),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,  # others reserve lines below the prompt
            key_bindings=key_bindings(self.note_ctrl_c),
            multiline=True,
            prompt_continuation=lambda width, line, wraps: "" if wraps else CONTINUATION,
            enable_suspend=True,
            input=input,
            output=output or (DummyOutput() if self.is_plain else own_output()),
        )
        self.session = self.begin()

    def read(self, toolbar: Callable[[], str] | None = None) -> str:
        """Return the next message or command.

        Raises `EOFError` after Ctrl-D or `end`, `KeyboardInterrupt` after Ctrl-C with nothing
        typed; else it discards what was. `toolbar` gives a line to show below meanwhile.
        """
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        while not self.is_ended:
            default, self.default = self.default, ""
            self.session.bottom_toolbar = toolbar
            self.session.refresh_interval = 0.2 if toolbar else 0
            try:
                text = self.prompt(default)
                if self.is_interrupted or self.is_ended:  # as it ended by itself
                    raise EOFError if self.is_ended else KeyboardInterrupt
            except KeyboardInterrupt:
                # A new one: this may have half a key or an open search left.
                text, self.session = self.session.default_buffer.text, self.begin()
                self.is_interrupted = False
                if text:
                    continue
                raise
            finally:
                if toolbar is None:  # else a prompt follows at once
                    self.restore_modes()
            if self.kept:
                self.kept.remember(text)
            return unquoted(text)
        raise EOFError

    def prompt(self, default) -> str:
        """Return a text as it is typed."""
        if not self.is_plain:
            try:
                return self.session.prompt(default=default, pre_run=self.leave_if_noted)
            finally:
                if threading.current_thread() is threading.main_thread():
                    signal.set_wakeup_fd(-1)  # a Ctrl-C as it ends leaves that of a closed loop
        with on_ctrl_c(signal.default_int_handler):
            try:
                self.is_waiting = True
                return plain_text(default)
            finally:
                self.is_waiting = False

    def note_ctrl_c(self) -> None:
        self.is_interrupted = True

    def leave_if_noted(self) -> None:
        """Leave a prompt that has just begun, for a signal that struck before it could listen."""
        if self.is_ended or self.is_interrupted:
            get_app().exit(exception=EOFError if self.is_ended else KeyboardInterrupt)

    def restore_modes(self) -> None:
        """Let the terminal be as it was before the first prompt."""
        modes, self.modes = self.modes, None
        if modes is not None:
            with suppress(termios.error):  # it has gone
                termios.tcsetattr(sys.stdin, termios.TCSANOW, modes)

    def end(self) -> bool:
        """End the reading, from a signal's handler or another thread; say whether there is any."""
        self.is_ended, app = True, get_app_or_none()

        def leave() -> None:
            if app.is_running and not app.is_done:
                app.exit(exception=EOFError)

        if self.is_waiting:
            raise EOFError  # out of the handler, to who waits
        if app is None or not app.is_running:
            return False
        app.loop.call_soon_threadsafe(leave)
        return True
