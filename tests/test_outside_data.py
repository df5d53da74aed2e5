"""What strangers hand over, through the programs: one sentence, status 2, at once.

Folders whose config.json, index or shards are not what they should be. The readers themselves have
test_json_files, test_headers and test_config; a hub's answers have test_hub_answers.
"""

import json
import os
import struct
from pathlib import Path

import pytest
from mlx_folder import write_mlx
from refusal import edit, refusal
from tiny import D, random_tensors

import chat
from convert.__main__ import main as convert
from mlx_dsv3.checkpoint import headers
from mlx_dsv3.errors import run_main
from mlx_dsv3.load import load_model

INDEX = "model.safetensors.index.json"
Q4 = {"bits": 4, "group_size": 32, "mode": "affine"}


def load(argv: list[str]) -> None:
    load_model(argv[0])


@pytest.mark.parametrize("value", [0, 3_000_000, 10**12])
@pytest.mark.parametrize("name", ["num_hidden_layers", "n_routed_experts"])
def test_more_layers_than_memory(folders, capsys, name, value):
    """Three million layers: names of all their tensors, 5.6 GB, before the first was missed."""
    edit(folders / "hub" / "config.json", **{name: value})
    edit(folders / "mlx" / "config.json", **{name: value})
    words = f"config.json has `{name}` = `{value}`; it takes 1 to "
    assert words in refusal(capsys, convert, "plan", folders / "hub")
    assert words in refusal(capsys, chat.main, folders / "mlx", "--plan")
    assert words in refusal(capsys, load, folders / "mlx")


@pytest.mark.parametrize("name, value", [("num_hidden_layers", 900), ("n_routed_experts", 4096)])
def test_more_layers_than_tensors(folders, capsys, name, value):
    """Within what a model may have, and more than this one has: 11 million names were listed."""
    edit(folders / "hub" / "config.json", **{name: value})
    edit(folders / "mlx" / "config.json", **{name: value})
    error = refusal(capsys, convert, "plan", folders / "hub")
    assert (
        f"`{name}` = `{value}`" in error or "has shape [16, 64]; config.json says [4096, " in error
    )
    error = refusal(capsys, load, folders / "mlx")
    assert f"`{name}` = `{value}`" in error


NUMBERS = {
    **{name: 0 for name in ("n_group", "moe_layer_freq", "qk_nope_head_dim", "rope_theta")},
    **{name: -1 for name in ("num_experts_per_tok", "rms_norm_eps", "routed_scaling_factor")},
    **{name: 0 for name in ("vocab_size", "num_attention_heads", "kv_lora_rank", "v_head_dim")},
    "max_position_embeddings": -5,
    "qk_rope_head_dim": 3,
    "bos_token_id": 10**6,
    "eos_token_id": [[1]],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_no_model_has(folders, capsys, name):
    """Zeros divided, negative numbers of experts were accepted."""
    for where in ("hub", "mlx"):
        edit(folders / where / "config.json", **{name: NUMBERS[name]})
    words = f"config.json has `{name}` = `{NUMBERS[name]}`; "
    assert words in refusal(capsys, convert, "plan", folders / "hub")
    assert words in refusal(capsys, chat.main, folders / "mlx", "--plan")


TEXTS = {  # in front of what a good file holds
    '"x": NaN': "holds `NaN`, which is not JSON",
    '"x": 1e999': "holds the number `1e999`",
    '"x": ' + "9" * 5000: "holds a number of 5,000 digits",
    '"x": ' + "[" * 900 + "]" * 900: "more than 32 deep",
    '"x": ' + "[" * 10**5: "more than 32 deep",
    '"x": [' + "[]," * 10**6 + "[]]": "more than 500,000 values",
    '"x": 1, "x": 2': "names `x` twice",
    '"x": "\\udc00"': "is not UTF-8",
}


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_texts_that_no_model_has(folders, capsys, file, text):
    """The same reader for every file: a program that prints or writes one must not fail at it."""
    for where in ("hub", "mlx"):
        path = folders / where / file
        path.write_text(path.read_text().replace("{", "{" + text + ",", 1))
    for main, argv in (
        (convert, ["plan", folders / "hub"]),
        (chat.main, [folders / "mlx", "--plan"]),
    ):
        error = refusal(capsys, main, *argv)
        assert f"{file}` " in error and TEXTS[text] in error


MANIFESTS = [
    *({"files": files} for files in ([], {"/etc/passwd": {"bytes": 1, "sha256": "0"}}, {"x": 1})),
    *({"roles": roles} for roles in ([], {"head": {}}, {"head": {"bytes": "1"}})),
    *({name: None} for name in ("source", "recipe", "layout", "plan", "device", "digest")),
    {"format": 2},
    {"recipe": {"name": ["q4"]}},
]


@pytest.mark.parametrize("change", MANIFESTS, ids=str)
def test_a_manifest_that_no_conversion_writes(folders, capsys, change):
    """Missing keys were tracebacks, and a name like `/etc/passwd` was opened."""
    edit(folders / "out" / "conversion.json", **change)
    error = refusal(capsys, convert, "verify", folders / "out")
    assert f"conversion.json` has `{min(change)}" in error


def test_what_is_no_file(folders, capsys):
    """A pipe was waited for without end, a folder was a traceback."""
    for name in ("config.json", INDEX, "model-trunk-00001.safetensors", "mtp.safetensors"):
        path = folders / "mlx" / name
        path.rename(folders / "kept")
        for make in (os.mkfifo, os.mkdir):
            make(path)
            assert f"{name}` is not a file" in refusal(capsys, chat.main, folders / "mlx", "--plan")
            path.rmdir() if path.is_dir() else path.unlink()
        (folders / "kept").rename(path)
    for path in (min((folders / "hub").glob("*.safetensors")), folders / "hub" / "config.json"):
        path.unlink()
        os.mkfifo(path)
        assert path.name in refusal(capsys, convert, "plan", folders / "hub")


@pytest.mark.parametrize("file", ["config.json", INDEX, "mtp.safetensors"])
def test_what_may_not_be_read(folders, capsys, monkeypatch, file):
    """The system's refusal names the file; root may read everything, so it is played."""

    def refuse(path, *args, **options):
        if Path(path).name == file:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    opened = open
    monkeypatch.setattr("builtins.open", refuse)
    error = refusal(capsys, chat.main, folders / "mlx", "--plan")
    assert f"{file}` cannot be used: permission denied" in error


def rewrite_header(path: Path, change) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    raw = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


LM_HEAD, NORM, KV_B = "lm_head", "model.norm.weight", "model.layers.0.self_attn.kv_b_proj"
TRUNK = {
    "F8_E4M3": ("mlx", NORM, {"dtype": "F8_E4M3", "shape": [128]}),
    "F64": ("mlx", NORM, {"dtype": "F64", "shape": [16]}),
    "I16": ("mlx", NORM, {"dtype": "I16"}),
    "words without scales": ("mlx", f"{LM_HEAD}.weight", {"dtype": "U32", "shape": [160, 32]}),
    "weights as scales": ("packed", f"{LM_HEAD}.scales", {"dtype": "I16"}),
    "scales of more rows": ("packed", f"{LM_HEAD}.scales", {"shape": [320, 3]}),
    "biases of more rows": ("packed", f"{LM_HEAD}.biases", {"shape": [320, 3]}),
    "scales without rows": ("packed", f"{LM_HEAD}.scales", {"shape": [960]}),
    "weight without rows": ("packed", f"{LM_HEAD}.weight", {"shape": [3840]}),
    "bytes as scales": ("packed", f"{LM_HEAD}.scales", {"dtype": "U8", "shape": [160, 12]}),
    "scales of a norm": ("packed", "model.norm.weight", {"dtype": "U8", "shape": [384]}),
    "kv_b of other rows": ("packed", f"{KV_B}.weight", {"shape": [192, 32]}),
}


@pytest.mark.parametrize("case", TRUNK)
def test_a_trunk_that_mlx_does_not_take(folders, capsys, case):
    """All bytes are accounted for, and MLX's own words were a traceback, or tokens of nonsense."""
    where, name, entry = TRUNK[case]

    def change(entries):
        entries[name] |= entry

    rewrite_header(folders / where / "model-trunk-00001.safetensors", change)
    error = refusal(capsys, load, folders / where)
    assert f"`{name.rpartition('.')[0]}` in `" in error or f"`{KV_B}.weight` has shape" in error


def test_rows_that_no_number_of_heads_shares(folders, capsys):
    """384 rows for five heads were a ValueError of a reshape."""
    edit(folders / "packed" / "config.json", num_attention_heads=5)
    assert "kv_b_proj.weight` has shape (384, 128); config.json says (480," in refusal(
        capsys, load, folders / "packed"
    )


def test_heads_that_cannot_be_packed(tmp_path):
    """The older form packs rows of the latent width; rows of a head may fit no group."""
    config = D | {"qk_nope_head_dim": 48}
    write_mlx(tmp_path / "x", config, random_tensors(config), packing=Q4, split_kv_b=False)
    load_model(tmp_path / "x").store.close()


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_a_part_of_a_packed_weight_is_missing(folders, capsys, part):
    rewrite_header(
        folders / "packed" / "model-trunk-00001.safetensors",
        lambda entries: entries.update({"model.other": entries.pop(f"{LM_HEAD}.{part}")}),
    )
    (folders / "packed" / INDEX).unlink()
    assert f"`{LM_HEAD}` in `" in refusal(capsys, load, folders / "packed")


@pytest.mark.parametrize("about", [3, {"a": 1}, {"a": None}, [1]])
def test_metadata_that_mlx_does_not_take(folders, capsys, about):
    """MLX reads the header again, and its parser's words were a traceback."""
    path = folders / "mlx" / "model-trunk-00001.safetensors"
    rewrite_header(path, lambda entries: entries.update(__metadata__=about))
    assert "`__metadata__` in" in refusal(capsys, load, folders / "mlx")


@pytest.mark.parametrize("file", ["x.gguf", "x", "model.bin", "sub/model.safetensors", ".."])
def test_an_index_of_other_files(folders, capsys, file):
    """MLX knows a file's kind by its name, and a subfolder's files were said to be missing."""
    weight_map = json.loads((folders / "mlx" / INDEX).read_text())["weight_map"]
    for where, main in (("mlx", chat.main), ("hub", convert)):
        changed = dict.fromkeys(weight_map, file)
        edit(folders / where / INDEX, weight_map=changed)
        argv = [folders / where, "--plan"] if where == "mlx" else ["plan", folders / where]
        error = refusal(capsys, main, *argv)
        assert f"into `{file}`, which is not a safetensors file beside it" in error


def test_weights_in_a_subfolder(folders, capsys):
    """Said to be missing, although they are there."""
    (folders / "mlx" / "sub").mkdir()
    (folders / "mlx" / INDEX).unlink()
    for path in (folders / "mlx").glob("model*.safetensors"):
        path.rename(path.parent / "sub" / path.name)
    assert run_main(lambda: chat.main([str(folders / "mlx"), "--plan"])) == 2
    error = capsys.readouterr().err
    assert "has no weights" in error and "sub/model-" in error
    assert run_main(lambda: chat.main([str(folders), "--plan"])) == 2
    error = capsys.readouterr().err
    assert "has no config.json" in error and f"hint: `{folders / 'hub'}` has one" in error


def test_headers_of_all_files_are_bounded(folders, capsys, monkeypatch):
    """Each header may be good and small, and all of them more than fits into memory."""
    monkeypatch.setattr(headers, "MAX_HEADERS_BYTES", 30_000)
    assert "more than 30,000 bytes" in refusal(capsys, convert, "plan", folders / "hub")
    monkeypatch.setattr(headers, "MAX_TENSORS", 100)
    for where, main in (("mlx", chat.main), ("hub", convert)):
        argv = [folders / where, "--plan"] if where == "mlx" else ["plan", folders / where]
        monkeypatch.setattr(headers, "MAX_HEADERS_BYTES", 64 << 20)
        assert " tensors" in refusal(capsys, main, *argv)
