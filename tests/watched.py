"""A session of which every reply is compared with one from scratch, on a small random model.

Its replies are words that stay what they are in any text, with `<think>` and `</think>` where a
family has them, or any tokens at all; they may be stopped anywhere.
"""

import mlx.core as mx
from families import OPEN, Family

from mlx_dsv3 import generate
from mlx_dsv3.conversation import session as sessions
from mlx_dsv3.conversation.messages import Conversation
from mlx_dsv3.conversation.session import End, Session, Text
from mlx_dsv3.decoding.state import common_prefix_length
from mlx_dsv3.decoding.steps import Stepper
from mlx_dsv3.generate import Prefill
from mlx_dsv3.model.decoder import Decoder

BOUND = 1e-5  # absolute, of rows; of logits, relative to the largest
LEAST, LONGEST = 4, 8  # tokens of a reply
SETTINGS = {"temp": 1.0, "max_tokens": LONGEST, "seed": 1}


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
        conversation = Conversation(self.loaded.tokenizer, self.session.conversation.system)
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
