"""A session without a screen: events in order, and what stays of a turn that did not end well."""

import signal
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
from drafted import Drafted

from mlx_dsv3.conversation.session import End, Event, Session, Text
from mlx_dsv3.errors import UserError
from mlx_dsv3.generate import Prefill, stream
from mlx_dsv3.load import load_model, plan_memory
from mlx_dsv3.model.decoder import Decoder

from .test_chat import QUESTION

FOLLOW_UP = "And what is the capital of Italy?"
STEP = 4  # of the reply, at which something happens: its first tokens are out


@pytest.fixture
def session(loaded) -> Session:
    return Session(loaded, drafts=1)


@pytest.fixture
def at_step(monkeypatch):
    """Return a function (step, action): the action is taken when the model is next asked for it."""

    def arrange(step: int, action) -> None:
        original, calls = Decoder.through, []

        def through(self, *arguments):
            calls.append(arguments)
            if len(calls) == step:
                action()
            return original(self, *arguments)

        monkeypatch.setattr(Decoder, "through", through)

    return arrange


def reply(events: Iterator[Event]) -> Iterator[Event]:
    """Return the events of a turn but for those of the prompt."""
    return (event for event in events if not isinstance(event, Prefill))


def said(events) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def roles(session: Session) -> list[str]:
    return [message["role"] for message in session.conversation.messages]


def assert_goes_on(session: Session) -> None:
    """Check the caches, and that the next turn reuses them and is what it is from scratch.

    After an error they are empty.
    """
    loaded, state = session.loaded, session.state
    if state.mtp_cache is not None and state.ids:
        Drafted(loaded.model, loaded.mtp).assert_exact(state, bound=1e-4)
    held = len(state.ids)
    *events, end = session.turn(FOLLOW_UP)
    answer = session.conversation.messages.pop()["content"]
    pieces = stream(loaded, session.conversation.prompt_ids(), drafts=0)
    assert said(events) == answer == "".join(piece.text for piece in pieces)
    assert held - 2 <= end.stats.reused_tokens


def test_a_turn_is_texts_and_then_an_end(session, capsys):
    """Terminal, pipe and endpoint read the same events; nothing is printed for them."""
    *texts, end = reply(session.turn(QUESTION))
    assert all(isinstance(event, Text) for event in texts) and isinstance(end, End)
    assert "Paris" in said(texts) and end.finish_reason == "stop" and end.layers == {}
    assert end.stats.reply_tokens == len(texts) and end.stats.reused_tokens == 0
    assert roles(session) == ["user", "assistant"]
    assert session.conversation.messages[-1]["content"] == said(texts)
    assert_goes_on(session)
    assert capsys.readouterr() == ("", "")


def test_a_limit_ends_a_reply(loaded):
    session = Session(loaded, settings={"max_tokens": 3})
    *texts, end = reply(session.turn(QUESTION))
    assert len(texts) == 3 and end.finish_reason == "length"
    session.settings["max_tokens"] = None  # settings may change between turns
    *_, end = session.turn(FOLLOW_UP)
    assert end.finish_reason == "stop"


def test_the_system_prompt_stays_after_clear(loaded):
    session = Session(loaded, system="Be brief.", drafts=0)
    first = session.conversation.prompt_ids()
    list(session.turn(QUESTION))
    session.clear()
    assert session.conversation.prompt_ids() == first
    *_, end = session.turn(FOLLOW_UP)
    assert end.stats.reused_tokens > len(first) // 2


@pytest.mark.parametrize("drafts", [0, 2])
def test_closing_keeps_what_was_said(loaded, drafts):
    """How an endpoint stops a reply whose client has left."""
    session = Session(loaded, drafts=drafts)
    told = reply(events := session.turn(QUESTION))
    text = said(next(told) for _ in range(STEP))
    events.close()
    assert text and session.conversation.messages[-1] == {"role": "assistant", "content": text}
    assert_goes_on(session)


@pytest.mark.parametrize("drafts", [0, 2])
def test_ctrl_c_inside_keeps_what_was_said(loaded, at_step, drafts):
    """The signal strikes while the model computes: an end follows the texts."""
    session = Session(loaded, drafts=drafts)
    at_step(STEP, lambda: signal.raise_signal(signal.SIGINT))
    *texts, end = reply(session.turn(QUESTION))
    assert said(texts) and end.finish_reason == "interrupted"
    assert end.stats.reply_tokens == len(texts)
    assert session.conversation.messages[-1]["content"] == said(texts)
    assert_goes_on(session)


def test_ctrl_c_in_the_reader_keeps_what_was_said(session):
    """It strikes the reader more often than the model; then the reader throws it in."""
    told = reply(events := session.turn(QUESTION))
    text = said(next(told) for _ in range(STEP))
    end = events.throw(KeyboardInterrupt())
    assert end.finish_reason == "interrupted" and end.stats.reply_tokens == STEP
    assert list(events) == [] and session.conversation.messages[-1]["content"] == text
    assert_goes_on(session)


def test_ctrl_c_before_the_first_token(session, at_step):
    """No statistics, and the session continues."""
    at_step(1, lambda: signal.raise_signal(signal.SIGINT))
    *_, end = session.turn(QUESTION)
    assert (end.finish_reason, end.stats) == ("interrupted", None)
    assert "Rome" in said(session.turn(FOLLOW_UP))


def test_an_error_leaves_no_turn(session, at_step):
    """Nobody knows what it left in the caches: the next turn begins with empty ones."""
    list(session.turn(QUESTION))
    at_step(STEP, lambda: 1 / 0)
    events = session.turn(FOLLOW_UP)
    with pytest.raises(ZeroDivisionError):
        list(events)
    assert roles(session) == ["user", "assistant"] and session.state.ids == []
    assert "Rome" in said(session.turn(FOLLOW_UP))


@pytest.mark.parametrize(
    "error, kept",
    [(OSError("the pipe is closed"), []), (KeyboardInterrupt(), ["user", "assistant"])],
)
def test_a_reader_fails_at_the_end_of_a_reply(session, error, kept):
    """It leaves no turn; but a Ctrl-C there undid a reply that stood on the screen."""
    events = session.turn(QUESTION)
    while not isinstance(next(events), End):
        pass
    with pytest.raises(type(error)):
        events.throw(error)
    assert roles(session) == kept


STOPS = {"closed": None, "stopped": KeyboardInterrupt(), "failed": OSError("the pipe is closed")}


def stop(events: Iterator[Event], at: int, how: str) -> None:
    """Read some events, then stop the reply or fail."""
    for _ in range(at):
        next(events)
    if how == "closed":
        return events.close()
    error = STOPS[how]
    try:
        while not isinstance(event := events.throw(error), End):
            pass
        assert how == "stopped" and list(events) == [] and event.finish_reason == "interrupted"
    except OSError as raised:
        assert how == "failed" and raised is error


@pytest.mark.parametrize(
    "at, how, again",
    [
        (1, "closed", "regenerate"),
        (3, "stopped", "regenerate"),
        (1, "stopped", "retry"),
        (3, "failed", "regenerate"),
    ],
)
def test_a_reply_stays_until_another_comes(session, how, at, again):
    """A stray Ctrl-C cost the answer that was to be replaced, and all that followed it."""
    list(session.turn(QUESTION))
    list(session.turn(FOLLOW_UP))
    before, takes = list(session.conversation.messages), session.takes
    events = session.regenerate() if again == "regenerate" else session.retry(1)
    stop(events, at, how)  # within the prompt
    assert session.conversation.messages == session.messages == before
    assert session.takes == takes
    assert_goes_on(session)


def test_a_reply_of_which_something_came_replaces_the_other(session):
    list(session.turn(QUESTION))
    text = next(reply(events := session.regenerate())).text
    stop(events, 1, "stopped")
    assert text and session.messages[-1]["content"].startswith(text)
    assert session.takes == 1


@pytest.mark.parametrize("at, how", [(1, "failed"), (4, "stopped"), (8, "closed"), (12, "failed")])
def test_a_turn_that_is_left_anywhere(session, how, at):
    """Closed or stopped, it keeps what was said, failed it is none; the next one is exact."""
    list(session.turn(QUESTION))
    stop(session.turn(QUESTION), at, how)
    assert roles(session) == ["user", "assistant"] * (1 if how == "failed" else 2)
    assert_goes_on(session)


def test_other_takes_of_a_reply(loaded):
    """Each has the noise of the next seed; a new question begins with the first again."""
    session = Session(loaded, settings={"temp": 3, "max_tokens": 12}, drafts=1)
    list(session.turn(QUESTION))
    texts = [session.messages[-1]["content"]]
    for _ in range(2):
        list(session.regenerate())
        texts.append(session.messages[-1]["content"])
    assert len(set(texts)) == 3
    list(session.retry(1))
    assert session.messages[-1]["content"] == texts[0] and session.takes == 0


def test_a_context_that_is_full(loaded):
    """The reply ends, the next question is refused with what to do, and that helps."""
    limit = 60
    session = Session(replace(loaded, plan=replace(loaded.plan, context=limit)), drafts=2)
    for _ in range(10):
        *_, end = session.turn(QUESTION)
        if end.finish_reason == "length":
            break
    assert end.stats.prompt_tokens + end.stats.reply_tokens == limit
    before = list(session.messages)
    with pytest.raises(UserError, match="(?s)memory is planned for 60.*/undo.*/clear.*--context"):
        list(session.turn(FOLLOW_UP))
    assert session.messages == before
    session.conversation.undo()
    list(session.turn("Hi"))
    session.clear()
    assert "Rome" in said(session.turn(FOLLOW_UP))


def test_a_refusal_leaves_no_turn_and_keeps_the_caches(session, monkeypatch):
    """A prompt that is too long cost the minutes of the conversation before it."""
    list(session.turn(QUESTION))
    held = list(session.state.ids)
    monkeypatch.setattr(session.loaded.args, "max_position_embeddings", len(held) + 1)
    with pytest.raises(UserError, match="max_position_embeddings"):
        list(session.turn(FOLLOW_UP))
    assert roles(session) == ["user", "assistant"] and session.state.ids == held


def test_a_trace_that_ends_within_a_reply(demo_q4, loaded):
    """Where a layer is resident and others stream, its hits left the sum: it became negative."""
    plan = plan_memory(demo_q4, experts="streamed", expert_memory_gb=0.002)
    partly = load_model(demo_q4, plan=replace(plan, slots=plan.slots | {1: plan.num_experts}))
    partly.tokenizer, partly.vocabulary_mask = loaded.tokenizer, loaded.vocabulary_mask
    session, store, calls = Session(partly, drafts=0), partly.store, []

    def route(layer, experts):
        calls.append(layer)
        if layer == 1 and calls.count(1) > 20:
            store.on_route = None

    store.on_route = route
    for question in (QUESTION, FOLLOW_UP):
        *_, end = session.turn(question)
        layers = [asdict(count) for count in end.layers.values()]
        for name in ("hits", "misses", "nbytes"):
            total = getattr(end.stats.experts, name)
            assert total == sum(layer[name] for layer in layers) and total >= 0
    assert store.on_route is None and 1 not in end.layers
    store.close()
