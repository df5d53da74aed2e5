"""A checkpoint in the hub's layout: which tensor lies where, and its bytes.

Safetensors headers are parsed here and checked to the byte, so that a truncated download or an
index that lies is found before anything is converted. This file knows nothing about layers,
recipes or MLX. Tensors are read with `pread` and files are opened for each read: mapped pages
would count as resident memory, and 163 shards held open exceed the limit of a Mac's shell.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mlx_dsv3.checkpoint.headers import AGAIN, header_length
from mlx_dsv3.config import ModelArgs, read_config, read_json
from mlx_dsv3.errors import UserError

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
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SCALE_SUFFIX = "_scale_inv"


class Tensor(NamedTuple):
    """A tensor in a shard; `start` counts from the beginning of the file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def parse_header(raw: bytes, shard: str, file_bytes: int) -> dict[str, Tensor]:
    """Return the tensors that a header (without its eight length bytes) announces.

    Raises `UserError` unless the tensors fill the file exactly, without holes or overlaps.
    """
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        tensors = {name: _entry(shard, 8 + len(raw), entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"the header of `{shard}` is damaged", AGAIN) from None
    place = 8 + len(raw)
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start != place or tensor.nbytes < 0:
            raise UserError(f"`{name}` does not begin where the header of `{shard}` says", AGAIN)
        if tensor.nbytes != math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]:
            raise UserError(f"the size of `{name}` in `{shard}` is not that of its shape", AGAIN)
        place += tensor.nbytes
    if place != file_bytes:
        raise UserError(f"`{shard}` has {file_bytes:,} bytes; its header says {place:,}", AGAIN)
    return tensors


def _entry(shard: str, data_start: int, entry: dict) -> Tensor:
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPE_BYTES:
        raise UserError(f"`{shard}` holds the unknown dtype `{entry['dtype']}`", AGAIN)
    return Tensor(shard, entry["dtype"], tuple(entry["shape"]), data_start + begin, end - begin)


def read_header(path: Path) -> bytes:
    """Return the header of a local file as it stands there, without the length bytes."""
    with open(path, "rb", buffering=0) as file:
        length = header_length(file.read(8), path.name, path.stat().st_size)
        return file.read(length)


def read_bytes(path: Path, start: int, nbytes: int) -> bytearray:
    """Read `nbytes` at `start`; raise `UserError` where the file ends before."""
    buffer, done = bytearray(nbytes), 0
    view = memoryview(buffer)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while done < nbytes:
            count = os.preadv(descriptor, [view[done:]], start + done)
            if count == 0:
                raise UserError(f"`{path.name}` ends at byte {start + done:,}", AGAIN)
            done += count
    finally:
        os.close(descriptor)
    return buffer


def read_index(index: dict, name: str, prefix: str = "") -> dict[str, list[str]]:
    """Return shard -> tensor names from the dictionary of an index file.

    With `prefix`, only the shards that hold tensors of such names are returned.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"`{name}` has no `weight_map`", AGAIN)
    shards = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(
                f"`{name}` puts `{tensor}` into `{shard}`, which is no file name", AGAIN
            )
        shards.setdefault(shard, []).append(tensor)
    return {
        shard: names
        for shard, names in sorted(shards.items())
        if any(name.startswith(prefix) for name in names)
    }


class Source:
    """The tensors of a checkpoint by name, read when asked for."""

    def __init__(self, folder: Path, config: dict, headers: dict[str, tuple[bytes, int]]):
        """Take config.json and shard -> (header, bytes of the file)."""
        self.folder = folder
        self.path_of: Callable[[str], Path] = lambda shard: folder / shard
        self.config, self.headers = config, headers
        self.args = ModelArgs.from_dict(config)
        self.block = block_size(config)
        self.repo_id = self.revision = None
        self.sha256_of: dict[str, str] = {}  # of shards, where the hub tells it
        self.stamps: dict[str, list[int]] = {}  # shard -> size and mtime_ns, in a folder
        self.read_small: Callable[[str], bytes] = self.read  # also before a shard is here
        self.shard_bytes = {shard: size for shard, (_, size) in headers.items()}
        self.tensors: dict[str, Tensor] = {}
        digest = hashlib.sha256()
        for shard, (raw, size) in headers.items():
            digest.update(f"{shard} {size} ".encode() + raw)
            for name, tensor in parse_header(raw, shard, size).items():
                if name in self.tensors:
                    first = self.tensors[name].shard
                    raise UserError(f"`{name}` lies in `{first}` and in `{shard}`", AGAIN)
                self.tensors[name] = tensor
        self.headers_sha256 = digest.hexdigest()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def scale_of(self, name: str) -> str | None:
        """Return the name of an FP8 weight's scales, or None for another tensor."""
        return name + SCALE_SUFFIX if self.tensors[name].dtype == "F8_E4M3" else None

    def read(self, name: str, rows: tuple[int, int] | None = None) -> bytearray:
        """Return a tensor's bytes, or those of rows [start, stop) of a matrix."""
        tensor = self.tensors[name]
        start, nbytes = tensor.start, tensor.nbytes
        if rows:
            row_bytes = nbytes // tensor.shape[0]
            start, nbytes = start + rows[0] * row_bytes, (rows[1] - rows[0]) * row_bytes
        return read_bytes(self.path_of(tensor.shard), start, nbytes)


def stamp(path: Path) -> list[int]:
    """Return a file's size and the time of its last change in ns, a list as in JSON."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def block_size(config: dict) -> tuple[int, int]:
    """Return the (rows, columns) of an FP8 block, or refuse how the checkpoint is quantised."""
    if "quantization" in config:
        raise UserError(
            "the source is already an MLX folder (config.json has `quantization`)",
            "convert from the original checkpoint: FP8 or BF16, with `quant_method` fp8 or none",
        )
    settings = config.get("quantization_config")
    if settings is None:
        return (128, 128)
    method, block = settings.get("quant_method"), settings.get("weight_block_size")
    if method != "fp8" or settings.get("fmt", "e4m3") != "e4m3":
        raise UserError(
            f"config.json has `quant_method` `{method}`; `fp8` (e4m3 in blocks) or none converts",
            "look on the hub for the FP8 or BF16 form of this checkpoint",
        )
    if not isinstance(block, list) or len(block) != 2 or min(block) < 1:
        raise UserError(
            f"config.json has `weight_block_size` `{block}`; two sizes are needed",
            "look on the hub for the block FP8 or BF16 form of this checkpoint",
        )
    return (block[0], block[1])


def refuse_config(config: dict) -> None:
    """Refuse what does not convert before any shard is looked at."""
    ModelArgs.from_dict(config)
    block_size(config)


def open_folder(folder: Path, prefix: Callable[[dict], str] = lambda _: "") -> Source:
    """Open a local checkpoint; raise `UserError` for whatever is missing or damaged.

    `prefix` names, for a config.json, the tensors that matter; other shards are left alone.
    """
    config = read_config(folder)
    refuse_config(config)
    index_file = folder / INDEX_FILE
    if index_file.is_file():
        shards = read_index(read_json(index_file), INDEX_FILE, prefix(config))
    elif (folder / SINGLE_FILE).is_file():
        shards = {SINGLE_FILE: None}
    else:
        raise UserError(f"`{folder}` has no {INDEX_FILE} and no {SINGLE_FILE}", AGAIN)
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise UserError(
            f"`{missing[0]}` is missing in `{folder}` ({len(missing)} of {len(shards)} shards)",
            "fetch the missing shards; nothing is converted from an incomplete checkpoint",
        )
    stamps = {shard: stamp(folder / shard) for shard in shards}
    headers = {shard: (read_header(folder / shard), stamps[shard][0]) for shard in shards}
    source = Source(folder, config, headers)
    source.stamps = stamps
    check_index(source, shards)
    return source


def check_index(source: Source, shards: dict[str, list[str] | None]) -> None:
    """Refuse an index that disagrees with the shards' own headers."""
    for shard, names in shards.items():
        for name in names or ():
            if name not in source.tensors or source.tensors[name].shard != shard:
                raise UserError(
                    f"`{INDEX_FILE}` puts `{name}` into `{shard}`, which does not hold it",
                    "fetch the index and the shard again; they belong to different revisions",
                )
    indexed = {name for names in shards.values() for name in names or ()}
    unindexed = [name for name in source.tensors if indexed and name not in indexed]
    if unindexed:
        where = source.tensors[unindexed[0]].shard
        raise UserError(
            f"`{where}` holds `{unindexed[0]}`, which `{INDEX_FILE}` does not name",
            "fetch the index again; it belongs to another revision",
        )
