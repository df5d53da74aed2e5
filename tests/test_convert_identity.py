"""Models that share every header: none may be taken for another, or mixed with it in a resume.

Also the end of a conversion: killed between two renames, it wants no room on the disk.
"""

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from hub_server import COMMIT, REPO, know_only, serve

from convert.__main__ import main
from convert.identity import Identity
from convert.manifest import manifest_digest, write_json
from convert.run import _Run
from convert.source import open_folder
from mlx_dsv3.checkpoint.headers import read_header
from mlx_dsv3.errors import run_main
from mlx_dsv3.reference.weights import HubTensors
from tests.tiny import A, write_hub

SMALL = A | {"num_hidden_layers": 2, "n_routed_experts": 8}
NEXT = "fedcba9876543210fedcba9876543210fedcba98"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return two checkpoints of equal headers, and the files of the first's conversion."""
    folder = tmp_path_factory.mktemp("models")
    one, other = (write_hub(folder / str(seed), SMALL, seed=seed) for seed in (1, 2))
    assert open_folder(one).headers_sha256 == open_folder(other).headers_sha256
    assert main(["run", str(one), str(folder / "out")]) == 0
    return one, other, contents(folder / "out")


@pytest.fixture
def run(capsys):
    """Return a function (words of a command) -> (status, error text)."""

    def call(*argv) -> tuple[int, str]:
        capsys.readouterr()
        status = run_main(lambda: main([str(word) for word in argv]))
        return status, capsys.readouterr().err

    return call


@pytest.fixture
def finished(models, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name, data in models[2].items():
        (out / name).write_bytes(data)
    return out


@pytest.fixture
def stop(monkeypatch):
    """Return a function: the next conversion is interrupted after 20 units, all of them synced."""

    def set_up():
        left, real = 20, _Run.note_done

        def note_done(*args):
            nonlocal left
            real(*args)
            left -= 1
            if left == 0:
                args[0].sync_now()
                monkeypatch.setattr(_Run, "note_done", real)
                raise KeyboardInterrupt

        monkeypatch.setattr(_Run, "note_done", note_done)

    return set_up


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def copy(model: Path, folder: Path) -> Path:
    return shutil.copytree(model, folder)  # with the files' times


def negate_weights(shard: Path) -> None:
    """Flip the sign of every FP8 code: headers, scales, norms and biases stay."""
    data = np.fromfile(shard, np.uint8)
    for tensor in read_header(shard).values():
        if tensor.dtype == "F8_E4M3":
            data[tensor.offset : tensor.offset + tensor.nbytes] ^= 0x80
    data.tofile(shard)


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


# --- finished ---------------------------------------------------------------------------------


def test_another_model_is_not_converted_already(models, finished, run):
    """V3-0324 after V3 into one folder said "converted already": their headers are equal."""
    status, text = run("run", models[1], finished)
    assert status == 2 and "was converted already" not in text
    assert "holds a finished conversion (recipe `q4`) of another source (a folder)" in text
    assert contents(finished) == models[2]
    assert run("run", models[0], finished)[0] == 0


def test_other_weights_between_equal_norms(models, finished, run, tmp_path):
    """A merged adapter leaves norms and biases alone, so that their digest cannot see it."""
    tuned = copy(models[0], tmp_path / "tuned")
    for shard in shards(tuned):
        negate_weights(shard)
    assert Identity(open_folder(tuned)).source_sha256 == HubTensors(models[0]).source_sha256()
    status, text = run("run", tuned, finished)
    assert status == 2 and "of another source" in text


def test_a_copy_of_the_source_is_the_same_source(models, finished, run, tmp_path):
    """Neither path nor time tells a finished conversion's source."""
    moved = copy(models[0], tmp_path / "moved")
    for path in moved.iterdir():
        os.utime(path, (1, 1))
    status, text = run("run", moved, finished)
    assert status == 0 and "was converted already" in text


def test_verify_refuses_another_model(models, finished, run):
    """37 findings hid that SOURCE was another model of equal headers."""
    status, text = run("verify", finished, "--source", models[1])
    assert status == 2 and "the source is not the one that conversion.json was made from" in text
    assert "hint: give the folder that was converted" in text


def test_a_record_without_content(models, finished, run):
    """Folders of earlier versions stay good, and nobody claims to know whose weights they hold."""
    manifest = json.loads((finished / "conversion.json").read_text())
    for key in ("source_sha256", "sampled_sha256", "shards_sha256"):
        del manifest["source"][key]
    write_json(finished / "conversion.json", manifest | {"digest": manifest_digest(manifest)})
    status, text = run("run", models[0], finished)
    assert status == 2 and "by an earlier version, which did not note whose weights" in text
    assert f"hint: `python -m convert verify {finished} --source SOURCE`" in text
    assert run("verify", finished, "--source", models[0]) == (0, "")
    status, text = run("verify", finished, "--source", models[1])
    assert status == 1 and "does not follow from the source" in text


def test_digest_is_that_of_golden_files(models):
    """parity compares conversion.json with what the reference recorded."""
    for model in models[:2]:
        assert Identity(open_folder(model)).source_sha256 == HubTensors(model).source_sha256()


# --- unfinished -------------------------------------------------------------------------------


def test_resume_with_other_shards_is_refused(models, run, stop, tmp_path):
    """Half of one model and half of another came out, which `verify` called good."""
    model, out = copy(models[0], tmp_path / "model"), tmp_path / "out"
    stop()
    assert run("run", model, out)[0] == 130
    begun = contents(out)
    for shard in shards(model):
        negate_weights(shard)
    status, text = run("run", model, out)
    assert status == 2 and "holds a conversion begun from another source" in text
    assert f"hint: repeat with that source, or delete `{out / '.partial'}`" in text
    assert contents(out) == begun


def test_resume_with_touched_shards_is_refused(models, run, stop, tmp_path):
    """Of weights that no digest reads, a file's time alone tells that they may be others."""
    model, out = copy(models[0], tmp_path / "model"), tmp_path / "out"
    stop()
    assert run("run", model, out)[0] == 130
    for shard in shards(model):
        os.utime(shard, (1, 1))
    status, text = run("run", model, out)
    name = shards(model)[0].name
    assert status == 2 and f"`{name}` is not the file that the conversion in `{out}` has r" in text
    assert "hint: put that one back with its time (`cp -p`), or delete" in text


def test_resume_with_another_model_of_the_same_times(models, run, stop, tmp_path):
    """Size and time restored: norms and biases still tell one model from the other."""
    model, out = copy(models[0], tmp_path / "model"), tmp_path / "out"
    stop()
    assert run("run", model, out)[0] == 130
    for shard, new in zip(shards(model), shards(models[1]), strict=True):
        times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
        shard.write_bytes(new.read_bytes())
        os.utime(shard, ns=times)
    status, text = run("run", model, out)
    assert status == 2 and "begun from another source" in text


@pytest.mark.parametrize("place", [0, 1, 2])
def test_resume_with_one_other_shard_converts_it_again(models, run, stop, tmp_path, place):
    """A damaged shard, fetched again, costs its own units and leaves none of the old bytes."""
    model, out = copy(models[0], tmp_path / "model"), tmp_path / "out"
    stop()
    assert run("run", model, out)[0] == 130
    negate_weights(shards(model)[place])
    stop()
    status, text = run("run", model, out)
    name = shards(model)[place].name
    assert status == 130 and f"`{name}` was changed: what came from there is redone" in text
    status, text = run("run", model, out)
    assert status == 0 and "was changed" not in text
    assert run("run", model, tmp_path / "straight")[0] == 0
    assert contents(out) == contents(tmp_path / "straight") != models[2]


def test_a_shard_that_changes_while_it_is_converted(models, run, tmp_path, monkeypatch):
    """Some units saw the old file and some the new one; nothing may be called finished."""
    model, out, real = copy(models[0], tmp_path / "model"), tmp_path / "out", _Run.convert

    def convert(self):
        real(self)
        negate_weights(shards(model)[1])

    monkeypatch.setattr(_Run, "convert", convert)
    status, text = run("run", model, out)
    assert status == 2 and f"`{shards(model)[1].name}` was changed while it was converted" in text
    monkeypatch.undo()
    assert run("run", model, out)[0] == 0
    assert run("verify", out, "--source", model, "--full")[0] == 0


def test_all_shards_change_while_they_are_converted(models, run, tmp_path, monkeypatch):
    """The hint said to repeat the command, and the repeated command refused."""
    model, out, real = copy(models[0], tmp_path / "model"), tmp_path / "out", _Run.convert

    def convert(self):
        real(self)
        for shard in shards(model):
            negate_weights(shard)

    monkeypatch.setattr(_Run, "convert", convert)
    status, text = run("run", model, out)
    partial = out / ".partial"
    assert status == 2 and f"hint: delete `{partial}` and repeat the same command" in text
    monkeypatch.undo()
    shutil.rmtree(partial)
    assert run("run", model, out)[0] == 0


def test_a_journal_without_content(models, run, stop, tmp_path, monkeypatch):
    """A conversion begun by an earlier version gets a sentence, not a KeyError."""
    out = tmp_path / "out"
    monkeypatch.setattr(Identity, "as_dict", lambda self: None)
    stop()
    assert run("run", models[0], out)[0] == 130
    monkeypatch.undo()
    status, text = run("run", models[0], out)
    assert status == 2 and "begun by an earlier version, which did not note whose weights" in text
    assert f"hint: delete `{out / '.partial'}` to begin anew, or choose another folder" in text


def test_nothing_converted_yet_is_nothing_to_mix(models, run, tmp_path, monkeypatch):
    """A begun folder without a finished unit takes whatever the source now holds."""
    out = tmp_path / "out"

    def convert(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(_Run, "convert", convert)
    assert run("run", models[1], out)[0] == 130
    monkeypatch.undo()
    assert run("run", models[0], out)[0] == 0
    assert contents(out) == models[2]


def test_in_the_last_renames_the_shards_times_are_no_matter(models, run, tmp_path, monkeypatch):
    """Everything is converted; another model is refused, and `.partial` is not to be deleted."""
    model, out, real = copy(models[0], tmp_path / "model"), tmp_path / "out", os.replace

    def replace(old, new):
        if Path(new).name == "config.json":
            raise KeyboardInterrupt
        real(old, new)

    monkeypatch.setattr(os, "replace", replace)
    assert run("run", model, out)[0] == 130
    monkeypatch.undo()
    status, text = run("run", models[1], out)
    assert status == 2 and "begun from another source" in text
    assert text.endswith("hint: repeat with that source, or choose another folder\n")
    for shard in shards(model):
        os.utime(shard, (1, 1))
    assert run("run", model, out)[0] == 0
    assert contents(out) == models[2]


def test_mtp_from_another_model_is_not_resumed(models, finished, run, stop, tmp_path):
    """The sidecar's own resume knows its source too."""
    for name in ("conversion.json", "mtp.safetensors"):
        (finished / name).unlink()
    stop()
    assert run("mtp", models[0], finished)[0] == 130
    status, text = run("mtp", models[1], finished)
    assert status == 2 and "begun from another source" in text
    assert run("mtp", models[0], finished)[0] == 0
    assert contents(finished)["mtp.safetensors"] == models[2]["mtp.safetensors"]


# --- the hub ----------------------------------------------------------------------------------


@pytest.fixture
def hub(models, tmp_path, monkeypatch):
    with serve(models[0]) as server:
        know_only(server, tmp_path, monkeypatch)
        yield server


def test_a_new_commit_of_other_weights(models, hub, run, tmp_path):
    """The branch moved on after the conversion: it holds the former commit's weights."""
    out = tmp_path / "out"
    assert run("run", REPO, out, "--discard-source")[0] == 0
    hub.push(NEXT, models[1])
    status, text = run("run", REPO, out, "--discard-source")
    assert status == 2 and f"of another source (`{REPO}` at revision `{COMMIT}`)" in text
    assert run("run", REPO, out, "--revision", COMMIT)[0] == 0
    status, text = run("verify", out, "--source", REPO)
    assert status == 2 and f"hint: give `--source {REPO} --revision {COMMIT}`" in text
    hub.push(NEXT, models[0])  # a commit to the README alone
    status, text = run("run", REPO, out, "--discard-source")
    assert status == 0 and "was converted already" in text


def test_folder_and_hub_know_each_other(models, hub, finished, run, tmp_path):
    """One model from a folder and from the hub is one model, and two are two."""
    out = tmp_path / "from-hub"
    assert run("run", REPO, out)[0] == run("run", models[0], out)[0] == 0
    assert run("run", models[1], out)[0] == 2
    assert run("run", REPO, finished)[0] == 0
    hub.push(NEXT, models[1])
    assert run("run", REPO, finished)[0] == 2


def test_the_branch_moves_on_in_the_middle(models, hub, run, stop, tmp_path):
    """What began with a commit ends with it; another one on purpose is refused."""
    assert run("run", REPO, tmp_path / "straight")[0] == 0
    out = tmp_path / "out"
    stop()
    assert run("run", REPO, out, "--discard-source")[0] == 130
    hub.push(NEXT, models[1])
    status, text = run("run", REPO, out, "--discard-source", "--revision", "main")
    assert status == 2 and f"begun from `{REPO}` at revision `{COMMIT}`; this run reads" in text
    assert f"`--revision {COMMIT}` resumes it" in text
    status, text = run("run", REPO, out, "--discard-source")
    assert status == 0
    assert f"continuing with revision `{COMMIT}`, with which this conversion began" in text
    assert contents(out) == contents(tmp_path / "straight")


def test_the_commit_is_gone_in_the_middle(models, hub, run, stop, tmp_path):
    """A history that was rewritten: the message names the revision, which nobody typed."""
    stop()
    assert run("run", REPO, tmp_path / "out")[0] == 130
    hub.push(NEXT, models[0])
    del hub.commits[COMMIT]
    status, text = run("run", REPO, tmp_path / "out")
    assert status == 2 and f"`{REPO}` has no revision `{COMMIT}`" in text
    assert "needs another folder" in text


def test_a_server_that_ignores_ranges(hub, run, tmp_path):
    """The first bytes of a shard must not be taken for its norms."""
    hub.ignores_ranges = True
    status, text = run("run", REPO, tmp_path / "out")
    assert status == 2 and f"server of `{REPO}` answers no requests for parts of a file" in text
    assert not (tmp_path / "out").exists()


# --- the last renames -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "flags", "step"),
    [("FOLDER", [], 1), (REPO, [], 3), (REPO, ["--discard-source"], 3)],
    ids=["folder", "hub", "hub, discarded"],
)
def test_a_kill_between_renames_needs_no_room(
    models, hub, run, tmp_path, monkeypatch, source, flags, step
):
    """On a full disk: what lay under final names was not counted and wanted its size again."""
    out, real, left = tmp_path / "out", os.replace, 0

    def replace(old, new):
        nonlocal left
        if Path(new).parent == out:
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
        real(old, new)

    monkeypatch.setattr(os, "replace", replace)
    argv = ["run", models[0] if source == "FOLDER" else source, out, *flags]
    assert run(*argv)[0] == 130
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 0))
    num_renamed = 0
    while left := step:  # so many more files each time
        status, text = run(*argv)
        assert "disk" not in text
        if status == 0:
            break
        num_renamed += step
        assert len(list(out.glob("*.*"))) == num_renamed + 1  # and .partial
    assert len(models[2]) - step <= num_renamed < len(models[2])
    assert contents(out).keys() == models[2].keys()
