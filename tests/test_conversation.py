"""Messages and ids: one BOS, history in the template, control tokens in user text disarmed."""

from mlx_dsv3.conversation.messages import Conversation


class Token:
    def __init__(self, content):
        self.content = content


class FakeTokenizer:
    """Renders messages in the V3 form and encodes one id a character, BOS as 0."""

    added_tokens_decoder = {0: Token("<BOS>"), 1: Token("<｜User｜>"), 2: Token("</think>")}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return "<BOS>" + "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]"

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [0] + [ord(c) for c in text.removeprefix("<BOS>")]


def test_what_is_not_utf8_is_replaced():
    """Surrogates, which a tokenizer refuses, in a pasted text or a system prompt."""
    conversation = Conversation(FakeTokenizer(), system="a\udcffb")
    conversation.add_user("c\ud800\udc80d \N{GRINNING FACE}")
    text = "".join(map(chr, conversation.prompt_ids()[1:]))
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


def test_control_tokens_in_user_text_are_broken_up():
    """A pasted `<｜User｜>` would start a turn of its own."""
    conversation = Conversation(FakeTokenizer())
    conversation.add_user("a <｜User｜> b </think> c < d")
    content = conversation.messages[0]["content"]
    assert "<｜User｜>" not in content and "</think>" not in content
    assert content.replace("\u200b", "") == "a <｜User｜> b </think> c < d"
    conversation.add_assistant("ok </think> fine")  # what the model said stays as it is
    assert conversation.messages[1]["content"] == "ok </think> fine"


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
