"""Conversations of every template family: what the caches hold is what the template says.

Ten turns and more with questions changed, replies stopped, taken back and given anew. Before each
reply the next logits are those of the template's own ids, computed from scratch, and only what the
caches did not hold was fed; after it both caches are what those ids give.
"""

import random
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
import tiny
from drafted import agreeing_tensors
from families import CLOSE, DEMO, FAMILIES, OPEN, Family, real_folder, write_tokenizer
from mlx_folder import write_mlx
from mlx_lm.utils import load_tokenizer
from watched import Watched, words

from mlx_dsv3.load import load_model

CONFIG = {"num_hidden_layers": 2, "n_routed_experts": 8}
CHUNK = 24  # tokens of a prompt at once
LONG = " the" * 50  # is fed in several chunks


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """Return a function vocabulary -> a small random model whose drafts are often right."""
    made = {}

    def make(vocabulary: int):
        if vocabulary not in made:
            config, folder = (
                tiny.A | CONFIG | {"vocab_size": vocabulary},
                tmp_path_factory.mktemp("tiny"),
            )
            write_mlx(folder, config, agreeing_tensors(config, 0, damping=0.2, noise=0.15))
            loaded = load_model(folder, dtype=mx.float32)
            made[vocabulary] = replace(loaded, plan=replace(loaded.plan, prefill_chunk=CHUNK))
        return made[vocabulary]

    return make


def converse(talk: Watched) -> None:
    """Hold the conversation."""
    session, messages = talk.session, lambda: talk.session.conversation.messages
    assert talk.ask("what is the day").finish_reason in ("stop", "length")
    talk.ask("and the plan")
    talk.ask("tell me", stop_after=3)
    assert talk.family.appends or CLOSE in messages()[-1]["content"]  # a thought is closed
    talk.ask("which animal")
    before = list(messages())
    talk.reply(session.regenerate())
    assert messages()[:-1] == before[:-1]
    session.conversation.undo()
    talk.ask("which planet", is_edited=True)
    assert talk.ask("how small", strike_at=4).finish_reason == "interrupted"
    talk.ask("what would you like")
    talk.reply(session.retry(2))
    assert session.conversation.num_questions == 2
    assert talk.ask("tell" + LONG, in_prefill=True).finish_reason == "interrupted"
    assert messages()[-1]["content"] == ""
    talk.ask("the symbol")
    before = list(messages())
    assert talk.reply(session.retry(1), in_prefill=True).stats is None
    assert messages() == before
    talk.ask("the count")
    session.clear()
    talk.ask("the last", is_edited=True)
    if session.thinking is not None:
        session.set_thinking(not session.thinking)
        talk.ask("and the first", is_edited=True)


@pytest.fixture
def talk_with(model_of, tmp_path, monkeypatch):
    """Return a function (family, drafts, ...) -> Watched; `real` names a tokenizer to install."""

    def make(family: Family, drafts: int, is_canonical=True, real=None) -> Watched:
        if real == "demo":
            folder = DEMO
        else:
            folder = real_folder(tmp_path, real) if real else write_tokenizer(tmp_path, family)
        tokenizer = load_tokenizer(folder)
        loaded, known = model_of(-(-len(tokenizer.get_vocab()) // 64) * 64), tokenizer.get_vocab()
        allowed = words(tokenizer) if is_canonical else [i for i in known.values() if i > 2]
        tags = [] if family.appends else [OPEN, CLOSE]
        allowed += [known[name] for name in (*tags, family.eos)]
        mask = np.full(loaded.args.vocab_size, -np.inf, np.float32)
        mask[allowed] = 0
        loaded = replace(loaded, tokenizer=tokenizer, vocabulary_mask=mx.array(mask))
        talk = Watched(loaded, monkeypatch, family, drafts, is_canonical)
        assert (talk.session.thinking is None) == (family.thinking is None)
        if family.thinking is not None:
            talk.session.set_thinking(family.thinking)
        return talk

    return make


CASES = [(name, 2) for name in FAMILIES] + [("V3", 0), ("R1", 0)]
SLOW = [(name, 0) for name in FAMILIES if (name, 0) not in CASES]


@pytest.mark.parametrize(
    "name, drafts", CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
)
def test_a_conversation(name, drafts, talk_with):
    talk = talk_with(FAMILIES[name], drafts)
    converse(talk)
    assert talk.starts >= 11


@pytest.mark.parametrize("name", ["V3", pytest.param("R1", marks=pytest.mark.slow)])
def test_text_that_is_tokenised_otherwise(name, talk_with):
    """Sampled tokens are seldom those of their text; broken bytes have none: all are fed again."""
    talk = talk_with(FAMILIES[name], 2, is_canonical=False)
    converse(talk)
    assert talk.num_lost > 0


def step(talk: Watched, rng: random.Random) -> None:
    """Do anything to a session: a reply that may stop anywhere, or what a command does."""
    session = talk.session
    questions = session.conversation.num_questions
    ways = [partial(session.turn, "tell" + " the day" * rng.choice([1, 3, 40]))] * 4
    if questions:
        ways += [session.regenerate, partial(session.retry, rng.randint(1, questions))]
        ways += [session.conversation.undo, session.clear]
    ways += [partial(session.set_system, rng.choice(["be brief", None]))] * (rng.random() < 0.3)
    if session.thinking is not None:
        ways.append(partial(session.set_thinking, not session.thinking))
    events = rng.choice(ways)()
    if events is not None:
        how = rng.choice([{}, {}, {"stop_after": rng.randint(1, 6)}, {"in_prefill": True}])
        talk.reply(events, strike_at=rng.choice([None, None, rng.randint(1, 9)]), **how)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", FAMILIES)
def test_any_conversation(name, seed, talk_with):
    """Forty steps of any kind; what no word is may be tokenised otherwise."""
    rng = random.Random(seed)
    talk = talk_with(FAMILIES[name], 2, is_canonical=bool(seed))
    for _ in range(40):
        step(talk, rng)
        talk.session.set_drafts(rng.choice([2, 2, 2, 0, 1, 4]))
    assert talk.starts > 10


def test_a_conversation_with_the_demos_tokenizer(talk_with):
    converse(talk_with(FAMILIES["V3"], 2, real="demo"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "real, name",
    [
        ("deepseek-v3", "V3"),
        ("deepseek-r1", "R1"),
        ("deepseek-v3.1", "V3.1"),
        ("deepseek-v3.1", "V3.1, thinking"),
        ("glm-4.7-flash", "GLM"),
    ],
)
def test_a_conversation_in_real_tokens(real, name, talk_with):
    """The models' own tokenizers and templates, with 129,280 tokens and more."""
    converse(talk_with(FAMILIES[name], 2, real=real))
