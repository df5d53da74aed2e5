"""A chat that is saved goes on where it was: the same messages, and nothing computed again."""

import errno
import json
import os
import random
import stat
from pathlib import Path

import mlx.core as mx
import pytest

import chat
from mlx_dsv3.conversation.messages import Conversation
from mlx_dsv3.conversation.session import Session, Text
from mlx_dsv3.conversation.transcript import FORMAT, Transcript, cache_of, read, save
from mlx_dsv3.errors import UserError
from mlx_dsv3.generate import Prefill

from .test_chat import QUESTION

FOLLOW_UP = "And what is the capital of Italy?"
# Whatever a person may paste: escapes, half a character, line separators, what JSON escapes.
ODD = ["\x1b[2J\0\x7f", "a\ud800b\udfff", "\u2028\u2029\u202e\r\n\t", '"\\u12 \\ud800 }],[{', "😀é"]


@pytest.fixture
def talk(loaded, tmp_path):
    """Return a session of one turn, and the file that holds it with its cache."""
    session = Session(loaded, system="Be brief.", settings={"seed": 3}, drafts=1)
    list(session.turn(QUESTION))
    save(session, tmp_path / "chat.json", with_cache=True, model="demo")
    return session, tmp_path / "chat.json"


def parse(*argv: str):
    return chat.make_parser().parse_args([*argv])


def last(events):
    *_, end = events
    return end


def test_nothing_is_computed_again(talk, loaded):
    """Messages and settings are as they were, and the next turn is fed its own tokens alone."""
    session, path = talk
    other = Session(loaded, drafts="auto")
    assert other.restore(read(path), cache_of(path)) is None
    assert other.conversation.messages == session.conversation.messages
    assert (other.conversation.system, other.settings) == ("Be brief.", session.settings)
    assert other.drafts == 1 and other.state.ids == session.state.ids
    begun = next(events := other.turn(FOLLOW_UP))
    assert isinstance(begun, Prefill) and begun.reused >= len(session.state.ids) - 1
    expected, actual = last(session.turn(FOLLOW_UP)), last(events)
    assert actual.text == expected.text
    assert actual.stats.reused_tokens == expected.stats.reused_tokens


def test_a_file_is_its_owners_alone(talk):
    """Both hold what a person said; no partial file is left."""
    _, path = talk
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}
    assert set(path.parent.iterdir()) == {path, cache_of(path)}


def test_a_link_that_others_put_there_leads_nowhere(talk, tmp_path):
    """In a folder that all may write to, the names of partial files can be guessed."""
    session, path = talk
    (other := tmp_path / "other").write_text("mine")
    (path.parent / f".{path.name}.{os.getpid()}.partial").symlink_to(other)
    (path.parent / f".{path.name}.cache.partial.safetensors").symlink_to(other)
    save(session, path, with_cache=True)
    assert other.read_text() == "mine" and read(path).messages == session.messages
    assert not path.is_symlink() and not cache_of(path).is_symlink()


@pytest.mark.parametrize("text", ODD)
def test_any_text_comes_back(loaded, tmp_path, text):
    session, path = Session(loaded, system=text + "x"), tmp_path / "chat.json"
    session.conversation.add_user(text)
    session.conversation.add_assistant(text)
    save(session, path)
    transcript = read(path)
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert [message["content"] for message in transcript.messages] == [whole] * 2
    assert transcript.system == whole + "x" and transcript.thinking is None


def test_a_reply_that_comes_is_saved_whole(loaded, tmp_path):
    """A signal saves what stands: a thought is closed, an old reply stays until a token comes."""
    session, path = Session(loaded), tmp_path / "chat.json"
    list(session.turn(QUESTION))
    answer = session.messages[-1]["content"]
    events = session.regenerate()
    next(events)
    save(session, path)
    assert read(path).messages[-1]["content"] == answer
    while not isinstance(event := next(events), Text):
        pass
    save(session, path)
    assert read(path).messages[-1]["content"] == event.text
    session._reply_now.thoughts.is_inside = True  # as in a model that thinks
    save(session, path)
    assert read(path).messages[-1]["content"] == event.text + "</think>"


def test_a_question_without_a_reply_can_be_answered(loaded, tmp_path):
    """The process ended before a token came."""
    session, path = Session(loaded), tmp_path / "chat.json"
    save(session, path)
    assert session.restore(read(path)) is None and session.messages == []
    session.conversation.add_user(QUESTION)
    save(session, path)
    session.restore(read(path))
    assert "Paris" in last(session.regenerate()).text
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    session.restore(read(path))
    assert "Rome" in last(session.turn(FOLLOW_UP)).text
    assert [message["content"] for message in session.messages[:2]] == [QUESTION, ""]
    save(session, path)
    assert len(read(path).messages) == 4


def test_the_command_line_goes_before_a_kept_chat(talk, loaded):
    """`--continue -s` kept the old system prompt, and `--drafts` the old number."""
    session, path = talk
    kept = chat.open_session(loaded, parse("--continue"), {}, read(path))
    assert kept.messages == session.messages and kept.conversation.system == "Be brief."
    assert (kept.drafts, kept.settings["seed"]) == (1, 3)
    told = parse("--continue", "-s", "Be long.", "--drafts", "0", "--seed", "7")
    changed = chat.open_session(loaded, told, {}, read(path))
    assert changed.messages == session.messages and changed.conversation.system == "Be long."
    assert (changed.drafts, changed.control.fixed, changed.settings["seed"]) == ("0", 0, 7)


def damaged(path, change) -> None:
    arrays, metadata = mx.load(str(path), return_metadata=True)
    change(arrays, metadata)
    mx.save_safetensors(str(path), arrays, metadata)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda path: path.unlink(), "is not a file"),
        (lambda path: path.write_bytes(b""), "not a safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "`"),
        (lambda path: damaged(path, lambda _, m: m.update(model="x")), "with another model"),
        (lambda path: damaged(path, lambda _, m: m.update(format="x")), "not a saved conversation"),
        (lambda path: damaged(path, lambda _, m: m.update(ids="1 2")), "is damaged"),
        (lambda path: damaged(path, lambda a, _: a.pop("layers.0")), "is damaged"),
    ],
)
def test_a_cache_that_cannot_be_used(talk, loaded, change, words):
    """It is said and left out; the chat goes on, and computes."""
    session, path = talk
    change(cache_of(path))
    other = Session(loaded)
    assert words in other.restore(read(path), cache_of(path))
    assert other.state.ids == []
    assert last(other.turn(FOLLOW_UP)).text == last(session.turn(FOLLOW_UP)).text


def test_a_cache_without_drafts(loaded, tmp_path):
    """One that lacks the module's rows is of no use to a session that drafts; else it is."""
    session, path = Session(loaded, drafts=0), tmp_path / "chat.json"
    list(session.turn(QUESTION))
    save(session, path, with_cache=True)
    transcript = read(path)
    assert session.restore(transcript, cache_of(path)) is None and session.state.ids
    transcript.drafts = 2
    assert "without drafts" in session.restore(transcript, cache_of(path))
    list(session.turn(FOLLOW_UP))
    save(session, path, with_cache=True)
    transcript.drafts = 0
    assert session.restore(transcript, cache_of(path)) is None
    assert session.state.mtp_cache is None and session.state.ids


def test_a_template_that_refuses_a_chat_leaves_the_session(talk, loaded, monkeypatch):
    """Nothing of what was loaded stays."""
    session, path = talk
    kept = session.conversation, session.state, session.settings, session.control
    monkeypatch.setattr(Conversation, "prompt", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.restore(Transcript(messages=[{"role": "user", "content": "x"}]))
    assert kept == (session.conversation, session.state, session.settings, session.control)


def test_nothing_else_is_written_over(loaded, tmp_path):
    """`/save chat.py`, or a slip of the finger."""
    session = Session(loaded)
    for make in (Path.mkdir, lambda path: path.write_text("mine"), os.mkfifo):
        make(path := tmp_path / f"other{len(list(tmp_path.iterdir()))}")
        with pytest.raises(UserError, match="exists and is not a saved chat"):
            save(session, path)
    (path := tmp_path / "empty").touch()
    for _ in range(2):
        save(session, path)
    (link := tmp_path / "link").symlink_to(path)
    save(session, link)
    assert link.is_symlink() and read(link).messages == []
    with pytest.raises(UserError, match="cannot be used"):
        save(session, tmp_path / "absent" / "chat.json", with_cache=True)


def test_a_full_disk_leaves_the_file_as_it_was(talk, monkeypatch):
    session, path = talk
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="no space left"):
        save(session, path)
    assert path.read_bytes() == before
    assert set(path.parent.iterdir()) == {path, cache_of(path)}


GOOD = {"format": FORMAT, "model": "demo", "system": None, "thinking": None, "settings": {}}
GOOD |= {"drafts": "auto", "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"format": "x"}, "is not a saved chat"),
        ({"format": None}, "is not a saved chat"),
        ({"extra\x1b[2J": 1}, "holds `extra\\x1b[2J`, which no saved chat has"),
        ({"model": 7}, "holds `model` of the kind int"),
        ({"system": ["x"]}, "holds `system` of the kind list"),
        ({"thinking": 1}, "holds `thinking` of the kind int"),
        ({"settings": {"temp": "hot"}}, "`temp` in `{}` is `hot`; it takes a number from 0"),
        ({"settings": {"temp": None}}, "`temp` in `{}` is `None`"),
        ({"settings": {"seed": True}}, "`seed` in `{}` is `True`"),
        ({"settings": {"max_tokens": 0}}, "`max_tokens` in `{}` is `0`"),
        ({"settings": {"top": 1}}, "holds the setting `top`, which no chat has"),
        ({"drafts": 5}, "holds `5` for the number of drafts"),
        ({"drafts": True}, "holds `True` for the number of drafts"),
        ({"messages": {}}, "holds `messages` of the kind dict"),
        ({"messages": ["x"]}, "message 1 that is not a text of the user"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "message 1 that is not"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 that is not"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "message 1 that is not"),
        ({"messages": GOOD["messages"] * 2}, "message 2 that is not a text of the assistant"),
    ],
)
def test_a_file_that_holds_something_else(tmp_path, change, words):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(UserError) as told:
        read(path)
    assert words.format(path) in str(told.value) and "\n\nhint: " in str(told.value)


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "is not JSON"),
        (b"[]", "holds a list"),
        (b"\xff\xfe", "is not text in UTF-8"),
        (b'{"format": "\\ud800"}', "is not UTF-8"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "deep"),
        (b"[" * 100_000, "deep"),
        (b'{"format": NaN}', "`NaN`"),
    ],
)
def test_a_file_that_is_no_chat(tmp_path, data, words):
    path = tmp_path / "chat.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=words):
        read(path)


def test_whatever_a_file_holds(talk, loaded):
    """A file that is cut, changed or mixed up is refused in a sentence, or goes on as a chat."""
    session, path = talk
    good, rng, read_well = path.read_bytes(), random.Random(0), 0
    names = [b"null", b"true", b"-1", b"1e99", b'"\\udc00"', b"[]", b"{}", b'"auto"', b",", b'"']
    for _ in range(400):
        begin, end = sorted(rng.randrange(len(good)) for _ in range(2))
        middle = rng.choice([b"", rng.randbytes(3), rng.choice(names), good[begin:end] * 2])
        path.write_bytes(good[:begin] + middle + good[min(end, begin + rng.randrange(9)) :])
        try:
            transcript = read(path)
            assert session.restore(transcript) is None
            save(session, path)
            assert read(path).messages[: len(transcript.messages)] == transcript.messages
            read_well += 1
        except UserError as error:
            assert str(path) in str(error)
            path.write_bytes(b"")
    assert read_well > 10


def test_a_cache_that_cannot_be_written(talk, monkeypatch):
    """The chat is saved all the same, and the disk is not left full of half a cache."""
    session, path = talk
    path.unlink()
    cache_of(path).unlink()

    def full(name, *_):
        Path(name).write_bytes(b"half")
        raise RuntimeError("[write] Unable to write 4096 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(UserError, match="is saved, but .* cannot be written"):
        save(session, path, with_cache=True)
    assert read(path).messages == session.messages
    assert list(path.parent.iterdir()) == [path]
