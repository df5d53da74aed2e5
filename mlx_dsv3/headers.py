"""Safetensors headers: where each tensor of a folder lies, without reading any tensor.

A file is 8 bytes of header length (little endian), a JSON header, then data. Standard library
only; the converter and the expert store both plan from these.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from mlx_dsv3.errors import UserError

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: dtype is the header's word (`BF16`, `U32`), offset counts from the file start."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file; raise `UserError` when it is cut short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise UserError(
                f"`{path}` is truncated: {size} bytes hold no header", "fetch the file again"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise UserError(f"`{path}` has no safetensors header", "fetch the file again") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise UserError(
                f"`{path}` is truncated: `{name}` ends at byte {8 + length + end}, "
                f"the file has {size}",
                "fetch the file again",
            )
        shape = tuple(entry["shape"])
        tensors[name] = TensorInfo(path, entry["dtype"], shape, 8 + length + begin, end - begin)
    return tensors


def read_headers(paths: list[Path]) -> dict[str, TensorInfo]:
    """Return the tensors of several files; a name in two of them is an error."""
    tensors = {}
    for path in paths:
        for name, info in read_header(path).items():
            if name in tensors:
                raise UserError(f"`{name}` is in `{tensors[name].path}` and in `{path}`")
            tensors[name] = info
    return tensors
