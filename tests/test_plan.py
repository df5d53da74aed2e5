"""The plan: exact byte sums for the real models from headers alone, and the order in the files.

The headers are generated here from the table of spec 2.2, not from the converter's own list; the
data of the shards are holes in sparse files.
"""

import json
import struct
from math import ceil, prod

import pytest
from mlx_lm.models.deepseek_v3 import ModelArgs as DeepseekV3Args

from convert import report
from convert.__main__ import main
from convert.manifest import output_config
from convert.planner import build
from convert.recipe import RECIPES
from convert.source import open_folder
from tests.tiny import FP8_CONFIG, YARN, D, write_hub

V3 = D | {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
}
KIMI_K2 = V3 | {
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "num_attention_heads": 64,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "rope_scaling": YARN | {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},
    "num_nextn_predict_layers": 0,
}
MOONLIGHT = V3 | {
    "vocab_size": 163840,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "rope_scaling": None,
    "num_nextn_predict_layers": 0,
}
BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def hub_tensors(c: dict, fp8: bool):
    """Yield (name, dtype, shape) as spec 2.2 lists them, weights before their scales."""
    hidden, heads, latent = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    outer = [c["vocab_size"], hidden]
    last = c["num_hidden_layers"]

    def linear(name, rows, columns):
        yield name + ".weight", "F8_E4M3" if fp8 else "BF16", [rows, columns]
        if fp8:
            yield name + ".weight_scale_inv", "F32", [ceil(rows / 128), ceil(columns / 128)]

    def mlp(name, width):
        yield from linear(name + ".gate_proj", width, hidden)
        yield from linear(name + ".up_proj", width, hidden)
        yield from linear(name + ".down_proj", hidden, width)

    yield "model.embed_tokens.weight", "BF16", outer
    for layer in range(last + c["num_nextn_predict_layers"]):
        p = f"model.layers.{layer}."
        if layer == last:
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{p}{norm}.weight", "BF16", [hidden]
            yield p + "eh_proj.weight", "BF16", [hidden, 2 * hidden]
            yield p + "embed_tokens.weight", "BF16", outer
            yield p + "shared_head.head.weight", "BF16", outer
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{p}{norm}.weight", "BF16", [hidden]
        rank = c["q_lora_rank"]
        if rank:
            yield from linear(p + "self_attn.q_a_proj", rank, hidden)
            yield p + "self_attn.q_a_layernorm.weight", "BF16", [rank]
            yield from linear(p + "self_attn.q_b_proj", heads * (nope + rope), rank)
        else:
            yield from linear(p + "self_attn.q_proj", heads * (nope + rope), hidden)
        yield from linear(p + "self_attn.kv_a_proj_with_mqa", latent + rope, hidden)
        yield p + "self_attn.kv_a_layernorm.weight", "BF16", [latent]
        yield from linear(p + "self_attn.kv_b_proj", heads * (nope + value), latent)
        yield from linear(p + "self_attn.o_proj", hidden, heads * value)
        if layer < c["first_k_dense_replace"]:
            yield from mlp(p + "mlp", c["intermediate_size"])
            continue
        yield p + "mlp.gate.weight", "BF16", [c["n_routed_experts"], hidden]
        yield p + "mlp.gate.e_score_correction_bias", "F32", [c["n_routed_experts"]]
        yield from mlp(p + "mlp.shared_experts", c["moe_intermediate_size"] * c["n_shared_experts"])
        for expert in range(c["n_routed_experts"]):
            yield from mlp(f"{p}mlp.experts.{expert}", c["moe_intermediate_size"])
    yield "model.norm.weight", "BF16", [hidden]
    yield "lm_head.weight", "BF16", outer


def write_headers(folder, config: dict, num_shards: int, fp8: bool = True):
    """Write a checkpoint whose shards are true headers before holes."""
    folder.mkdir(exist_ok=True)
    tensors = list(hub_tensors(config, fp8))
    share, weight_map = ceil(len(tensors) / num_shards), {}
    for i in range(num_shards):
        header, place = {}, 0
        name = f"model-{i + 1:05d}-of-{num_shards:06d}.safetensors"
        for tensor, dtype, shape in tensors[i * share : (i + 1) * share]:
            end = place + prod(shape) * BYTES[dtype]
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [place, end]}
            weight_map[tensor], place = name, end
        text = json.dumps(header).encode()
        with open(folder / name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + place)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if fp8:
        config = config | {"quantization_config": FP8_CONFIG}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def data_bytes(plan, prefix: str) -> int:
    """Return the bytes of tensors, without headers, in the files that begin with `prefix`."""
    files = [file for name, file in plan.files.items() if name.startswith(prefix)]
    return sum(part.nbytes for file in files for part in file.parts)


def affine(rows: int, columns: int, bits: int) -> int:
    """Return the bytes of a quantised matrix: codes, and BF16 scale and bias for 64 weights."""
    return rows * columns * bits // 8 + rows * columns // 64 * 4


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    return open_folder(write_headers(tmp_path_factory.mktemp("v3"), V3, 163))


@pytest.fixture(scope="module")
def plan(v3):
    return build(v3, RECIPES["q4"])


def test_v3_source(v3):
    """The counts of the real checkpoint (spec 2.1)."""
    assert len(v3.tensors) == 91_991
    assert v3.nbytes == 688_574_839_360
    assert sum(tensor.dtype == "F8_E4M3" for tensor in v3.tensors.values()) == 45_808
    layer_61 = [t.nbytes for name, t in v3.tensors.items() if name.startswith("model.layers.61.")]
    assert (len(layer_61), sum(layer_61)) == (1_564, 15_424_227_552)


def test_v3_at_q4(plan):
    """Routed experts, trunk and sidecar, byte for byte."""
    assert data_bytes(plan, "model-experts") == 367_823_683_584
    assert data_bytes(plan, "model-trunk") == 9_783_169_024
    assert data_bytes(plan, "mtp") == 12_337_454_080
    assert data_bytes(plan, "") == 389_944_306_688
    assert len([name for name in plan.files if name.startswith("model-experts")]) == 58
    assert all(f.nbytes <= 5.1e9 for name, f in plan.files.items() if "trunk" in name)


def test_v3_records_are_aligned(plan):
    """Every piece of every record begins at a multiple of 16 KiB, so that reads can be direct."""
    for name, file in plan.files.items():
        if name.startswith("model-experts"):
            assert all(start % (16 << 10) == 0 for start in file.start_of.values())
    experts = {k: v for k, v in plan.files["mtp.safetensors"].start_of.items() if ".experts." in k}
    assert len(experts) == 256 * 9 and all(start % (16 << 10) == 0 for start in experts.values())


def test_units_are_small(v3, plan):
    """No unit reads more than an expert does, whatever the tensor: memory stays bounded."""
    for unit in plan.units:
        elements = 0
        for name in unit.sources:
            rows, *rest = v3.tensors[name].shape
            elements += (unit.rows[1] - unit.rows[0] if unit.rows else rows) * prod(rest)
        assert elements <= 3 * 2048 * 7168, unit.sources


def test_moonlight_at_q4(tmp_path):
    """BF16 source, no query rank, no MTP layer; 15.96 B weights."""
    source = open_folder(write_headers(tmp_path, MOONLIGHT, 27, fp8=False))
    assert source.nbytes == 2 * 15_960_110_208 + 2 * 26 * 64  # the bias is F32, not BF16
    plan = build(source, RECIPES["q4"])
    matrix = affine(1408, 2048, 4)
    assert data_bytes(plan, "model-experts") == 26 * 64 * 3 * matrix
    assert data_bytes(plan, "mtp") == 0 and not plan.with_mtp
    attention = sum(
        affine(*shape, 4)
        for shape in ((3072, 2048), (576, 2048), (16 * 512, 128), (16 * 128, 512), (2048, 2048))
    )
    outer = 2 * affine(163840, 2048, 4) + 2 * 2048
    norms = 27 * 2 * (2048 + 2048 + 512)
    moe = 26 * (3 * affine(2816, 2048, 4) + 64 * 2048 * 2 + 64 * 4)
    dense = 3 * affine(11264, 2048, 4)
    assert data_bytes(plan, "model-trunk") == outer + norms + 27 * attention + moe + dense


def test_kimi_k2_at_q4(tmp_path):
    """384 experts, 64 heads, another model_type; about a trillion weights."""
    layers = 9  # of 61, which are alike
    config = KIMI_K2 | {"num_hidden_layers": layers}
    source = open_folder(write_headers(tmp_path, config, 10))
    plan = build(source, RECIPES["q4"])
    assert data_bytes(plan, "model-experts") == (layers - 1) * 384 * 3 * affine(2048, 7168, 4)
    attention = sum(
        affine(*shape, 4)
        for shape in (
            (1536, 7168),
            (64 * 192, 1536),
            (576, 7168),
            (64 * 512, 128),
            (64 * 128, 512),
            (7168, 8192),
        )
    )
    outer = 2 * affine(163840, 7168, 4) + 2 * 7168
    norms = layers * 2 * (7168 + 7168 + 1536 + 512)
    moe = (layers - 1) * (3 * affine(2048, 7168, 4) + 384 * 7168 * 2 + 384 * 4)
    dense = 3 * affine(18432, 7168, 4)
    assert data_bytes(plan, "model-trunk") == outer + norms + layers * attention + moe + dense


def test_plan_command_reads_headers_only(tmp_path, capsys):
    """The table for the real model comes from 163 headers; nothing is written."""
    hub = write_headers(tmp_path / "hub", V3, 163)
    assert main(["plan", str(hub), "--recipe", "q4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["source_tensors"] == 91_991 and result["has_mtp"]
    experts = result["roles"]["experts_gate_up"]["bytes"] + result["roles"]["experts_down"]["bytes"]
    assert experts == 367_823_683_584
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_records_lie_in_numeric_order(tmp_path):
    """`experts.10` comes after `experts.9`; a record is gate, up, down, each with its scales."""
    plan = build(open_folder(write_hub(tmp_path / "hub", D)), RECIPES["q4"])
    names = [part.name for part in plan.files["model-experts-00002.safetensors"].parts]
    prefix = "model.layers.2.mlp.experts"
    assert names == [
        f"{prefix}.{expert}.{projection}.{part}"
        for expert in range(16)
        for projection in ("gate_proj", "up_proj", "down_proj")
        for part in ("weight", "scales", "biases")
    ]


def test_digest_tells_plans_apart(tmp_path):
    """Recipe, layout and source all count; the recipe's name alone does not."""
    source = open_folder(write_hub(tmp_path / "hub", D))
    digests = {build(source, RECIPES[name]).digest for name in ("q4", "q6", "q4-mixed", "bf16")}
    digests.add(build(source, RECIPES["q4"], "stacked").digest)
    other = open_folder(write_hub(tmp_path / "other", D | {"rms_norm_eps": 1e-5}))
    digests.add(build(other, RECIPES["q4"]).digest)
    assert len(digests) == 6
    assert build(source, RECIPES["q4"]).digest in digests


def test_the_time_of_fitted_levels(tmp_path, monkeypatch):
    """The fit is nearly all of the work, and the plan must not promise the time of extremes."""
    monkeypatch.setattr(report, "PROBE_SHAPE", (256, 2048))
    source = open_folder(write_hub(tmp_path / "hub", D))
    plans = [build(source, RECIPES[name]) for name in ("q2-mixed", "q2-fit")]
    mixed, fitted = (report.minutes_of_arithmetic(plan) for plan in plans)
    assert fitted > 2 * mixed


def test_config_for_other_programs(tmp_path):
    """GigaChat3's integer in a float field: transformers refused the converted folder.

    And a config as transformers 5 writes it: mlx-lm read no yarn in what became of it.
    """
    config = {k: v for k, v in D.items() if k not in ("rope_scaling", "rope_theta", "n_group")}
    rope = {k: v for k, v in YARN.items() if k != "type"} | {"rope_type": "yarn"}
    config |= {"routed_scaling_factor": 1, "rope_parameters": rope | {"rope_theta": 100000}}
    source = open_folder(write_hub(tmp_path, config))
    written = output_config(build(source, RECIPES["q4"]))
    theirs = DeepseekV3Args.from_dict(written)
    assert theirs.rope_scaling == YARN and theirs.n_group == 8
    for value, wanted in ((theirs.rope_theta, 100000), (theirs.routed_scaling_factor, 1)):
        assert value == wanted and isinstance(value, float)
    assert "rope_parameters" not in written and written["bos_token_id"] == 0
