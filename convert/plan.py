"""What convert will write: tensors, files and units of work, each with its place in bytes.

Plain data that `planner.build` fills in before a byte is read, and that everything else goes by.
The digest covers the source's headers, the recipe and every byte range: with the source's
`identity`, which tells what lies behind equal headers, it says what the output is.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from math import prod
from typing import NamedTuple

from convert.identity import Identity
from convert.recipe import Recipe
from convert.source import Source
from mlx_dsv3.checkpoint.format import FORMAT, SCALE_SUFFIX, Quantization
from mlx_dsv3.checkpoint.headers import DTYPE_BYTES
from mlx_dsv3.checkpoint.importance import Importance


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


@dataclass
class Plan:
    """Files and units of a conversion."""

    source: Source
    recipe: Recipe
    layout: str
    with_mtp: bool
    files: dict[str, OutputFile]
    units: list[Unit]
    importance: Importance | None = None

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files.values())

    @cached_property
    def identity(self) -> Identity:
        return Identity(self.source)

    @cached_property
    def digest(self) -> str:
        digest = hashlib.sha256()
        recipe = self.recipe.as_dict() | {"name": None}
        head = [FORMAT, self.layout, self.source.headers_sha256, self.source.config, recipe]
        if self.importance:
            head.append(self.importance.sha256)
        digest.update(json.dumps(head, sort_keys=True).encode())
        for unit in self.units:
            digest.update(repr((unit.rule, unit.sources, unit.rows, unit.file)).encode())
            digest.update(repr([target.writes for target in unit.targets]).encode())
        return digest.hexdigest()


@dataclass
class RoleRow:
    """One role's line in the table of `plan`."""

    role: str
    tensors: set[str] = field(default_factory=set)
    source_types: set[str] = field(default_factory=set)
    stored_as: set[str] = field(default_factory=set)
    weights: int = 0
    source_bytes: int = 0
    nbytes: int = 0


def role_rows(plan: Plan) -> list[RoleRow]:
    """Return the table of roles, largest first, without what is only compared."""
    rows: dict[str, RoleRow] = {}
    for unit in plan.units:
        sources = unit.sources[: len(unit.targets)]  # kv_b's second half has none of its own
        for source, target in zip_longest(sources, unit.targets):
            row = rows.setdefault(target.role, RoleRow(target.role))
            if source:
                _add_source(plan, row, source, unit.rows)
            row.nbytes += sum(nbytes for _, nbytes in target.writes)
            row.stored_as.add(label(target))
    return sorted(rows.values(), key=lambda row: -row.nbytes)


def _add_source(plan: Plan, row: RoleRow, name: str, rows: tuple[int, int] | None) -> None:
    tensor = plan.source.tensors[name]
    num_rows = rows[1] - rows[0] if rows else tensor.shape[0]
    row.weights += num_rows * prod(tensor.shape[1:])
    row.source_bytes += tensor.nbytes // tensor.shape[0] * num_rows
    row.source_types.add(tensor.dtype)
    if name not in row.tensors and plan.source.scale_of(name):
        row.source_bytes += plan.source.tensors[name + SCALE_SUFFIX].nbytes
    row.tensors.add(name)


def label(target: Target) -> str:
    """Return how a target is stored, short: `4 bits/64`, `mxfp4`, `BF16`."""
    quantization = target.quantization
    if quantization is None:
        return target.dtype
    if quantization.mode != "affine":
        return quantization.mode
    return f"{quantization.bits} bits/{quantization.group_size}"
