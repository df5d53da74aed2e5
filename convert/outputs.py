"""The shapes of a plan: tensors, files, and units of work, each with its place in bytes.

Plain data; `plan.py` fills it in and everything else reads it.
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import NamedTuple

from mlx_dsv3.checkpoint.format import Quantization
from mlx_dsv3.checkpoint.headers import DTYPE_BYTES


class Part(NamedTuple):
    """A tensor of the output before it has a place."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


class Module(NamedTuple):
    """What one source matrix (or half of kv_b) becomes: an array per part, written in order."""

    path: str
    role: str
    quantization: Quantization | None
    parts: tuple[Part, ...]


class Target(NamedTuple):
    """A module, or some rows of it, with the byte range of each of its parts."""

    path: str
    role: str
    quantization: Quantization | None
    dtype: str
    writes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """What one worker reads, converts and writes at once.

    `rule` is `matrix`, `split_kv_b`, `keep` (bytes as they are), or `compare` (writes nothing).
    """

    index: int
    rule: str
    sources: tuple[str, ...]
    rows: tuple[int, int] | None
    file: str
    targets: tuple[Target, ...]

    @property
    def nbytes(self) -> int:
        return sum(nbytes for target in self.targets for _, nbytes in target.writes)


@dataclass
class OutputFile:
    """A safetensors file whose header is known before its data."""

    name: str
    alignment: int
    parts: list[Part] = field(default_factory=list)

    @cached_property
    def header(self) -> bytes:
        """Return length and header, padded with spaces so that the data begins aligned."""
        entries, place = {"__metadata__": {"format": "mlx"}}, 0
        for part in self.parts:
            offsets = [place, place + part.nbytes]
            entries[part.name] = {
                "dtype": part.dtype,
                "shape": part.shape,
                "data_offsets": offsets,
            }
            place += part.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % self.alignment)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def start_of(self) -> dict[str, int]:
        """Return where each tensor begins, counted from the beginning of the file."""
        starts, place = {}, len(self.header)
        for part in self.parts:
            starts[part.name] = place
            place += part.nbytes
        return starts

    @cached_property
    def nbytes(self) -> int:
        return len(self.header) + sum(part.nbytes for part in self.parts)
