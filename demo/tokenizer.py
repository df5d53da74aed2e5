"""Train the demo model's tokenizer: DeepSeek-V3's kind of byte-level BPE, a hundredth of its size.

Same order of ids (BOS, EOS, pad, base tokens, added tokens), same special strings (the bar is
U+FF5C, the block U+2581), same pre-tokenizer chain, no normaliser. `<｜User｜>` and
`<｜Assistant｜>` are added tokens with special=false as in the hub's file: skip_special_tokens
does not hide them. The chat template writes BOS as text, so a rendered chat is encoded with
add_special_tokens=False and holds exactly one.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
BASE_SIZE = 1090  # with the two roles: ids 0..1091, the model's vocab_size is 1152

# The one GPT-style pattern of DeepSeek-V3's tokenizer.json.
WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The V3 (Dec 2024) template without tool calls: BOS, system text, turns; nothing between turns.
CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}"
    "{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(system_prompt='', is_first_sp=true) %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}"
    "{% set ns.is_first_sp = false %}"
    "{%- else %}{% set ns.system_prompt = ns.system_prompt + '\n\n' + message['content'] %}"
    "{%- endif %}"
    "{%- endif %}{%- endfor %}"
    "{{ bos_token }}{{ ns.system_prompt }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{{ '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}{%- endif %}"
    "{%- endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


def render(messages: list[dict[str, str]], *, generate: bool = False) -> str:
    """Render a chat as `CHAT_TEMPLATE` does; `check` compares the two."""
    text = BOS + "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    for message in messages:
        if message["role"] == "user":
            text += USER + message["content"]
        elif message["role"] == "assistant":
            text += ASSISTANT + message["content"] + EOS
    return text + ASSISTANT if generate else text


def train(texts, size: int = BASE_SIZE) -> Tokenizer:
    """Train `size` ids and the two roles on plain text; every byte has an id, so any text has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.Split(Regex("[一-龥぀-ゟ゠-ヿ]+"), "isolated"),
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in (BOS, EOS, PAD)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t in (USER, ASSISTANT)]
    )
    return tokenizer


def config() -> dict:
    """Return tokenizer_config.json, in the hub's form with a class that needs no sentencepiece."""

    def special(content: str) -> dict:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": content} | flags

    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": special(BOS),
        "clean_up_tokenization_spaces": False,
        "eos_token": special(EOS),
        "model_max_length": 131072,
        "pad_token": special(EOS),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }


def save(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps(config(), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n")
