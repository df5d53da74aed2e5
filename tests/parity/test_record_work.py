"""`GOLDEN.partial`: one recording at a time, stopped anywhere, on disks that fill or lose power."""

import json
import os
import resource
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mlx_dsv3.errors import run_main
from mlx_dsv3.reference import golden, record, stream

CONFIG = tiny.A | {
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.write_hub(tmp_path_factory.mktemp("source") / "hub", CONFIG, storage="bf16")


@pytest.fixture
def argv(source, tmp_path, monkeypatch):
    """Return the arguments of a recording of four tokens, in which git is not asked."""
    monkeypatch.setattr(golden, "code_version", lambda: "unknown")
    (tmp_path / "ids.json").write_text("[5, 9, 150, 3]")
    files = [tmp_path / "golden", "--prompt-file", tmp_path / "ids.json"]
    return [str(word) for word in (source, *files, "--device", "cpu")]


def status(argv: list[str]) -> int:
    return run_main(lambda: record.main(argv))


def partial_of(argv: list[str]) -> Path:
    return Path(argv[1] + ".partial")


@pytest.fixture
def begun(argv, monkeypatch):
    """Return the arguments of a recording that was stopped before its head."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(record.Recording, "head", stop)
        assert status(argv) == 130
    assert (partial_of(argv) / "states.safetensors").exists()
    return argv


class Stopping:
    """Makes every change of the disk but those from the `at`-th on: a kill came before."""

    def __init__(self, patch, at: int):
        self.left = at
        for name in ("replace", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, self.stopping(getattr(os, name)))

    def stopping(self, change):
        def call(path, *args, **kwargs):
            self.left -= "golden" in str(path)  # torch makes a folder too
            if self.left < 0:
                raise KeyboardInterrupt
            return change(path, *args, **kwargs)

        return call


def test_stopped_at_any_change_of_a_folder(argv, tmp_path, monkeypatch):
    """Between any two changes on the disk; the same command gives the same bytes, to the last.

    Stopped after its last rename, a recording said that its own result exists, and stayed so.
    """
    assert status(argv) == 0
    expected = Path(argv[1]).read_bytes()
    for at in range(100):
        Path(argv[1]).unlink()
        with monkeypatch.context() as patch:
            Stopping(patch, at)
            is_done = status(argv) == 0
        assert is_done or status(argv) == 0, f"after {at} changes"
        assert Path(argv[1]).read_bytes() == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == ["golden", "ids.json"]
        if is_done:
            break
    assert is_done and at == 12  # mkdir, five renames, five unlinks, rmdir


def test_only_the_removal_is_left(argv, monkeypatch):
    """Killed as it removed its work: hours would be computed again, or `exists` said for ever."""
    with monkeypatch.context() as patch:
        Stopping(patch, at=7)  # the folder, five renames, the latest states
        assert status(argv) == 130
    assert Path(argv[1]).exists()
    assert not (partial_of(argv) / "states.safetensors").exists()
    monkeypatch.setattr(stream.Stream, "layer", lambda *_: pytest.fail("it computes again"))
    assert status(argv) == 0
    assert not partial_of(argv).exists()


def test_a_file_that_came_meanwhile(begun, capsys):
    """Something else took the name while a recording was stopped: both stay."""
    Path(begun[1]).write_text("precious")
    assert status(begun) == 2
    assert f"error: `{begun[1]}` exists" in capsys.readouterr().err
    assert Path(begun[1]).read_text() == "precious"
    Path(begun[1]).unlink()
    assert status(begun) == 0


def test_two_recordings_into_one_file(argv, monkeypatch, capsys):
    """The second wrote into the first one's folder, and one of them ended in SafetensorError."""
    layer, second = stream.Stream.layer, []

    def during(self, i, states):
        if not second:
            second.append(None)
            second[0] = status(argv)
        return layer(self, i, states)

    monkeypatch.setattr(stream.Stream, "layer", during)
    assert status(argv) == 0
    assert second == [2]
    assert f"error: another recording into `{argv[1]}` is running\n" in capsys.readouterr().err
    assert status(argv) == 2, "it exists"


@pytest.mark.parametrize("text", ["", '{"source_', "[1]", None])
def test_settings_cut_short_by_a_power_cut(begun, capsys, text):
    """They blocked every resume with a JSONDecodeError. What was recorded is never thrown away."""
    settings = partial_of(begun) / "settings.json"
    settings.unlink() if text is None else settings.write_text(text)
    assert status(begun) == 2
    said = capsys.readouterr().err
    assert f"error: `{settings}` is damaged; the recording that it belongs to cannot go on" in said
    assert f"hint: remove `{settings.parent}` to begin it anew" in said
    (settings.parent / "states.safetensors").unlink()  # no layer was finished
    assert status(begun) == 0


@pytest.mark.parametrize("name", ["states.safetensors", "step-00000.safetensors"])
def test_a_damaged_layer(begun, capsys, name):
    """SafetensorError at once, or at the very end."""
    file = partial_of(begun) / name
    file.write_bytes(file.read_bytes()[:-1])
    assert status(begun) == 2
    assert f"error: `{file}` is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("found", [{}, {"h.0": (3, 64)}, {"h.1": (4, 64)}, {"h.0": (4, 65)}])
def test_states_of_something_else(begun, capsys, found):
    """A KeyError, or a layer computed from another prompt's states."""
    file = partial_of(begun) / "states.safetensors"
    states = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in found.items()}
    save_file(states | {"x": torch.zeros(1)}, file, {"next": "1"})
    assert status(begun) == 2
    assert f"error: `{file}` is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lock", "settings.json", "settings.json.tmp"])
def test_a_pipe_in_the_folder(argv, capsys, name):
    """Opened to write, it waits for a reader that never comes."""
    partial_of(argv).mkdir()
    os.mkfifo(partial_of(argv) / name)
    if name == "settings.json":
        assert status(argv) == 0
        return
    assert status(argv) == 2
    assert f"golden.partial/{name}` cannot be used: " in capsys.readouterr().err


def test_settings_reach_the_disk_before_a_layer(argv, monkeypatch):
    """Renamed without a sync, an empty file can take a name when the power fails."""
    events, sync, replace = [], os.fsync, os.replace

    def synced(file):
        events.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file")
        sync(file)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *paths: events.append("rename") or replace(*paths))
    assert status(argv) == 0
    renames = [i for i, event in enumerate(events) if event == "rename"]
    assert len(renames) == 5  # settings, layer, states, head, golden
    assert all(events[i - 1 : i + 2] == ["file", "rename", "folder"] for i in renames)


def test_leftovers_of_another_recording_are_no_part(begun):
    """Layers of a longer model, left by a removal that was cut off, were joined to the next one."""
    folder = partial_of(begun)
    save_file({"0.layers.9.mlp": torch.zeros(4, 64)}, folder / "step-00009.safetensors")
    for name in ("settings.json", "states.safetensors"):
        (folder / name).unlink()
    assert status(begun) == 0
    assert "0.layers.9.mlp" not in load_file(begun[1])
    assert not folder.exists()


def test_a_disk_that_takes_no_more(argv, capsys):
    """`I/O error` as SafetensorError; now a sentence, and the layer that is lost is done again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert status(argv) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert "step-00000.safetensors.tmp` cannot be used: file too large\n" in said
    assert "then repeat the same command" in said
    assert status(argv) == 0


def test_a_disk_too_small(argv, monkeypatch, capsys):
    """Hours of work, and then no room for the file."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(stream.Stream, "layer", lambda *_: pytest.fail("it begins"))
    assert status(argv) == 2
    said = capsys.readouterr().err
    assert f"on the disk of `{argv[1]}`, which has 0.0 MB free" in said


@pytest.mark.parametrize("name", ["", ".", "absent/../ids.json/x", "x" * 300])
def test_names_that_cannot_be_written(argv, tmp_path, monkeypatch, capsys, name):
    """After the download and the digests of 700 GB: NotADirectoryError."""
    monkeypatch.setattr(record.source, "resolve", lambda _: pytest.fail("it fetches"))
    argv[1] = f"{tmp_path}/{name}" if len(name) > 1 else name
    assert status(argv) == 2
    assert capsys.readouterr().err.startswith("error: `")


def test_a_link_to_nowhere_stays(argv, tmp_path, capsys):
    """It was replaced by the recording."""
    Path(argv[1]).symlink_to(tmp_path / "nowhere")
    assert status(argv) == 2
    assert f"error: `{argv[1]}` exists" in capsys.readouterr().err
    assert Path(argv[1]).is_symlink()


def test_names_that_a_reader_prints(argv, tmp_path, monkeypatch):
    """A line break in the name of a source or a text: after hours, a file that parity refuses."""
    folder = tmp_path / "two\nlines\x1b"
    folder.symlink_to(argv[0])
    text = tmp_path / "a\nb\udcff.json"
    os.rename(tmp_path / "ids.json", text)
    monkeypatch.chdir(tmp_path)
    assert status([folder.name, argv[1], "--prompt-file", str(text), "--device", "cpu"]) == 0
    with safe_open(argv[1], "pt") as file:
        about = file.metadata()
    assert about["model"] == "two?lines?" and json.loads(about["prompts"]) == ["a?b?.json"]
