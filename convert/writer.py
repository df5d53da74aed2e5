"""Output files: laid out at full size first, then filled in place and in any order.

`pwrite` into a file whose header is already there needs no memory for what is not yet known, and a
unit may be written twice without harm. Nothing here decides what goes where: the plan does. The
data of a unit are safe only after `sync`; on macOS that needs more than `fsync`.
"""

import hashlib
import os
from pathlib import Path
from threading import Lock

from convert.disk import flush_file, naming, write_at
from convert.plan import OutputFile, Unit


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
                with naming(self.folder / name):
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
                with naming(self.folder / unit.file):
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
