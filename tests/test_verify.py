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


def seal(folder) -> None:
    """Make conversion.json agree with what the files now hold."""
    manifest = json.loads((folder / "conversion.json").read_text())
    manifest["files"] = {name: file_entry(folder / name) for name in manifest["files"]}
    manifest["digest"] = manifest_digest(manifest)
    write_json(folder / "conversion.json", manifest)


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
