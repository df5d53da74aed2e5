"""Token ids -> a stream of text, with stop rules and statistics.

`State` keeps the latent caches together with the ids they stand for; it is exact after every way a
stream can end, so the next turn computes only what it does not share. How tokens are decoded,
with drafts or without, is `speculative.py`'s.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_dsv3.decoding.draft_control import MAX_DRAFTS, DraftControl
from mlx_dsv3.decoding.sampler import Sampler
from mlx_dsv3.decoding.state import State, common_prefix_length
from mlx_dsv3.decoding.steps import DraftStats, Stepper, catch_up, decode
from mlx_dsv3.errors import UserError
from mlx_dsv3.experts.store import Counters
from mlx_dsv3.load import Loaded


@dataclass
class Stats:
    """Counts and seconds of one reply; `peak_bytes` is MLX's peak since the process began.

    `prompt_s` ends where decoding begins, with the prompt's last token, which is a reply's first
    input. So both rates are of what was computed in their time, however many tokens came at once.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prompt_s: float = 0.0
    reply_tokens: int = 0
    reply_s: float = 0.0
    peak_bytes: int = 0
    drafts: DraftStats = field(default_factory=DraftStats)
    experts: Counters | None = None

    @property
    def prompt_tps(self) -> float:
        """Return the tokens per second that were computed before decoding, 0 for none."""
        computed = max(self.prompt_tokens - 1 - self.reused_tokens, 0)
        return computed / max(self.prompt_s, 1e-9)

    @property
    def reply_tps(self) -> float:
        return self.reply_tokens / max(self.reply_s, 1e-9)


@dataclass
class Piece:
    """One token of a reply; `finish_reason` is None until the last: `stop` or `length`."""

    token: int
    text: str
    finish_reason: str | None
    stats: Stats


def make_state(loaded: Loaded, with_drafts: bool = True) -> State:
    """Return an empty state for a model, with an MTP cache where it has the module."""
    has_mtp = loaded.mtp is not None and with_drafts
    return State(loaded.model.make_cache(), loaded.mtp.make_cache() if has_mtp else None)


def make_control(loaded: Loaded, drafts: str | int) -> DraftControl:
    """Return the control for `--drafts`: `auto` or a fixed number of drafts, 0 to 4."""
    if drafts == "auto":
        return DraftControl(fixed=None if loaded.mtp is not None else 0)
    if not str(drafts).isdecimal() or int(drafts) > MAX_DRAFTS:
        raise UserError(f"`--drafts` is `{drafts}`", f"choose auto or 0 to {MAX_DRAFTS}")
    if int(drafts) and loaded.mtp is None:
        raise UserError(
            f"`--drafts {drafts}` needs the MTP module and the folder has no `mtp.safetensors`",
            "`python -m convert mtp SOURCE FOLDER` adds it from the original checkpoint",
        )
    return DraftControl(fixed=int(drafts))


def check_state(loaded: Loaded, state: State, control: DraftControl) -> None:
    """Drop the MTP cache of a state for a model without the module; refuse drafts without one."""
    if loaded.mtp is None:
        make_control(loaded, control.fixed or 0)
        state.drop_mtp()
    elif control.fixed and state.mtp_cache is None:
        raise UserError(
            f"`drafts={control.fixed}` needs an MTP cache and this state was made without one",
            "`make_state(loaded)` makes one with it; `drafts=0` goes on without",
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
            "`/clear` the conversation first, or give a larger `--context` where memory allows it",
        )
    if len(ids) >= limit:
        raise UserError(
            f"the prompt has {len(ids):,} tokens and `max_position_embeddings` is {limit:,}",
            "shorten it, or `/clear` the conversation first",
        )


def prefill(loaded: Loaded, state: State, ids: list[int]) -> int:
    """Feed all but the last of `ids`, keeping what the state shares with them; return how many."""
    state.rewind(min(common_prefix_length(state.ids, ids), len(ids) - 1))
    reused = len(state.ids)
    while len(ids) - 1 > len(state.ids):
        chunk = ids[len(state.ids) : len(ids) - 1][: loaded.plan.prefill_chunk]
        g = loaded.model.hidden(mx.array([chunk]), state.cache)
        mx.eval(g, [layer.state for layer in state.cache])
        state.commit(chunk, g)
        if state.mtp_cache is not None:
            catch_up(loaded.mtp, state)
            mx.eval(state.mtp_cache.state, state.pending)
        mx.clear_cache()
    return reused


def stream(
    loaded: Loaded,
    ids: list[int],
    *,
    max_tokens: int | None = None,
    sampler: Sampler | None = None,
    drafts: str | int | DraftControl = "auto",
    state: State | None = None,
) -> Iterator[Piece]:
    """Yield the reply to the prompt `ids`, token by token.

    `drafts` is `auto`, a number of drafts for every step, or a `DraftControl` that outlives the
    reply. `state` carries the caches from reply to reply: what it holds is not computed again.
    Ends with finish_reason `stop` at an end token (whose text is empty) or `length` at
    `max_tokens` or the end of the context. Raises `UserError` for ids that cannot be run, and for
    a fixed number of drafts with a state that was made without them.
    """
    check_ids(loaded, ids)
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"`max_tokens` is `{max_tokens}`", "it takes a whole number from 1")
    control = drafts if isinstance(drafts, DraftControl) else make_control(loaded, drafts)
    state = state or make_state(loaded, control.fixed != 0)
    check_state(loaded, state, control)
    room = context_limit(loaded) - len(ids)
    limit = room if max_tokens is None else min(max_tokens, room)
    stats = Stats(prompt_tokens=len(ids))
    detokenizer, ends = loaded.tokenizer.detokenizer, set(loaded.tokenizer.eos_token_ids)
    before = loaded.store.counters
    start = time.perf_counter()
    try:
        stats.reused_tokens = prefill(loaded, state, ids)
        mask = loaded.vocabulary_mask
        stepper = Stepper(loaded.model, loaded.mtp, state, sampler or Sampler(), mask)
        begun = time.perf_counter()
        stats.prompt_s = begun - start
        for token in decode(stepper, ids[-1], limit, control, ends, stats.drafts):
            stats.reply_tokens += 1
            stats.reply_s = time.perf_counter() - begun
            stats.peak_bytes = mx.get_peak_memory()
            stats.experts = loaded.store.counters - before if loaded.store.is_streamed else None
            if token not in ends:
                detokenizer.add_token(token)
            is_last = token in ends or stats.reply_tokens == limit
            if is_last:
                detokenizer.finalize()
            reason = "stop" if token in ends else "length" if is_last else None
            yield Piece(token, detokenizer.last_segment, reason, stats)
    finally:
        state.align()
