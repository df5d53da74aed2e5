"""What is typed becomes one message or command: keys, pastes, quotes, completion, the history."""

import io
import os
import signal
import socket
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from mlx_dsv3.terminal.kept import Kept
from mlx_dsv3.terminal.lines import Lines, edited
from mlx_dsv3.terminal.names import LAST

CODE = '"""What it does."""\n\nimport os\n\n"""More."""\n\nprint(os)'
PASTED = "\n".join(f"line {i}" for i in range(40))
WORDS = {"/r": ["/read", "/regen"], "/rea": ["/read"], "/read a\\ f": ["a\\ file"]}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def typed(home):
    """Return a function from keys to the message that they make."""
    with create_pipe_input() as keys:
        lines = Lines(Kept(), lambda text: WORDS.get(text, ()), keys, DummyOutput())

        def read(text: str | bytes) -> str:
            keys.send_bytes(text if isinstance(text, bytes) else text.encode())
            return lines.read()

        read.lines = lines
        yield read


@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("  hello \r", "hello"),
        ('"""first\rsecond\r"""\r', "first\nsecond"),
        ('"""/no command"""\r', "//no command"),  # one slash when it is sent
        ('""\r', '""'),
        (f"\x1b[200~{PASTED}\n\x1b[201~\r", PASTED),
        (f"\x1b[200~{PASTED}\x1b[201~ and this?\r", f"{PASTED} and this?"),
        (f"\x1b[200~{CODE}\x1b[201~\r", CODE),
        ("first\x1b\rsecond\r", "first\nsecond"),
        ("discarded\x03next\r", "next"),
        ("/r\ta\t\r", "/read"),
        ("/read a\\ f\t\r", "/read a\\ file"),
        (b"not \xff UTF-8\r", "not \udcff UTF-8"),
        ("x" * 10_000 + "\r", "x" * 10_000),
    ],
)
def test_keys(typed, monkeypatch, terminal, keys, message):
    monkeypatch.setenv("TERM", terminal)
    assert typed(keys) == message


def test_a_dumb_terminal_gets_no_control_code(home, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "dumb")
    typed = io.BytesIO(b'\n"""\nfirst\nsecond"""\nnot \xff UTF-8\n')
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed))
    lines = Lines()
    assert [lines.read() for _ in range(3)] == ["", "first\nsecond", "not \ufffd UTF-8"]
    with pytest.raises(EOFError):
        lines.read()
    assert "".join(capsys.readouterr()) == ">>> >>> ... ... >>> >>> "
    waiting = SimpleNamespace(readline=lambda: lines.end())  # as SIGTERM does
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=waiting))
    with pytest.raises(EOFError):
        lines.read()


@pytest.mark.parametrize("word", ["\\a" * 22, "x" * 20_000])
def test_tab_behind_a_long_word(word):
    """The search for the last word took twice as long with each backslash: a formula hung it."""
    began = time.perf_counter()
    assert LAST.search(f"{word} a\\ b")[0] == "a\\ b" and LAST.search(f"{word} ")[0] == ""
    assert time.perf_counter() - began < 0.5


def test_ctrl_c_and_ctrl_d_with_nothing_typed(typed):
    with pytest.raises(KeyboardInterrupt):
        typed("\x03")
    with pytest.raises(EOFError):
        typed("\x04")
    assert typed("go on\r") == "go on"


def test_no_loop_is_left_with_the_signals(typed, monkeypatch):
    """A Ctrl-C as a prompt ended left them to a closed loop, and each later one was a traceback."""
    lines, (left, right) = typed.lines, socket.socketpair()
    left.setblocking(False)

    def prompt(**_):
        signal.set_wakeup_fd(left.fileno())
        raise KeyboardInterrupt

    monkeypatch.setattr(lines.session, "prompt", prompt)
    with pytest.raises(KeyboardInterrupt):
        lines.prompt("")
    assert signal.set_wakeup_fd(-1) == -1
    left.close(), right.close()


def test_a_prompt_in_a_thread_is_ended_from_outside(typed):
    """The first prompt is shown while the main thread loads the model, and a load may fail."""
    ends = []

    def read():
        ends.append(typed("in a thread\r"))
        try:
            typed("unfinished")
        except EOFError as error:
            ends.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    while len(ends) < 1 or not typed.lines.end():
        thread.join(0.01)
    thread.join(5)
    assert ends[0] == "in a thread" and isinstance(ends[1], EOFError)


def test_the_history_is_kept_for_its_user_alone(typed, home):
    (home / ".mlx_dsv3").chmod(0o755)
    (home / ".mlx_dsv3/history").chmod(0o644)
    for keys in ("one\r", " a secret\r", '"""two\rlines"""\r', b"\xff\r"):
        typed(keys)
    file = home / ".mlx_dsv3/history"
    assert oct(file.stat().st_mode) == oct(0o100600)
    assert oct(file.parent.stat().st_mode) == oct(0o40700)
    assert "secret" not in file.read_text()
    with create_pipe_input() as keys:
        lines = Lines(Kept(), input=keys, output=DummyOutput())
        keys.send_text("\x1b[A\x1b[A\r")
        assert lines.read() == "two\nlines"
        keys.send_text("\x12on\r\r")  # Ctrl-R
        assert lines.read() == "one"


@pytest.mark.parametrize("trouble", ["symlink", "pipe", "no home", "relative", "full"])
def test_a_history_that_cannot_be_kept_is_told_once(typed, home, monkeypatch, capsys, trouble):
    """A link that somebody left there would have had a user's lines written anywhere."""
    folder, other = home / ".mlx_dsv3", home / "other"
    other.write_text("theirs")
    (folder / "history").unlink()
    if trouble == "symlink":
        (folder / "history").symlink_to(other)
    elif trouble == "pipe":
        os.mkfifo(folder / "history")
    elif trouble == "no home":
        monkeypatch.setenv("HOME", str(other))
    elif trouble == "relative":
        monkeypatch.chdir(home.parent)
        monkeypatch.setenv("HOME", home.name)
    else:
        full = partial(os.open, "/dev/full")
        monkeypatch.setattr("mlx_dsv3.terminal.kept.open_history", full)
    assert [typed(f"{i}\r") for i in range(3)] == ["0", "1", "2"]
    told = capsys.readouterr().err
    assert told.startswith("warning: what is typed is not kept: ") and told.count("\n") == 1
    assert other.read_text() == "theirs"


def test_an_editor_changes_the_text(typed, tmp_path, monkeypatch):
    """Ctrl-C is a key of editors, and reaches us too: it killed them."""
    editor = tmp_path / "my editor"
    editor.write_text(
        "#!/bin/sh\nkill -INT $PPID\nsleep 0.2\n"
        'printf "%s\\376\\n" "$(cat "$2") more" > "$2.new"; mv "$2.new" "$2"'
    )
    editor.chmod(0o700)
    monkeypatch.setenv("VISUAL", "/no/such/editor")
    monkeypatch.setenv("EDITOR", f"'{editor}' -w")
    assert edited("text") == "text more\ufffd"
    changed = typed.lines.session.default_buffer.on_text_changed
    changed += lambda buffer: buffer.text.endswith("more\ufffd") and buffer.validate_and_handle()
    assert typed("text\x07") == "text more\ufffd"
