"""Verification: a flipped byte anywhere, values that do not follow from the source."""

import json
import random
import shutil

import numpy as np
import pytest

from convert.__main__ import main
from convert.manifest import device_kind, file_entry, manifest_digest, write_json
from mlx_dsv3.checkpoint.headers import read_header
from mlx_dsv3.errors import run_main
from tests.tiny import D, write_hub, write_tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return a checkpoint and its q4 folder."""
    folder = tmp_path_factory.mktemp("verify")
    hub = write_tokenizer(write_hub(folder / "hub", D))
    (hub / "LICENSE").write_text("MIT")
    assert main(["run", str(hub), str(folder / "out")]) == 0
    return hub, folder / "out"


@pytest.fixture
def out(pair, tmp_path):
    shutil.copytree(pair[1], tmp_path / "out")
    return tmp_path / "out"


def verify(*argv) -> int:
    return run_main(lambda: main(["verify", *map(str, argv)]))


def test_good_folder(pair, capsys):
    """The table of errors, and how much was derived again."""
    hub, out = pair
    assert verify(out) == 0
    assert verify(out, "--source", hub) == 0
    capsys.readouterr()
    assert verify(out, "--source", hub, "--full", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["findings"] == [] and result["derived_again"] > 100
    roles = result["roles"]
    assert roles["experts_down"]["bits_per_weight"] == 4.5
    assert 0.05 < roles["experts_down"]["relative_rms_error"] < 0.15
    assert 0.002 < roles["mtp"]["relative_rms_error"] < 0.02
    assert "mlp.experts" in roles["experts_gate_up"]["worst"]["tensor"]


def test_a_flipped_byte_anywhere_is_found(out, capsys):
    """In every file: the first and the last byte, and some between."""
    draw = random.Random(0)
    for path in sorted(out.iterdir()):
        good = path.read_bytes()
        for place in [0, len(good) - 1, *(draw.randrange(len(good)) for _ in range(4))]:
            path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            assert verify(out) in (1, 2), (path.name, place)
            text = capsys.readouterr().err
            assert path.name in text, (path.name, place)
        path.write_bytes(good)
    assert verify(out) == 0


def test_missing_and_short_files_are_found(out, capsys):
    (out / "LICENSE").unlink()
    (out / "tokenizer.json").write_text("{}")
    assert verify(out) == 1
    text = capsys.readouterr().err
    assert "`LICENSE` is missing" in text and "`tokenizer.json` has 2 bytes" in text


def seal(folder, **changes) -> None:
    """Make conversion.json agree with what the files now hold."""
    manifest = json.loads((folder / "conversion.json").read_text())
    files = manifest["files"]
    manifest["files"] = {name: file_entry(folder / name) for name in files if name in there(folder)}
    manifest |= changes
    manifest["digest"] = manifest_digest(manifest)
    write_json(folder / "conversion.json", manifest)


def there(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def change(folder, file: str, name: str, edit) -> None:
    """Apply `edit` to a tensor's bytes (uint8 array), in place."""
    path = folder / file
    tensor = read_header(path)[name]
    data = np.fromfile(path, np.uint8)
    edit(data[tensor.offset : tensor.offset + tensor.nbytes])
    data.tofile(path)
    seal(folder)


def test_values_that_are_not_finite_are_found(out, capsys):
    """Checksums made afterwards do not hide them."""
    file = "model-experts-00001.safetensors"
    name = "model.layers.1.mlp.experts.3.up_proj.scales"
    change(out, file, name, lambda data: data.view(np.uint16).__setitem__(0, 0x7F80))
    assert verify(out) == 1
    assert f"`{name}` in `{file}` has values that are not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "codes", "status"), [(None, 1, 1), ("gpu", 1, 0), ("gpu", 2, 1)]
)
def test_derived_again(pair, out, capsys, device, codes, status):
    """On the same kind of device every bit must follow; on another, a code may be one step off."""
    hub, _ = pair
    if device == device_kind():
        device = "cpu"
    if device:
        manifest = json.loads((out / "conversion.json").read_text())
        write_json(out / "conversion.json", manifest | {"device": device})

    def edit(data):
        place = int(np.argmax((data & 0x0F) < 8))  # the low half of a byte is one code
        data[place] += codes

    change(
        out, "model-experts-00002.safetensors", "model.layers.2.mlp.experts.5.up_proj.weight", edit
    )
    assert verify(out) == 0
    assert verify(out, "--source", hub, "--full") == status
    if status:
        assert "experts.5.up_proj` in `model-experts-00002" in capsys.readouterr().err


def test_fitted_levels_made_on_another_device(pair, tmp_path, capsys):
    """In a group or two another fit may be as good; that codes of a whole row are is no chance."""
    hub, out = pair[0], tmp_path / "out"
    assert main(["run", str(hub), str(out), "--recipe", "q3-fit"]) == 0
    assert verify(out, "--source", hub) == 0
    assert "extremes" in capsys.readouterr().out
    manifest = json.loads((out / "conversion.json").read_text())
    roles = manifest["roles"]["experts_down"]
    assert 0.7 < (roles["relative_rms_error"] / roles["extremes_rms_error"]) ** 2 < 0.8
    other = "cpu" if device_kind() == "gpu" else "gpu"
    write_json(out / "conversion.json", manifest | {"device": other})
    file, name = "model-experts-00002.safetensors", "model.layers.2.mlp.experts.5.up_proj.weight"
    for place, status in [(0, 0), (24, 1), (48, 1)]:  # 24 bytes a group
        change(out, file, name, lambda data, place=place: data.__setitem__(place, data[place] ^ 4))
        assert verify(out, "--source", hub, "--full") == status, place


def test_other_folders_are_refused(pair, tmp_path, capsys):
    hub, out = pair
    assert verify(tmp_path / "nowhere") == 2
    assert verify(hub) == 2
    assert verify(out, "--full") == 2
    other = write_hub(tmp_path / "other", D | {"rms_norm_eps": 1e-5})
    assert verify(out, "--source", other) == 2
    assert "the source is not the one" in capsys.readouterr().err
    (tmp_path / "half" / ".partial").mkdir(parents=True)
    assert verify(tmp_path / "half") == 2
    assert "still in conversion" in capsys.readouterr().err


ADDED = (
    "chat_template.jinja",
    "Chat_Template.JINJA",  # the same file on the disk of a Mac
    "generation_config.json",
    "added_tokens.json",
    "tokenization_mine.py",
    "vocab.txt",
    "mtp.safetensors",
    "model-extra.safetensors",
    "additional_chat_templates",
)


@pytest.mark.parametrize("name", ADDED)
def test_files_that_were_added_are_found(out, capsys, name):
    """A template put into a folder drives every chat, and the folder was good."""
    if name in there(out):
        (out / name).unlink()
        seal(out)
    assert verify(out) == 0
    if "templates" in name:
        (out / name).mkdir()
    else:
        (out / name).write_text("{}")
    assert verify(out) == 1
    assert f"`{name}` was added: conversion.json does not list it\n" == capsys.readouterr().err


def test_what_no_program_reads_may_be_added(out):
    for name in ("README.md", ".DS_Store", ".gitattributes", "LICENSE-MODEL"):
        (out / name).write_text("mine")
    (out / ".cache" / "huggingface").mkdir(parents=True)
    assert verify(out) == 0


def test_files_that_conversion_json_leaves_out_are_found(out, capsys):
    """An empty list with a right digest was good: nothing was compared with anything."""
    seal(out, files={})
    assert verify(out) == 1
    text = capsys.readouterr().err
    needed = {"config.json", "model.safetensors.index.json"}
    for name in there(out) - needed - {"conversion.json", "LICENSE"}:
        assert f"`{name}` was added" in text
    assert all(f"`conversion.json` does not list `{name}`" in text for name in needed)


def test_an_index_that_names_files_which_are_not_there(pair, out, capsys):
    """The file and its entry in conversion.json were taken away, the index was not."""
    file = "model-experts-00001.safetensors"
    (out / file).unlink()
    seal(out)
    assert verify(out) == 1
    text = capsys.readouterr().err
    assert f"`model.safetensors.index.json` names `{file}`, which conversion.json does" in text
    (out / "mtp.safetensors").unlink()
    shutil.copy(pair[1] / file, out)
    seal(out)
    manifest = json.loads((pair[1] / "conversion.json").read_text())
    listed = {name: entry for name, entry in manifest["files"].items() if "mtp" not in name}
    seal(out, files=listed)
    assert verify(out) == 0
    assert verify(out, "--source", pair[0]) == 1
    text = capsys.readouterr().err
    assert "`mtp.safetensors` does not hold the tensors that follow from the source" in text


def test_a_sidecar_of_another_model(out, tmp_path, capsys):
    """Equal shapes and other weights: the header says nothing."""
    path = out / "mtp.safetensors"
    data = bytearray(path.read_bytes())
    data[-100:] = bytes(100)
    path.write_bytes(data)
    assert verify(out) == 1
    assert "`mtp.safetensors` was changed" in capsys.readouterr().err


def test_links_count_as_what_they_lead_to(out, tmp_path, capsys):
    """The hub's cache is made of links; a folder or a link to nothing is no file."""
    real = tmp_path / "real"
    real.mkdir()
    for path in [*out.iterdir()]:
        path.rename(real / path.name)
        path.symlink_to(real / path.name)
    assert verify(out) == 0
    (real / "LICENSE").unlink()
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").mkdir()
    assert verify(out) == 1
    text = capsys.readouterr().err
    assert "`LICENSE` is not a file" in text and "`tokenizer.json` is not a file" in text


def test_names_in_conversion_json_are_words(out, capsys):
    """`[/x]` was markup, and ended in a traceback of the library that prints tables."""
    worst = {"tensor": "[/x] :bomb: \x1b]0;x\x07", "relative_rms_error": 0.5}
    role = {"bytes": 1, "bits_per_weight": 4.5, "worst": worst}
    seal(out, roles={"[red]\x1b[2J": role})
    assert verify(out) == 0
    text = capsys.readouterr().out
    assert "[red]\\x1b[2J" in text and "[/x] :bomb: \\x1b]0;x\\x07" in text and "\x1b" not in text


def test_weighted_errors_are_columns(out, capsys):
    """Four errors leave no room for the worst tensor; without a weighted one it is there."""
    row = json.loads((out / "conversion.json").read_text())["roles"]["head"]
    errors = {"extremes_rms_error": 0.25}
    seal(out, roles={"head": row | errors})
    assert verify(out) == 0
    text = capsys.readouterr().out
    assert "25.00%" in text and "worst tensor" in text
    errors |= {"weighted_rms_error": 0.125, "weighted_extremes_rms_error": 0.375}
    seal(out, roles={"head": row | errors})
    assert verify(out) == 0
    text = capsys.readouterr().out
    assert "25.00%    12.50%    37.50%" in text and "worst" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}, "`files./etc/passwd`"),
        ({"files": {"../x": {"bytes": 1, "sha256": ""}}}, "`files.../x`"),
        ({"files": {"config.json": {}}}, "`files.config.json`"),
        ({"files": None}, "`files`"),
        ({"roles": {"mtp": {}}}, "`roles.mtp`"),
        ({"recipe": {}}, "`recipe`"),
        ({"layout": "other"}, "`layout`"),
        ({"source": {"id": 5}}, "`source.id`"),
    ],
)
def test_a_crafted_conversion_json(out, capsys, changes, words):
    """Each was a traceback, or a file outside the folder that was opened."""
    seal(out, **changes)
    assert verify(out) == 2
    assert f"conversion.json` has {words} = " in capsys.readouterr().err


def test_a_recipe_that_cannot_be_derived(pair, out, capsys):
    seal(out, recipe={"name": "q4", "default": "x"})
    assert verify(out, "--source", pair[0]) == 2
    assert "error: `conversion.json` gives `default` " in capsys.readouterr().err
