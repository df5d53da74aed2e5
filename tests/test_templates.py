"""What each family's template makes of a conversation (spec 6.2), and how thinking is switched.

Each is checked in our own words for it, and with a model's own files where a package holds them.
"""

import json

import pytest
from families import ASSISTANT, BOS, DEMO, EOS, FAMILIES, USER, real_folder, write_tokenizer
from mlx_lm.utils import load_tokenizer

from mlx_dsv3.conversation.messages import Conversation, check_template
from mlx_dsv3.errors import UserError

REPLY = "<think>\nhmm</think>\n\nA1"
U1, U2, A1 = USER + "Q1", USER + "Q2", "\n\nA1" + EOS
START, MIDDLE = "<|im_assistant|>assistant<|im_middle|>", "<|im_end|><|im_user|>user<|im_middle|>"
KIMI = "<|im_system|>system<|im_middle|>You are a model." + MIDDLE + "Q1<|im_end|>" + START
# What is rendered of the question Q1, that reply and the question Q2.
GOLDEN = {
    "V3": BOS + U1 + ASSISTANT + REPLY + EOS + U2 + ASSISTANT,
    "V3-0324": BOS + U1 + ASSISTANT + REPLY + EOS + U2 + ASSISTANT,
    "R1": BOS + U1 + ASSISTANT + A1 + U2 + ASSISTANT + "<think>\n",
    "R1-0528": BOS + U1 + ASSISTANT + A1 + U2 + ASSISTANT,
    "V3.1": BOS + U1 + ASSISTANT + "</think>" + A1 + U2 + ASSISTANT + "</think>",
    "V3.1, thinking": BOS + U1 + ASSISTANT + "</think>" + A1 + U2 + ASSISTANT + "<think>",
    "Moonlight, Kimi-K2": KIMI + REPLY + MIDDLE + "Q2<|im_end|>" + START,
    "Kimi-K2-Thinking": KIMI + "<think></think>\n\nA1" + MIDDLE + "Q2<|im_end|>" + START,
    "GigaChat3": "<s>user<|role_sep|>\nQ1<|message_sep|>\n\nassistant<|role_sep|>\n" + REPLY
    + "<|message_sep|>\n\nuser<|role_sep|>\nQ2<|message_sep|>\n\nassistant<|role_sep|>\n",
    "GLM": "[gMASK]<sop><|user|>Q1<|assistant|></think>A1<|user|>Q2<|assistant|><think>",
}  # fmt: skip
REAL = {"V3": "deepseek-v3", "R1": "deepseek-r1", "R1-0528": "deepseek-r1-0528-qwen3-8b"}
REAL |= {"V3.1": "deepseek-v3.1", "V3.1, thinking": "deepseek-v3.1", "GLM": "glm-4.7-flash"}
# Which thought the reply to the next question begins in, and whether it may have one.
BEGINS = {"R1": (True, True), "V3.1, thinking": (True, True), "GLM": (True, True)}
BEGINS |= {"R1-0528": (False, True), "Kimi-K2-Thinking": (False, True)}
PLACES = [(name, None) for name in GOLDEN] + list(REAL.items())


@pytest.fixture(params=PLACES, ids=str, scope="module")
def place(request, tmp_path_factory):
    """Return a family's name and its tokenizer, ours or the model's own."""
    (name, real), folder = request.param, tmp_path_factory.mktemp("tokenizer")
    real_folder(folder, real) if real else write_tokenizer(folder, FAMILIES[name])
    return name, load_tokenizer(folder)


def talk(name, tokenizer) -> Conversation:
    """Return a conversation up to its second question."""
    conversation = Conversation(tokenizer)
    conversation.add_user("Q1")
    conversation.add_assistant(REPLY)
    conversation.add_user("Q2")
    if FAMILIES[name].thinking is not None:
        conversation.set_thinking(FAMILIES[name].thinking)
    return conversation


def test_a_conversation_as_the_template_writes_it(place):
    name, tokenizer = place
    conversation = talk(*place)
    assert conversation.prompt() == GOLDEN[name]
    assert conversation.encode(GOLDEN[name]) == conversation.prompt_ids()
    if FAMILIES[name].bos:
        assert conversation.prompt_ids().count(tokenizer.bos_token_id) == 1
    thoughts = conversation.thoughts(conversation.prompt())
    assert (thoughts.is_inside, thoughts.may_open) == BEGINS.get(name, (False, False))


def test_thinking_is_a_variable_of_some_templates(place):
    """Found by what the template writes; what it does by itself is the default."""
    name, tokenizer = place
    default = {"V3.1": False, "V3.1, thinking": False, "GLM": True}.get(name)
    conversation = Conversation(tokenizer)
    assert conversation.thinking == default
    if default is None:
        with pytest.raises(UserError, match="has no variable for thinking"):
            conversation.set_thinking(True)
        with pytest.raises(UserError, match="has no variable for thinking"):
            check_template(tokenizer, thinking=False)
        return
    for is_on, end in ((True, "<think>"), (False, "</think>")):
        conversation.set_thinking(is_on)
        conversation.add_user("Q1")
        assert conversation.prompt().endswith(end)
        check_template(tokenizer, thinking=is_on)


def test_the_default_is_the_templates_own(tmp_path):
    """mlx-lm says `enable_thinking=True` for every tokenizer that has `<think>`."""
    folder = write_tokenizer(tmp_path, FAMILIES["GLM"])
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    template = "{{ messages[0].content }}{% if enable_thinking %}<think>{% endif %}</think>"
    file.write_text(json.dumps(settings | {"chat_template": template}))
    conversation = Conversation(load_tokenizer(folder))
    conversation.add_user("Q1")
    assert conversation.thinking is False and conversation.prompt() == "Q1</think>"


def test_the_first_chat_of_the_spec(tmp_path):
    """Golden ids of spec 6.1: V3's, and what R1 and V3.1 add."""
    first = [0, 3476, 477, 260, 11502, 22896, 16, 128803, 18387, 477, 440, 33, 128804]
    added = {"deepseek-v3": [], "deepseek-r1": [128798, 201], "deepseek-v3.1": [128799]}
    for name, rest in added.items():
        (tmp_path / name).mkdir()
        tokenizer = load_tokenizer(real_folder(tmp_path / name, name))
        conversation = Conversation(tokenizer, "You are a helpful assistant.")
        conversation.add_user("Who are you?")
        assert conversation.prompt_ids() == first + rest
        if conversation.thinking is not None:
            conversation.set_thinking(True)
            assert conversation.prompt_ids() == [*first, 128798]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_fills_the_context(name, tmp_path):
    """Together it is the prompt; a thought counts only where the template keeps it."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, FAMILIES[name]))
    conversation = talk(name, tokenizer)
    conversation.set_system("be small and brief")
    shares = dict(conversation.shares())
    assert list(shares) == ["system", "questions", "thoughts", "answers", "template"]
    assert sum(shares.values()) == len(conversation.prompt_ids()) and min(shares.values()) >= 0
    assert shares["system"] == len(tokenizer.encode("be small and brief", add_special_tokens=False))
    assert shares["questions"] == 2 * len(tokenizer.encode("Q1", add_special_tokens=False))
    assert shares["thoughts"] == 0 < shares["answers"]
    conversation.clear()
    assert dict(conversation.shares()) == dict.fromkeys(shares, 0) | {"system": shares["system"]}


def test_the_demos_own_template():
    """It is V3's, without tools."""
    conversation = talk("V3", load_tokenizer(DEMO))
    assert conversation.prompt() == GOLDEN["V3"] and conversation.thinking is None
