"""Measures of a difference: of states, stage by stage, and of the text's log-probabilities.

A mean hides a wrong row, a maximum hides a wrong scale, and a single wrong channel hides in both;
so a stage has all three. Numbers gather over prompts. Nothing here knows what is acceptable
(`bounds.py`), or where the numbers come from (`replay.py`).
"""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

# States may hold infinities: a NaN from them counts as an infinite difference, without a warning.
QUIET = np.errstate(invalid="ignore", over="ignore")


def as_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


@dataclass
class Stage:
    """Differences of one stage over all prompts: a row is a position, a channel a column.

    `worst` and `channel` leave out rows that a router sent elsewhere, here or (running free) in an
    earlier layer: those are another computation, counted in `agreement` and in the mean `error`.
    `is_disturbed` says that there may be rows which attended to one of those.
    """

    name: str
    rows: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    is_alike: list[bool] = field(default_factory=list)
    is_disturbed: bool = False
    error_squares: np.ndarray | float = 0.0  # by channel
    squares: np.ndarray | float = 0.0
    overlaps: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    num_chosen: int = 0  # experts of a position

    @QUIET
    def add(self, actual, expected, alike: np.ndarray, base=None) -> None:
        """Take rows (P, D) of one prompt; with `base` (P, D) only what was added to it counts."""
        actual, expected = as_numpy(actual), as_numpy(expected)
        base = 0.0 if base is None else as_numpy(base)
        size = np.linalg.norm(expected - base, axis=-1)
        error = np.linalg.norm(actual - expected, axis=-1)
        both = np.linalg.norm(actual, axis=-1) * np.linalg.norm(expected, axis=-1)
        rows = error / np.maximum(size, 1e-30)
        self.rows += list(np.where(np.isnan(rows), np.inf, rows))
        self.cosines += list((actual * expected).sum(-1) / np.maximum(both, 1e-30))
        self.is_alike += list(alike)
        scale = 1 / np.maximum(np.square(expected - base).mean(-1, keepdims=True), 1e-60)
        self.error_squares += (np.square(actual - expected) * scale)[alike].sum(0)
        self.squares += (np.square(expected - base) * scale)[alike].sum(0)

    def route(self, actual: mx.array, expected: mx.array, margins: mx.array) -> np.ndarray:
        """Compare expert ids (L, K) of one prompt; return which positions have equal sets."""
        actual, expected = np.array(actual), np.array(expected)
        common = (actual[:, :, None] == expected[:, None, :]).any(-1).mean(-1)
        self.overlaps += list(common)
        self.margins += list(np.array(margins))
        self.num_chosen = actual.shape[1]
        return common == 1

    @property
    def error(self) -> float:
        """Mean over rows of |actual - expected| / |expected|; NaN counts as infinite."""
        return finite(np.mean(self.rows))

    @property
    def worst(self) -> float:
        alike = [row for row, is_alike in zip(self.rows, self.is_alike, strict=True) if is_alike]
        return finite(max(alike, default=0.0))

    @property
    @QUIET
    def channel(self) -> float:
        """The largest error of a channel, over its own size or the mean one if that is larger."""
        if not np.any(self.squares):
            return 0.0
        size = np.maximum(self.squares, np.mean(self.squares))
        return finite(np.sqrt((self.error_squares / size).max()))

    @property
    def cosine(self) -> float:
        return float(np.mean(self.cosines))

    def agreement(self, tie: float | None = None) -> float | None:
        """Return the share of expert choices in common, where the margin exceeds `tie`."""
        if not self.overlaps:
            return None
        kept = np.array(self.margins) > (-1 if tie is None else tie)
        return float(np.array(self.overlaps)[kept].mean()) if kept.any() else 1.0

    def num_choices(self, tie: float) -> int:
        """Return how many choices of an expert are not close."""
        return self.num_chosen * int((np.array(self.margins) > tie).sum())


def finite(value: float) -> float:
    return float("inf") if np.isnan(value) else float(value)


@dataclass
class TokenDifferences:
    """Differences of logits over all prompts; lists have a number for each position."""

    divergences: list[float] = field(default_factory=list)  # KL(golden | model)
    is_same: list[bool] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # golden's best against its second
    losses: list[float] = field(default_factory=list)
    golden_losses: list[float] = field(default_factory=list)
    num_rerouted: int = 0  # positions that a router sent elsewhere

    def add(self, logits: mx.array, prompt: dict, prefix: str, targets: mx.array, at: np.ndarray):
        """Take logits (P, vocabulary) of the positions `at` (P,), which ascend."""
        rows, logits = mx.array(at), logits.astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        top_ids = prompt[prefix + "top_ids"][rows]
        p, q = (
            as_numpy(prompt[prefix + "top_logprobs"][rows]),
            as_numpy(mx.take_along_axis(logprobs, top_ids, axis=-1)),
        )
        self.divergences += list(divergence(p, q))
        self.is_same += list(np.array(mx.argmax(logits, axis=-1) == top_ids[:, 0]))
        self.gaps += list(p[:, 0] - p[:, 1])
        rows = rows[: int((at < len(targets)).sum())]  # the last position has no target
        chosen = mx.take_along_axis(logprobs[: len(rows)], targets[rows][:, None], axis=-1)
        self.losses += list(-as_numpy(chosen)[:, 0])
        self.golden_losses += list(-as_numpy(prompt[prefix + "logprobs"][rows]))

    @property
    def kl(self) -> float:
        return finite(np.mean(self.divergences))

    @property
    def top1(self) -> float:
        return float(np.mean(self.is_same))

    def top1_outside(self, tie: float) -> float:
        """Return top-1 agreement where golden's best is ahead by more than `tie` (nats)."""
        kept = np.array(self.gaps) > tie
        return float(np.array(self.is_same)[kept].mean()) if kept.any() else 1.0

    @property
    def doubt(self) -> float:
        """Return the mean of (1 - p)^2, where golden gives p to each token: 0 where it is sure."""
        p = np.exp(-np.maximum(self.golden_losses, 0))
        return float(np.square(1 - p).mean())

    @property
    @QUIET
    def perplexities(self) -> tuple[float, float]:
        """Return the model's perplexity and the golden one."""
        return finite(np.exp(np.mean(self.losses))), float(np.exp(np.mean(self.golden_losses)))


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return KL(p | q) of log-probabilities (rows, 20), everything else as one more outcome."""
    rest_p = np.maximum(1 - np.exp(p).sum(-1), 0)
    rest_q = np.maximum(1 - np.exp(q).sum(-1), 1e-12)
    inside = (np.exp(p) * (p - q)).sum(-1)
    outside = np.where(rest_p > 1e-6, rest_p * np.log(np.maximum(rest_p, 1e-12) / rest_q), 0)
    return np.maximum(inside + outside, 0)
