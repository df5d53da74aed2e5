"""A checkpoint in the hub's layout: which tensor lies where, and its bytes.

Headers and index are checked against each other and to the byte, so that a truncated download is
found before anything is converted. This file knows nothing about layers, recipes or MLX. Tensors
are read with `pread` and files are opened for each read: mapped pages would count as resident
memory, and 163 shards held open exceed the limit of a Mac's shell.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from convert.disk import naming
from mlx_dsv3.checkpoint.format import INDEX, SCALE_SUFFIX, SINGLE, mtp_prefix, read_index
from mlx_dsv3.checkpoint.headers import (
    AGAIN,
    TensorInfo,
    join_headers,
    parse_header,
    read_raw_headers,
)
from mlx_dsv3.checkpoint.hub import Repo
from mlx_dsv3.config import ModelArgs, read_config
from mlx_dsv3.errors import UserError

# Code in the repository (tokenizers of Moonlight and Kimi) is copied and never run.
COPIED = (
    "tokenizer*",
    "*.tiktoken",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.jinja",
    "generation_config.json",
    "LICENSE*",
    "*.py",
)


def read_bytes(path: Path, start: int, nbytes: int) -> bytearray:
    """Read `nbytes` at `start`; raise `UserError` where the file ends before."""
    buffer, done = bytearray(nbytes), 0
    view = memoryview(buffer)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while done < nbytes:
            with naming(path):
                count = os.preadv(descriptor, [view[done:]], start + done)
            if count == 0:
                raise UserError(f"`{path.name}` ends at byte {start + done:,}", AGAIN)
            done += count
    finally:
        os.close(descriptor)
    return buffer


class Source:
    """The tensors of a checkpoint by name, read when asked for."""

    def __init__(
        self,
        folder: Path,
        config: dict,
        headers: dict[str, tuple[bytes, int]],
        *,
        stamps: dict[str, list[int]] | None = None,
        repo: Repo | None = None,
        path_of: Callable[[str], Path] | None = None,
    ):
        """Take config.json and shard -> (header, bytes of the file).

        Shards in `folder` have `stamps` (size and mtime_ns). Those of a `repo` may be there only
        when `path_of` was asked for them.
        """
        self.folder, self.config, self.headers = folder, config, headers
        self.stamps, self.repo = stamps or {}, repo
        self.path_of = path_of or (lambda shard: folder / shard)
        self.args = ModelArgs.from_dict(config)
        self.block = block_size(config)
        self.shard_bytes = {shard: size for shard, (_, size) in headers.items()}
        self.tensors: dict[str, TensorInfo] = join_headers(
            parse_header(folder / shard, *header) for shard, header in headers.items()
        )
        digest = hashlib.sha256()
        for shard, (raw, size) in headers.items():
            digest.update(f"{shard} {size} ".encode() + raw)
        self.headers_sha256 = digest.hexdigest()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def scale_of(self, name: str) -> str | None:
        """Return the name of an FP8 weight's scales, or None for another tensor."""
        return name + SCALE_SUFFIX if self.tensors[name].dtype == "F8_E4M3" else None

    def shards_of(self, names: Iterable[str]) -> set[str]:
        """Return the shards that hold these weights and their scales."""
        shards = set()
        for name in names:
            shards.add(self.tensors[name].shard)
            if scale := self.scale_of(name):
                shards.add(self.tensors[scale].shard)
        return shards

    def read(self, name: str, rows: tuple[int, int] | None = None) -> bytearray:
        """Return a tensor's bytes, or those of rows [start, stop) of a matrix."""
        tensor = self.tensors[name]
        start, nbytes = tensor.offset, tensor.nbytes
        if rows:
            row_bytes = nbytes // tensor.shape[0]
            start, nbytes = start + rows[0] * row_bytes, (rows[1] - rows[0]) * row_bytes
        return read_bytes(self.path_of(tensor.shard), start, nbytes)

    def read_small(self, name: str) -> bytes:
        """Return a small tensor's bytes, by a request where its shard need not be here."""
        if self.repo is None:
            return self.read(name)
        tensor = self.tensors[name]
        return self.repo.read(tensor.shard, tensor.offset, tensor.nbytes)


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
    are_sizes = isinstance(block, list) and all(type(n) is int and n > 0 for n in block)
    if not are_sizes or len(block) != 2:
        raise UserError(
            f"config.json has `weight_block_size` `{block}`; two sizes are needed",
            "look on the hub for the block FP8 or BF16 form of this checkpoint",
        )
    return (block[0], block[1])


def convertible(config: dict) -> ModelArgs:
    """Refuse what does not convert before any shard is looked at."""
    args = ModelArgs.from_dict(config)
    block_size(config)
    return args


def needed_shards(folder: Path, args: ModelArgs, only_mtp: bool) -> dict[str, list[str] | None]:
    """Return shard -> names of its tensors, None without an index; perhaps of the MTP layer's."""
    if not (folder / INDEX).exists():
        return {SINGLE: None}
    prefix = mtp_prefix(args) if only_mtp else ""
    return {
        shard: names
        for shard, names in read_index(folder).items()
        if any(name.startswith(prefix) for name in names)
    }


def copied_files(folder: Path) -> list[Path]:
    """Return the source's tokenizer, template, licence and code files."""
    found = {path for pattern in COPIED for path in folder.glob(pattern) if not path.is_dir()}
    return sorted(found)


def check_copies(folder: Path) -> None:
    """Refuse what cannot be copied: it is the last thing that a conversion does, hours later."""
    for path in copied_files(folder):
        name = os.fsencode(path.name).decode(errors="backslashreplace")
        if name != path.name:
            hint = "rename or remove it: conversion.json could not list it"
            raise UserError(f"`{name}` in `{folder}` has a name that is not UTF-8", hint)
        if not path.is_file():  # a link to nothing, in half a cache; or a pipe, which would wait
            raise UserError(f"`{path}` is not a file", "fetch the file again, or remove it")
        open(path, "rb").close()


def open_folder(folder: Path, only_mtp: bool = False) -> Source:
    """Open a local checkpoint; raise `UserError` for whatever is missing or damaged.

    With `only_mtp`, shards that hold nothing of the MTP layer are left alone.
    """
    config = read_config(folder)
    shards = needed_shards(folder, convertible(config), only_mtp)
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing == [SINGLE] and not (folder / INDEX).exists():
        raise UserError(f"`{folder}` has no {INDEX} and no {SINGLE}", AGAIN)
    if missing:
        raise UserError(
            f"`{missing[0]}` is missing in `{folder}` ({len(missing)} of {len(shards)} shards)",
            "fetch the missing shards; nothing is converted from an incomplete checkpoint",
        )
    check_copies(folder)
    stamps = {shard: stamp(folder / shard) for shard in shards}
    headers = read_raw_headers(folder, shards)
    source = Source(folder, config, headers, stamps=stamps)
    check_index(source, shards)
    return source


def check_index(source: Source, shards: dict[str, list[str] | None]) -> None:
    """Refuse an index that disagrees with the shards' own headers."""
    for shard, names in shards.items():
        for name in names or ():
            if name not in source.tensors or source.tensors[name].shard != shard:
                raise UserError(
                    f"`{INDEX}` puts `{name}` into `{shard}`, which does not hold it",
                    "fetch the index and the shard again; they belong to different revisions",
                )
    indexed = {name for names in shards.values() for name in names or ()}
    unindexed = [name for name in source.tensors if indexed and name not in indexed]
    if unindexed:
        where = source.tensors[unindexed[0]].shard
        raise UserError(
            f"`{where}` holds `{unindexed[0]}`, which `{INDEX}` does not name",
            "fetch the index again; it belongs to another revision",
        )
