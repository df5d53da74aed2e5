"""Files of strangers, checked to the byte, and files of our own, written whole or not at all.

A safetensors file is 8 bytes of header length (little endian), a JSON header, then data. Its
tensors must fill it: a download cut short, or a header that lies, is found before a wrong byte is
computed with. `mlx_dsv3/checkpoint/headers.py` has its own reader of the same format.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from mlx_dsv3.errors import UserError
from mlx_dsv3.json_files import AGAIN, brief, parse_json

MAX_HEADER_BYTES = 16 << 20  # V3's shards have 100 KB
MAX_DIMENSION = (1 << 31) - 1
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Entry(NamedTuple):
    """Where a tensor lies in its file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Header(NamedTuple):
    """The raw header of a safetensors file, its tensors, and what its metadata say."""

    raw: bytes
    entries: dict[str, Entry]
    metadata: dict


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file; raise `UserError` unless its tensors fill it."""
    if not path.is_file():  # a pipe would wait for ever
        raise UserError(f"`{path}` is not a file", AGAIN)
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise UserError(f"`{path}` is cut off within its header, or has none", AGAIN)
        raw = file.read(length)
    header = parse_json(raw, f"the safetensors header of `{path}`")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise UserError(f"`{path}` has no safetensors header", AGAIN)
    entries = {name: _entry(path, name, 8 + len(raw), info) for name, info in header.items()}
    _check_layout(path, 8 + len(raw), size, entries)
    return Header(raw, entries, metadata)


def _entry(path: Path, name: str, data_start: int, info) -> Entry:
    """Return the entry of one tensor, after a look at each value and at its size."""
    info = info if isinstance(info, dict) else {}
    word, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    dtype = DTYPES.get(word) if isinstance(word, str) else None
    if dtype is None:
        raise UserError(f"`{brief(name)}` in `{path}` has the unknown dtype `{brief(word)}`", AGAIN)
    if not _are_sizes(shape, MAX_DIMENSION) or len(shape) > 8:
        raise UserError(f"`{brief(name)}` in `{path}` has a damaged shape", AGAIN)
    if not _are_sizes(offsets, 1 << 62) or len(offsets) != 2:
        raise UserError(f"`{brief(name)}` in `{path}` has damaged offsets", AGAIN)
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise UserError(
            f"`{brief(name)}` in `{path}` has {end - begin:,} bytes, which is not the size of "
            f"{word} {shape}",
            AGAIN,
        )
    return Entry(path, dtype, tuple(shape), data_start + begin, end - begin)


def _are_sizes(values, most: int) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n <= most for n in values)


def _check_layout(path: Path, place: int, size: int, entries: dict[str, Entry]) -> None:
    """Refuse holes, overlaps, and a file that is shorter or longer than its tensors."""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != place:
            raise UserError(
                f"`{brief(name)}` in `{path}` begins at byte {entry.start:,}; "
                f"the tensor before it ends at byte {place:,}",
                AGAIN,
            )
        place += entry.nbytes
    if place != size:
        what = "is cut off" if place > size else "is longer than its header says"
        raise UserError(f"`{path}` {what}: {size:,} bytes instead of {place:,}", AGAIN)


def read_bytes(entry: Entry, start: int, nbytes: int) -> torch.Tensor:
    """Return bytes of a tensor, from `start` on, as a flat tensor of its dtype.

    Plain reads: a mapped file would count as memory of this process.
    """
    buffer = bytearray(nbytes)
    with open(entry.path, "rb", buffering=0) as file:
        file.seek(entry.start + start)
        view, done = memoryview(buffer), 0
        while done < nbytes and (count := file.readinto(view[done:])):
            done += count
    if done < nbytes:
        raise UserError(f"`{entry.path}` is cut off", AGAIN)
    if not nbytes:  # which `frombuffer` refuses
        return torch.empty(0, dtype=entry.dtype)
    return torch.frombuffer(buffer, dtype=entry.dtype)


@contextmanager
def written(path: Path, partial: Path | None = None) -> Iterator[BinaryIO]:
    """Give a file to write that becomes `path` as a whole, and on the disk, or not at all.

    What is written lies in `partial` until then, by default beside `path`.
    """
    partial = partial or path.with_name(path.name + ".tmp")
    try:
        with open(partial, "wb", opener=without_waiting) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename is None:  # a full disk has no name otherwise
            error.filename = str(partial)
        raise


def without_waiting(path: str, flags: int) -> int:
    """Open a file to write; a pipe in its place is an error, and not a wait for its reader."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def sync_folder(folder: Path) -> None:
    """Put the names of a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
