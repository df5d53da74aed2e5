"""Output files: laid out at full size first, then filled in place and in any order.

`pwrite` into a file whose header is already there needs no memory for what is not yet known, and a
unit may be written twice without harm. Nothing here decides what goes where: the plan does. The
data of a unit are safe only after `sync`; on macOS that needs more than `fsync`.
"""

import errno
import fcntl
import hashlib
import os
from pathlib import Path
from threading import Lock

from convert.outputs import OutputFile, Unit


def flush(descriptor: int) -> None:
    """Bring a file to the disk itself; macOS's `fsync` stops at the drive's cache."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def write_at(descriptor: int, data, offset: int) -> None:
    """Write all of `data` (bytes, or a view of bytes in any shape) at `offset`."""
    view = memoryview(data).cast("B")
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def flush_file(path: Path) -> None:
    """Bring a file that was written and closed to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make renames and new files in a folder durable."""
    flush_file(folder)


def is_full_disk(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


class Writer:
    """Writes units into the files of a plan, under `folder`; safe to call from many threads."""

    def __init__(self, folder: Path, files: dict[str, OutputFile]):
        self.folder, self.files = folder, files
        self._dirty: set[str] = set()
        self._lock = Lock()

    def lay_out(self) -> None:
        """Give every file its header and its full size; what is there already stays."""
        for name, file in self.files.items():
            descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.ftruncate(descriptor, file.nbytes)
                write_at(descriptor, file.header, 0)
            finally:
                os.close(descriptor)
            self._dirty.add(name)

    def write(self, unit: Unit, buffers: list) -> str:
        """Write a unit's buffers to its byte ranges; return the sha256 over all of them."""
        digest = hashlib.sha256()
        if not unit.targets:
            return digest.hexdigest()
        descriptor = os.open(self.folder / unit.file, os.O_WRONLY)
        try:
            for (offset, nbytes), buffer in zip(ranges(unit), buffers, strict=True):
                assert buffer.nbytes == nbytes, (unit.sources, buffer.nbytes, nbytes)
                digest.update(buffer)
                write_at(descriptor, buffer, offset)
        finally:
            os.close(descriptor)
        with self._lock:
            self._dirty.add(unit.file)  # not before: a sync in between would count it as done
        return digest.hexdigest()

    def digest_on_disk(self, unit: Unit) -> str:
        """Return the sha256 over what stands in a unit's byte ranges now."""
        return hashlib.sha256(b"".join(read_ranges(self.folder, unit))).hexdigest()

    def sync(self) -> None:
        """Bring everything written so far to the disk."""
        with self._lock:
            names, self._dirty = self._dirty, set()
        for name in sorted(names):
            flush_file(self.folder / name)


def read_ranges(folder: Path, unit: Unit) -> list[bytes]:
    """Return the bytes of a unit's ranges, in the order of writing."""
    if not unit.targets:
        return []
    with open(folder / unit.file, "rb", buffering=0) as file:
        return [os.pread(file.fileno(), nbytes, offset) for offset, nbytes in ranges(unit)]


def ranges(unit: Unit) -> list[tuple[int, int]]:
    """Return a unit's byte ranges in the order in which its arrays are written."""
    return [write for target in unit.targets for write in target.writes]
