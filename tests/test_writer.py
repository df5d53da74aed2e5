"""Laid-out files, and what happens when the disk is full."""

import errno
import os
import subprocess

import pytest

from convert import destination, disk, writer
from convert.__main__ import main
from convert.plan import OutputFile, Part, Target, Unit
from mlx_dsv3.errors import run_main
from tests.tiny import A, write_hub

PARTS = [Part("a", "U32", (20, 3)), Part("b", "BF16", (2, 1))]
UNIT = Unit(0, "matrix", ("a",), None, "f", (Target("a", "head", None, "U32", ((200, 4),)),))


def output_file(alignment: int = 8) -> OutputFile:
    """Return a file whose data begin before byte 200, where the unit writes."""
    return OutputFile("f", alignment, list(PARTS))


@pytest.mark.parametrize("alignment", [8, 16 << 10])
def test_header_ends_aligned(alignment):
    """Data begin at a multiple of the alignment, padded with spaces as the format allows."""
    file = output_file(alignment)
    assert len(file.header) % alignment == 0
    assert file.start_of == {"a": len(file.header), "b": len(file.header) + 240}
    assert file.nbytes == len(file.header) + 244


def test_lay_out_keeps_what_is_there(tmp_path):
    """A resume lays out again: data stay, a file that was cut is extended."""
    file = output_file()
    one = writer.Writer(tmp_path, {"f": file})
    one.lay_out()
    one.write(UNIT, [memoryview(b"abcd")])
    assert writer.read_ranges(tmp_path, UNIT) == [b"abcd"]
    os.truncate(tmp_path / "f", 202)
    two = writer.Writer(tmp_path, {"f": file})
    two.lay_out()
    assert writer.read_ranges(tmp_path, UNIT) == [b"ab\0\0"]
    assert (tmp_path / "f").stat().st_size == file.nbytes


def test_digest_covers_what_was_written(tmp_path):
    target = writer.Writer(tmp_path, {"f": output_file()})
    target.lay_out()
    digest = target.write(UNIT, [memoryview(b"abcd")])
    assert target.digest_on_disk(UNIT) == digest
    with open(tmp_path / "f", "r+b") as file:
        file.seek(201)
        file.write(b"x")
    assert target.digest_on_disk(UNIT) != digest


def test_write_at_continues_after_a_short_write(tmp_path, monkeypatch):
    """A signal or a nearly full disk may let `pwrite` take less than it was given."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:3], offset))
    with open(tmp_path / "f", "wb") as file:
        disk.write_at(file.fileno(), memoryview(b"0123456789").cast("B", (5, 2)), 5)
    assert (tmp_path / "f").read_bytes() == bytes(5) + b"0123456789"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write_hub(tmp_path_factory.mktemp("full") / "hub", A)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def convert(*argv) -> int:
    return run_main(lambda: main(["run", *map(str, argv)]))


def fail_at(monkeypatch, module, name: str, count: int) -> None:
    """Let the call number `count` of a function fail as on a full disk."""
    real, calls = getattr(module, name), iter(range(10**9))

    def limited(*args):
        if next(calls) >= count:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(module, name, limited)


@pytest.mark.parametrize("name", ["pwrite", "fsync", "replace"])
def test_full_disk_at_many_calls(hub, tmp_path, monkeypatch, capsys, name):
    """A clear stop at any write, flush or rename; nothing lost; the same command goes on."""
    straight = tmp_path / "straight"
    calls = []
    with monkeypatch.context() as counted:
        real = getattr(os, name)
        counted.setattr(os, name, lambda *args: (calls.append(0), real(*args))[1])
        assert convert(hub, straight) == 0
    step = max(1, len(calls) // 12)
    for count in range(0, len(calls), step):
        out = tmp_path / str(count)
        with monkeypatch.context() as limited:
            fail_at(limited, os, name, count)
            assert convert(hub, out) == 2, count
        error = capsys.readouterr().err
        assert "is full; nothing that was converted is lost" in error and "hint: free" in error
        if (out / "config.json").exists() and not (out / ".partial").exists():
            assert contents(out) == contents(straight)  # only the very last flush failed
        assert convert(hub, out) == 0
        assert contents(out) == contents(straight), count


@pytest.mark.slow
def test_full_disk_for_real(hub, tmp_path, monkeypatch, capsys):
    """A small tmpfs is refused, fills up all the same, is enlarged, and the command ends well."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounting needs root")
    try:
        assert convert(hub, disk / "out") == 2
        assert "needs 0.9 MB on the disk of" in capsys.readouterr().err
        with monkeypatch.context() as blind:  # as when somebody else fills the disk meanwhile
            blind.setattr(destination.Destination, "check_space", lambda *args: None)
            assert convert(hub, disk / "out") == 2
        assert "is full" in capsys.readouterr().err
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        assert convert(hub, disk / "out") == 0
        assert convert(hub, tmp_path / "straight") == 0
        assert contents(disk / "out") == contents(tmp_path / "straight")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
