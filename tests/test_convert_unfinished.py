"""What an interrupted `convert run` or `convert mtp` leaves: who may use it, and how it ends.

Every program that meets `.partial` names the command that began, with its arguments.
"""

import json
import os
import shutil
import zlib
from pathlib import Path

import pytest

from convert.__main__ import main
from convert.run import _Run
from mlx_dsv3.checkpoint.folder import open_folder
from mlx_dsv3.errors import UserError, run_main
from tests.test_convert import convert, strip_mtp
from tests.tiny import D, write_hub


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a checkpoint, a folder of it without MTP as others convert it, and that with MTP."""
    folder = tmp_path_factory.mktemp("unfinished")
    hub = write_hub(folder / "hub", D)
    peer = convert(strip_mtp(hub, folder / "stripped"), folder / "peer", "--recipe", "q4")
    (peer / "conversion.json").unlink()
    shutil.copytree(peer, folder / "whole")
    assert main(["mtp", str(hub), str(folder / "whole")]) == 0
    return hub, peer, folder / "whole"


@pytest.fixture
def peer(folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "peer")
    return tmp_path / "peer"


@pytest.fixture
def run(capsys):
    """Return a function that runs a command and returns status and stderr."""

    def run(*argv) -> tuple[int, str]:
        status = run_main(lambda: main([str(word) for word in argv]))
        return status, capsys.readouterr().err

    return run


@pytest.fixture
def interrupted(run, monkeypatch):
    """Return a function that runs a command and interrupts it before its small files, or later."""

    def interrupted(*argv, before_rename: str | None = None) -> None:
        with monkeypatch.context() as patch:
            if before_rename:
                patch.setattr(os, "replace", stopping(before_rename))
            else:
                patch.setattr(_Run, "complete_folder", stop)
            assert run(*argv)[0] == 130

    return interrupted


def stop(*_):
    raise KeyboardInterrupt


def stopping(name: str):
    real = os.replace
    return lambda old, new: stop() if Path(new).name == name else real(old, new)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def edit_journal(out: Path, edit) -> None:
    """Apply `edit` to every head, as another version would have written it."""
    path = out / ".partial" / "journal"
    lines = []
    for line in path.read_bytes().splitlines():
        entry = json.loads(line.partition(b" ")[2])
        if "head" in entry:
            edit(entry["head"])
        text = json.dumps(entry, separators=(",", ":")).encode()
        lines.append(b"%08x %s\n" % (zlib.crc32(text), text))
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize("before_rename", [None, "mtp.safetensors", "config.json"])
def test_a_folder_stays_usable_while_it_gets_its_mtp_layer(
    folders, peer, run, interrupted, capsys, before_rename
):
    """After a kill it could not be used, and every hint was a `convert run` that never was."""
    hub, _, whole = folders
    interrupted("mtp", hub, peer, before_rename=before_rename)
    command = f"python -m convert mtp {hub} {peer}"
    found = open_folder(peer)
    note = f"`{peer}` is used without its MTP layer, which `{command}` has yet to finish\n"
    assert capsys.readouterr().err == note
    assert found.sidecar == {} and set(found.tensors) == set(open_folder(whole).tensors)
    status, text = run("verify", peer)
    assert status == 2 and f"still in conversion\n\nhint: `{command}` finishes it\n" in text
    before = contents(peer)
    status, text = run("run", hub, peer)
    assert status == 2 and f"`{peer}` holds an unfinished `convert mtp`, and this is" in text
    assert f"hint: `{command}` finishes it\n" in text and contents(peer) == before
    assert run("mtp", hub, peer)[0] == 0
    assert contents(peer) == contents(whole)
    assert open_folder(peer).sidecar and capsys.readouterr().err == ""


def test_an_unfinished_run_is_finished_by_its_own_command(folders, run, interrupted, tmp_path):
    """Its arguments are not to be guessed; `convert mtp` said "has no config.json" and no more."""
    hub, out = folders[0], tmp_path / "a folder"
    argv = ["run", hub, out, "--recipe", "q6", "--stacked"]
    command = f"`python -m convert run {hub} '{out}' --recipe q6 --stacked`"
    interrupted(*argv)
    for status, text in (run("verify", out), run("mtp", hub, out)):
        assert status == 2 and f"hint: {command} finishes it\n" in text
    with pytest.raises(UserError, match="still in conversion") as error:
        open_folder(out)
    assert error.value.hint == f"{command} finishes it"
    status, text = run("run", hub, out, "--recipe", "q6")
    assert status == 2 and f"hint: {command} resumes it, or choose another folder\n" in text
    assert run(*argv)[0] == 0


def test_everything_is_in_place_and_only_the_journal_is_left(folders, run, interrupted, tmp_path):
    """Killed after the last rename: the folder is whole, drafts too."""
    hub, out = folders[0], convert(folders[0], tmp_path / "out")
    (out / ".partial").mkdir()
    assert open_folder(out).sidecar
    assert run("run", hub, out)[0] == 0
    assert not (out / ".partial").exists()


@pytest.mark.parametrize("kind", ["run", "mtp"])
@pytest.mark.parametrize("before_rename", [None, "model-trunk-00001-of-00001.safetensors"])
def test_a_journal_of_an_earlier_version(
    folders, peer, run, interrupted, tmp_path, kind, before_rename
):
    """It does not note the command; it resumes all the same, and gets the hint of its kind."""
    hub, _, whole = folders
    dest = peer if kind == "mtp" else tmp_path / "out"
    if kind == "mtp" and before_rename:
        before_rename = "config.json"
    interrupted(kind, hub, dest, before_rename=before_rename)
    edit_journal(dest, lambda head: head.pop("command", None))
    status, text = run("verify", dest)
    assert status == 2 and f"hint: `python -m convert {kind} SOURCE {dest}` finishes it" in text
    assert run(kind, hub, dest)[0] == 0
    assert contents(dest) == contents(whole if kind == "mtp" else convert(hub, tmp_path / "again"))


def test_a_recipe_by_another_name_resumes(folders, run, interrupted, tmp_path):
    """Earlier versions named a recipe by its file alone; the plan knows that it is the same."""
    hub, out, recipe = folders[0], tmp_path / "out", tmp_path / "q2.json"
    recipe.write_text(json.dumps({"default": 8, "head": None}))
    interrupted("run", hub, out, "--recipe", recipe)
    edit_journal(out, lambda head: head.update(recipe="q2"))
    assert run("run", hub, out, "--recipe", recipe)[0] == 0
    assert json.loads((out / "conversion.json").read_text())["recipe"]["name"] == "q2.json"


def journal_head(**changes) -> bytes:
    head = {"recipe": "q4", "plan": "0f", "units": 9, "mlx": "0.32", "device": "cpu"}
    return json.dumps({"head": head | changes}).encode()


FOREIGN = {
    "a list": b"[]",
    "not JSON": b"{",
    "nested": b"[" * 100_000,
    "a head that is a list": b'{"head":[]}',
    "a source that is a list": journal_head(source=[]),
    "a source without files": journal_head(source={}),
    "a head without a plan": b'{"head":{"recipe":"q4"}}',
    "a unit without a digest": b'{"unit":1}',
    "a unit by name": b'{"unit":"1","sha256":"","errors":[]}',
    "errors of text": b'{"unit":1,"sha256":"","errors":[["1","2"]]}',
    "errors without end": b'{"unit":1,"sha256":"","errors":[[1e999,2]]}',
    "negative errors": b'{"unit":1,"sha256":"","errors":[[-1,2]]}',
    "units that were not written": b'{"synced":[1000000]}',
    "two entries in one": b'{"unit":1,"synced":[]}',
    "synced by name": b'{"synced":"all"}',
    "words of a later version": b'{"paused":1}',
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_journal_of_another_version(folders, run, interrupted, tmp_path, case):
    """Each was a traceback. Nothing is overwritten that another version has converted."""
    hub, out = folders[0], tmp_path / "out"
    path, text = out / ".partial" / "journal", FOREIGN[case]
    path.parent.mkdir(parents=True)
    path.write_bytes(b"%08x %s\n" % (zlib.crc32(text), text))
    status, text = run("run", hub, out)
    assert status == 2 and f"error: `{path}` was written by another version" in text
    assert f"hint: delete `{out / '.partial'}` to begin anew, or choose another folder\n" in text
    assert [path.name for path in (out / ".partial").iterdir()] == ["journal"]
    assert run("verify", out)[0] == 2


@pytest.mark.parametrize(
    "text",
    [
        b'{"unit":1000000,"sha256":"","errors":[]}',
        b'{"unit":-1,"sha256":"","errors":[]}',
        b'{"unit":0,"sha256":"","errors":[null,null,null,null,null]}',
        b'{"unit":0,"sha256":"","errors":[[1,2,3]]}',  # the sums of fitted levels
    ],
)
def test_a_journal_that_notes_other_units(folders, run, interrupted, tmp_path, text):
    """The right head with units that the plan does not have: IndexError, or wrong sums."""
    hub, out = folders[0], tmp_path / "out"
    interrupted("run", hub, out)
    path = out / ".partial" / "journal"
    head = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(head + b"%08x %s\n" % (zlib.crc32(text), text))
    status, text = run("run", hub, out)
    assert status == 2 and f"error: `{path}` notes other units than this conversion has" in text


def test_a_journal_that_ends_what_is_not_there(folders, run, interrupted, tmp_path):
    hub, out = folders[0], tmp_path / "out"
    interrupted("run", hub, out, before_rename="config.json")
    (out / "mtp.safetensors").unlink()
    status, text = run("run", hub, out)
    assert status == 2 and "ends a conversion of which `mtp.safetensors` is not there" in text


@pytest.mark.parametrize("name", ["journal", "lock"])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_journal_or_lock_that_is_no_file(folders, run, tmp_path, name, kind):
    """A pipe waited for ever."""
    hub, path = folders[0], tmp_path / "out" / ".partial" / name
    path.parent.mkdir(parents=True)
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    status, text = run("run", hub, tmp_path / "out")
    assert status == 2 and f"`{path}`" in text and text.count("hint: ") == 1


def test_a_lock_that_is_a_link_keeps_what_it_leads_to(folders, run, tmp_path):
    path, mine = tmp_path / "out" / ".partial" / "lock", tmp_path / "mine"
    mine.write_text("mine")
    path.parent.mkdir(parents=True)
    path.symlink_to(mine)
    assert run("run", folders[0], tmp_path / "out")[0] == 0
    assert mine.read_text() == "mine"


def test_files_of_others_in_partial_are_not_published(folders, run, tmp_path):
    """What lay in `.partial` was moved into the folder, code too."""
    out = tmp_path / "out"
    (out / ".partial" / "deep").mkdir(parents=True)
    (out / ".partial" / "tokenization_mine.py").write_text("")
    assert run("run", folders[0], out)[0] == 0
    assert not {"tokenization_mine.py", ".partial"} & {path.name for path in out.iterdir()}
