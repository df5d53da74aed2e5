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


def test_fitted_groups_shrink_to_what_divides_the_width():
    """The demo model's experts are 64 wide: half of them stayed in BF16 with groups of 128."""
    widths = {128: 128, 192: 64, 96: 32, 40: None}
    found = {w: RECIPES["q2-fit"].quantization("experts_down", w) for w in widths}
    assert found == {w: size and Quantization(2, size) for w, size in widths.items()}


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


BAD = {
    "unknown role": ({"default": 4, "expert": 2}, "unknown role `expert`"),
    "no default": ({"experts_down": 4}, "nor `default`"),
    "7 bits": ({"default": 7}, "gives `default` 7 as bits"),
    "0 bits": ({"default": 4, "embedding": 0}, "gives `embedding` 0 as bits"),
    "0 bits in an object": ({"default": {"bits": 0}}, "0 as bits"),
    "bits that are a float": ({"default": {"bits": 4.0}}, "`4.0` as bits"),
    "bits that are true": ({"default": 4, "mtp": True}, "gives `mtp` `true` as bits"),
    "bits that are null": ({"default": {"bits": None}}, "`null` as bits"),
    "bits that are text": ({"default": "4"}, '`"4"` as bits'),
    "bits that are a list": ({"default": [[[]]]}, "gives `default` a list as bits"),
    "bits without end": ({"default": 10**4000}, r"gives `default` 1000000\d+\.\.\. as bits"),
    "groups of 48": ({"default": {"bits": 4, "group_size": 48}}, "48 as group size"),
    "groups of 0": ({"default": {"bits": 4, "group_size": 0}}, "gives `default` 0 as group size"),
    "unknown mode": ({"default": {"bits": 4, "mode": "awq"}}, 'gives `default` `"awq"` as mode'),
    "mode that is a list": ({"default": {"mode": ["affine"]}}, "a list as mode"),
    "mode that is empty": ({"default": {"mode": ""}}, '`""` as mode'),
    "unknown key": ({"default": {"bits": 4, "group": 64}}, "gives `default` the unknown key `gr"),
    "unknown dtype": ({"default": 4, "dtype": "F16"}, 'has `"F16"` as its `dtype`'),
    "dtype that is a list": ({"default": 4, "dtype": ["BF16"]}, "has a list as its `dtype`"),
    "name that is a number": ({"default": 4, "name": 5}, "has 5 as its `name`"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_json_recipes_are_refused(case):
    """0 bits were 4 bits, for a default took the place of all that is false; 4.0 was a crash."""
    values, words = BAD[case]
    with pytest.raises(UserError, match=words) as error:
        from_dict(values, "`mine.json`")
    assert error.value.message.startswith("`mine.json` ") and error.value.hint


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("q4", 4, None, None), "excludes"),
        (("q4", 0, None, None), "excludes"),
        (("q5", None, None, None), "no recipe `q5`"),
        (("", None, None, None), "no recipe ``"),
        (("q4.json", None, None, None), "no recipe `q4.json`"),
        ((None, 4, 48, None), "the command line gives 48 as group size"),
        ((None, 0, None, None), "the command line gives 0 as bits"),
        ((None, None, 0, None), "the command line gives 0 as group size"),
        ((None, 4, None, "mxfp8"), "the command line gives 4 as bits"),
    ],
)
def test_bad_flags_are_refused(flags, words):
    """`--q-bits 0` converted to 4 bits without a word."""
    with pytest.raises(UserError, match=words):
        choose(*flags)


def test_a_file_that_equals_a_built_in_recipe_is_that_recipe(tmp_path):
    """Parity judges a folder by the bounds of its recipe's name: 8 bits were judged as 2."""
    path = tmp_path / "q2.json"
    for content, name in (({"default": 2}, "q2"), ({"default": 8}, "q8")):
        path.write_text(json.dumps(content))
        assert choose(str(path), None, None, None) == RECIPES[name]
    path.write_text(json.dumps({"default": 8, "head": None}))
    recipe = choose(str(path), None, None, None)
    assert recipe.name == "q2.json" and recipe.by_role["head"] is None
