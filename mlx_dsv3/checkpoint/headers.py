"""Safetensors headers: where each tensor of a folder lies, without reading any tensor.

A file is 8 bytes of header length (little endian), a JSON header, then data. Headers come from
strangers and are checked to the byte: the tensors must fill the file, so that a download cut short
or a header that lies is found before a wrong byte is computed with; and how many they may be is
bounded, so that none takes the machine's memory. Standard library only; the converter, the memory
plan and the expert store all work from these.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mlx_dsv3.errors import UserError
from mlx_dsv3.json_files import AGAIN, brief, parse_json

DTYPE_BYTES = {
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "F8_E5M2": 1,
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U16": 2,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
MAX_TENSORS = 500_000  # of one model; Kimi-K2 has 207,000, packed as records
MAX_HEADERS_BYTES = 64 << 20  # of all files of one model; those of Kimi-K2 have 31 MB
MAX_HEADER_BYTES = 16 << 20  # of one file; 0.5 MB for a layer of Kimi-K2, packed as records
MAX_DIMENSIONS, MAX_DIMENSION = 8, 2**31 - 1  # MLX's sizes are int32; no tensor has more than 4
MAX_OFFSET = 2**63 - 1  # of files; and Python refuses to print numbers of 4,301 digits
TOO_MANY = "no model has so many; check where its files come from"


class TensorInfo(NamedTuple):
    """One tensor: dtype is the header's word (`BF16`, `U32`), offset counts from the file start."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def shard(self) -> str:
        """Return the name of the file."""
        return self.path.name


def header_length(first_bytes: bytes, name: str, file_bytes: int) -> int:
    """Return the length of a header from the first eight bytes of its file."""
    length = int.from_bytes(first_bytes, "little")
    if len(first_bytes) < 8 or length > min(MAX_HEADER_BYTES, file_bytes - 8):
        raise UserError(f"`{name}` is truncated or not a safetensors file", AGAIN)
    return length


def parse_header(path: Path, raw: bytes, file_bytes: int) -> dict[str, TensorInfo]:
    """Return the tensors of a header (without its eight length bytes), which lie in `path`.

    Raises `UserError` unless they fill a file of `file_bytes` exactly, without holes or overlaps.
    """
    place, entries = 8 + len(raw), parse_json(raw, f"the safetensors header of `{path}`")
    about = entries.pop("__metadata__", None)
    about = {} if about is None else about
    if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
        raise UserError(f"`__metadata__` in `{path}` holds something else than texts", AGAIN)
    tensors = {name: _entry(path, name, place, entry) for name, entry in entries.items()}
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != place:
            raise UserError(
                f"`{brief(name)}` in `{path}` begins at byte {info.offset:,}; "
                f"the tensor before it ends at byte {place:,}",
                AGAIN,
            )
        place += info.nbytes
    if place != file_bytes:
        what = "is truncated" if place > file_bytes else "is longer than its header says"
        raise UserError(f"`{path}` {what}: {file_bytes:,} bytes instead of {place:,}", AGAIN)
    return tensors


def _entry(path: Path, name: str, data_start: int, entry) -> TensorInfo:
    """Return a tensor of a header, after a look at each value and at its size."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise UserError(
            f"`{brief(name)}` in `{path}` has the unknown dtype `{brief(dtype)}`", AGAIN
        )
    if not _are_sizes(shape, MAX_DIMENSION) or len(shape) > MAX_DIMENSIONS:
        raise UserError(f"`{brief(name)}` in `{path}` has a damaged shape", AGAIN)
    if not _are_sizes(offsets, MAX_OFFSET) or len(offsets) != 2:
        raise UserError(f"`{brief(name)}` in `{path}` has damaged offsets", AGAIN)
    nbytes = offsets[1] - offsets[0]
    if nbytes != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise UserError(
            f"`{brief(name)}` in `{path}` has {nbytes:,} bytes, which is not the size of "
            f"{dtype} {shape}",
            AGAIN,
        )
    return TensorInfo(path, dtype, tuple(shape), data_start + offsets[0], nbytes)


def _are_sizes(values, most: int) -> bool:
    """Say whether these are a list of integers from 0 to `most`; true is not one, nor is 1.0."""
    return isinstance(values, list) and all(type(n) is int and 0 <= n <= most for n in values)


def read_raw_header(path: Path) -> tuple[bytes, int]:
    """Return the header of a local file as it stands there, and the size of the file."""
    if not path.is_file():  # a pipe would wait for ever
        raise UserError(f"`{path}` is not a file", AGAIN)
    size = path.stat().st_size
    with open(path, "rb", buffering=0) as file:
        return file.read(header_length(file.read(8), str(path), size)), size


def read_raw_headers(folder: Path, names: Iterable[str]) -> dict[str, tuple[bytes, int]]:
    """Return, by file name, what `read_raw_header` returns, for several files."""
    headers, total = {}, 0
    for name in names:
        headers[name] = read_raw_header(folder / name)
        total += len(headers[name][0])
        check_total(total, folder)
    return headers


def check_total(nbytes: int, where: object) -> None:
    """Refuse to hold more headers than a model has."""
    if nbytes > MAX_HEADERS_BYTES:
        raise UserError(
            f"the headers of `{where}` have more than {MAX_HEADERS_BYTES:,} bytes",
            TOO_MANY,
        )


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file on this machine."""
    return parse_header(path, *read_raw_header(path))


def join_headers(headers: Iterable[dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """Return the tensors of several files; a name in two of them is an error."""
    tensors = {}
    for header in headers:
        for name, info in header.items():
            if name in tensors:
                raise UserError(
                    f"`{brief(name)}` is in `{tensors[name].path}` and in `{info.path}`"
                )
            tensors[name] = info
        if len(tensors) > MAX_TENSORS:
            raise UserError(
                f"`{info.path}` and the files before it hold {len(tensors):,} tensors", TOO_MANY
            )
    return tensors


def read_headers(paths: list[Path]) -> dict[str, TensorInfo]:
    """Return the tensors of several files on this machine."""
    return join_headers(map(read_header, paths))
