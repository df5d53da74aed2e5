"""config.json in every spelling that occurs, and the refusals by name and value."""

import json

import pytest
import tiny

from mlx_dsv3.config import ModelArgs, read_config, read_json
from mlx_dsv3.errors import UserError

YARN = tiny.YARN
NEW_ROPE = {key: value for key, value in YARN.items() if key != "type"} | {
    "rope_type": "yarn",
    "rope_theta": 50000.0,
}


def without(config: dict, *names: str) -> dict:
    return {key: value for key, value in config.items() if key not in names}


def test_hub_fields_arrive():
    """A field that is dropped takes its default in silence."""
    args = ModelArgs.from_dict(tiny.A)
    for name, value in tiny.A.items():
        if hasattr(args, name) and name != "rope_scaling":
            assert getattr(args, name) == value, name
    assert args.rope_scaling == YARN
    assert args.is_yarn and args.has_mtp


def test_both_rope_spellings_agree():
    """transformers 5 moves rope_theta and the scaling into rope_parameters and renames `type`."""
    old = ModelArgs.from_dict(tiny.A | {"rope_theta": 50000.0})
    new = ModelArgs.from_dict(
        without(tiny.A, "rope_theta", "rope_scaling") | {"rope_parameters": NEW_ROPE}
    )
    assert new.rope_theta == old.rope_theta == 50000.0
    names = ("type", "factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
    names += ("original_max_position_embeddings",)
    assert {n: new.rope_scaling[n] for n in names} == {n: old.rope_scaling[n] for n in names}
    renamed = without(YARN, "type") | {"rope_type": "yarn"}
    assert ModelArgs.from_dict(tiny.A | {"rope_scaling": renamed}).rope_scaling == YARN


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": None},
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ],
)
def test_no_scaling(rope):
    """`default` is transformers' word for none; treated as a scaling it would be refused."""
    args = ModelArgs.from_dict(without(tiny.A, "rope_scaling") | rope)
    assert args.rope_scaling is None and not args.is_yarn


def test_yarn_defaults_are_transformers():
    """Absent betas are 32 and 1; an absent mscale_all_dim leaves the softmax scale alone."""
    rope = without(YARN, "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    scaling = ModelArgs.from_dict(tiny.A | {"rope_scaling": rope}).rope_scaling
    assert (scaling["beta_fast"], scaling["beta_slow"]) == (32, 1)
    assert (scaling["mscale"], scaling["mscale_all_dim"]) == (1.0, 0.0)


def test_fields_that_transformers_leaves_out():
    """A config written by transformers 5 lacks these four; each has one meaning for deepseek_v3."""
    names = ("topk_method", "scoring_func", "moe_layer_freq", "ep_size")
    args = ModelArgs.from_dict(without(tiny.A, *names))
    assert args == ModelArgs.from_dict(tiny.A)


@pytest.mark.parametrize(
    "fields, depth",
    [
        ({"num_nextn_predict_layers": 1}, 1),
        ({"num_mtp_layers": 1}, 1),
        ({"num_nextn_predict_layers": 0}, 0),
        ({"num_nextn_predict_layers": None}, 0),
        ({}, 0),
    ],
)
def test_both_names_of_the_mtp_depth(fields, depth):
    """transformers 5 writes num_mtp_layers; a model without MTP has 0, null or nothing."""
    args = ModelArgs.from_dict(without(tiny.A, "num_nextn_predict_layers") | fields)
    assert args.num_nextn_predict_layers == depth and args.has_mtp == bool(depth)


def test_moe_layers():
    """Which layers have experts: the leading dense ones, the frequency, the MTP layer always."""
    args = ModelArgs.from_dict(tiny.A | {"first_k_dense_replace": 2, "num_hidden_layers": 6})
    assert [args.is_moe_layer(i) for i in range(7)] == [False, False, True, True, True, True, True]
    args.moe_layer_freq = 3
    assert [args.is_moe_layer(i) for i in range(7)] == [False] * 3 + [True, False, False, True]


REFUSED = {
    "model_type": ({"model_type": "deepseek_v2"}, "model_type `deepseek_v2`"),
    "sparse attention": ({"model_type": "deepseek_v32"}, "model_type `deepseek_v32`"),
    "no model_type": ({"model_type": None}, "model_type `None`"),
    "softmax gate": ({"scoring_func": "softmax"}, "`scoring_func` = `softmax`"),
    "greedy gate": ({"topk_method": "greedy"}, "`topk_method` = `greedy`"),
    "activation": ({"hidden_act": "gelu"}, "`hidden_act` = `gelu`"),
    "attention bias": ({"attention_bias": True}, "`attention_bias` = `True`"),
    "tied head": ({"tie_word_embeddings": True}, "`tie_word_embeddings` = `True`"),
    "uneven groups": ({"n_group": 3}, "`n_group` = `3`; does not divide 16 experts"),
    "groups of one": ({"n_group": 16, "topk_group": 8}, "`n_group` = `16`"),
    "no group kept": ({"topk_group": 0}, "`topk_group` = `0`"),
    "too many groups": ({"topk_group": 5}, "`topk_group` = `5`; n_group is 4"),
    "too few experts": ({"num_experts_per_tok": 9}, "`num_experts_per_tok` = `9`; groups keep 8"),
    "two MTP layers": ({"num_nextn_predict_layers": 2}, "`num_nextn_predict_layers` = `2`"),
    "linear rope": ({"rope_scaling": {"type": "linear", "factor": 2}}, "`linear`"),
    "yarn without factor": ({"rope_scaling": without(YARN, "factor")}, "`rope_scaling.factor`"),
    "no rank": ({"kv_lora_rank": None}, "lacks `kv_lora_rank`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_field_and_value(case):
    """What would be computed wrongly must stop before a weight is read, and say what it was."""
    change, words = REFUSED[case]
    with pytest.raises(UserError) as error:
        ModelArgs.from_dict(tiny.A | change)
    assert words in error.value.message
    assert error.value.hint and "\n" not in error.value.message


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "n_routed_experts", "v_head_dim"])
def test_missing_field(field):
    """A dimension without a value has no default."""
    with pytest.raises(UserError, match=f"lacks `{field}`"):
        ModelArgs.from_dict(without(tiny.A, field))


def test_kimi_k2_and_float_numbers():
    """Kimi-K2 has its own model_type and writes whole numbers as floats."""
    rope = YARN | {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0}
    args = ModelArgs.from_dict(tiny.A | {"model_type": "kimi_k2", "rope_scaling": rope})
    assert args.rope_scaling["factor"] == 32 and args.model_type == "kimi_k2"


def test_config_file(tmp_path):
    """A folder without a readable config.json: one sentence that names it, no traceback."""
    (tmp_path / "config.json").write_text(json.dumps(tiny.A))
    assert read_config(tmp_path) == tiny.A
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match="config.json` is not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match="config.json` is not JSON"):
        read_config(tmp_path)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match="holds a list, not an object"):
        read_json(tmp_path / "list.json")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json"):
        read_config(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        read_config(tmp_path / "absent")


def test_null_counts_as_absent_and_words_are_no_numbers():
    """`n_group: null` means one group; `"8"` would compare and multiply as text."""
    assert ModelArgs.from_dict(tiny.A | {"n_group": None, "topk_group": None}).n_group == 1
    with pytest.raises(UserError, match="`num_hidden_layers` = `four`; a number is needed"):
        ModelArgs.from_dict(tiny.A | {"num_hidden_layers": "four"})
    scaling = {key: value for key, value in tiny.YARN.items() if key != "type"}
    with pytest.raises(UserError, match="lacks `rope_scaling.type`"):
        ModelArgs.from_dict(tiny.A | {"rope_scaling": scaling})
