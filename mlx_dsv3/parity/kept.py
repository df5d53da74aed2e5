"""What is kept of a reference while another model is compared with it: last states, and its head.

Log-probabilities are computed from them again, with the same bits. For V3 that is 28,672 bytes for
each token in place of 517,120, and nothing is rounded; the head comes once. The folder holds the
states as NumPy's file and the head as safetensors, written last: a folder without it is unfinished.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_dsv3.checkpoint.folder import Folder
from mlx_dsv3.errors import UserError
from mlx_dsv3.load import fill
from mlx_dsv3.model.decoder import Model
from mlx_dsv3.model.linear import Linear
from mlx_dsv3.sizes import size

STATES, HEAD = "states.npy", "head.safetensors"
DAMAGED = "delete the folder: the same command computes it again"


def digest_of(folder: Folder, windows: list[list[int]], dtype: mx.Dtype) -> str:
    """Return what a kept folder belongs to: weights by size and time, windows, activations."""
    files = sorted({info.path for info in folder.tensors.values()})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    told = json.dumps([folder.config, stats, windows, str(dtype)], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def is_kept(where: Path, digest: str) -> bool:
    """Say whether a folder holds the states; raise `UserError` where it holds others."""
    if not (where / HEAD).is_file():
        if where.exists() and (not where.is_dir() or {*os.listdir(where)} - {STATES}):
            raise UserError(
                f"`{where}` is there and is no folder of kept states",
                "give `--keep` the name of a new folder",
            )
        return False
    if _read_head(where)[1].get("digest") != digest:
        raise UserError(
            f"`{where}` holds the states of another reference, text, window or dtype",
            "give `--keep` the name of a new folder, or delete that one",
        )
    return True


def check_room(where: Path, folder: Folder, num_tokens: int) -> int:
    """Return the bytes that will be written, the head not packed at most; refuse a full disk."""
    args = folder.args
    nbytes = 4 * args.hidden_size * (num_tokens + args.vocab_size)
    place = next(path for path in (where.absolute(), *where.absolute().parents) if path.is_dir())
    if nbytes > (free := shutil.disk_usage(place).free):
        raise UserError(
            f"the reference's states take {size(nbytes)}, and the disk of `{place}` has "
            f"{size(free)} free",
            "make room, or give `--keep` a folder on a larger disk",
        )
    return nbytes


def keep(where: Path, model: Model, batches: Iterable[mx.array], num_tokens: int, digest: str):
    """Write the states (rows, D) of all batches, then the head."""
    where.mkdir(parents=True, exist_ok=True)
    shape = (num_tokens, model.args.hidden_size)
    with open(where / STATES, "wb") as file:
        about = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, about)
        for rows in batches:
            file.write(memoryview(np.array(rows.astype(mx.float32))))
    head = dict(tree_flatten(model.lm_head.parameters()))
    mx.save_safetensors(str(where / f".{HEAD}"), head, {"digest": digest})
    os.replace(where / f".{HEAD}", where / HEAD)


class Kept:
    """The log-probabilities of a reference, computed from what was kept of it."""

    def __init__(self, where: Path, folder: Folder, num_tokens: int):
        args, file = folder.args, where / STATES
        try:
            self.states = np.load(file, mmap_mode="r")
        except ValueError as error:
            raise UserError(f"`{file}` is damaged: {error}", DAMAGED) from None
        if self.states.shape != (num_tokens, args.hidden_size) or self.states.dtype != np.float32:
            raise UserError(f"`{file}` has other states than were written", DAMAGED)
        outer = nn.Module()
        outer.lm_head = Linear(args.hidden_size, args.vocab_size)
        weights = {f"lm_head.{name}": array for name, array in _read_head(where)[0].items()}
        fill(outer, weights, str(where / HEAD))
        self.head = outer.lm_head
        self.dtype = self.head.get("scales", self.head.weight).dtype

    def logits(self, rows: slice) -> mx.array:
        """Return the reference's logits (rows, vocabulary)."""
        return self.head(mx.array(self.states[rows]).astype(self.dtype))


def _read_head(where: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    try:
        return mx.load(str(where / HEAD), return_metadata=True)
    except RuntimeError as error:
        raise UserError(f"`{where / HEAD}` is damaged: {error}", DAMAGED) from None
