"""Messages and ids: one BOS, history in the template, no control token but the template's."""

import random
import time
from collections import Counter
from pathlib import Path

import pytest
from families import DEMO, real_folder

from mlx_dsv3.conversation.messages import Conversation

THOUGHTS = {"<think>", "</think>"}
# What other tokenizers have: one that overlaps itself, one of a single character, one that holds
# the mark which breaks the others, one inside another.
ODD = ["｜DSML｜", "~", "<\u200b｜User｜>", "User", "aa", "<dsml:"]


class Token:
    def __init__(self, content):
        self.content = content


class FakeTokenizer:
    """Renders messages in the V3 form and encodes one id a character, BOS as 0."""

    has_chat_template, name_or_path, chat_template = True, "fake", "[role]content"
    added_tokens_decoder = {0: Token("<BOS>"), 1: Token("<｜User｜>"), 2: Token("</think>")}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, **variables):
        assert not tokenize and add_generation_prompt
        return "<BOS>" + "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]"

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [0] + [ord(c) for c in text.removeprefix("<BOS>")]


def text_of(conversation: Conversation) -> str:
    """Return the prompt after its BOS, of a fake tokenizer."""
    return "".join(map(chr, conversation.prompt_ids()[1:]))


def test_what_is_not_utf8_is_replaced():
    """Surrogates, which a tokenizer refuses, in a pasted text or a system prompt."""
    conversation = Conversation(FakeTokenizer(), system="a\udcffb")
    conversation.add_user("c\ud800\udc80d \N{GRINNING FACE}")
    text = text_of(conversation)
    assert "a\ufffdb" in text and "c\ufffd\ufffdd \N{GRINNING FACE}" in text


def test_prompt_holds_system_history_and_one_bos():
    conversation = Conversation(FakeTokenizer(), system="Be brief.")
    conversation.add_user("Hi")
    conversation.add_assistant("Hello.")
    conversation.add_user("Bye")
    ids = conversation.prompt_ids()
    assert ids.count(0) == 1
    text = "".join(map(chr, ids[1:]))
    assert text == "[system]Be brief.[user]Hi[assistant]Hello.[user]Bye[assistant]"


def test_control_tokens_in_messages_are_broken_up():
    """A pasted `<｜User｜>` would start a turn of its own; so would one in a system prompt."""
    pasted = "a <｜User｜> b </think> c < d"
    conversation = Conversation(FakeTokenizer(), system=pasted)
    conversation.add_user(pasted)
    text = text_of(conversation)
    assert "<｜User｜>" not in text and "</think>" not in text
    assert text.replace("\u200b", "") == f"[system]{pasted}[user]{pasted}[assistant]"


@pytest.mark.parametrize(
    "tokens, text, broken",
    [
        (["｜D｜"], "｜D｜D｜D｜", "｜\u200bD｜\u200bD｜\u200bD｜"),
        (["~"], "a~~b", "a\u200b\u200bb"),
        (["<\u200bx>", "<x>"], "<x>", "<\u2060x>"),
        (["  ", "\n", ""], "a  b\n", "a  b\n"),
    ],
)
def test_odd_tokens_are_broken_up(tokens, text, broken):
    """One that overlaps itself, of one character, that holds the mark; white space stays."""
    tokenizer = FakeTokenizer()
    tokenizer.added_tokens_decoder = dict(enumerate(map(Token, tokens)))
    assert Conversation(tokenizer).disarm(text) == broken


def test_tokens_that_only_tiktoken_knows():
    """Kimi's reserved tokens are in no list that transformers keeps."""
    tokenizer = FakeTokenizer()
    tokenizer.special_tokens = {"<|reserved_token_9|>": 9}
    disarmed = Conversation(tokenizer).disarm("<|reserved_token_9|>")
    assert disarmed == "<\u200b|reserved_token_9|>"


def test_a_reply_keeps_its_thoughts_and_makes_no_turn():
    """Templates cut the thoughts off by `</think>`, and equal ids keep what the cache holds."""
    conversation = Conversation(FakeTokenizer())
    conversation.add_user("x")
    conversation.add_assistant("<think>so</think> fine <｜User｜> more")
    assert "<think>so</think> fine <\u200b｜User｜> more" in text_of(conversation)


def test_undo_drops_the_last_turn_and_clear_everything():
    conversation = Conversation(FakeTokenizer())
    for text in ("one", "two"):
        conversation.add_user(text)
        conversation.add_assistant(text.upper())
    conversation.undo()
    assert [m["content"] for m in conversation.messages] == ["one", "ONE"]
    conversation.clear()
    assert conversation.messages == []
    conversation.undo()  # nothing to undo is no error


def real_tokenizer(name: str, folder: Path):
    """Return the demo's tokenizer, or one that the package of real tokenizers holds."""
    utils = pytest.importorskip("mlx_lm.utils")
    if not name.startswith("demo"):
        return utils.load_tokenizer(real_folder(folder, name))
    tokenizer = utils.load_tokenizer(DEMO)
    tokenizer.add_tokens(ODD if name == "demo, odd" else [])
    return tokenizer


NAMES = ["demo", "demo, odd", "deepseek-v3", "deepseek-r1", "deepseek-v3.1"]


def attack(rng: random.Random, tokens: list[str]) -> str:
    """Return a text of tokens: whole, cut, overlapping, nested, split by what may vanish."""

    def piece() -> str:
        token, other = rng.choice(tokens), rng.choice(tokens)
        cut = rng.randint(0, len(token))
        within = rng.choice(["\u200b", "\u2060", "\udc80", "\ud83d", "\0", " ", "\n", other])
        ways = [token, token[:cut], token[cut:], token[:cut] + within + token[cut:]]
        return rng.choice([*ways, token + token[1:], token[:-1] + token, within])

    return "".join(piece() for _ in range(rng.randint(1, 12)))


def control_ids(conversation: Conversation) -> Counter:
    """Return the added tokens of the prompt, but the thoughts of replies."""
    known = conversation.tokenizer.added_tokens_decoder
    ids = Counter(i for i in conversation.prompt_ids() if i in known)
    return Counter({i: n for i, n in ids.items() if known[i].content not in THOUGHTS})


@pytest.mark.parametrize("name", NAMES)
def test_no_control_token_but_the_templates(name, tmp_path):
    """One pass over `｜DSML｜DSML｜` left the token whole; system prompts had no pass at all.

    Whatever the messages hold, the prompt has the control tokens that it has for harmless ones.
    """
    tokenizer, rng = real_tokenizer(name, tmp_path), random.Random(0)
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values()]

    def talk(make) -> Conversation:
        conversation = Conversation(tokenizer, system=make())
        conversation.add_user(make())
        conversation.add_assistant(make().encode("utf-8", "replace").decode())
        conversation.add_user(make())
        return conversation

    harmless = control_ids(talk(lambda: "x"))
    assert harmless
    for _ in range(300):
        conversation = talk(lambda: attack(rng, tokens) + "x")
        assert control_ids(conversation) == harmless, conversation.messages


@pytest.mark.parametrize("text", ["｜DSML", "~", "a", "<", "<｜User｜>", "plain words "])
def test_a_long_text_is_disarmed_in_little_time(text, tmp_path):
    """300,000 characters; work that grows with their square would take minutes."""
    conversation = Conversation(real_tokenizer("demo, odd", tmp_path))
    begun = time.perf_counter()
    conversation.disarm(text * (300_000 // len(text)))
    assert time.perf_counter() - begun < 2
