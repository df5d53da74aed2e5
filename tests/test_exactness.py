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

from mlx_dsv3 import generate
from mlx_dsv3.conversation import session as sessions
from mlx_dsv3.conversation.messages import Conversation
from mlx_dsv3.conversation.session import End, Session, Text
from mlx_dsv3.decoding.state import common_prefix_length
from mlx_dsv3.decoding.steps import Stepper
from mlx_dsv3.generate import Prefill
from mlx_dsv3.load import load_model
from mlx_dsv3.model.decoder import Decoder

BOUND = 1e-5  # absolute, of rows; of logits, relative to the largest
CONFIG = {"num_hidden_layers": 2, "n_routed_experts": 8}
CHUNK, LEAST, LONGEST = 32, 4, 8  # tokens
SETTINGS = {"temp": 1.0, "max_tokens": LONGEST, "seed": 1}
LONG = " the" * 150  # makes the caches grow


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


def words(tokenizer) -> list[int]:
    """Return tokens that stay what they are however they stand in a text: whole words."""
    found = []
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        word = token.removeprefix("Ġ")
        is_word = word != token and word.isalpha() and word.isascii()
        if is_word and tokenizer.encode(" " + word, add_special_tokens=False) == [number]:
            found.append(number)
            if len(found) == 30:
                break
    return found


class Watched:
    """A session of which every reply is compared with one from scratch."""

    def __init__(self, loaded, monkeypatch, family: Family, drafts: int, is_canonical=True):
        self.loaded, self.family, self.fed = loaded, family, 0
        self.strike_at, self.chosen, self.starts, self.num_lost = None, 0, 0, 0
        self.session = Session(loaded, system="be small", settings=SETTINGS, drafts=drafts)
        self.is_canonical = is_canonical
        self.watch(monkeypatch)

    def watch(self, monkeypatch) -> None:
        """Count what is fed, look at each prompt when it is computed, and choose as asked."""
        watched, through, choose = self, Decoder.through, Stepper.choose

        def counting(decoder, ids, *rest):
            watched.fed += ids.shape[1]
            return through(decoder, ids, *rest)

        class Start(Stepper):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                watched.check_start(self.state)

        def striking(stepper, states, fed):
            watched.chosen += 1
            if watched.chosen == watched.strike_at:
                raise KeyboardInterrupt
            return choose(stepper, states, fed)

        monkeypatch.setattr(Decoder, "through", counting)
        monkeypatch.setattr(Stepper, "choose", striking)
        monkeypatch.setattr(generate, "Stepper", Start)
        make_sampler = sessions.make_sampler
        monkeypatch.setattr(sessions, "make_sampler", lambda told: self.bent(make_sampler(told)))

    def bent(self, sampler):
        """Return a sampler whose replies have LEAST tokens, `<think>` first where a model does."""
        tokenizer = self.loaded.tokenizer
        [first], ends = tokenizer.convert_tokens_to_ids([OPEN]), list(tokenizer.eos_token_ids)

        def choose(logits, position, ids=None):
            for row in range(logits.shape[0]):
                place = position + row - len(self.ids)
                if self.family.opens and place == 0:
                    logits[row, first] = 1e4
                if place < LEAST:
                    logits[row, mx.array(ends)] = -mx.inf
            return sampler(logits, position, ids)

        return choose

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """Return the ids of a prompt, from messages alone."""
        conversation = Conversation(self.loaded.tokenizer, "be small")
        conversation.messages, conversation.thinking = messages, self.session.thinking
        return conversation.prompt_ids()

    def check_start(self, state) -> None:
        """Compare the next logits, and count what was fed and the tokens that begin a text."""
        model, self.starts = self.loaded.model, self.starts + 1
        assert self.session.conversation.messages[-1] == {"role": "assistant", "content": ""}
        self.ids = ids = self.prompt_ids(self.session.conversation.messages[:-1])
        assert state.ids == ids[:-1]
        self.num_lost += common_prefix_length(self.held, ids) < len(self.held)
        shared = min(common_prefix_length(self.held, ids), len(ids) - 1)
        self.reused = len(ids) - 1 - self.fed
        assert shared - (state.mtp_cache is not None) <= self.reused <= shared
        if bos := self.loaded.tokenizer.bos_token_id if self.family.bos else None:
            assert ids.count(bos) == 1 and ids[0] == bos
        fed, self.fed = self.fed, 0
        self.logits = model(mx.array([ids[-1:]]), state.cache)[0, -1]
        for layer in state.cache:
            layer.trim(1)
        assert fed == len(ids) - 1 - self.reused

    def reply(self, events, stop_after=None, strike_at=None, in_prefill=False) -> End | None:
        """Run a reply to its end, or stop it, and check both caches then."""
        self.held, self.fed, self.chosen = list(self.session.state.ids), 0, 0
        self.logits, self.ids = None, []
        self.strike_at, event, texts = strike_at, None, 0
        for event in events:
            if (
                in_prefill
                and isinstance(event, Prefill)
                and (event.done > event.reused or event.done == event.total)
            ):
                event = events.throw(KeyboardInterrupt())
            texts += isinstance(event, Text)
            if texts == stop_after:
                events.close()
        if isinstance(event, End) and event.stats:
            assert event.stats.reused_tokens == self.reused
        self.check_caches()
        return event

    def check_caches(self) -> None:
        """Compare the next logits and the rows of both caches with those from scratch."""
        state, (model, mtp) = self.session.state, (self.loaded.model, self.loaded.mtp)
        ids, pairs = state.ids, min(state.mtp_pairs, len(state.ids) - 1)
        if not ids and not self.ids:  # stopped before anything was fed
            assert not any(layer.length for layer in state.cache)
            return
        fresh, all_ids = model.make_cache(), mx.array([max(ids, self.ids, key=len)])
        g = model.hidden(all_ids, fresh)
        for layer, expected in zip(state.cache, fresh, strict=True):
            assert layer.length == len(ids)
            rows = expected.latents[:, : len(ids)]
            assert not ids or mx.abs(layer.latents - rows).max() <= BOUND
        if self.logits is not None:
            assert self.ids == all_ids[0, : len(self.ids)].tolist()
            expected = model.lm_head(g[:, len(self.ids) - 1])[0]
            assert mx.abs(self.logits - expected).max() <= BOUND * mx.abs(expected).max()
        if state.mtp_cache is None:
            return
        assert state.mtp_pairs + state.num_waiting == len(ids)
        assert state.mtp_cache.length == state.mtp_pairs
        if state.pending:
            waiting = g[:, state.mtp_pairs : len(ids)]
            assert mx.abs(state.waiting() - waiting).max() <= BOUND * mx.abs(waiting).max()
        if pairs > 0:  # the last pair may be of an id that is gone; `rewind` drops it
            mtp.states(g[:, :pairs], all_ids[:, 1 : pairs + 1], cache := mtp.make_cache())
            assert mx.abs(state.mtp_cache.latents[:, :pairs] - cache.latents).max() <= BOUND

    def ask(self, text: str, is_edited: bool = False, **how) -> End | None:
        """Ask; where all of a turn stays in the prompt, all that was held is used again."""
        end = self.reply(self.session.turn(text), **how)
        if self.family.appends and self.is_canonical and self.ids and not is_edited:
            assert common_prefix_length(self.held, self.ids) == len(self.held)
        return end


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


@pytest.mark.parametrize("name", ["V3", "R1"])
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
