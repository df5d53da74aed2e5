"""A reply as it comes: whole whenever it stops."""

from types import SimpleNamespace

import pytest
from test_conversation import FakeTokenizer

from mlx_dsv3.conversation.messages import Conversation
from mlx_dsv3.conversation.reply import Reply, Text


class Thinker(FakeTokenizer):
    """A template that knows thoughts; the model opens them."""

    chat_template = "<think></think>"


def reply_of(*texts: str, tokenizer=Thinker, instead=None, finish_reason=None) -> Reply:
    conversation = Conversation(tokenizer())
    conversation.add_user("x")
    reply = Reply(conversation, instead)
    for i, text in enumerate(texts):
        ended = finish_reason if i == len(texts) - 1 else None
        shown = reply.add(SimpleNamespace(text=text, stats=i, finish_reason=ended))
        assert all(isinstance(part, Text) for part in shown) and shown
    return reply


@pytest.mark.parametrize(
    "texts, content, thought, answer",
    [
        ([], "", "", ""),
        (["<thi"], "<thi", "", "<thi"),  # held back, and nothing but text in the end
        (["<think>", "hm", "m"], "<think>hmm</think>", "hmm", ""),
        (["<think>", "hm</th"], "<think>hm</th</think>", "hm</th", ""),
        (["<think>hm</think>", "\n\nA"], "<think>hm</think>\n\nA", "hm", "A"),
        (["A", "</think>"], "A</think>", "", "A</think>"),
    ],
)
@pytest.mark.parametrize("finish_reason", [None, "length"])
def test_a_reply_that_stops(texts, content, thought, answer, finish_reason):
    """A thought is closed, or the template would take it for the answer; nothing is lost."""
    reply = reply_of(*texts, finish_reason=finish_reason)
    end = reply.end({})
    assert reply.messages()[-1] == {"role": "assistant", "content": content}
    assert (end.reasoning, end.text) == (thought, answer)
    assert end.finish_reason == (finish_reason if texts and finish_reason else "interrupted")


def test_a_template_without_thoughts():
    """V3's: what looks like one is text."""
    reply = reply_of("<think>hm</think>A", tokenizer=FakeTokenizer)
    assert reply.end({}).text == "<think>hm</think>A" and reply.end({}).reasoning == ""


def test_what_is_to_be_replaced_stays_until_a_token_comes():
    before = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "old"}]
    assert reply_of(instead=before).messages() is before
    assert reply_of("new", instead=before).messages()[-1]["content"] == "new"
