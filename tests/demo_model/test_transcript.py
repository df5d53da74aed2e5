"""A chat that is saved goes on where it was: the same messages, and nothing computed again."""

import stat

import pytest

from mlx_dsv3.conversation.session import Session
from mlx_dsv3.conversation.transcript import cache_of, read, save
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
