"""config.json in every spelling that occurs, and the refusals by name and value."""

import json
from dataclasses import MISSING, fields

import pytest
import tiny

from mlx_dsv3.config import ModelArgs, read_config
from mlx_dsv3.errors import UserError
from mlx_dsv3.json_files import read_json
from mlx_dsv3.reference import model as reference

YARN = tiny.YARN
NEW_ROPE = {key: value for key, value in YARN.items() if key != "type"} | {
    "rope_type": "yarn",
    "rope_theta": 50000.0,
}

Q4 = {"bits": 4, "group_size": 64}
REQUIRED = [field.name for field in fields(ModelArgs) if field.default is MISSING]


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


def test_scaling_goes_before_parameters():
    """transformers reads `rope_scaling` where both are given, and the theta within either."""
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
    args = ModelArgs.from_dict(tiny.A | both)
    assert args.is_yarn and args.rope_theta == 10000.0
    within = {"rope_scaling": YARN | {"rope_theta": 5e4}}
    assert ModelArgs.from_dict(tiny.A | within).rope_theta == 5e4


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


def test_absent_fields():
    """mlx-lm's defaults (one group, no dense layer, a scale of 1) are another model's.

    Those of the model's own code, which test_rope_variants compares with transformers'.
    """
    dimensions = {name: tiny.A[name] for name in REQUIRED}
    for read in ModelArgs.from_dict, reference.Args.from_dict:
        args = read(dimensions)
        assert (args.n_group, args.topk_group, args.first_k_dense_replace) == (8, 4, 3)
        assert (args.routed_scaling_factor, args.norm_topk_prob) == (2.5, True)
        assert (args.q_lora_rank, args.n_shared_experts, args.moe_layer_freq) == (1536, 1, 1)
        assert (args.rms_norm_eps, args.rope_theta, args.rope_scaling) == (1e-6, 1e4, None)
        assert (args.rope_interleave, args.num_nextn_predict_layers) == (True, 0)
        nulls = read(dimensions | {"q_lora_rank": None, "n_shared_experts": None})
        assert nulls.q_lora_rank is nulls.n_shared_experts is None
    assert ModelArgs.from_dict(dimensions).max_position_embeddings == 4096


# What hub configs of the family say beside the dimensions: none of it may be refused.
V3 = {
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "seq_aux": True,
    "use_cache": True,
    "quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0"},
}
RELATIVES = {
    "V3": V3,
    "Kimi-K2": V3
    | {
        "model_type": "kimi_k2",
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
        "rope_scaling": YARN | {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},
    },
    "Moonlight": V3 | {"q_lora_rank": None, "rope_scaling": None, "rope_theta": 50000},
    "GigaChat3": {
        "q_lora_rank": None,
        "routed_scaling_factor": 1,
        "rope_theta": 100000,
        "rope_scaling": YARN | {"factor": 64, "rope_type": "yarn"},
        "head_dim": 64,
    },
    "transformers 5": {
        "rope_scaling": None,
        "rope_parameters": NEW_ROPE | {"type": "yarn", "partial_rotary_factor": 1.0},
        "rope_interleave": True,
        "head_dim": 16,
        "qk_head_dim": 32,
        "num_mtp_layers": 1,
        "output_router_logits": False,
        "pad_token_id": None,
        "dtype": "bfloat16",
    },
}


@pytest.mark.parametrize("name", RELATIVES)
def test_no_relative_is_refused(name):
    """A check that knows fewer keys than the hub's configs have would lock a model out."""
    assert ModelArgs.from_dict(tiny.A | RELATIVES[name])
    assert reference.Args.from_dict(tiny.A | RELATIVES[name])


def test_float_fields_are_floats_and_written_as_floats():
    """GigaChat3's `"routed_scaling_factor": 1` converted, and transformers refused the result."""
    config = tiny.A | {"routed_scaling_factor": 1, "rope_theta": 100000, "eos_token_id": 7}
    written = ModelArgs.from_dict(config).fill(config)
    floats = [written[name] for name in ("routed_scaling_factor", "rope_theta", "rms_norm_eps")]
    floats += [value for key, value in written["rope_scaling"].items() if "type" != key]
    floats.remove(4096)
    assert all(isinstance(value, float) for value in floats) and len(floats) == 8
    assert written["eos_token_id"] == 7 and type(written["num_hidden_layers"]) is int
    assert ModelArgs.from_dict(written).fill(written) == written


def test_written_config_says_what_others_would_guess():
    """mlx-lm has other defaults, and reads no `rope_parameters`: a converted V3 lost its yarn."""
    new = without(tiny.A, "rope_scaling", "rope_theta", "n_group", "num_nextn_predict_layers")
    new |= {"rope_parameters": NEW_ROPE, "num_mtp_layers": 1, "topk_group": 4}
    written = ModelArgs.from_dict(new).fill(new)
    assert written["rope_scaling"] == YARN and written["rope_theta"] == 50000.0
    assert written["n_group"] == 8 and written["num_nextn_predict_layers"] == 1
    assert not {"rope_parameters", "num_mtp_layers"} & written.keys()


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
    "gates of Instella": ({"gated_attention": True}, "`gated_attention` = `True`"),
    "indexer": ({"index_topk": 2048}, "`index_topk` = `2048`; it is not implemented"),
    "biased experts": ({"mlp_bias": True}, "`mlp_bias` = `True`"),
    "partial rope": ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor` = `0.5`"),
    "partial rope within": (
        {"rope_scaling": YARN | {"partial_rotary_factor": 0.5}},
        "`rope_scaling.partial_rotary_factor` = `0.5`; `1` is the only value implemented",
    ),
    "unknown rope key": (
        {"rope_scaling": YARN | {"attn_factor": 2.0}},
        "`rope_scaling.attn_factor` = `2.0`; it is not implemented",
    ),
    "unknown rope parameter": (
        {"rope_scaling": None, "rope_parameters": NEW_ROPE | {"llama_4_scaling_beta": 0.1}},
        "`rope_parameters.llama_4_scaling_beta` = `0.1`; it is not implemented",
    ),
    "rope is a word": ({"rope_scaling": "yarn"}, "`rope_scaling` = `yarn`; an object is needed"),
    "factor is a word": (
        {"rope_scaling": YARN | {"factor": "40"}},
        "`rope_scaling.factor` = `40`; a number is needed",
    ),
    # transformers takes a null for false here, and for true where the key is absent
    "null truncate": (
        {"rope_scaling": YARN | {"truncate": None}},
        "`rope_scaling.truncate` = `None`; true or false is needed",
    ),
    "null interleave": (
        {"rope_interleave": None},
        "`rope_interleave` = `None`; true or false is needed",
    ),
    "float layers": ({"num_hidden_layers": 4.0}, "`num_hidden_layers` = `4.0`; an integer"),
    "bool layers": ({"num_hidden_layers": True}, "`num_hidden_layers` = `True`; an integer"),
    "list of layers": ({"moe_layer_freq": [0, 1]}, "`moe_layer_freq` = `[0, 1]`; an integer"),
    "bool scale": ({"routed_scaling_factor": True}, "`routed_scaling_factor` = `True`; a number"),
    "null scale": ({"routed_scaling_factor": None}, "`routed_scaling_factor` = `None`; a number"),
    "no number": ({"rms_norm_eps": float("nan")}, "`rms_norm_eps` = `nan`; a number is needed"),
    "huge": ({"rope_theta": 10**99}, "...`; it takes 1.001 to 1,000,000,000,000"),
    "infinite": ({"rope_theta": float("inf")}, "`rope_theta` = `inf`; it takes 1.001 to"),
    "scalar rope": (
        {"rope_scaling": None, "rope_parameters": 0},
        "`rope_parameters` = `0`; an object is needed",
    ),
    "list of ropes": ({"rope_scaling": []}, "`rope_scaling` = `[]`; an object is needed"),
    "half a pair": ({"qk_rope_head_dim": 3}, "`qk_rope_head_dim` = `3`; rope turns pairs"),
    "token beyond": ({"bos_token_id": 10**6}, "`bos_token_id` = `1000000`; a token"),
    "token that is a list": ({"eos_token_id": [[1]]}, "`eos_token_id` = `[[1]]`; a token"),
    "a page for a value": ({"hidden_act": "x" * 9999}, "x...`; `silu` is the only value"),
    "word for a bool": ({"norm_topk_prob": "false"}, "`norm_topk_prob` = `false`; true or false"),
    "linear rope": ({"rope_scaling": {"type": "linear", "factor": 2}}, "`linear`"),
    "yarn without factor": ({"rope_scaling": without(YARN, "factor")}, "`rope_scaling.factor`"),
    "no rank": ({"kv_lora_rank": None}, "lacks `kv_lora_rank`"),
}


OUT_OF_RANGE = {
    **dict.fromkeys(["num_hidden_layers", "n_routed_experts"], (0, -1, 3_000_000, 10**12)),
    **dict.fromkeys(["vocab_size", "hidden_size", "moe_intermediate_size"], (0, -1, 10**12)),
    **dict.fromkeys(["num_attention_heads", "kv_lora_rank", "q_lora_rank"], (0, -1, 10**12)),
    **dict.fromkeys(["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"], (0, -1, 10**12)),
    **dict.fromkeys(["n_group", "moe_layer_freq", "num_experts_per_tok"], (0, -1, 10**12)),
    **dict.fromkeys(["first_k_dense_replace", "num_nextn_predict_layers"], (-1, 10**12)),
    **dict.fromkeys(["n_shared_experts", "max_position_embeddings"], (-1, 10**12)),
    **dict.fromkeys(["routed_scaling_factor", "rms_norm_eps"], (0, -1.0, float("inf"), 1e30)),
    **dict.fromkeys(["rope_theta"], (0, 1, -1.0, float("inf"), 1e30)),
}
YARN_OUT_OF_RANGE = {
    "factor": (0, 0.5, 1e30),
    "original_max_position_embeddings": (0, 10**12),
    "beta_fast": (0, -1, 1e-300, float("inf")),
    "beta_slow": (0, -1, 1e-300, float("inf")),
    "mscale": (-1, 1e30),
    "mscale_all_dim": (-1, 1e30),
    "attention_factor": (0, -1, 1e30),
}


@pytest.mark.parametrize("field", OUT_OF_RANGE)
def test_numbers_out_of_range(field):
    """Zeros divided, and millions of layers took all memory of the machine."""
    for value in OUT_OF_RANGE[field]:
        with pytest.raises(UserError) as error:
            ModelArgs.from_dict(tiny.A | {field: value})
        assert error.value.message.startswith(f"config.json has `{field}` = `{value}`; it takes ")


@pytest.mark.parametrize("key", YARN_OUT_OF_RANGE)
def test_numbers_of_yarn_out_of_range(key):
    for value in YARN_OUT_OF_RANGE[key]:
        with pytest.raises(UserError) as error:
            ModelArgs.from_dict(tiny.A | {"rope_scaling": YARN | {key: value}})
        name = f"`rope_scaling.{key}` = `{value}`; it takes "
        assert error.value.message.startswith(f"config.json has {name}")


ARITHMETIC = ("softmax gate", "greedy gate", "activation", "attention bias", "tied head")
ARITHMETIC += ("gates of Instella", "indexer", "biased experts", "partial rope", "linear rope")
ARITHMETIC += ("partial rope within", "unknown rope key", "unknown rope parameter")


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_field_and_value(case):
    """What would be computed wrongly must stop before a weight is read, and say what it was."""
    change, words = REFUSED[case]
    with pytest.raises(UserError) as error:
        ModelArgs.from_dict(tiny.A | change)
    assert words in error.value.message
    assert error.value.hint and "\n" not in error.value.message


@pytest.mark.parametrize("case", ARITHMETIC)
def test_reference_refuses_unknown_arithmetic_too(case):
    """A setting that both sides ignore alike passes every parity test."""
    change, words = REFUSED[case]
    with pytest.raises(UserError) as error:
        reference.Args.from_dict(tiny.A | change)
    assert words.split(";")[0] in error.value.message


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
    with pytest.raises(UserError, match="config.json` is not text in UTF-8"):
        read_config(tmp_path)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match="holds a list, not an object"):
        read_json(tmp_path / "list.json")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json"):
        read_config(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        read_config(tmp_path / "absent")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"quantization_config": 1}, "`quantization_config` = `1`; an object is needed"),
        ({"quantization": "q4"}, "`quantization` = `q4`; an object is needed"),
        ({"quantization": {}}, "`quantization.bits` = `None`; it takes 1 to 1,024"),
        ({"quantization": {"bits": 4.0, "group_size": 64}}, "`quantization.bits` = `4.0`"),
        ({"quantization": {"bits": 4, "group_size": 0}}, "`quantization.group_size` = `0`"),
        ({"quantization": Q4 | {"mode": ["affine"]}}, "`quantization.mode` = `['affine']`"),
        ({"quantization": Q4 | {"a.b": {"bits": 4}}}, "`quantization.a.b.group_size` = `None`"),
        ({"tokenizer_class": ["x"]}, "`tokenizer_class` = `['x']`; a name is needed"),
    ],
)
def test_other_shapes_in_a_config_file(tmp_path, change, words):
    """`quantization_config: 1` was a traceback, and every program reads the block somewhere."""
    (tmp_path / "config.json").write_text(json.dumps(tiny.A | {"quantization": None}))
    assert read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny.A | change))
    with pytest.raises(UserError) as error:
        read_config(tmp_path)
    assert words in error.value.message and error.value.hint


def test_a_quantization_with_modules_passes(tmp_path):
    """mlx-lm notes false for a module that is not packed."""
    modules = {"lm_head": Q4 | {"mode": "affine"}, "model.norm": False}
    (tmp_path / "config.json").write_text(json.dumps(tiny.A | {"quantization": Q4 | modules}))
    assert read_config(tmp_path)


def test_null_groups_and_words_that_are_no_numbers():
    """`n_group: null` means one group; `"8"` would compare and multiply as text."""
    assert ModelArgs.from_dict(tiny.A | {"n_group": None, "topk_group": None}).n_group == 1
    with pytest.raises(UserError, match="`num_hidden_layers` = `four`; an integer is needed"):
        ModelArgs.from_dict(tiny.A | {"num_hidden_layers": "four"})
    scaling = {key: value for key, value in tiny.YARN.items() if key != "type"}
    with pytest.raises(UserError, match="lacks `rope_scaling.type`"):
        ModelArgs.from_dict(tiny.A | {"rope_scaling": scaling})
