"""`convert mtp`: the sidecar for a folder from mlx_lm.convert is that of a whole conversion."""

import json
import shutil

import mlx.core as mx
import pytest
from mlx_lm.convert import convert as peer_convert
from mlx_lm.utils import load_model

from convert.__main__ import main
from mlx_dsv3.errors import run_main
from mlx_dsv3.load import load_model as load_ours
from tests.test_convert import convert, strip_mtp
from tests.tiny import A, D, write_hub


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a checkpoint, mlx_lm.convert's folder of it without MTP, and our whole folder."""
    folder = tmp_path_factory.mktemp("mtp")
    hub = write_hub(folder / "hub", D)
    stripped = strip_mtp(hub, folder / "stripped")
    peer_convert(str(stripped), str(folder / "peer"), quantize=True, q_bits=4)
    return hub, folder / "peer", convert(hub, folder / "whole")


@pytest.fixture
def peer(folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "peer")
    return tmp_path / "peer"


def add_mtp(*argv) -> int:
    return run_main(lambda: main(["mtp", *map(str, argv)]))


def mtp_logits(folder) -> mx.array:
    """Return the MTP module's logits for fixed states and tokens."""
    loaded = load_ours(folder, dtype=mx.float32)
    states = mx.random.normal((1, 5, loaded.args.hidden_size), key=mx.random.key(0))
    logits, _ = loaded.mtp(states, mx.array([[3, 1, 4, 1, 5]]))
    mx.eval(logits)
    loaded.store.close()
    return logits


def test_sidecar_equals_that_of_the_whole_conversion(folders, peer):
    """The file byte for byte, the logits bit for bit; mlx-lm still loads the folder strictly."""
    hub, _, whole = folders
    before = {path.name: path.read_bytes() for path in peer.iterdir()}
    assert add_mtp(hub, peer) == 0
    assert (peer / "mtp.safetensors").read_bytes() == (whole / "mtp.safetensors").read_bytes()
    changed = {path.name for path in peer.iterdir() if before.get(path.name) != path.read_bytes()}
    assert changed == {"mtp.safetensors", "config.json", "conversion.json"}
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (whole, peer))
    assert theirs["quantization"] == ours["quantization"] == theirs["quantization_config"]
    load_model(peer, strict=True)
    assert mx.array_equal(mtp_logits(peer), mtp_logits(whole))
    assert main(["verify", str(peer), "--source", str(hub), "--full"]) == 0


def test_only_the_shards_of_the_mtp_layer_are_needed(folders, peer, tmp_path):
    hub, _, whole = folders
    partial = tmp_path / "partial"
    shutil.copytree(hub, partial)
    index = json.loads((hub / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {shard for name, shard in index.items() if name.startswith("model.layers.4.")}
    unneeded = set(index.values()) - needed
    assert unneeded
    for shard in unneeded:
        (partial / shard).unlink()
    assert add_mtp(partial, peer) == 0
    assert (peer / "mtp.safetensors").read_bytes() == (whole / "mtp.safetensors").read_bytes()


def test_refusals(folders, peer, tmp_path, capsys):
    hub, _, whole = folders
    other = write_hub(tmp_path / "other", A)
    for source, dest, words in (
        (hub, whole, "has `mtp.safetensors` already"),
        (other, peer, "is another model: its `hidden_size` is 192, the source's is 64"),
        (peer, peer, "already an MLX folder"),
        (hub, hub, "is a checkpoint, not an MLX folder"),
        (strip_mtp(hub, tmp_path / "stripped"), peer, "the source holds no MTP layer"),
        (hub, tmp_path / "nowhere", "is not a folder"),
    ):
        assert add_mtp(source, dest) == 2
        assert words in capsys.readouterr().err
    assert not (peer / ".partial").exists()


def test_unquantised_folder_gets_a_bf16_sidecar(folders, tmp_path):
    """No `quantization` in config.json: nothing is quantised, and config.json stays without."""
    hub = folders[0]
    plain = convert(strip_mtp(hub, tmp_path / "stripped"), tmp_path / "plain", "--recipe", "bf16")
    (plain / "conversion.json").unlink()  # as if somebody else had made it
    assert add_mtp(hub, plain) == 0
    assert "quantization" not in json.loads((plain / "config.json").read_text())
    whole = convert(hub, tmp_path / "whole", "--recipe", "bf16")
    assert (plain / "mtp.safetensors").read_bytes() == (whole / "mtp.safetensors").read_bytes()


def test_a_folder_without_an_index_is_verified(folders, peer, capsys):
    """One `model.safetensors` needs no index: it was a traceback."""
    shards = sorted(peer.glob("model*.safetensors"))
    tensors = {name: array for shard in shards for name, array in mx.load(str(shard)).items()}
    mx.save_safetensors(str(peer / "one"), tensors, {"format": "mlx"})
    for path in (*shards, peer / "model.safetensors.index.json"):
        path.unlink()
    (peer / "one.safetensors").rename(peer / "model.safetensors")
    assert add_mtp(folders[0], peer) == 0
    argv = ["verify", str(peer)]
    assert run_main(lambda: main(argv)) == 0
    output = capsys.readouterr().out
    assert "is good; conversion.json speaks of config.json and mtp.safetensors alone\n" in output
    with open(peer / "model.safetensors", "r+b") as file:
        file.truncate((peer / "model.safetensors").stat().st_size - 8)
    assert run_main(lambda: main(argv)) == 1
    assert "model.safetensors` is truncated: " in capsys.readouterr().err


def test_weights_that_an_index_does_not_name(folders, peer, capsys):
    """mlx-lm loads every `model*.safetensors`, whatever the index says."""
    assert add_mtp(folders[0], peer) == 0
    shutil.copy(peer / "mtp.safetensors", peer / "model-more.safetensors")
    assert run_main(lambda: main(["verify", str(peer)])) == 1
    text = capsys.readouterr().err
    assert "`model.safetensors.index.json` does not name `model-more.safetensors`" in text
