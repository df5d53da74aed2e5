"""Where a conversion cannot be read from or written to: one sentence with the path, status 2.

Nothing is left under a final name, and nothing is begun where the place is wrong.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convert.__main__ import main
from mlx_dsv3.errors import run_main
from tests.tiny import A, write_hub

ROOT = Path(__file__).parent.parent
SHARD = "model-00001-of-000003.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_hub(tmp_path_factory.mktemp("places") / "hub", A)


@pytest.fixture
def hub(good, tmp_path):
    shutil.copytree(good, tmp_path / "hub")
    return tmp_path / "hub"


def refused(capsys, *argv) -> str:
    """Return the sentence with which a command line is refused."""
    assert run_main(lambda: main([str(word) for word in argv])) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith("error: ") and errors.count("\nhint: ") == 1, errors
    return errors


def test_a_destination_below_a_file(good, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for dest in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "file" / "a" / "b"):
        assert f"error: `{tmp_path / 'file'}` is not a folder\n" in refused(
            capsys, "run", good, dest
        )


def test_a_destination_that_is_a_link_to_nothing(good, tmp_path, capsys):
    """The folder could not be made because "the file exists"."""
    for link, target in (("gone", "nowhere"), ("loop", "loop")):
        (tmp_path / link).symlink_to(tmp_path / target)
        for dest in (tmp_path / link, tmp_path / link / "out"):
            text = refused(capsys, "run", good, dest)
            assert f"error: `{tmp_path / link}` is a link to what is not there\n" in text
    assert not (tmp_path / "nowhere").exists()


def test_a_destination_with_too_long_a_name(good, tmp_path, capsys):
    text = refused(capsys, "run", good, tmp_path / ("x" * 300))
    assert "x" * 300 in text and "too long" in text


def test_a_finished_folder_that_takes_no_files_is_finished(good, tmp_path, capsys, monkeypatch):
    argv = ["run", str(good), str(tmp_path / "out")]
    assert main(argv) == 0
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(argv) == 0 and "was converted already" in capsys.readouterr().err
    assert f"`{tmp_path}` takes no new files" in refused(capsys, *argv[:2], tmp_path / "new")


@pytest.mark.slow
def test_a_disk_that_is_mounted_read_only(good, tmp_path):
    """Root may do what modes forbid, but not this."""
    disk, program = tmp_path / "disk", f"{sys.executable} -m convert"
    (disk / "out").mkdir(parents=True)
    mount = f"mount --bind {disk} {disk} && mount -o remount,ro,bind {disk} || exit 77"
    for dest, named in ((disk / "out", disk / "out"), (disk / "new", disk)):
        words = ["unshare", "-m", "sh", "-c", f"{mount}; {program} run {good} {dest}"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        if done.returncode in (1, 77):
            pytest.skip("this machine mounts nothing")
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: `{named}` takes no new files\n"), done.stderr


def test_a_destination_that_takes_no_files(good, tmp_path, capsys, monkeypatch):
    """Its modes allow what the system then refuses, as on a network's disk."""
    real, out = os.mkdir, tmp_path / "out"
    out.mkdir()

    def mkdir(path, *rest, **more):
        if Path(path).name == ".partial":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        real(path, *rest, **more)

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert f"`{out / '.partial'}` cannot be used: read-only" in refused(capsys, "run", good, out)


@pytest.mark.parametrize("call", ["pwrite", "ftruncate"])
def test_a_disk_that_fails(good, tmp_path, capsys, monkeypatch, call):
    """Errors of a descriptor have no file name: it was a traceback. The work goes on afterwards."""

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        text = refused(capsys, "run", good, out)
    assert f"error: `{out / '.partial'}/" in text and "cannot be used" in text
    assert run_main(lambda: main(["run", str(good), str(out)])) == 0


def test_a_source_that_fails(good, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    assert f"error: `{good}/model-0" in refused(capsys, "run", good, tmp_path / "out")


def test_a_destination_in_the_source(hub, tmp_path, capsys):
    """Who deletes the source, or uploads it, would do so to the result."""
    before = {path.name for path in hub.iterdir()}
    (tmp_path / "link").symlink_to(hub)
    assert f"`{hub}` is the source" in refused(capsys, "run", hub, hub)
    for dest in (hub / "out", hub / "a" / "b", tmp_path / "link" / "out"):
        assert f"`{dest}` lies in the source" in refused(capsys, "run", hub, dest)
    assert {path.name for path in hub.iterdir()} == before


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing"])
@pytest.mark.parametrize("name", [SHARD, "config.json", "model.safetensors.index.json"])
def test_what_is_no_file_in_the_source(hub, tmp_path, capsys, name, kind):
    """A pipe in place of a shard waited for ever."""
    path = hub / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(hub / "nowhere")
    for argv in (["plan", hub], ["run", hub, tmp_path / "out"]):
        assert name in refused(capsys, *argv) and not (tmp_path / "out").exists()


def test_files_that_cannot_be_copied_are_refused_at_once(hub, tmp_path, capsys, monkeypatch):
    """A conversion copies the tokenizer last, which may be hours later."""
    name = os.fsdecode(b"tokenizer\xff.json")
    try:
        (hub / name).write_text("{}")
    except OSError:
        pytest.skip("this disk takes no such name")
    assert "is not UTF-8" in refused(capsys, "run", hub, tmp_path / "out")
    (hub / name).unlink()
    (hub / "tokenizer.json").symlink_to("nowhere")
    assert "tokenizer.json` is not a file" in refused(capsys, "run", hub, tmp_path / "out")
    (hub / "tokenizer.json").unlink()
    (hub / "tokenizer.json").write_text("{}")
    real = open

    def forbidden(path, *rest, **more):
        if str(path).endswith("tokenizer.json"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr("builtins.open", forbidden)
    text = refused(capsys, "run", hub, tmp_path / "out")
    assert f"`{hub / 'tokenizer.json'}` cannot be used: permission denied" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run", "", "out"], "`SOURCE`: an empty word"),
        (["run", "hub", ""], "`DEST`: an empty word"),
        (["plan", "hub", "--revision", ""], "`--revision`: an empty word"),
        (["verify", "out", "--source", ""], "`--source`: an empty word"),
        (["plan", "hub", "--recipe", ""], "there is no recipe ``"),
        (["run", "hub", "out", "--jobs", "0"], "`--jobs` is `0`; it takes a whole number from 1"),
        (["run", "hub", "out", "--jobs", "-1"], "`--jobs` is `-1`"),
        (["verify", "out", "--jobs", "1000000000"], "`--jobs` is `1000000000`"),
        (["mtp", "hub", "out", "--jobs", "1.5"], "`--jobs` is `1.5`"),
    ],
)
def test_words_that_name_nothing(argv, words, tmp_path, monkeypatch, capsys):
    """An empty SOURCE was the folder at work, and a billion jobs a billion threads."""
    monkeypatch.chdir(tmp_path)
    assert f"error: {words}" in refused(capsys, *argv)


def test_millions_of_layers_are_refused_at_once(hub, capsys):
    """The list of what is missing took gigabytes and minutes."""
    config = json.loads((hub / "config.json").read_text())
    for layers in (3_000_000, 10**12):
        (hub / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        refused(capsys, "plan", hub)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("plan {hub} | head -c 1 > /dev/null; exit ${{PIPESTATUS[0]}}", 141),
        ("run {hub} {out} --json | head -c 0; exit ${{PIPESTATUS[0]}}", 141),
        ("run {hub} {out} 2>&-", 0),
    ],
)
def test_closed_pipes_and_descriptors(good, tmp_path_factory, command, status):
    """What is said has no reader, and what is converted stays; the same command goes on."""
    out = tmp_path_factory.getbasetemp() / "closed"
    words = command.format(hub=good, out=out)
    shell = ["bash", "-c", f"{sys.executable} -m convert {words}"]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status and "Traceback" not in done.stderr
