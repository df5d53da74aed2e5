"""What is shown on a terminal: nothing from outside drives it; a pipe gets what the model wrote."""

import io
import json
import random
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pyte
import pytest
from test_statistics import stats

from mlx_dsv3.conversation.session import End, Text
from mlx_dsv3.errors import visible
from mlx_dsv3.experts.bank import Counters
from mlx_dsv3.generate import Prefill
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


THINKING = [Prefill(0, 0, 11), Text("Let me", True), Text(" see.\n", True), Text("*Two*.")]
EVERYTHING = "# A\n**b** *c* `d` [e](f)\n- g\n> h\n```\ni\n```\n"


def shown(monkeypatch, events, out_is_terminal=True, err_is_terminal=True, **options):
    """Return what stdout and stderr get of the events of a reply, each 4 s after the last."""
    out, err, clock = Stdout(), Stdout(), 0
    out.is_terminal, err.is_terminal = out_is_terminal, err_is_terminal
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        patch.setattr("time.perf_counter", lambda: clock)
        screen = Screen(**options)
        for event in events:
            clock += 4
            screen.show(event)
    return out.getvalue(), err.getvalue()


def drawn(text: str, columns: int = 100) -> list[str]:
    """Return the lines of a terminal that was sent a text."""
    screen = pyte.Screen(columns, 200)
    pyte.Stream(screen).feed(text.replace("\n", "\r\n"))
    return [line.rstrip() for line in screen.display]


def test_a_thought_is_dim_and_has_a_duration(monkeypatch):
    out, err = shown(monkeypatch, [*THINKING, End("stop", None, {})])
    assert drawn(out)[:3] == ["Let me see.", "thought for 12 s", "*Two*."]
    assert out.startswith("\x1b[2mLet me\x1b[0m") and err == ""


def test_no_thought_is_no_thought(monkeypatch):
    """R1 may close at once the thought that its template has opened."""
    for hide in (True, False):
        events = [Prefill(0, 0, 3), Text("", True), Text("Hi"), End("stop", None, {})]
        out, _ = shown(monkeypatch, events, hide_thinking=hide)
        assert out.replace(RESET, "") == "Hi\n"


@pytest.mark.parametrize("is_pipe", [True, False])
def test_a_thought_cannot_drive_the_terminal(monkeypatch, is_pipe):
    out, err = shown(monkeypatch, [Text(HOSTILE, True)], out_is_terminal=not is_pipe)
    assert SHOWN in (err if is_pipe else out) and HOSTILE not in out + err


def test_a_hidden_thought_shows_its_seconds(monkeypatch):
    """They stand in one place, and the duration takes it."""
    out, _ = shown(monkeypatch, THINKING[:3], hide_thinking=True)
    assert drawn(out)[:2] == ["thinking … 8 s", ""]
    out, _ = shown(monkeypatch, [*THINKING, End("stop", None, {})], hide_thinking=True)
    assert drawn(out)[:3] == ["thought for 12 s", "*Two*.", ""]
    monkeypatch.setenv("NO_COLOR", "1")
    out, _ = shown(monkeypatch, [*THINKING, End("stop", None, {})], hide_thinking=True)
    assert drawn(out)[:3] == ["thought for 12 s", "*Two*.", ""] and "\x1b[2m" not in out
    monkeypatch.setenv("TERM", "dumb")
    out, _ = shown(monkeypatch, [*THINKING, End("stop", None, {})], hide_thinking=True)
    assert out == "thinking … thought for 12 s\n*Two*.\n"


@pytest.mark.parametrize("hide", [True, False])
def test_a_pipe_gets_the_answer_alone(monkeypatch, hide):
    """A person at stderr still sees the thought; a program there does not."""
    events = [*THINKING, End("stop", None, {})]
    out, err = shown(monkeypatch, events, out_is_terminal=False, hide_thinking=hide)
    said = ["thought for 12 s", ""] if hide else ["Let me see.", "thought for 12 s"]
    assert out == "*Two*.\n" and drawn(err)[:2] == said
    assert shown(monkeypatch, events, False, False, hide_thinking=hide) == ("*Two*.\n", "")


def test_a_reply_that_failed_in_a_thought_leaves_nothing_to_the_next(monkeypatch):
    monkeypatch.setattr("sys.stdout", Stdout())
    screen = Screen()
    screen.show(Text("Let me", True))
    screen.fail()
    screen.show(Text("Hello"))
    assert drawn(sys.stdout.getvalue())[:3] == ["Let me", "Hello", ""]


def test_a_stopped_thought_ends_its_line(monkeypatch):
    for hide in (True, False):
        events = [*THINKING[:2], End("interrupted", stats(), {})]
        out, err = shown(monkeypatch, events, hide_thinking=hide)
        assert drawn(out)[hide ^ 1] == "thought for 8.0 s"
        assert drawn(err)[0] == "(stopped)" and drawn(err)[1].startswith("[prompt")


@pytest.mark.parametrize("environ", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {}])
def test_no_control_codes_where_they_are_not_wanted(monkeypatch, environ):
    """With an empty NO_COLOR a terminal has them; a pipe never."""
    events = [*THINKING, Text(EVERYTHING), End("length", stats(), {})]
    monkeypatch.setenv("NO_COLOR", "")
    assert all("\x1b[2m" in text for text in shown(monkeypatch, events))
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    is_pipe = not environ
    for options in ({}, {"hide_thinking": True}):
        for text in shown(monkeypatch, events, not is_pipe, not is_pipe, **options):
            if "NO_COLOR" in environ:  # a line is drawn anew all the same
                text = text.replace("\r\x1b[K", "").replace("\r", "")
            assert "\x1b" not in text and "\r" not in text
    assert EVERYTHING in text or EVERYTHING in shown(monkeypatch, events, not is_pipe)[0]


@pytest.mark.parametrize("options", [{"raw": True}, {"markdown": False}])
def test_markdown_is_switched_off(monkeypatch, options):
    """`--raw` leaves thoughts without an attribute too."""
    assert EVERYTHING not in shown(monkeypatch, [Text(EVERYTHING)])[0]
    assert EVERYTHING in shown(monkeypatch, [Text(EVERYTHING)], **options)[0]
    is_dim = "\x1b[2mLet me" in shown(monkeypatch, THINKING, **options)[0]
    assert is_dim == ("raw" not in options)


@pytest.mark.parametrize(
    "text", ["你好" * 99, "👩\u200d👩\u200d👧 שלום e\u0301 नमस्ते", "x" * 10_000]
)
def test_wide_and_long_lines(monkeypatch, text):
    """Nothing depends on the width: the terminal itself breaks lines."""
    for raw in (True, False):
        out, _ = shown(monkeypatch, [*map(Text, text), End("stop", None, {})], raw=raw)
        assert out.replace(RESET, "") == text + "\n"


def test_json_is_one_line_of_any_reply(monkeypatch):
    """An object for each reply, whatever it holds; of a prompt that was stopped too."""
    experts = Counters(hits=9, misses=1, nbytes=10**9)
    nothing = End("interrupted", None, {})
    for some, reused in ((stats(90, 60, experts), 65_200), (stats(), 65_200), (None, 7)):
        end = End("stop", some, {3: experts}, HOSTILE, "\ud800\n👧")
        out, err = shown(monkeypatch, [Prefill(7, 7, 11), *THINKING[1:], end], as_json=True)
        assert err == "" and out.count("\n") == 1 and out.isascii() and out[:-1].isprintable()
        values = json.loads(out)
        assert (values["text"], values["reasoning"]) == (HOSTILE, "\ud800\n👧")
        assert values["finish_reason"] == "stop" and (values["statistics"] is None) == (not some)
        counts = values["usage"]
        assert counts["total_tokens"] == counts["prompt_tokens"] + counts["completion_tokens"]
        assert counts["prompt_tokens_details"] == {"cached_tokens": reused}
    out, _ = shown(monkeypatch, [Prefill(7, 7, 11), nothing, nothing], as_json=True)
    prompts = [json.loads(line)["usage"]["prompt_tokens"] for line in out.splitlines()]
    assert prompts == [12, 0]  # the second was stopped before its prompt


def test_any_events(monkeypatch):
    """Whatever comes in whatever order: a pipe gets the answers alone, a terminal no command."""
    rng = random.Random(16)
    for _ in range(400):
        prefill, end = Prefill(0, rng.randrange(9), 9), End("stop", rng.choice([None, stats()]), {})
        texts = [Text(rng.choice([HOSTILE, EVERYTHING, "", "a", "`\n"])) for _ in range(9)]
        thoughts = [replace(text, is_thought=True) for text in texts[:4]]
        events = rng.choices([prefill, end, *texts, *thoughts], k=rng.randrange(12))
        said = [event for event in events if event not in (prefill, *thoughts)]
        answer = "".join("\n" if event is end else event.text for event in said)
        options = {name: rng.random() < 0.5 for name in ("markdown", "raw", "hide_thinking")}
        is_person = rng.random() < 0.5
        assert shown(monkeypatch, events, False, is_person, **options)[0] == answer
        for text in shown(monkeypatch, events, True, is_person, **options):
            text = re.sub(r"\x1b\[([0-9;]*m|K)|[\r\n\t]", "", text)
            assert text == visible(text)


def test_an_error_takes_the_place_of_a_bar(monkeypatch):
    """A prompt that fails while it is computed, with its bar drawn."""
    err, clock = Stdout(), 0
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setattr("time.perf_counter", lambda: clock)
    screen = Screen()
    for done in (0, 5, 10):
        screen.show(Prefill(0, done, 20))
        clock += 4
    assert "10 of 20 tokens" in drawn(err.getvalue())[0]
    screen.fail()
    assert drawn(err.getvalue())[0] == ""


def test_an_error_begins_a_line_of_its_own(capsys, monkeypatch):
    """Also within a thought, and with --json, where nothing was said before it."""
    for options in ({}, {"as_json": True}):
        chat = chat_that_says("**so", error=ValueError("no"))
        chat.screen = Screen(**options)
        answer_line(chat, "x")
        assert capsys.readouterr().out == ("" if options else "**so\n")
