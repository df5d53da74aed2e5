"""Recipes: names, flags, JSON files, and what they refuse."""

import json

import pytest

from convert.recipe import RECIPES, ROLES, choose, from_dict
from mlx_dsv3.checkpoint.format import Quantization
from mlx_dsv3.errors import UserError


def test_default_is_uniform_q4_with_mtp_at_8_bits():
    """A 4-bit MTP head is reported to accept hardly any of its drafts."""
    recipe = choose(None, None, None, None)
    assert recipe.name == "q4"
    assert {recipe.by_role[role] for role in ROLES[:-1]} == {Quantization(4)}
    assert recipe.by_role["mtp"] == Quantization(8)


def test_unquantised_recipes_quantise_nothing():
    for name, dtype in (("bf16", "BF16"), ("float32", "F32")):
        recipe = RECIPES[name]
        assert recipe.dtype == dtype and recipe.default is None
        assert recipe.quantization("mtp", 64) is None


def test_mixed_recipes_keep_everything_but_experts_at_8_bits():
    recipe = RECIPES["q3-mixed"]
    assert recipe.quantization("experts_down", 128) == Quantization(3)
    assert recipe.quantization("attention", 128) == Quantization(8)
    assert recipe.default == Quantization(3)


def test_a_width_that_the_group_does_not_divide_stays_unquantised():
    assert RECIPES["q4"].quantization("dense", 96) is None
    assert RECIPES["mxfp4"].quantization("dense", 96) == Quantization(4, 32, "mxfp4")


def test_flags_that_equal_a_named_recipe_take_its_name():
    """So that `--q-bits 4` resumes what `--recipe q4` began."""
    assert choose(None, 4, None, None) == RECIPES["q4"]
    assert choose(None, None, None, "mxfp4") == RECIPES["mxfp4"]
    assert choose(None, 5, 32, None).name == "q5-g32-affine"


def test_json_recipe(tmp_path):
    """`default` covers the roles that are not named, except the MTP module."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"default": 4, "experts_down": {"bits": 6}, "head": None}))
    recipe = choose(str(path), None, None, None)
    assert recipe.by_role["experts_down"] == Quantization(6)
    assert recipe.by_role["embedding"] == Quantization(4)
    assert recipe.by_role["head"] is None
    assert recipe.by_role["mtp"] == Quantization(8)
    assert from_dict(recipe.as_dict(), "itself") == recipe and recipe.name == "mine"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_conversion_json(name):
    """`verify --source` derives again from the recipe as it stands in conversion.json."""
    assert from_dict(json.loads(json.dumps(RECIPES[name].as_dict())), "a record") == RECIPES[name]


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"default": 4, "expert": 2}, "unknown role `expert`"),
        ({"experts_down": 4}, "nor `default`"),
        ({"default": 7}, "7 bits"),
        ({"default": {"bits": 4, "group_size": 48}}, "groups of 48"),
        ({"default": {"bits": 4, "mode": "awq"}}, "mode `awq`"),
        ({"default": "four"}, "`four`"),
        ({"default": 4, "dtype": "F16"}, "`F16`"),
    ],
)
def test_bad_json_recipes_are_refused(values, word):
    with pytest.raises(UserError, match=word):
        from_dict(values, "`mine.json`")


def test_bad_flags_are_refused():
    for flags in (("q4", 4, None, None), ("q5", None, None, None), (None, 4, 48, None)):
        with pytest.raises(UserError):
            choose(*flags)
