"""Measures of a difference, and the bounds of recipes."""

import mlx.core as mx
import numpy as np
import pytest

from convert.recipe import RECIPES, Recipe, from_dict
from mlx_dsv3.errors import UserError
from mlx_dsv3.parity import bounds
from mlx_dsv3.parity.differences import Stage, TokenDifferences, divergence


def normal(*shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_measures_see_what_they_are_for():
    """A row, a channel, a NaN, and a row that a router sent elsewhere."""
    expected, alike = normal(8, 32), np.ones(8, bool)

    def measure(actual, alike=alike):
        stage = Stage("x")
        stage.add(mx.array(actual), mx.array(expected), alike)
        return stage

    same = measure(expected)
    assert same.error == same.worst == same.channel == 0 and same.cosine == pytest.approx(1)
    row = expected.copy()
    row[3] *= 2
    assert measure(row).worst == pytest.approx(1) and measure(row).error == pytest.approx(1 / 8)
    elsewhere = measure(row, alike & (np.arange(8) != 3))
    assert elsewhere.worst == elsewhere.channel == 0 and elsewhere.error == pytest.approx(1 / 8)
    channel = expected.copy()
    channel[:, 5] *= 1.5
    assert measure(channel).channel > 0.3 > 3 * measure(channel).error
    row[3, 0] = np.nan
    assert measure(row).error == measure(row).worst == np.inf


def test_infinities_are_differences():
    """What a file may hold: numpy warned of `inf / inf` and of a perplexity beyond float64."""
    states = normal(8, 32)
    states[3, 5] = np.inf
    stage = Stage("x")
    stage.add(mx.array(normal(8, 32)), mx.array(states), np.ones(8, bool))
    assert stage.error == stage.worst == stage.channel == np.inf
    assert TokenDifferences(losses=[1.0], golden_losses=[1e30]).perplexities[1] == np.inf


def test_divergence_is_the_whole_one():
    """20 tokens and the rest: at most the full KL, and nearly it where the rest is small."""
    logits, other = 4 * normal(16, 200), 4 * normal(16, 200) + 0.5 * normal(16, 200, seed=1)
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (logits.astype(float), other))
    full = (np.exp(p) * (p - q)).sum(-1)
    top = np.argsort(-p, -1)[:, :20]
    found = divergence(np.take_along_axis(p, top, -1), np.take_along_axis(q, top, -1))
    assert (found <= full + 1e-9).all() and found == pytest.approx(full, rel=0.5)
    assert divergence(p[:, :20], p[:, :20]) == pytest.approx(np.zeros(16), abs=1e-9)


def test_ties_do_not_count_outside_ties():
    """Another expert where two score alike is no difference; where one is clearly ahead, it is."""
    stage = Stage("x")
    golden, ours = mx.array([[1, 2], [1, 2]]), mx.array([[1, 2], [1, 3]])
    stage.route(ours, golden, mx.array([0.5, 1e-5]))
    assert stage.agreement() == 0.75 and stage.agreement(1e-3) == 1.0
    stage.route(ours, golden, mx.array([0.5, 0.5]))
    assert stage.agreement(1e-3) == pytest.approx(5 / 6)
    text = TokenDifferences(is_same=[True, False, False], gaps=[2.0, 0.1, 1.0])
    assert text.top1_outside(0.5) == 0.5


def manifest(name: str, recipe: Recipe, layout: str = "records") -> dict:
    return {"layout": layout, "recipe": recipe.as_dict() | {"name": name}}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_known_by_its_content(name):
    """A recipe file called q2.json, of 8 bits, was judged by the bounds of q2.

    Fitted levels err less than those of `extremes`, and have their bounds.
    """
    for given in (name, "q2", "mine", ""):
        found = bounds.recipe_of(manifest(given, RECIPES[name]), {})
        assert found == name.replace("-fit", "-mixed")


def test_bounds_of_other_recipes():
    """The fewest bits decide; where nothing is near, the user chooses."""

    def row(**roles) -> str:
        return bounds.recipe_of(manifest("mine", from_dict({"default": 8} | roles, "here")), {})

    assert row() == "q8"
    assert row(experts_down=4) == "q4-mixed"
    assert row(experts_down=2, experts_gate_up=3, head=None) == "q2-mixed"
    assert row(attention=4) == row(experts_down=6, mtp=4) == "q4"
    assert row(experts_down=6) == "q6"
    assert row(experts_down={"bits": 4, "mode": "mxfp4"}) == "mxfp4"
    with pytest.raises(UserError, match="no bounds for quantisation `q5`"):
        row(experts_down=5)


def test_bounds_of_folders_converted_elsewhere():
    """mlx-community folders have no conversion.json: their bits decide, never the folder's name."""

    def row(default: object, **paths) -> str:
        return bounds.recipe_of(None, {"quantization": default and default | paths})

    assert row(None) == "bf16" == bounds.recipe_of(None, {})
    assert row({"bits": 8, "group_size": 64}) == "q8"
    assert row({"bits": 6, "group_size": 64}, lm_head={"bits": 4}, gate=False) == "q4"
    assert row({"bits": 4, "group_size": 32, "mode": "mxfp4"}) == "mxfp4"
    sidecar = manifest("q4", RECIPES["q4"], "mtp")  # `convert mtp` beside another's conversion
    assert bounds.recipe_of(sidecar, {"quantization": {"bits": 8}}) == "q8"
    for strange in ({"bits": 5}, {"bits": "8"}, {"bits": 8.0}, {"group_size": 64}, {"bits": [8]}):
        with pytest.raises(UserError, match="no bounds for quantisation"):
            row(strange)


def test_every_recipe_has_bounds():
    assert {name.replace("-fit", "-mixed") for name in RECIPES} == set(bounds.RECIPES)
