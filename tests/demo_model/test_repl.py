"""Signals and Ctrl-C at any time, in this process: nothing said is lost, and the chat goes on."""

import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from interrupt import Interrupt
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import mlx_dsv3
from mlx_dsv3.conversation.session import Session
from mlx_dsv3.conversation.transcript import read
from mlx_dsv3.model.decoder import Decoder
from mlx_dsv3.terminal.commands import choices
from mlx_dsv3.terminal.kept import Kept, chats, newest
from mlx_dsv3.terminal.lines import Lines
from mlx_dsv3.terminal.repl import Chat, repl
from mlx_dsv3.terminal.screen import Screen

from .test_chat import QUESTION

FILES = tuple(
    str(Path(mlx_dsv3.__file__).parent / name)
    for name in ("terminal/repl.py", "terminal/commands.py", "terminal/kept.py", "conversation/")
)
AT_THE_ENDS = 70  # lines


@pytest.fixture
def killed(monkeypatch):
    """Return by which signals a chat ends this process, which stays."""
    numbers = []
    system = SimpleNamespace(getpid=os.getpid, kill=lambda pid, number: numbers.append(number))
    monkeypatch.setattr("mlx_dsv3.terminal.repl.os", system)
    monkeypatch.setattr("mlx_dsv3.terminal.repl.discard", lambda stream: None)
    return numbers


@pytest.fixture
def new_chat(loaded, tmp_path, monkeypatch):
    """Return a function (longest reply) -> a chat."""
    monkeypatch.setenv("HOME", str(tmp_path))

    def chat(max_tokens: int) -> Chat:
        session = Session(loaded, settings={"max_tokens": max_tokens}, drafts=0)
        return Chat(session, Screen(), model="demo")

    return chat


@pytest.fixture
def chat(new_chat):
    return new_chat(12)


@pytest.fixture
def type_into():
    """Return a function (chat, keys) that is a whole session with them."""
    with create_pipe_input() as keys:

        def typed(chat: Chat, text: str) -> None:
            keys.send_text(text)
            repl(chat, Lines(Kept(), choices, keys, DummyOutput()))

        yield typed


def at_event(chat: Chat, number: int, action) -> None:
    """Take an action when the n-th event of the replies is shown."""
    show, events = chat.screen.show, []

    def shown(event):
        events.append(event)
        show(event)
        if len(events) == number:
            action()

    chat.screen.show = shown


def kept(chat: Chat) -> list[dict]:
    """Return the messages of the newest chat, which are those of this one."""
    messages = read(newest()).messages
    assert messages == chat.session.conversation.messages
    return messages


def test_a_chat_that_is_only_looked_at_is_kept_once(chat, new_chat, type_into):
    """Fifty looks at the last chat dropped all others."""
    type_into(chat, f"{QUESTION}\r/exit\r")
    for line, number in (("/show", 1), ("/set temp 1", 2)):
        chat = new_chat(12)
        chat.session.restore(read(newest()))
        type_into(chat, f"{line}\r/exit\r")
        assert len(chats()) == number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("event", [1, 6, 9])
def test_a_signal_keeps_what_was_said(chat, type_into, killed, number, event):
    """In the prompt, in the reply; what was typed ahead is not answered any more."""
    at_event(chat, event, lambda: signal.raise_signal(number))
    type_into(chat, f"{QUESTION}\rAnd now?\r")
    question, answer = kept(chat)
    assert question["content"] == QUESTION and killed == [number]
    assert "The capital of France is Paris.".startswith(answer["content"])
    assert bool(answer["content"]) == (event > 5)
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_signal_while_the_model_computes(chat, type_into, killed, monkeypatch):
    original, calls = Decoder.through, []

    def through(self, *arguments):
        calls.append(arguments)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(Decoder, "through", through)
    type_into(chat, f"{QUESTION}\r")
    assert 0 < len(kept(chat)[1]["content"]) < 30 and killed == [signal.SIGTERM]


def test_a_signal_at_the_prompt(chat, type_into, killed):
    """What is being typed is no message yet."""
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    at_event(chat, 1, timer.start)
    type_into(chat, f"{QUESTION}\rhalf a mess")
    assert len(kept(chat)) == 2 and killed == [signal.SIGTERM]


def test_a_process_that_ignores_hangups_goes_on(chat, type_into, killed):
    """`nohup` asks for it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_event(chat, 2, lambda: signal.raise_signal(signal.SIGHUP))
        type_into(chat, f"{QUESTION}\r/exit\r")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert kept(chat)[1]["content"] == "The capital of France is Paris." and not killed


def test_twice_in_a_row(chat, type_into, capsys):
    """A second Ctrl-C within a reply took the chat, and the model with it."""

    def twice():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)

    at_event(chat, 7, twice)
    type_into(chat, f"{QUESTION}\r{QUESTION}\r\x03\x03\x04")
    assert kept(chat)[-1]["content"] == "The capital of France is Paris."
    assert capsys.readouterr().err.count("(/exit or Ctrl-D leaves)") >= 2


def test_ctrl_c_before_a_reply_begins_and_while_it_is_told(chat, type_into):
    """A question without an answer made every template refuse the next one."""
    turn, conversation, drop = chat.session.turn, chat.session.conversation, []

    def interrupted(text):
        turn(text)
        chat.session.turn = turn
        raise KeyboardInterrupt

    def dropped():
        drop.extend(conversation.messages)
        if conversation.messages:
            conversation.messages.clear()
            signal.raise_signal(signal.SIGINT)  # one more

    chat.session.turn, conversation.drop_unanswered = interrupted, dropped
    type_into(chat, f"Hi\r{QUESTION}\r\x04")
    assert drop[0]["content"] == "Hi" and kept(chat)[0]["content"] == QUESTION
    del conversation.drop_unanswered
    conversation.add_user("Hi")
    for _ in range(2):
        conversation.drop_unanswered()
    assert len(conversation.messages) == 2


# A file that was opened just then is closed with a warning.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_at_any_line(new_chat, type_into, tmp_path):
    """The signal itself, at 15 of the lines of ours that a session runs, those at its ends apart.

    There it may end the process, as it does everywhere: nothing is lost by then.
    """
    keys, many = "Hi\rHo\r/undo\r/regen\r/show\r/clear\rHi\r\x04", 10**9
    count = Interrupt(FILES, many)
    count.run(lambda: type_into(new_chat(2), keys))
    total = many - count.left
    for line in range(AT_THE_ENDS, total - AT_THE_ENDS, total // 15):
        (tmp_path / ".mlx_dsv3/history").unlink()  # or each session would run more lines
        interrupt, chat = Interrupt(FILES, line), new_chat(2)
        assert not interrupt.run(lambda chat=chat: type_into(chat, keys)) and interrupt.was_sent
        messages = chat.session.conversation.messages
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert not messages or kept(chat)
