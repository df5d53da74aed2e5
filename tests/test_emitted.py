"""What `decode` emits is distributed as the sampler says, drafts or not; a wrong rule is noticed.

The model is a `Model` without layers, the MTP module a table: both choose by the last token alone,
so the exact joint distribution of the first two tokens is known. Every seed is decoded for itself,
through draft, verification and acceptance.
"""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from chi_square import agrees, distribution
from test_sampler import SETTINGS

from mlx_dsv3.config import ModelArgs
from mlx_dsv3.decoding.draft_control import DraftControl
from mlx_dsv3.decoding.draft_stats import DraftStats
from mlx_dsv3.decoding.sampler import Sampler, repetition_penalties
from mlx_dsv3.decoding.state import State
from mlx_dsv3.decoding.steps import Stepper, decode
from mlx_dsv3.model.cache import LatentCache
from mlx_dsv3.model.decoder import Model

SIZE, FIRST, LAST = 6, 0, 2  # the prompt is FIRST and LAST
PENALISED = {"penalised": {"temp": 1.0, "penalty": 2.0}}
PENALISED |= {"penalised, all": SETTINGS["all"] | {"penalty": 1.5}}
FEW, MANY = 2_000, 20_000  # seeds in `make test` and in the slow lane


class Table(nn.Module):
    """Drafts by the last token alone, from another table than the model's."""

    def __init__(self, model: Model):
        super().__init__()
        weight = model.model.embed_tokens.weight
        self.embed = nn.Embedding(*weight.shape)
        self.embed.weight = weight + 0.5 * mx.random.normal(weight.shape)

    def states(self, g: mx.array, next_ids: mx.array, cache: LatentCache, last=None) -> mx.array:
        cache.append(mx.zeros((*next_ids.shape, 1)))
        return self.embed(next_ids[:, -1:])


@pytest.fixture
def models() -> tuple[Model, Table]:
    args = ModelArgs.from_dict(tiny.A | {"vocab_size": SIZE, "hidden_size": 8})
    model = Model(replace(args, num_hidden_layers=0))
    model.model.embed_tokens.weight = mx.random.normal((SIZE, 8))
    model.lm_head.weight = mx.random.normal((SIZE, 8))
    table = Table(model)
    mx.eval(model.parameters(), table.parameters())
    return model, table


def joint_counts(models, options: dict, drafts: int, seeds: int) -> tuple[np.ndarray, list]:
    """Return counts (SIZE, SIZE) of the first two tokens, and acceptance by position."""
    model, table = models
    g, counts, stats = model.hidden(mx.array([[FIRST]])), np.zeros((SIZE, SIZE)), DraftStats()
    options = dict(options)
    options["penalties"] = repetition_penalties(options.pop("penalty", None))
    for seed in range(seeds):
        state = State([], LatentCache())
        state.commit([FIRST], g)
        stepper = Stepper(model, table, state, Sampler(seed=seed, **options))
        first, second, *_ = decode(stepper, LAST, drafts + 1, DraftControl(fixed=drafts), stats)
        counts[first, second] += 1
    return counts, stats.acceptance


def joint_distribution(models, options: dict, forgets: bool = False) -> np.ndarray:
    """Return the exact distribution; `forgets` is the mistake of penalties not seeing the draft."""
    logits = np.array(models[0](mx.arange(SIZE)[None])[0], np.float64)
    options = dict(options)
    penalty = options.pop("penalty", 1.0)

    def after(last: int, said: set[int]) -> np.ndarray:
        row = logits[last].copy()
        for token in said:
            row[token] *= 1 / penalty if row[token] > 0 else penalty
        return distribution(row, **options)

    first = after(LAST, {FIRST, LAST})
    rows = [after(token, {FIRST, LAST} | (set() if forgets else {token})) for token in range(SIZE)]
    return first[:, None] * np.stack(rows)


def assert_right(models, options: dict, drafts: int, seeds: int) -> None:
    counts, acceptance = joint_counts(models, options, drafts, seeds)
    expected = joint_distribution(models, options)
    assert agrees(counts, expected)
    assert agrees(counts.sum(1), expected.sum(1)) and agrees(counts.sum(0), expected.sum(0))
    assert all(0.05 < share < 0.95 for share in acceptance)


@pytest.mark.parametrize("name", ["temperature", "all"])
def test_emitted_tokens(models, name):
    """First and second position, jointly: the second is verified in one pass with the first."""
    assert_right(models, SETTINGS[name], 1, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [1, 2])
@pytest.mark.parametrize("name", SETTINGS | PENALISED)
def test_emitted_tokens_of_every_setting(models, name, drafts):
    assert_right(models, (SETTINGS | PENALISED)[name], drafts, MANY)


@pytest.mark.parametrize("options", PENALISED.values(), ids=PENALISED)
def test_emitted_tokens_under_a_penalty(models, options):
    """The second token is penalised for the first, though both come out of one pass."""
    counts, _ = joint_counts(models, options, 1, FEW)
    assert agrees(counts, joint_distribution(models, options))
    assert not agrees(counts, joint_distribution(models, options, forgets=True))
    assert not agrees(counts, joint_distribution(models, options | {"penalty": 1.0}))


def accept_all(self, last: int, count: int) -> tuple[list[int], int]:
    """Emit the drafts unverified: the MTP module's distribution."""
    drafts = self.draft(mx.array([last], mx.int32), count)
    fed = mx.concatenate([mx.array([last], mx.int32), drafts])
    g = self.model.hidden(fed[None], self.state.cache)
    tokens = [*drafts.tolist(), self.choose(g, fed)[-1].item()]
    self.state.commit([last, *tokens[:-1]], g, paired=True)
    return tokens, count


def draw_again(self, last: int, count: int) -> tuple[list[int], int]:
    """After a rejection, draw with other noise instead of emitting what rejected the draft."""
    tokens, accepted = right_speculate(self, last, count)
    if accepted < count:
        row = len(tokens) - 1
        other = Sampler(temp=self.sampler.temp, seed=self.sampler.seed + 1_000_000)
        fed = mx.array([[last, *tokens][row]])
        tokens[row] = other(self.model(fed[None])[0], len(self.state.ids)).item()
    return tokens, accepted


right_speculate = Stepper.speculate


@pytest.mark.parametrize("rule", [accept_all, draw_again])
def test_a_wrong_rule_is_rejected(models, monkeypatch, rule):
    monkeypatch.setattr(Stepper, "speculate", rule)
    options = SETTINGS["temperature"]
    counts, _ = joint_counts(models, options, 1, 2 * FEW)
    expected = joint_distribution(models, options)
    assert not agrees(counts, expected) and not agrees(counts.sum(1), expected.sum(1))
