"""The demo model's data: what the corpus promises, and that the tokenizer is of DeepSeek's kind."""

import json
import random

import pytest
from tokenizers import Tokenizer

from demo import corpus, facts, tokenizer
from demo.model_config import CONFIG

CHECKPOINT = corpus.HERE / "checkpoint"


@pytest.fixture(scope="module")
def conversations():
    return list(corpus.corpus(2000, seed=3))


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def test_corpus_is_deterministic(conversations):
    """A corpus that depends on hash order or on the clock could not be made again."""
    assert conversations == list(corpus.corpus(2000, seed=3))


def test_turns_alternate_and_are_filled(conversations):
    """An unfilled placeholder would be learned and spoken."""
    for messages in conversations:
        roles = [m["role"] for m in messages if m["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert not any("{" in m["content"] or "}" in m["content"] for m in messages)


def test_questions_and_prompts_are_held_out(conversations):
    """Twenty questions, at least eight in wordings that no thing has in the corpus."""
    corpus.check_questions(conversations)
    questions = corpus.questions()
    assert len(questions) == 20
    assert sum(q["wording"] == "new" for q in questions) >= 8


def test_withheld_pairs_never_enter_the_corpus():
    """`ask` is the only door for a wording of a thing; it must refuse the withheld pairs."""
    rng = random.Random(0)
    domain = next(d for d in facts.load()[0] if d.name == "countries")
    capital = domain.attributes[0]
    for template in capital.direct:
        for country in domain.things:
            if corpus.is_withheld(template, country):
                wanted = corpus.fill(template, domain.things[country] | {"w": "w"})
                asked = (corpus.ask(rng, domain, country, capital) for _ in range(50))
                assert all(wanted not in a[0] for a in asked if a)


def test_tokenizer_ids_are_in_the_hub_order(tok):
    """BOS 0, EOS 1, pad 2; the roles last; ids beyond the tokenizer are padding rows."""
    assert [tok.id_to_token(i) for i in range(3)] == [
        tokenizer.BOS,
        tokenizer.EOS,
        tokenizer.PAD,
    ]
    size = tok.get_vocab_size()
    assert [tok.id_to_token(size - 2), tok.id_to_token(size - 1)] == [
        tokenizer.USER,
        tokenizer.ASSISTANT,
    ]
    assert size < CONFIG["vocab_size"]
    special = {t["content"]: t["special"] for t in json.loads(tok.to_str())["added_tokens"]}
    assert special[tokenizer.EOS] and not special[tokenizer.USER]


@pytest.mark.parametrize(
    "text", ["3.14159 is pi", "今天天气很好 こんにちは", "café 😀\n\n", "\x00\x7f"]
)
def test_any_text_survives_the_tokenizer(tok, text):
    """Every byte is in the alphabet: no unknown token, nothing lost."""
    ids = tok.encode(text, add_special_tokens=False).ids
    assert tok.decode(ids) == text


def test_chat_template_renders_as_training_did(conversations):
    """A template that differs from the training text by one newline costs the model its wits."""
    transformers = pytest.importorskip("transformers")
    hub = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    for messages in conversations[:100]:
        text = hub.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert text == tokenizer.render(messages[:-1], generate=True)
        ids = hub.encode(text, add_special_tokens=False)
        assert ids.count(0) == 1 and ids[0] == 0


def test_checkpoint_is_small_and_in_the_hub_layout():
    """Readers must meet FP8 blocks, BF16, F32, and a scale apart from its weight."""
    from safetensors import safe_open

    assert sum(p.stat().st_size for p in CHECKPOINT.iterdir()) <= 12e6
    index = json.loads((CHECKPOINT / "model.safetensors.index.json").read_text())["weight_map"]
    dtypes = {}
    for file in set(index.values()):
        with safe_open(CHECKPOINT / file, framework="np") as shard:
            dtypes |= {name: shard.get_slice(name).get_dtype() for name in shard.keys()}
    assert dtypes.keys() == index.keys()
    scales = {n for n in dtypes if n.endswith("_scale_inv")}
    assert {n + "_scale_inv" for n, d in dtypes.items() if d == "F8_E4M3"} == scales
    assert any(index[n] != index[n.removesuffix("_scale_inv")] for n in scales)
    layers = CONFIG["num_hidden_layers"]
    assert dtypes[f"model.layers.{layers}.eh_proj.weight"] == "BF16"
    assert dtypes["model.layers.1.mlp.gate.e_score_correction_bias"] == "F32"
    assert f"model.layers.{layers}.shared_head.head.weight" in dtypes
