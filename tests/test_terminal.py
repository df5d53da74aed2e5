"""What is shown on a terminal: nothing from outside drives it; a pipe gets what the model wrote."""

import io
import json
from types import SimpleNamespace

import pyte
import pytest

from mlx_dsv3.conversation.session import End, Text
from mlx_dsv3.decoding.draft_stats import LEAST_TOKENS, DraftStats
from mlx_dsv3.experts.bank import Counters
from mlx_dsv3.generate import Prefill, Stats
from mlx_dsv3.terminal.drawing import RESET, duration
from mlx_dsv3.terminal.repl import Chat, answer_line
from mlx_dsv3.terminal.screen import Screen
from mlx_dsv3.terminal.statistics import context_lines, stats_lines, stats_words
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


def stats(drafted=0, accepted=0, experts=None, **values) -> Stats:
    """Return the statistics of the longest reply that a line must have room for."""
    drafts = DraftStats(drafted=[drafted, 0, 0, 0], accepted=[accepted, 0, 0, 0])
    drafts.steps, drafts.lengths = [1, drafted, 0, 0, 0], [drafted - accepted, accepted, 0, 0, 0]
    longest = {"prompt_tokens": 131_234, "reused_tokens": 65_200, "prompt_s": 431.0}
    longest |= {"first_token_s": 431.3, "reply_tokens": 4512, "reply_s": 51.2}
    longest |= {"peak_bytes": 377_900_000_000, "drafts": drafts, "experts": experts}
    return Stats(**longest | values)


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
    assert out == "thinking … thought for 12 s\n*Two*.\n"


@pytest.mark.parametrize("hide", [True, False])
def test_a_pipe_gets_the_answer_alone(monkeypatch, hide):
    """A person at stderr still sees the thought; a program there does not."""
    events = [*THINKING, End("stop", None, {})]
    out, err = shown(monkeypatch, events, out_is_terminal=False, hide_thinking=hide)
    said = ["thought for 12 s", ""] if hide else ["Let me see.", "thought for 12 s"]
    assert out == "*Two*.\n" and drawn(err)[:2] == said
    assert shown(monkeypatch, events, False, False, hide_thinking=hide) == ("*Two*.\n", "")


def test_a_stopped_thought_ends_its_line(monkeypatch):
    for hide in (True, False):
        events = [*THINKING[:2], End("interrupted", stats(), {})]
        out, err = shown(monkeypatch, events, hide_thinking=hide)
        assert drawn(out)[hide ^ 1] == "thought for 8 s"
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


def test_durations():
    seconds = (0, 0.0514, 1.26, 9.94, 9.96, 59.7, 599, 599.6, 7250)
    words = [duration(s) for s in seconds]
    assert words == [
        *("0.001 s", "0.051 s", "1.3 s", "9.9 s", "10 s", "60 s", "599 s", "10 min", "121 min")
    ]


def test_the_line_fits_100_columns():
    """Of a resident model, after a long reply to a longer prompt: 71 % of its drafts accepted."""
    line = f"[{'; '.join(stats_words(stats(2000, 1420)))}]"
    assert len(line) <= 100
    assert line.startswith("[prompt 131,234 (65,200 reused), first token 431 s; reply 4,512, ")
    assert line.endswith("88.1/s; drafts 71%; peak 377.9 GB]")


def test_few_tokens_make_no_ratio():
    """The demo greeted with `0.03 x plain`, of 13 tokens."""
    few = {"prompt_tokens": 1020, "reused_tokens": 1000}
    for tokens, is_ratio in ((LEAST_TOKENS - 1, False), (LEAST_TOKENS, True)):
        experts = Counters(hits=900, misses=100, nbytes=10**9)
        some = stats(tokens, 10, experts, **few | {"reply_tokens": tokens - 20})
        line = "; ".join(stats_words(some))
        assert (line.count("%"), line.count(" of ")) == ((2, 0) if is_ratio else (0, 2)), line
        lines = "\n".join(lines_of(some, {3: experts}))
        assert ("%" in lines) == is_ratio and " x plain" not in lines
        assert lines.startswith("prompt       1,020 tokens, 1,000 reused\n")  # 20 say no speed
    assert lines_of(stats())[0] == "prompt       131,234 tokens, 65,200 reused, 153.2/s"


def lines_of(some: Stats, layers=None) -> list[str]:
    """Return the lines of `/stats` after a reply."""
    bank = SimpleNamespace(capacity=12)
    store = SimpleNamespace(banks=dict.fromkeys(layers or {}, bank))
    session = SimpleNamespace(loaded=SimpleNamespace(store=store))
    session.control = SimpleNamespace(fixed=None)
    return stats_lines(End("stop", some, layers or {}), session)


def test_stats_are_drawn(monkeypatch):
    """Hit rates of layers and what became of drafts, in blocks or, where there are none, ASCII."""
    layers = {3: Counters(hits=900, misses=300), 4: Counters()}
    for encoding, half in (("utf-8", "█" * 12), ("ascii", "#" * 12)):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr("sys.stderr", stream)
        lines = lines_of(stats(100, 50), layers)
        rows = {" ".join(line[:13].split()): line[13:] for line in lines}
        assert rows["accepted 0"] == rows["accepted 1"] == half * 2 + "      50"
        assert rows["layer 3"].startswith(f"{half}{half[:6]}       75% hits, 12 slots")
        assert rows["layer 4"].startswith(f"{'':<24} 0% hits")
        assert all(len(line) <= 100 for line in lines)
        "".join(lines).encode(encoding)


def test_context_is_drawn(monkeypatch):
    """What fills it by share of what is there: a short chat is nothing beside 32,768 tokens."""
    loaded = SimpleNamespace(
        args=SimpleNamespace(max_position_embeddings=999), plan=SimpleNamespace(context=400)
    )
    parts = [("system", 75), ("questions", 0), ("answers", 25)]
    session = SimpleNamespace(context=lambda: parts, loaded=loaded)
    assert [line.replace(" ", "") for line in context_lines(session)] == [
        "context██████100of400tokens",
        f"system{'█' * 18}75",
        "questions0",
        f"answers{'█' * 6}25",
    ]
    for count, drawn in ((0, ""), (1, "▏")):
        session.context = lambda count=count: [("system", count)]
        line = context_lines(session)[0]
        assert line.replace(" ", "") == f"context{drawn}{count}of400tokens"


def test_json_is_one_line_of_any_reply(monkeypatch):
    """An object for each reply, whatever it holds; of a prompt that was stopped too."""
    experts = Counters(hits=9, misses=1, nbytes=10**9)
    nothing = End("interrupted", None, {})
    for some, reused in ((stats(90, 60, experts), 65_200), (stats(), 65_200), (None, 7)):
        end = End("stop", some, {3: experts}, HOSTILE, "\ud800\n👧", 1.5)
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
