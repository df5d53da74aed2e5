"""Speculative decoding with the model's own MTP module: draft, verify, accept, rewind.

A step drafts k tokens with the MTP module, feeds them with the last chosen token to the main model
in one pass, and keeps the drafts that equal what the main model chooses itself. Choice is greedy
or by noise that depends on (seed, position) alone, and the draft uses the same noise, so the
tokens are those of plain decoding whatever k is (spec 4.3; the acceptance rule "equal to the
target's own sample" of 4.5). One host synchronisation a step: to read drafts and choices.

Yields token ids; text, stop rules and budgets are the caller's, except that the caller says how
many tokens are still wanted and which ids end the reply.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_dsv3.gate import PLAIN_BURST, Gate
from mlx_dsv3.model import Model
from mlx_dsv3.mtp import MTP
from mlx_dsv3.sampler import Sampler
from mlx_dsv3.state import State


@dataclass
class DraftStats:
    """What drafting did: by position, drafts made and accepted; lengths; steps; seconds."""

    drafted: list[int] = field(default_factory=lambda: [0] * 8)
    accepted: list[int] = field(default_factory=lambda: [0] * 8)
    lengths: list[int] = field(default_factory=lambda: [0] * 8)
    plain_steps: int = 0
    plain_s: float = 0.0
    draft_steps: int = 0
    draft_tokens: int = 0
    draft_s: float = 0.0

    def record(self, drafts: int, accepted: int, seconds: float) -> None:
        for i in range(drafts):
            self.drafted[i] += 1
            self.accepted[i] += i < accepted
        self.lengths[accepted] += 1
        self.draft_steps += 1
        self.draft_tokens += accepted + 1
        self.draft_s += seconds

    @property
    def acceptance(self) -> list[float]:
        """Return the share accepted of the drafts made, by position."""
        return [a / d for a, d in zip(self.accepted, self.drafted, strict=True) if d]

    @property
    def speed_up(self) -> float | None:
        """Return tokens a second of draft steps over plain ones, None until both were measured."""
        if not self.plain_steps or not self.draft_steps:
            return None
        plain = self.plain_steps / max(self.plain_s, 1e-9)
        return self.draft_tokens / max(self.draft_s, 1e-9) / plain

    @property
    def tokens_per_forward(self) -> float:
        forwards = self.draft_steps + self.plain_steps
        return (self.draft_tokens + self.plain_steps) / max(forwards, 1)


class Decoder:
    """Everything that a step needs: model, MTP module, sampler, state, and what masks ids."""

    def __init__(
        self,
        model: Model,
        mtp: MTP | None,
        state: State,
        sampler: Sampler,
        mask: mx.array | None = None,
    ):
        self.model, self.mtp, self.state, self.sampler, self.mask = model, mtp, state, sampler, mask

    def choose(self, states: mx.array, fed: mx.array) -> mx.array:
        """Return the tokens (rows,) chosen from states (1, rows, D), int32.

        `fed` (n,) are the ids given to the model beyond the committed ones, the last row's input
        last.
        """
        logits = self.model.lm_head(states)[0]
        if self.mask is not None:
            logits = logits + self.mask
        ids = self.state.ids
        position = len(ids) + fed.shape[0] - logits.shape[0] + 1
        tokens = self.sampler(
            logits, position, lambda: mx.concatenate([mx.array(ids, mx.int32), fed])
        )
        return tokens.astype(mx.int32)

    def draft(self, last: mx.array, count: int) -> mx.array:
        """Return `count` drafts (count,) for what follows `last` (1,), unevaluated.

        Brings the MTP cache up to the pair (last state, `last`); later drafts recycle the module's
        own states, whose cache entries are guesses and are trimmed at once.
        """
        state, cache = self.state, self.state.mtp_cache
        start = state.mtp_pairs
        g = state.take_pending()
        if g.shape[1] > 1:  # only the last pair's output is wanted: the others need no experts
            known = mx.array([state.ids[start + 1 :]])
            self.mtp.extend(g[:, :-1], known, cache)
        f = self.mtp.states(g[:, -1:], last[None], cache)
        fed = last
        for i in range(count):
            if i:
                f = self.mtp.states(f, fed[None, -1:], cache)
            fed = mx.concatenate([fed, self.choose(f, fed)])
        cache.trim(count - 1)
        return fed[1:]

    def speculate(self, last: int, count: int) -> tuple[list[int], int]:
        """Feed `last` and `count` drafts; return the tokens chosen and how many were accepted.

        The state then holds `last` and the accepted drafts; the final token is not fed yet.
        """
        state = self.state
        first = mx.array([last], mx.int32)
        drafts = self.draft(first, count)
        fed = mx.concatenate([first, drafts])
        g = self.model.hidden(fed[None], state.cache)  # (1, count + 1, D)
        chosen = self.choose(g, fed)
        both = mx.concatenate([chosen, drafts]).tolist()
        tokens, guesses = both[: count + 1], both[count + 1 :]
        accepted = next((i for i in range(count) if tokens[i] != guesses[i]), count)
        state.commit([last, *tokens[:accepted]], g[:, : accepted + 1])
        for layer in state.cache:
            layer.trim(count - accepted)
        return tokens[: accepted + 1], accepted

    def plain(self, last: int, limit: int) -> Iterator[int]:
        """Yield up to `limit` tokens one by one, the next step submitted before each is read."""
        state = self.state

        def step(fed: mx.array) -> tuple[mx.array, mx.array]:
            g = self.model.hidden(fed[None], state.cache)
            token = self.choose(g, fed)
            mx.async_eval(token)
            return token, g

        token, g = step(mx.array([last], mx.int32))
        state.commit([last], g)
        for count in range(1, limit + 1):
            upcoming = step(token) if count < limit else None
            value = token.item()
            if upcoming is not None:
                token, g = upcoming
                state.commit([value], g)
            yield value


def decode(
    decoder: Decoder, last: int, limit: int, gate: Gate, ends: set[int], stats: DraftStats
) -> Iterator[int]:
    """Yield up to `limit` tokens after `last`, with as many drafts a step as the gate says.

    Stops after an id of `ends`, also inside accepted drafts; what lay behind it is rewound.
    """
    state = decoder.state
    while limit > 0:
        drafts = min(gate.choose(len(state.ids)), limit - 1)
        start = time.perf_counter()
        if drafts < 1 or not state.pending:  # nothing to draft from
            burst = limit if gate.fixed == 0 else PLAIN_BURST if drafts < 1 else 1
            for token in decoder.plain(last, min(burst, limit)):
                seconds = time.perf_counter() - start
                stats.plain_steps, stats.plain_s = stats.plain_steps + 1, stats.plain_s + seconds
                gate.record(len(state.ids), 0, seconds, 1)
                limit, last = limit - 1, token
                yield token
                if token in ends:
                    return
                start = time.perf_counter()
            continue
        tokens, accepted = decoder.speculate(last, drafts)
        seconds = time.perf_counter() - start
        stats.record(drafts, accepted, seconds)
        gate.record(len(state.ids), drafts, seconds, accepted + 1)
        end = next((i for i, token in enumerate(tokens) if token in ends), None)
        if end is not None and end < accepted:
            state.rewind(len(state.ids) - (accepted - 1 - end))
        for token in tokens if end is None else tokens[: end + 1]:
            limit, last = limit - 1, token
            yield token
        if end is not None:
            return
