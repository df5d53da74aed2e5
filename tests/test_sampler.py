"""The sampler: noise by seed and position, filters, penalties, and what it draws from."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from chi_square import agrees, chi_square, distribution
from mlx_lm.sample_utils import make_logits_processors

from mlx_dsv3.decoding.sampler import Sampler, gumbel

LOGITS = mx.array([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]])
NUM_SEEDS = 20_000
SETTINGS = {
    "temperature": {"temp": 1.0},
    "cool": {"temp": 0.6},
    "hot": {"temp": 3.0},
    "top_k": {"temp": 1.0, "top_k": 3},
    "top_p": {"temp": 0.8, "top_p": 0.8},
    "min_p": {"temp": 1.2, "min_p": 0.2},
    "all": {"temp": 0.9, "top_p": 0.95, "top_k": 4, "min_p": 0.05},
}


def noise_of_seeds(num_seeds: int, position: int, size: int) -> mx.array:
    """Return the noise (num_seeds, size) that samplers of seeds 0, 1, ... have at a position."""
    keys = [[seed, position] for seed in range(num_seeds)]
    return mx.vmap(partial(gumbel, size))(mx.array(keys, mx.uint32))


def draw(options: dict, position: int, ids=None, logits=LOGITS) -> np.ndarray:
    """Return how often each token is drawn by 20,000 seeds, all at once."""
    sampler = Sampler(**options)
    sampler.noise = lambda position, rows, size: noise_of_seeds(NUM_SEEDS, position, size)
    return np.bincount(np.array(sampler(logits, position, ids)), minlength=logits.size)


def test_noise_of_many_seeds_is_that_of_each():
    """Guards the tests below, which draw for all seeds at once."""
    many = noise_of_seeds(50, 7, 6)
    for seed in (0, 1, 49):
        assert mx.array_equal(many[seed : seed + 1], Sampler(seed=seed).noise(7, 1, 6))


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


@pytest.mark.parametrize("seed", [-1, 2**32 + 5, 2**40])
def test_any_integer_is_a_seed(seed):
    assert 0 <= Sampler(temp=1.0, seed=seed)(LOGITS, 3).item() < LOGITS.size


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("position", [0, 1])
def test_distribution(options, position):
    counts = draw(options, position)
    assert counts.sum() == NUM_SEEDS
    assert agrees(counts, distribution(LOGITS[0], **options))


@pytest.mark.parametrize("position", [0, 1])
def test_distribution_with_penalties(position):
    """The penalty sees the ids before the row: 0 and 3 were said, the others not."""
    penalties = make_logits_processors(repetition_penalty=1.5)
    counts = draw({"temp": 1.0, "penalties": penalties}, position, lambda: mx.array([0, 3, 0]))
    logits = np.array(LOGITS[0]).copy()
    assert not agrees(counts, distribution(logits, 1.0))
    logits[0] /= 1.5
    assert agrees(counts, distribution(logits, 1.0))


def test_positions_are_independent():
    """Two positions of one seed: the joint counts are the product of the distributions."""
    p, size = distribution(LOGITS[0], 1.0), LOGITS.size
    noise = [noise_of_seeds(NUM_SEEDS, position, size) for position in (5, 6)]
    first, second = (np.array(mx.argmax(LOGITS + n, axis=-1)) for n in noise)
    joint = np.bincount(first * size + second, minlength=size * size)
    assert agrees(joint, np.outer(p, p))


@pytest.mark.parametrize("temp", [0.95, 1.05])
def test_the_distribution_test_can_fail(temp):
    """5 % of temperature are noticed."""
    value, bound = chi_square(draw({"temp": 1.0}, 0), distribution(LOGITS[0], temp))
    assert value > bound


def test_penalties_see_the_rows_before():
    """Row i is penalised for the ids up to its own input, not for those of later rows."""
    penalties = make_logits_processors(presence_penalty=10.0, presence_context_size=3)
    sampler, ids = Sampler(penalties=penalties), mx.array([5, 0, 1])
    logits = mx.repeat(LOGITS, 2, axis=0)  # rows after 0 and after 1: both would choose 0
    penalized = sampler.penalized(logits, ids)
    assert (penalized - logits).tolist() == [[-10, 0, 0, 0, 0, -10], [-10, -10, 0, 0, 0, -10]]
    assert sampler(logits, 1, lambda: ids).tolist() == [1, 2]
    assert logits.tolist() == [LOGITS[0].tolist()] * 2  # mlx-lm's processors write in place
