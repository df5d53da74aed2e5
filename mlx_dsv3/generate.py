"""Token ids -> a stream of text: the prompt is fed (`prefill`), then tokens are chosen one by one.

Here a reply ends, at an end token or at its limit, and is measured. A `State` (`decoding/state.py`)
keeps the caches with the ids they stand for and is exact after every way a stream can end, so the
next turn computes only what it does not share. How tokens are chosen, with drafts or without, is
in `decoding/steps.py`.
"""

import time
import weakref
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import mlx.core as mx

from mlx_dsv3.decoding.draft_control import DraftControl, fixed_drafts
from mlx_dsv3.decoding.draft_stats import DraftStats
from mlx_dsv3.decoding.sampler import Sampler
from mlx_dsv3.decoding.state import State, common_prefix_length
from mlx_dsv3.decoding.steps import Stepper, catch_up, decode
from mlx_dsv3.detokenizer import Detokenizer
from mlx_dsv3.errors import UserError
from mlx_dsv3.experts.bank import Counters
from mlx_dsv3.load import Loaded
from mlx_dsv3.model.decoder import Model
from mlx_dsv3.model.mtp import MTP
from mlx_dsv3.options import SETTINGS

SHORTER = "shorten it; in a chat `/undo` drops the last turn, and `/clear` all of them"


@dataclass(frozen=True)
class Stats:
    """Counts and seconds of a reply up to a token; `peak_bytes` is MLX's since the process began.

    `prompt_s` ends where decoding begins, with the prompt's last token, which is a reply's first
    input. So both rates are of what was computed in their time, however many tokens came at once.
    """

    prompt_tokens: int
    reused_tokens: int
    prompt_s: float
    first_token_s: float  # from the call on
    reply_tokens: int
    reply_s: float
    peak_bytes: int
    drafts: DraftStats
    experts: Counters | None  # of streamed layers; None where none streams

    @property
    def prompt_tps(self) -> float:
        """Return the tokens per second that were computed before decoding, 0 for none."""
        computed = max(self.prompt_tokens - 1 - self.reused_tokens, 0)
        return computed / max(self.prompt_s, 1e-9)

    @property
    def reply_tps(self) -> float:
        return self.reply_tokens / max(self.reply_s, 1e-9)


@dataclass(frozen=True)
class Piece:
    """One token of a reply; `finish_reason` is None until the last: `stop` or `length`."""

    token: int
    text: str
    finish_reason: str | None
    stats: Stats


@dataclass(frozen=True)
class Prefill:
    """How far the prompt is: tokens of it that were held already, are computed, and all."""

    reused: int
    done: int
    total: int


def make_state(loaded: Loaded, with_drafts: bool = True) -> State:
    """Return an empty state for a model, with an MTP cache where it has the module."""
    has_mtp = loaded.mtp is not None and with_drafts
    mtp_cache = loaded.mtp.make_cache() if has_mtp else None
    return State(loaded.model.make_cache(), mtp_cache, owner=weakref.ref(loaded.model))


def make_control(loaded: Loaded, drafts: str | int) -> DraftControl:
    """Return the control for `auto` or a fixed number of drafts; without the module, for none."""
    has_mtp = loaded.mtp is not None
    fixed = fixed_drafts(drafts, has_mtp)
    return DraftControl(fixed if has_mtp else 0)


def check_state(loaded: Loaded, state: State, control: DraftControl) -> None:
    """Drop the MTP cache of a state for a model without the module; refuse drafts without one.

    A state of another model is refused: its rows would mean nothing, and nothing would crash.
    """
    if state.owner is not None and state.owner() is not loaded.model:
        raise UserError(
            "this state was computed by another model, or by this one as it was loaded before",
            "`make_state(loaded)` makes an empty one; `State.save` and `load_state` keep one",
        )
    if loaded.mtp is None:
        fixed_drafts(control.fixed or 0, has_mtp=False)
        state.drop_mtp()
    elif control.fixed and state.mtp_cache is None:
        raise UserError(
            f"`drafts={control.fixed}` needs an MTP cache and this state was made without one",
            "`make_state(loaded)` makes one with it; `drafts=0` needs none",
        )


def context_limit(loaded: Loaded) -> int:
    """Return the tokens that a conversation may have: the model's, and those planned for."""
    return min(loaded.args.max_position_embeddings, loaded.plan.context)


def check_ids(loaded: Loaded, ids: list[int]) -> None:
    """Refuse an empty prompt, an id the embedding lacks, and a prompt beyond the context."""
    if not ids:
        raise UserError("the prompt is empty", "type a question")
    if min(ids) < 0 or max(ids) >= loaded.args.vocab_size:
        bad = next(i for i in ids if not 0 <= i < loaded.args.vocab_size)
        raise UserError(
            f"the prompt holds token id {bad}; the model's vocab_size is {loaded.args.vocab_size}",
            "copy the tokenizer files of this model from the hub",
        )
    limit = context_limit(loaded)
    if len(ids) >= limit < loaded.args.max_position_embeddings:
        raise UserError(
            f"the prompt has {len(ids):,} tokens and memory is planned for {limit:,}",
            f"{SHORTER}; or give a larger `--context` where memory allows it",
        )
    if len(ids) >= limit:
        raise UserError(
            f"the prompt has {len(ids):,} tokens and `max_position_embeddings` is {limit:,}",
            SHORTER,
        )


def prefill(
    model: Model, mtp: MTP | None, state: State, ids: list[int], chunk: int
) -> Iterator[Prefill]:
    """Feed all but the last of `ids`, `chunk` at once; say after each layer how far it is.

    A chunk of streamed experts takes minutes. Whoever reads may stop between two layers: `align`
    brings the caches back to the chunks before.
    """
    state.rewind(min(common_prefix_length(state.ids, ids), len(ids) - 1))
    reused, last, layers = len(state.ids), len(ids) - 1, len(model.layers)
    yield Prefill(reused, reused, last)
    for begin in range(reused, last, chunk):
        fed = ids[begin : min(begin + chunk, last)]
        states = model.model.through(mx.array([fed]), state.cache)
        for i in range(1, layers + 1):
            next(states)
            yield Prefill(reused, begin + len(fed) * i // layers, last)
        g = next(states)  # after the final norm
        mx.eval(g, [layer.state for layer in state.cache])
        state.commit(fed, g)
        if state.mtp_cache is not None:
            catch_up(mtp, state)
            mx.eval(state.mtp_cache.state, state.pending)
        mx.clear_cache()


def stream(loaded: Loaded, ids: list[int], **settings) -> Iterator[Piece]:
    """Yield the reply to the prompt `ids`, token by token; the settings are those of `run`."""
    with closing(run(loaded, ids, **settings)) as events:
        yield from (event for event in events if isinstance(event, Piece))


def run(
    loaded: Loaded,
    ids: list[int],
    *,
    max_tokens: int | None = None,
    sampler: Sampler | None = None,
    drafts: str | int = "auto",
    control: DraftControl | None = None,
    state: State | None = None,
) -> Iterator[Prefill | Piece]:
    """Yield how far the prompt `ids` is, and then the reply to it, token by token.

    `drafts` is `auto` or a number of drafts for every step. What is learnt from reply to reply is
    kept by who keeps it: a `control` from `make_control`, in place of `drafts`, what drafting
    costs; a `state` from `make_state` the caches, so that what it holds is not computed again.
    Ends with finish_reason `stop` at an end token (whose text is empty) or `length` at
    `max_tokens` or the end of the context. Raises `UserError` for ids that cannot be run, and for
    a fixed number of drafts with a state that was made without them.
    """
    check_ids(loaded, ids)
    if max_tokens is not None:
        SETTINGS["max_tokens"].check(max_tokens, "`max_tokens`")
    control = control or make_control(loaded, drafts)
    state = state or make_state(loaded, control.fixed != 0)
    check_state(loaded, state, control)
    room = context_limit(loaded) - len(ids)
    limit = room if max_tokens is None else min(max_tokens, room)
    store, mask, drafted = loaded.store, loaded.vocabulary_mask, DraftStats()
    detokenizer, ends = Detokenizer(loaded.tokenizer), set(loaded.tokenizer.eos_token_ids)
    before, start, first_s = store.counters, time.perf_counter(), 0.0
    try:
        for event in prefill(loaded.model, loaded.mtp, state, ids, loaded.plan.prefill_chunk):
            yield event
        stepper = Stepper(loaded.model, loaded.mtp, state, sampler or Sampler(), mask)
        begun = time.perf_counter()
        with closing(decode(stepper, ids[-1], limit, control, drafted)) as tokens:
            for count, token in enumerate(tokens, 1):
                reason = "stop" if token in ends else "length" if count == limit else None
                text = "" if reason == "stop" else detokenizer.add(token)
                if reason is not None:
                    text += detokenizer.end()
                now = time.perf_counter()
                first_s = first_s or now - start
                stats = Stats(
                    prompt_tokens=len(ids),
                    reused_tokens=event.reused,
                    prompt_s=begun - start,
                    first_token_s=first_s,
                    reply_tokens=count,
                    reply_s=now - begun,
                    peak_bytes=mx.get_peak_memory(),
                    drafts=drafted.copy(),
                    experts=store.counters - before if store.is_streamed else None,
                )
                yield Piece(token, text, reason, stats)
                if reason is not None:
                    return
    finally:
        state.align()
