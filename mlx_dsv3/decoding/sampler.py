"""Choice of the next token: greedy, or by noise that depends only on the seed and the position.

The token at a position is argmax(log-probabilities / temperature + Gumbel noise of that position),
which samples exactly from the filtered distribution. Because the noise is a function of (seed,
position) and not of what was drawn before, the same seed gives the same reply however the logits
were computed: alone, in a batch of drafts, or after a resumed prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx

# Below it the noise is lost in the rounding of float32 (and much below the division overflows).
LEAST_TEMP = 1e-5
# mlx-lm's top_p reads out of bounds where the product with it rounds to 0.
LEAST_TOP_P = 1e-6


def repetition_penalties(penalty: float | None) -> list[Callable]:
    """Return the penalties for a factor on what the last 20 tokens hold; none for None and 1."""
    if penalty in (None, 1):
        return []
    from mlx_lm.sample_utils import make_logits_processors

    return make_logits_processors(repetition_penalty=penalty)


def gumbel(size: int, key: mx.array) -> mx.array:
    """Return the noise of one position from its key (2,): (seed, position)."""
    return mx.random.gumbel((size,), key=key)


@dataclass
class Sampler:
    """Sampling settings; `temp` 0 is greedy. Filters apply before the temperature, as in mlx-lm.

    A `top_p` of 0 or 1, a `top_k` of 0 or -1 and a `min_p` of 0 keep every token.

    `penalties` are mlx-lm's logits processors: functions of (ids so far, logits).
    """

    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    penalties: list[Callable] = field(default_factory=list)

    def filtered(self, logprobs: mx.array) -> mx.array:
        """Return log-probabilities (rows, vocabulary) with what the filters drop at -inf."""
        from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

        if 0 < self.top_p < 1:
            logprobs = apply_top_p(logprobs, max(self.top_p, LEAST_TOP_P))
        if self.min_p > 0:
            logprobs = apply_min_p(logprobs, self.min_p)
        if 0 < self.top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, self.top_k)
        return logprobs

    def noise(self, position: int, rows: int, size: int) -> mx.array:
        """Return the Gumbel noise (rows, size) of the positions from `position` on."""
        keys = [[self.seed & 0xFFFFFFFF, position + i] for i in range(rows)]
        return mx.vmap(partial(gumbel, size))(mx.array(keys, mx.uint32))

    def penalized(self, logits: mx.array, ids: mx.array) -> mx.array:
        """Return logits (rows, vocabulary) after the penalties; row i sees the ids before it."""
        rows, length = logits.shape[0], ids.shape[0]
        out = []
        for i in range(rows):
            row = logits[i : i + 1]
            for penalty in self.penalties:
                row = penalty(ids[: length - rows + 1 + i], row)
            out.append(row)
        return mx.concatenate(out)

    def scores(
        self, logits: mx.array, position: int, ids: Callable[[], mx.array] | None = None
    ) -> mx.array:
        """Return what is compared, (rows, vocabulary): the chosen token has the largest score."""
        logits = logits.astype(mx.float32)
        if self.penalties:
            logits = self.penalized(logits, ids())
        if self.temp < LEAST_TEMP:
            return logits
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return self.filtered(logprobs) / self.temp + self.noise(position, *logits.shape)

    def __call__(
        self, logits: mx.array, position: int, ids: Callable[[], mx.array] | None = None
    ) -> mx.array:
        """Return the token ids (rows,) chosen from logits (rows, vocabulary) of one sequence.

        Row i chooses the token at position + i. `ids` returns the ids up to and including the
        input of the last row; it is called only where there are penalties.
        """
        return mx.argmax(self.scores(logits, position, ids), axis=-1)
