"""Writes that arrive: whole, and on the disk itself. Knows descriptors and paths, nothing else."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of a descriptor, which do not know it, the name of their file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


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
        with naming(path):
            flush(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make renames and new files in a folder durable."""
    flush_file(folder)


def is_full_disk(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
