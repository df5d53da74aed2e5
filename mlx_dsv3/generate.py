"""Token ids -> a stream of text, with stop rules and statistics.

Decoding is double-buffered: the next step is submitted before the present token is read, so the
GPU does not wait for Python. `State` keeps the latent cache together with the ids it stands for;
it is exact after every way a stream can end, so the next turn reuses what it shares.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_dsv3.conversation import common_prefix_length
from mlx_dsv3.errors import UserError
from mlx_dsv3.load import Loaded
from mlx_dsv3.sampler import Sampler

PREFILL_CHUNK = 2048


@dataclass
class Stats:
    """Counts and seconds of one reply; `peak_bytes` is MLX's peak since the process began."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prompt_s: float = 0.0
    reply_tokens: int = 0
    reply_s: float = 0.0
    peak_bytes: int = 0

    @property
    def prompt_tps(self) -> float:
        return (self.prompt_tokens - self.reused_tokens) / max(self.prompt_s, 1e-9)

    @property
    def reply_tps(self) -> float:
        """Tokens per second after the first, whose time counts as the prompt's."""
        return max(self.reply_tokens - 1, 0) / max(self.reply_s, 1e-9)


@dataclass
class Piece:
    """One token of a reply; `finish_reason` is None until the last: `stop` or `length`."""

    token: int
    text: str
    finish_reason: str | None
    stats: Stats


@dataclass
class State:
    """The main model's latent cache and the ids that it has been fed, in order."""

    cache: list
    ids: list[int] = field(default_factory=list)

    def align(self) -> None:
        """Trim the cache to the ids known to be in it, after an interrupted step."""
        self.trim(len(self.ids))

    def trim(self, length: int) -> None:
        """Keep the first `length` positions."""
        for layer in self.cache:
            layer.trim(layer.offset - length)
        del self.ids[length:]


def make_state(loaded: Loaded) -> State:
    """Return an empty state for a model."""
    return State(loaded.model.make_cache())


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
    limit = loaded.args.max_position_embeddings
    if len(ids) >= limit:
        raise UserError(
            f"the prompt has {len(ids):,} tokens and `max_position_embeddings` is {limit:,}",
            "shorten it, or `/clear` the conversation first",
        )


def vocabulary_mask(loaded: Loaded) -> mx.array | None:
    """Return -inf for the padding ids that the tokenizer lacks, 0 elsewhere; None without any."""
    known = set(loaded.tokenizer.get_vocab().values())
    if len(known) >= loaded.args.vocab_size:
        return None
    return mx.array([0.0 if i in known else -float("inf") for i in range(loaded.args.vocab_size)])


def prefill(loaded: Loaded, state: State, ids: list[int]) -> None:
    """Feed all but the last of `ids` to the model, keeping what the state shares with them."""
    keep = min(common_prefix_length(state.ids, ids), len(ids) - 1)
    state.trim(keep)
    while len(ids) - 1 > len(state.ids):
        chunk = ids[len(state.ids) : len(ids) - 1][:PREFILL_CHUNK]
        loaded.model.hidden(mx.array([chunk]), state.cache)
        mx.eval([layer.state for layer in state.cache])
        state.ids.extend(chunk)
        mx.clear_cache()


def steps(loaded: Loaded, state: State, last: int, sampler: Sampler, limit: int) -> Iterator[int]:
    """Yield up to `limit` tokens after `last`, which is the first to be fed."""
    mask = vocabulary_mask(loaded)

    def step(ids: mx.array) -> mx.array:
        position = state.cache[0].offset + 1
        logits = loaded.model(ids[None], state.cache)[0]  # (1, vocabulary)
        token = sampler(logits if mask is None else logits + mask, position)
        mx.async_eval(token)
        return token

    token = step(mx.array([last]))
    state.ids.append(last)
    for count in range(1, limit + 1):
        upcoming = step(token) if count < limit else None
        value = token.item()
        if upcoming is not None:
            state.ids.append(value)
        yield value
        token = upcoming


def stream(
    loaded: Loaded,
    ids: list[int],
    *,
    max_tokens: int | None = None,
    sampler: Sampler | None = None,
    state: State | None = None,
) -> Iterator[Piece]:
    """Yield the reply to the prompt `ids`, token by token.

    `state` carries the cache from reply to reply; ids it already holds are not computed again.
    Ends with finish_reason `stop` at an end token (whose text is empty) or `length` at
    `max_tokens` or the end of the context. Raises `UserError` for ids that cannot be run.
    """
    check_ids(loaded, ids)
    state = state or make_state(loaded)
    room = loaded.args.max_position_embeddings - len(ids)
    limit = room if max_tokens is None else min(max_tokens, room)
    stats = Stats(prompt_tokens=len(ids))
    detokenizer = loaded.tokenizer.detokenizer
    start = time.perf_counter()
    try:
        stats.reused_tokens = min(common_prefix_length(state.ids, ids), len(ids) - 1)
        prefill(loaded, state, ids)
        for token in steps(loaded, state, ids[-1], sampler or Sampler(), limit):
            now = time.perf_counter()
            if stats.reply_tokens == 0:
                stats.prompt_s, first = now - start, now
            stats.reply_tokens += 1
            stats.reply_s = now - first
            stats.peak_bytes = mx.get_peak_memory()
            stops = token in loaded.tokenizer.eos_token_ids
            if not stops:
                detokenizer.add_token(token)
            ends = stops or stats.reply_tokens == limit
            if ends:
                detokenizer.finalize()
            reason = "stop" if stops else "length" if ends else None
            yield Piece(token, detokenizer.last_segment, reason, stats)
            if ends:
                return
    finally:
        state.align()
