"""Sums of squares so far: in memory as float64, on disk in OUT.partial, at last as means in OUT.

At V3's sizes they take 1.1 GB, and OUT half of that (computed). A file is whole or not there.
"""

import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_dsv3.checkpoint.headers import parse_header, read_raw_header
from mlx_dsv3.checkpoint.importance import shapes
from mlx_dsv3.config import ModelArgs
from mlx_dsv3.errors import UserError
from mlx_dsv3.experts.interrupts import deferred_interrupts
from mlx_dsv3.json_files import parse_json

KIND = "importance in progress"
WORDS = {"<f4": "F32", "<f8": "F64", "<i8": "I64"}


class Sums:
    """Sums by name over the windows that are `done`; `rows` counts what went into each."""

    def __init__(self, args: ModelArgs, with_mtp: bool):
        self.done, self.pending = 0, []
        self.values = {name: np.zeros(shape) for name, shape in shapes(args, with_mtp).items()}
        self.rows = dict.fromkeys(self.values, 0)

    def note(self, name: str, sums: mx.array, rows: int) -> None:
        """Take sums (B, ...) of some windows; they count when those are settled."""
        mx.async_eval(sums)  # or a graph would keep what every layer was given
        self.pending.append((name, sums, rows))

    def settle(self, windows: int) -> None:
        """Count some windows: all that was noted for them or, after a Ctrl-C, nothing."""
        taken = [(name, np.array(x).sum(0, dtype=np.float64), n) for name, x, n in self.pending]
        if bad := [name for name, value, _ in taken if not np.isfinite(value).all()]:
            raise UserError(
                f"what enters `{bad[0]}` is not finite",
                "`python -m convert verify MODEL` says whether the weights are damaged",
            )
        with deferred_interrupts():
            for name, value, rows in taken:
                self.values[name] += value
                self.rows[name] += rows
            self.done, self.pending = self.done + windows, []

    def means(self) -> dict[str, np.ndarray]:
        """Return the tensors of OUT; an expert without rows has zeros."""
        found = {}
        for name, value in self.values.items():
            counts = self.values.get(f"{name.rpartition('.')[0]}.rows")
            if name.endswith(".experts.rows"):
                found[name] = value.astype("<i8")
                continue
            rows = self.rows[name] if counts is None else np.maximum(counts, 1)[:, None]
            found[name] = (value / rows).astype("<f4")
        return found

    def save(self, path: Path, key: str) -> None:
        """Write what a later run goes on from."""
        rows = {f"{name}.count": np.array(n, "<i8") for name, n in self.rows.items()}
        about = {"kind": KIND, "key": key, "windows": str(self.done)}
        write(path, self.values | rows, about)

    def resume(self, path: Path, key: str) -> None:
        """Go on from what `save` wrote; refuse what belongs to another measurement."""
        raw, size = read_raw_header(path)
        header = parse_header(path, raw, size)
        about = parse_json(raw, f"`{path}`").get("__metadata__") or {}
        if about.get("kind") != KIND or about.get("key") != key:
            raise UserError(
                f"`{path}` was begun with another model, text, window or dtype",
                "repeat that command, or delete the file to begin anew",
            )
        for name, value in self.values.items():
            info, count = header.get(name), header.get(f"{name}.count")
            good = info and count and (info.shape, count.shape) == (value.shape, ())
            if not good or (info.dtype, count.dtype) != ("F64", "I64"):
                raise UserError(f"`{path}` is damaged at `{name}`", "delete the file")
            values = np.fromfile(path, "<f8", value.size, offset=info.offset)
            self.values[name] = values.reshape(value.shape)
            self.rows[name] = int(np.fromfile(path, "<i8", 1, offset=count.offset)[0])
        self.done = int(about["windows"])


def write(path: Path, tensors: dict[str, np.ndarray], about: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    entries, place = {"__metadata__": about}, 0
    for name, array in tensors.items():
        end = place + array.nbytes
        dtype = WORDS[array.dtype.str]
        entries[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # it may be a link that others put there
    try:
        with open(partial, "xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in tensors.values():
                file.write(np.ascontiguousarray(array).data)
        os.replace(partial, path)
    finally:  # a disk that it has filled takes nothing else
        partial.unlink(missing_ok=True)
