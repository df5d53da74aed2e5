"""What is shown on a terminal: nothing from outside drives it; a pipe gets what the model wrote."""

import io
from types import SimpleNamespace

import pytest

from mlx_dsv3.conversation.session import End, Text
from mlx_dsv3.terminal.drawing import RESET
from mlx_dsv3.terminal.repl import Chat, answer_line
from mlx_dsv3.terminal.screen import Screen
from mlx_dsv3.terminal.trace import Trace

# Clears the screen, sets the title and the clipboard, in C0 and in C1; hides what came before.
HOSTILE = "\x1b[2J\x1b]0;title\x07 \x1b]52;c;eA==\x07 \x9b2J\x90x\x9c a\rb\x7f\x08 \u202ec"
SHOWN = r"\x1b[2J\x1b]0;title\x07 \x1b]52;c;eA==\x07 \x9b2J\x90x\x9c a\x0db\x7f\x08 \u202ec"


@pytest.fixture(autouse=True)
def colours(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


class Stdout(io.StringIO):
    """A stdout that is a terminal, or a pipe."""

    is_terminal = True

    def isatty(self):
        return self.is_terminal


def chat_that_says(*texts: str, error: Exception | None = None) -> Chat:
    """Return a chat whose every reply is the texts, or the error after them."""

    def turn(text):
        yield from map(Text, texts)
        if error is not None:
            raise error
        yield End("stop", None, {})

    return Chat(SimpleNamespace(turn=turn), Screen())


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_reply_cannot_drive_the_terminal(monkeypatch, is_terminal):
    """One token of the demo model is ESC, and it was printed. Lines and tabs stay."""
    screen = Stdout()
    screen.is_terminal = is_terminal
    monkeypatch.setattr("sys.stdout", screen)
    chat_that_says("1\n\t", *HOSTILE).turn("x")
    assert screen.getvalue() == f"1\n\t{SHOWN + RESET if is_terminal else HOSTILE}\n"


@pytest.mark.parametrize(
    "line, error", [(f"/{HOSTILE.split()[0]}", None), ("x", ValueError(HOSTILE))]
)
def test_what_is_told_cannot_either(capsys, line, error):
    """An unknown command is named, and a failure's reason: both come from outside."""
    answer_line(chat_that_says(error=error), line)
    told = capsys.readouterr().err
    assert SHOWN.split()[0] in told and told.replace("\n", "").isprintable()


def test_a_trace_that_ends_cannot_either(tmp_path, capsys):
    store = SimpleNamespace(on_route=None)
    trace = Trace(store, tmp_path / "a\x1b[2Jb")
    trace.file.close()
    trace.file = SimpleNamespace(name=trace.file.name, write=full, close=lambda: None)
    store.on_route(3, SimpleNamespace(tolist=list))
    assert r"a\x1b[2Jb` ends: [Errno 28] full" in capsys.readouterr().err


def full(text):
    raise OSError(28, "full")
