"""The sampler: noise by seed and position, filters, and the distribution it draws from."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dsv3.sampler import Sampler

LOGITS = mx.array([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]])


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    keep = expected > 0
    assert counts[~keep].sum() == 0
    return float(((counts[keep] - expected[keep]) ** 2 / expected[keep]).sum())


def draw(sampler_options: dict, num_seeds: int, position: int) -> np.ndarray:
    tokens = [Sampler(seed=seed, **sampler_options)(LOGITS, position) for seed in range(num_seeds)]
    return np.bincount(np.array(mx.concatenate(tokens)), minlength=LOGITS.size)


def test_greedy_is_argmax():
    assert Sampler()(LOGITS, 7).item() == 0


def test_a_row_gets_the_noise_of_its_position():
    """Guards coupled drafts: rows verified together must equal rows sampled one by one."""
    sampler = Sampler(temp=1.0, seed=3)
    logits = mx.random.normal((5, 50), key=mx.random.key(0))
    together = sampler(logits, 10)
    alone = [sampler(logits[i : i + 1], 10 + i).item() for i in range(5)]
    assert together.tolist() == alone
    assert len(set(sampler(mx.zeros((20, 50)), 0).tolist())) > 5  # positions differ


@pytest.mark.parametrize(
    "options",
    [
        {"temp": 1.0},
        {"temp": 0.6},
        {"temp": 1.0, "top_k": 3},
        {"temp": 0.8, "top_p": 0.8},
        {"temp": 1.2, "min_p": 0.2},
    ],
)
@pytest.mark.parametrize("position", [0, 1])
def test_distribution_is_the_filtered_softmax(options, position):
    """20.5 is the 0.999 quantile of chi-square with 5 degrees of freedom."""
    num_seeds = 3000
    counts = draw(options, num_seeds, position)
    logprobs = LOGITS - mx.logsumexp(LOGITS)
    filtered = Sampler(**options).filtered(logprobs) / options["temp"]
    expected = np.array(mx.softmax(filtered, axis=-1))[0] * num_seeds
    assert chi_square(counts, expected) < 20.5


def test_the_distribution_test_can_fail():
    counts = draw({"temp": 1.0}, 3000, 0)
    wrong = np.array(mx.softmax(LOGITS / 1.3, axis=-1))[0] * 3000
    assert chi_square(counts, wrong) > 20.5
