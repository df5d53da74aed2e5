"""Decoding, plain and with drafts of the model's own MTP module.

`decode`, the last function here, is the loop. Its plain steps are `Stepper.plain`: feed a token,
choose the next one, one after the other. Its drafted steps are `Stepper.speculate`: draft, verify,
accept, rewind. How many drafts a step makes is decided in `draft_control.py`.

A drafted step makes k drafts with the MTP module, feeds them with the last chosen token to the
main model in one pass, and keeps those that equal what the main model chooses itself. Choice is
greedy or by noise that depends on (seed, position) alone, and the draft uses the same noise, so the
tokens are those of plain decoding whatever k is (spec 4.3; the acceptance rule "equal to the
target's own sample" of 4.5).

One row and several may be summed in another order. In float32 that moves a logit by its last bits:
no token differed on the CPU backend (`tests/demo_model/identical.py`; docs/log.md). In bfloat16
on a GPU they go through different kernels, so near-ties can fall otherwise; `--drafts 0` is plain
decoding.

Host synchronisations: one for each step with drafts, whatever k, to read drafts and choices
together; one for each plain step, to read a token while the next step already runs. With streamed
experts every layer adds its own (`experts/products.py`).

Yields token ids. Text and the end of a reply are the caller's: it says how many tokens it needs at
most, and leaves where it has enough.
"""

import time
from collections.abc import Callable, Iterator

import mlx.core as mx

from mlx_dsv3.decoding.draft_control import DraftControl
from mlx_dsv3.decoding.draft_stats import DraftStats
from mlx_dsv3.decoding.sampler import Sampler
from mlx_dsv3.decoding.state import State
from mlx_dsv3.model.decoder import Model
from mlx_dsv3.model.mtp import MTP

MAX_WAITING = 256  # states that wait for the MTP cache through plain steps: 7 MB of V3's


def catch_up(mtp: MTP, state: State) -> None:
    """Put all waiting states but the last into the MTP cache, unevaluated.

    The last one makes the next draft, when the token that follows it is known.
    """
    g = state.waiting()
    if g.shape[1] > 1:
        mtp.extend(g[:, :-1], mx.array([state.ids[state.mtp_pairs + 1 :]]), state.mtp_cache)
        state.keep_last_waiting()


class Stepper:
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
        self.can_draft = mtp is not None and state.mtp_cache is not None

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
        known = mx.array(state.ids[state.mtp_pairs + 1 :], mx.int32)
        f = self.mtp.states(state.waiting(), mx.concatenate([known, last])[None], cache, last=1)
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
        mx.async_eval(drafts)  # they run while the verification's graph is built
        fed = mx.concatenate([first, drafts])
        g = self.model.hidden(fed[None], state.cache)  # (1, count + 1, D)
        chosen = self.choose(g, fed)
        both = mx.concatenate([chosen, drafts]).tolist()
        tokens, guesses = both[: count + 1], both[count + 1 :]
        accepted = next((i for i in range(count) if tokens[i] != guesses[i]), count)
        state.commit([last, *tokens[:accepted]], g, paired=True)
        for layer in state.cache:
            layer.trim(count - accepted)
        return tokens[: accepted + 1], accepted

    def plain(self, last: int, limit: int, goes_on: Callable[[], bool]) -> Iterator[int]:
        """Yield up to `limit` tokens one by one, the next step submitted before each is read.

        Before that it asks whether it `goes_on`; if not, the token is the last.
        """
        state = self.state

        def step(fed: mx.array) -> tuple[mx.array, mx.array]:
            g = self.model.hidden(fed[None], state.cache)
            token = self.choose(g, fed)
            mx.async_eval(token)
            return token, g

        token, g = step(mx.array([last], mx.int32))
        state.commit([last], g)
        for left in reversed(range(limit)):
            upcoming = step(token) if left and goes_on() else None
            value = token.item()
            if upcoming is not None:
                token, g = upcoming
                state.commit([value], g)
                if state.num_waiting >= MAX_WAITING:
                    catch_up(self.mtp, state)
                    mx.async_eval(state.mtp_cache.state)
            yield value
            if upcoming is None:
                return


def decode(
    stepper: Stepper, last: int, limit: int, control: DraftControl, stats: DraftStats
) -> Iterator[int]:
    """Yield up to `limit` tokens after `last`, with as many drafts per step as the control says.

    Wherever it is left, also inside accepted drafts, what was not yielded is not in the state.
    """
    state = stepper.state

    def wanted() -> int:
        """Return the drafts that the next step should make; none before anything was fed."""
        can_draft = stepper.can_draft and state.pending
        return control.choose(len(state.ids)) if can_draft else 0

    def observe(drafts: int, accepted: int, seconds: float) -> None:
        stats.observe(drafts, accepted, seconds, control.is_warm(drafts))
        control.observe(len(state.ids), drafts, seconds, accepted)
        stats.plain_step_s = control.step_s(len(state.ids), 0)

    while limit > 0:
        drafts = min(wanted(), limit - 1)
        if not drafts:
            for token, seconds in timed(stepper.plain(last, limit, lambda: not wanted())):
                observe(0, 0, seconds)
                limit, last = limit - 1, token
                yield token
            continue
        fed, start = len(state.ids) + 1, time.perf_counter()
        tokens, accepted = stepper.speculate(last, drafts)
        observe(drafts, accepted, time.perf_counter() - start)
        shown, stats.unseen = 0, stats.unseen + len(tokens)
        try:
            for token in tokens:
                limit, last, shown, stats.unseen = limit - 1, token, shown + 1, stats.unseen - 1
                yield token
        finally:
            if shown < accepted:
                state.rewind(fed + shown)


def timed(tokens: Iterator[int]) -> Iterator[tuple[int, float]]:
    """Yield each token with the seconds that it took, without those of whoever reads them."""
    start = time.perf_counter()
    for token in tokens:
        yield token, time.perf_counter() - start
        start = time.perf_counter()
