"""Safetensors headers: where each tensor of a folder lies, without reading any tensor.

A file is 8 bytes of header length (little endian), a JSON header, then data. Standard library
only; the converter and the expert store both plan from these.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mlx_dsv3.errors import UserError

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
AGAIN = "fetch the file again; a download that stopped half-way looks like this"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: dtype is the header's word (`BF16`, `U32`), offset counts from the file start."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def header_length(first_bytes: bytes, name: str, file_bytes: int) -> int:
    """Return the length of a header from the first eight bytes of its file."""
    length = int.from_bytes(first_bytes, "little")
    if len(first_bytes) < 8 or length > min(MAX_HEADER_BYTES, file_bytes - 8):
        raise UserError(f"`{name}` is truncated or no safetensors file", AGAIN)
    return length


def parse_header(path: Path, raw: bytes, file_bytes: int) -> dict[str, TensorInfo]:
    """Return the tensors of a header (without its eight length bytes), which lie in `path`.

    Raises `UserError` where a tensor ends beyond the file.
    """
    try:
        header = json.loads(raw)
    except ValueError:
        raise UserError(f"`{path}` has no safetensors header", AGAIN) from None
    header.pop("__metadata__", None)
    tensors, start = {}, 8 + len(raw)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if start + end > file_bytes:
            raise UserError(
                f"`{path}` is truncated: `{name}` ends at byte {start + end}, "
                f"the file has {file_bytes}",
                AGAIN,
            )
        shape = tuple(entry["shape"])
        tensors[name] = TensorInfo(path, entry["dtype"], shape, start + begin, end - begin)
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file; raise `UserError` when it is cut short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        raw = file.read(header_length(file.read(8), str(path), size))
    return parse_header(path, raw, size)


def join_headers(headers: Iterable[dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """Return the tensors of several files; a name in two of them is an error."""
    tensors = {}
    for header in headers:
        for name, info in header.items():
            if name in tensors:
                raise UserError(f"`{name}` is in `{tensors[name].path}` and in `{info.path}`")
            tensors[name] = info
    return tensors


def read_headers(paths: list[Path]) -> dict[str, TensorInfo]:
    """Return the tensors of several files on this machine."""
    return join_headers(map(read_header, paths))
