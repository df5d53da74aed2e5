"""Bad input: one sentence that names it, a hint, status 2, and nothing under a final name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.__main__ import main
from mlx_dsv3.errors import run_main
from tests.tiny import FP8_CONFIG, A, write_hub

INDEX = "model.safetensors.index.json"
Q_A = "model.layers.0.self_attn.q_a_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_hub(tmp_path_factory.mktemp("errors") / "hub", A)


@pytest.fixture
def hub(good, tmp_path):
    shutil.copytree(good, tmp_path / "hub")
    return tmp_path / "hub"


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(hub: Path, change) -> None:
    """Apply `change(tensors)` to every shard and write the index anew."""
    weight_map = {}
    for shard in sorted(hub.glob("*.safetensors")):
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard.name)
    (hub / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def first_shard(hub: Path) -> Path:
    return min(hub.glob("*.safetensors"))


def drop(name: str):
    return lambda hub: edit_tensors(hub, lambda tensors: tensors.pop(name, None))


def replace(name: str, value: torch.Tensor):
    def change(tensors):
        if name in tensors:
            tensors[name] = value

    return lambda hub: edit_tensors(hub, change)


def add(name: str, value: torch.Tensor):
    def break_it(hub):
        tensors = load_file(first_shard(hub)) | {name: value}
        save_file(tensors, first_shard(hub))
        index = json.loads((hub / INDEX).read_text())
        index["weight_map"][name] = first_shard(hub).name
        (hub / INDEX).write_text(json.dumps(index))

    return break_it


def truncate(hub: Path) -> None:
    with open(first_shard(hub), "r+b") as file:
        file.truncate(first_shard(hub).stat().st_size - 100)


def truncate_header(hub: Path) -> None:
    with open(first_shard(hub), "r+b") as file:
        file.truncate(40)


def garble_header(hub: Path) -> None:
    with open(first_shard(hub), "r+b") as file:
        file.seek(20)
        file.write(b"\0\0\0")


def index_names_absent(hub: Path) -> None:
    index = json.loads((hub / INDEX).read_text())
    index["weight_map"]["model.layers.1.mlp.experts.99.up_proj.weight"] = first_shard(hub).name
    (hub / INDEX).write_text(json.dumps(index))


def index_lacks_one(hub: Path) -> None:
    index = json.loads((hub / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (hub / INDEX).write_text(json.dumps(index))


def index_leaves_the_folder(hub: Path) -> None:
    edit_json(hub / INDEX, weight_map={"model.norm.weight": "../model.safetensors"})


def config(**values):
    return lambda hub: edit_json(hub / "config.json", **values)


NAN_SCALE = torch.full((1, 1), float("nan"))
BAD = {
    "missing scale": (drop(Q_A + "_scale_inv"), f"`{Q_A}` is FP8 and its `weight_scale_inv`"),
    "scale without weight": (drop(Q_A), f"`{Q_A}` is in none of 3 shards"),
    "scale that scales nothing": (
        add("x.weight_scale_inv", torch.ones(1)),
        "does not scale an FP8 weight",
    ),
    "scale of a wrong shape": (replace(Q_A + "_scale_inv", torch.ones(2, 1)), "need [1, 1]"),
    "scale of a wrong dtype": (
        replace(Q_A + "_scale_inv", torch.ones(1, 1, dtype=torch.float16)),
        "`model.layers.0.self_attn.q_a_proj.weight_scale_inv` is F16",
    ),
    "scale that is not finite": (replace(Q_A + "_scale_inv", NAN_SCALE), f"`{Q_A}` has values"),
    "missing tensor": (drop("model.norm.weight"), "`model.norm.weight` is in none of 3"),
    "missing shard": (lambda hub: first_shard(hub).unlink(), "(1 of 3 shards)"),
    "truncated shard": (truncate, "model-00001-of-000003.safetensors` is truncated"),
    "truncated header": (truncate_header, "is truncated or not a safetensors file"),
    "garbled header": (
        garble_header,
        "model-00001-of-000003.safetensors` is not JSON",
    ),
    "no index": (lambda hub: (hub / INDEX).unlink(), f"has no {INDEX}"),
    "index that is not JSON": (lambda hub: (hub / INDEX).write_text("{"), "is not JSON"),
    "index without a map": (lambda hub: (hub / INDEX).write_text("{}"), "`weight_map`"),
    "index that names an absent tensor": (index_names_absent, "experts.99.up_proj.weight` into"),
    "index that lacks a tensor": (index_lacks_one, "does not name"),
    "index that leaves the folder": (
        index_leaves_the_folder,
        "which is not a safetensors file beside it",
    ),
    "wrong shape": (
        replace("model.norm.weight", torch.ones(63).bfloat16()),
        "has shape [63]; config.json says [64]",
    ),
    "wrong dtype": (replace("model.norm.weight", torch.ones(64).half()), "has dtype `F16`"),
    "unknown tensor": (add("model.extra.weight", torch.ones(3)), "holds `model.extra.weight`"),
    "second MTP layer": (
        add("model.layers.5.enorm.weight", torch.ones(64)),
        "`model.layers.5.enorm.weight`",
    ),
    "MTP copy that differs": (
        replace("model.layers.4.embed_tokens.weight", torch.ones(160, 64).bfloat16()),
        "`model.layers.4.embed_tokens.weight` differs from `model.embed_tokens.weight`",
    ),
    "deepseek_v32": (config(model_type="deepseek_v32"), "`deepseek_v32`"),
    "deepseek_v2": (config(model_type="deepseek_v2"), "`deepseek_v2`"),
    "compressed-tensors": (
        config(quantization_config={"quant_method": "compressed-tensors"}),
        "`compressed-tensors`",
    ),
    "FP8 without blocks": (
        config(quantization_config=FP8_CONFIG | {"weight_block_size": None}),
        "`weight_block_size`",
    ),
    "FP8 in blocks of words": (
        config(quantization_config=FP8_CONFIG | {"weight_block_size": ["128", 128]}),
        "`weight_block_size`",
    ),
    "quantisation that is a number": (config(quantization_config=1.5), "an object is needed"),
    "quantisation that is false": (config(quantization_config=False), "`False`; an object"),
    "FP8 unannounced": (config(quantization_config=None), "config.json has no `quant"),
    "MLX folder": (config(quantization={"bits": 4, "group_size": 64}), "already an MLX folder"),
    "no config": (lambda hub: (hub / "config.json").unlink(), "has no config.json"),
    "no folder": (shutil.rmtree, "is not a folder"),
}


def run(capsys, *argv) -> tuple[int, str]:
    status = run_main(lambda: main([str(word) for word in argv]))
    return status, capsys.readouterr().err


def is_unfinished(out: Path) -> bool:
    return not out.exists() or {path.name for path in out.iterdir()} <= {".partial"}


@pytest.mark.parametrize("case", BAD)
def test_bad_source(hub, tmp_path, capsys, case):
    """Each must be said before anything stands under a final name."""
    break_it, words = BAD[case]
    break_it(hub)
    status, text = run(capsys, "run", hub, tmp_path / "out")
    assert status == 2 and words in text
    assert text.startswith("error: ") and text.count("\n\nhint: ") == 1, text
    assert is_unfinished(tmp_path / "out")


def test_rotary_frequencies_are_the_one_tensor_ignored(hub, tmp_path, capsys):
    """Old checkpoints carry `rotary_emb.inv_freq`, which the model computes itself."""
    add("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8))(hub)
    assert run(capsys, "run", hub, tmp_path / "out")[0] == 0


def test_destination_that_holds_something_else(hub, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    status, text = run(capsys, "run", hub, out)
    assert status == 2 and "holds something else (`notes.txt`)" in text
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (tmp_path / "file").write_text("")
    assert run(capsys, "run", hub, tmp_path / "file")[0] == 2


def test_destination_begun_with_another_recipe(hub, tmp_path, capsys):
    """The message names both, and what is there survives."""
    add_nan = replace("model.layers.4.enorm.weight", torch.full((64,), torch.nan).bfloat16())
    broken = tmp_path / "broken"
    shutil.copytree(hub, broken)
    add_nan(broken)
    out = tmp_path / "out"
    assert run(capsys, "run", broken, out)[0] == 2
    journal = (out / ".partial" / "journal").read_bytes()
    status, text = run(capsys, "run", broken, out, "--recipe", "q6")
    assert status == 2 and "begun with recipe `q4` (" in text and "asks for `q6`" in text
    assert f"hint: `python -m convert run {broken} {out}` resumes it, or choose" in text
    edit_json(broken / "config.json", rms_norm_eps=1e-6)
    status, text = run(capsys, "run", broken, out)
    assert status == 2 and "another source" in text
    assert (out / ".partial" / "journal").read_bytes() == journal


def test_a_damaged_shard_fetched_again(hub, tmp_path, capsys):
    """What the other shards gave stays, and the message's hint leads to the end."""
    name = "model.layers.4.enorm.weight"
    index = json.loads((hub / INDEX).read_text())["weight_map"]
    shard = hub / index[name]
    good, tensors = shard.read_bytes(), load_file(shard)
    save_file(tensors | {name: torch.full((64,), torch.nan).bfloat16()}, shard, {"format": "pt"})
    status, text = run(capsys, "run", hub, tmp_path / "out")
    assert status == 2 and "the shard is damaged" in text
    shard.write_bytes(good)
    assert run(capsys, "run", hub, tmp_path / "out")[0] == 0
    assert run(capsys, "run", hub, tmp_path / "straight")[0] == 0
    for path in (tmp_path / "straight").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_finished_destination(hub, tmp_path, capsys):
    """The same command is content; another recipe is refused."""
    out = tmp_path / "out"
    assert run(capsys, "run", hub, out)[0] == 0
    status, text = run(capsys, "run", hub, out)
    assert status == 0 and "was converted already" in text
    status, text = run(capsys, "run", hub, out, "--recipe", "q8")
    assert status == 2 and "holds a finished conversion (recipe `q4`)" in text


def test_recipe_excludes_q_flags(hub, tmp_path, capsys):
    status, text = run(capsys, "run", hub, tmp_path / "out", "--recipe", "q4", "--q-bits", "8")
    assert status == 2 and "excludes" in text
    assert run(capsys, "run", hub, tmp_path / "out", "--jobs", "0")[0] == 2
