"""Pearson's chi-square test of counts, and the sampler's exact distribution in float64.

The distribution is written down a second time here, from the definitions of the filters.
"""

import numpy as np

NORMAL_QUANTILE = 3.09  # of 0.999: one right sampler in a thousand would fail, but seeds are fixed


def distribution(logits, temp: float, top_p=1.0, top_k=0, min_p=0.0) -> np.ndarray:
    """Return the probabilities that a sampler draws from for logits (vocabulary,)."""
    logits = np.asarray(logits, np.float64)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    keep = np.ones(len(p), bool)
    if top_p < 1:  # the most likely ones until their mass reaches top_p
        for token in range(len(p)):
            keep[token] &= p[p > p[token]].sum() < top_p
    if min_p > 0:
        keep &= p >= min_p * p.max()
    if top_k > 0:
        keep &= p >= np.sort(np.where(keep, p, 0))[-top_k]
    weights = np.where(keep, np.exp((logits - logits.max()) / temp), 0)
    return weights / weights.sum()


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """Return the statistic and the largest value it may have; infinite for impossible tokens."""
    counts, expected = counts.ravel(), probabilities.ravel() * counts.sum()
    possible = expected > 0
    if counts[~possible].any():
        return np.inf, 0.0
    # Cells with few expected counts are put together: their statistic has no chi-square law.
    rare = possible & (expected < 5)
    cells = [(counts[i], expected[i]) for i in np.flatnonzero(possible & ~rare)]
    if rare.any():
        cells.append((counts[rare].sum(), expected[rare].sum()))
    value = sum((count - mean) ** 2 / mean for count, mean in cells)
    freedom = max(len(cells) - 1, 1)  # Wilson and Hilferty's approximation of the quantile
    spread = 2 / (9 * freedom)
    return value, freedom * (1 - spread + NORMAL_QUANTILE * spread**0.5) ** 3


def agrees(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    value, bound = chi_square(counts, probabilities)
    return value < bound
