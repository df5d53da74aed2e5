"""Whole conversions of small random checkpoints: equal to mlx_lm.convert, and loadable by it."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
import torch
from mlx_lm.convert import convert as peer_convert
from mlx_lm.utils import load_model
from safetensors.torch import load_file, save_file

from convert.__main__ import main
from tests.tiny import CONFIGS, D, write_hub, write_tokenizer

SHAPES = {
    "seven layers": (D | {"num_hidden_layers": 7, "first_k_dense_replace": 2}, {}),
    "without MTP": (D | {"num_nextn_predict_layers": 0}, {}),
    "without query rank": (D | {"q_lora_rank": None}, {}),
    "BF16 source": (D, {"storage": "bf16"}),
    "BF16 scales": (D, {"scale_dtype": torch.bfloat16}),
    "single shard": (D, {"num_shards": 1}),
    "narrow widths": (CONFIGS["A"], {}),
    "narrow widths, BF16": (CONFIGS["B"], {"storage": "bf16"}),
}


def strip_mtp(source: Path, copy: Path) -> Path:
    """Copy a checkpoint without its MTP layer: mlx_lm.convert knows layer 61 only."""
    copy.mkdir()
    config = json.loads((source / "config.json").read_text())
    prefix = f"model.layers.{config['num_hidden_layers']}."
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if not k.startswith(prefix)}
    for shard in source.glob("*.safetensors"):
        tensors = {k: v for k, v in load_file(shard).items() if not k.startswith(prefix)}
        save_file(tensors, copy / shard.name, {"format": "pt"})
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "config.json").write_text(json.dumps(config))
    return write_tokenizer(copy)


def load_all(folder: Path, pattern: str) -> dict[str, mx.array]:
    return {k: v for path in folder.glob(pattern) for k, v in mx.load(str(path)).items()}


def stack_records(tensors: dict[str, mx.array], num_experts: int) -> dict[str, mx.array]:
    """Stack `experts.{e}.*` into mlx-lm's `switch_mlp.*`, in numeric order."""
    stacked = {name: array for name, array in tensors.items() if ".experts." not in name}
    for name in [name for name in tensors if ".experts.0." in name]:
        layer, rest = name.split(".mlp.experts.0.")
        rows = [tensors[f"{layer}.mlp.experts.{e}.{rest}"] for e in range(num_experts)]
        stacked[f"{layer}.mlp.switch_mlp.{rest}"] = mx.stack(rows)
    return stacked


def assert_same(ours: dict[str, mx.array], theirs: dict[str, mx.array]) -> None:
    assert set(ours) == set(theirs)
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype, name
        assert mx.array_equal(ours[name].view(mx.uint8), array.view(mx.uint8)), name


def convert(source: Path, out: Path, *flags: str) -> Path:
    assert main(["run", str(source), str(out), *flags]) == 0
    return out


def peer(source: Path, out: Path, **settings) -> dict[str, mx.array]:
    peer_convert(str(strip_mtp(source, out.with_name("stripped"))), str(out), **settings)
    return load_all(out, "model*.safetensors")


@pytest.mark.parametrize("shape", SHAPES)
def test_q4_is_bitwise_mlx_lm(tmp_path, shape):
    """Every shape that a checkpoint may have; every fifth scale lies in another shard."""
    config, storage = SHAPES[shape]
    source = write_hub(tmp_path / "hub", config, **storage)
    out = convert(source, tmp_path / "out")
    theirs = peer(source, tmp_path / "peer", quantize=True, q_bits=4, q_group_size=64)
    ours = stack_records(load_all(out, "model*.safetensors"), config["n_routed_experts"])
    assert_same(ours, theirs)
    load_model(out, strict=True)
    assert main(["verify", str(out), "--source", str(source), "--full"]) == 0


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (["--recipe", "q8"], {"q_bits": 8}),
        (["--recipe", "q6"], {"q_bits": 6}),
        (["--recipe", "q3"], {"q_bits": 3}),
        (["--recipe", "q2"], {"q_bits": 2}),
        (["--recipe", "mxfp4"], {"q_mode": "mxfp4"}),
        (["--q-bits", "4", "--q-group-size", "32"], {"q_bits": 4, "q_group_size": 32}),
        (["--q-mode", "mxfp8"], {"q_mode": "mxfp8"}),
        (["--q-mode", "nvfp4"], {"q_mode": "nvfp4"}),
        (["--recipe", "bf16"], None),
        (["--recipe", "float32"], None),
    ],
)
def test_recipes_are_bitwise_mlx_lm(tmp_path, flags, settings):
    """The other uniform recipes; `float32` is BF16 widened."""
    source = write_hub(tmp_path / "hub", D)
    out = convert(source, tmp_path / "out", *flags)
    settings = {"quantize": False} if settings is None else {"quantize": True, **settings}
    theirs = peer(source, tmp_path / "peer", **settings)
    if flags[-1] == "float32":
        theirs = {name: array.astype(mx.float32) for name, array in theirs.items()}
    ours = stack_records(load_all(out, "model*.safetensors"), D["n_routed_experts"])
    assert_same(ours, theirs)
    load_model(out, strict=True)


@pytest.mark.parametrize("name", ["q4-mixed", "q3-mixed", "q2-mixed"])
def test_mixed_recipes_load_strictly(tmp_path, name):
    """Bits differ by module: mlx-lm reads them from config.json by path."""
    out = convert(write_hub(tmp_path / "hub", D), tmp_path / "out", "--recipe", name)
    model, _ = load_model(out, strict=True)
    assert model.lm_head.bits == model.model.layers[1].self_attn.embed_q.bits == 8
    assert model.model.layers[1].mlp.switch_mlp.down_proj.bits == int(name[1])


def test_e8m0_scales_are_powers_of_two(tmp_path):
    """mlx-lm reads E8M0 bytes as integers; the same values as F32 show what is right."""
    narrow = write_hub(tmp_path / "e8m0", D, scale_dtype=torch.float8_e8m0fnu)
    wide = tmp_path / "f32"
    shutil.copytree(narrow, wide)
    for shard in wide.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if name.endswith("_scale_inv"):
                tensors[name] = tensor.float()
        save_file(tensors, shard, {"format": "pt"})
    ours = load_all(convert(narrow, tmp_path / "out"), "*.safetensors")
    assert_same(ours, load_all(convert(wide, tmp_path / "out-wide"), "*.safetensors"))


def test_stacked_is_what_mlx_lm_writes(tmp_path):
    """`--stacked`: no record is left in `model*.safetensors`, the sidecar keeps its own."""
    source = write_hub(tmp_path / "hub", D)
    out = convert(source, tmp_path / "out", "--stacked")
    theirs = peer(source, tmp_path / "peer", quantize=True, q_bits=4)
    assert_same(load_all(out, "model*.safetensors"), theirs)
    assert "model.layers.4.mlp.experts.0.up_proj.weight" in load_all(out, "mtp.safetensors")
    load_model(out, strict=True)


def test_sidecar_has_8_bits_and_hub_names(tmp_path):
    """The MTP layer survives: kv_b split, experts as records, duplicates gone."""
    source = write_hub(tmp_path / "hub", D)
    out = convert(source, tmp_path / "out")
    mtp = load_all(out, "mtp.safetensors")
    assert all(name.startswith("model.layers.4.") for name in mtp)
    assert "model.layers.4.self_attn.embed_q.scales" in mtp
    assert not any("embed_tokens" in name or "shared_head.head" in name for name in mtp)
    config = json.loads((out / "config.json").read_text())
    eight = {"group_size": 64, "bits": 8, "mode": "affine"}
    assert config["quantization"]["model.layers.4.eh_proj"] == eight
    assert config["quantization"]["model.layers.4.mlp.switch_mlp.gate_proj"] == eight
    hub = {k: v for shard in source.glob("*.safetensors") for k, v in load_file(shard).items()}
    want = mx.quantize(
        mx.array(hub["model.layers.4.eh_proj.weight"].float().numpy()).astype(mx.bfloat16),
        group_size=64,
        bits=8,
    )
    for part, array in zip(("weight", "scales", "biases"), want, strict=True):
        assert mx.array_equal(mtp[f"model.layers.4.eh_proj.{part}"], array)


def test_small_files(tmp_path):
    """config.json without the FP8 block, index without MTP, the rest copied byte for byte."""
    source = write_tokenizer(write_hub(tmp_path / "hub", D))
    extras = {
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": "{}",
        "LICENSE-MODEL": "MIT",
        "tokenization_kimi.py": "raise SystemExit",
    }
    for name, text in extras.items():
        (source / name).write_text(text)
    out = convert(source, tmp_path / "out")
    assert {name: (out / name).read_text() for name in extras} == extras
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert "quant_method" not in config["quantization"]
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert "mtp.safetensors" not in index.values()
    assert set(index) == set(load_all(out, "model*.safetensors"))
    assert not (out / ".partial").exists()
    manifest = (out / "conversion.json").read_text()
    assert str(tmp_path) not in manifest and json.loads(manifest)["recipe"]["name"] == "q4"


def test_unquantised_config_has_no_quantization(tmp_path):
    """A stale FP8 block makes loaders believe in scales that are gone."""
    out = convert(write_hub(tmp_path / "hub", D), tmp_path / "out", "--recipe", "bf16")
    config = json.loads((out / "config.json").read_text())
    assert "quantization" not in config and "quantization_config" not in config


def test_an_mtp_layer_that_is_only_announced(tmp_path, capsys):
    """Stripped copies still say `num_nextn_predict_layers` 1; the result must not."""
    source = strip_mtp(write_hub(tmp_path / "hub", D), tmp_path / "stripped")
    out = convert(source, tmp_path / "out")
    assert "the shards hold none" in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not (out / "mtp.safetensors").exists()


def test_any_number_of_jobs_gives_the_same_bytes(tmp_path):
    source = write_hub(tmp_path / "hub", D)
    one = convert(source, tmp_path / "one", "--jobs", "1")
    many = convert(source, tmp_path / "many", "--jobs", "5")
    for path in one.iterdir():
        assert (many / path.name).read_bytes() == path.read_bytes(), path.name


def test_large_tensors_in_blocks_of_rows(tmp_path, monkeypatch):
    """Blocks begin where an FP8 block begins; the bits do not depend on where they end."""
    source = write_hub(tmp_path / "hub", D)
    whole = convert(source, tmp_path / "whole")
    monkeypatch.setattr("convert.planner.BLOCK_ELEMENTS", 128 * 192)
    blocks = convert(source, tmp_path / "blocks")
    for path in whole.glob("*.safetensors"):
        assert (blocks / path.name).read_bytes() == path.read_bytes(), path.name
