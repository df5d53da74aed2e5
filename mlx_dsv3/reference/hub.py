"""A hub checkpoint as a folder: which tensor lies where, and whether it is this model's, whole.

Tensors are found through the index, so a weight and its scale may lie in different shards. They are
read when asked for; what the headers say is compared with config.json before that.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlx_dsv3.errors import UserError
from mlx_dsv3.json_files import AGAIN, MOST_VALUES, brief, read_json
from mlx_dsv3.reference.args import Args, block_size
from mlx_dsv3.reference.files import Entry, Header, read_bytes, read_header
from mlx_dsv3.reference.fp8 import BLOCK, PLAIN, Operations
from mlx_dsv3.reference.model import Model, is_moe_layer, make_layer

SCALE_SUFFIX = "_scale_inv"
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
INDEX_BYTES = 32 << 20  # at most
MTP_COPIES = ("embed_tokens.weight", "shared_head.head.weight")  # of the main model's
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OTHER = "config.json and shards belong to different checkpoints; fetch both again"


class Stored(NamedTuple):
    """A tensor as stored, with the scales of an FP8 weight."""

    tensor: Tensor
    scale: Tensor | None = None


class HubTensors:
    """The tensors of a hub folder by name, read when asked for."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"`{folder}` is not a folder", "give the folder of a hub checkpoint")
        if not (self.folder / "config.json").exists():
            raise UserError(f"`{folder}` has no config.json", "give the folder of a hub checkpoint")
        self.config = read_json(self.folder / "config.json")
        self.block = block_size(self.config)
        self._headers = {}
        index = self.folder / INDEX
        if index.exists():
            self.shard_of = read_index(index)
        else:
            self.shard_of = dict.fromkeys(self._header(SINGLE_FILE).entries, SINGLE_FILE)

    def _header(self, shard: str) -> Header:
        if shard not in self._headers:
            if not (self.folder / shard).exists():
                raise UserError(f"`{shard}` is missing from `{self.folder}`", "download it again")
            self._headers[shard] = read_header(self.folder / shard)
            if sum(len(header.entries) for header in self._headers.values()) > MOST_VALUES:
                raise UserError(f"`{self.folder}` holds more tensors than any model", OTHER)
        return self._headers[shard]

    def entry(self, name: str) -> Entry:
        """Return where a tensor lies; raise `UserError` when no shard has it."""
        shard = self.shard_of.get(name)
        if shard is None or name not in self._header(shard).entries:
            raise UserError(
                f"`{name}` is in none of the shards of `{self.folder}`",
                "the download looks incomplete; "
                f"`python -m convert plan {self.folder}` lists what is missing",
            )
        return self._header(shard).entries[name]

    def raw(self, name: str) -> Tensor:
        """Return a tensor as stored."""
        entry = self.entry(name)
        return read_bytes(entry, 0, entry.nbytes).view(entry.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of a matrix as stored."""
        entry = self.entry(name)
        row_bytes = entry.nbytes // entry.shape[0]
        rows = read_bytes(entry, start * row_bytes, (stop - start) * row_bytes)
        return rows.view(stop - start, *entry.shape[1:])

    def stored(self, name: str) -> Stored:
        """Return a tensor as stored, with its scales where it is FP8."""
        is_fp8 = self.entry(name).dtype == torch.float8_e4m3fn
        return Stored(self.raw(name), self.raw(name + SCALE_SUFFIX) if is_fp8 else None)

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a tensor in `dtype`, dequantised where it is FP8."""
        return dequantized(self.stored(name), dtype, self.block)

    def headers_sha256(self) -> str:
        """Return the digest of all shards' names, sizes and headers, as conversion.json has it."""
        digest = hashlib.sha256()
        for shard in sorted(set(self.shard_of.values())):
            raw, size = self._header(shard).raw, (self.folder / shard).stat().st_size
            digest.update(f"{shard} {size} ".encode() + raw)
        return digest.hexdigest()

    def source_sha256(self) -> str:
        """Return a digest that tells checkpoints of one shape apart: headers, norms and biases."""
        digest = hashlib.sha256(self.headers_sha256().encode())
        for name in sorted(self.shard_of):
            entry = self.entry(name)
            if len(entry.shape) == 1:
                values = read_bytes(entry, 0, entry.nbytes)
                digest.update(name.encode() + bytes(values.view(torch.uint8).tolist()))
        return digest.hexdigest()


def read_index(path: Path) -> dict[str, str]:
    """Return tensor -> shard of an index; raise `UserError` unless shards are names of files."""
    weight_map = read_json(path, INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"`{path}` has no `weight_map`", AGAIN)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(
                f"`{path}` puts `{brief(name)}` into `{brief(shard)}`, which is not a file name",
                AGAIN,
            )
    return weight_map


def check_tensors(tensors: HubTensors, args: Args) -> None:
    """Refuse a checkpoint that lacks a tensor of this model, has it in another form, or has more.

    Looks at headers alone, a layer at a time, before hours of work. A tensor too many, such as a
    bias, belongs to an arithmetic that is not this one.
    """
    with torch.device("meta"):
        outer = Model(replace(args, num_hidden_layers=0, num_nextn_predict_layers=0))
    known, kinds = check_forms(tensors, forms(outer), ""), {}
    for i in range(args.num_hidden_layers + args.num_nextn_predict_layers):
        kind = (i >= args.num_hidden_layers, is_moe_layer(args, i))
        if kind not in kinds:  # 256 experts take 0.4 s to make
            with torch.device("meta"):
                kinds[kind] = forms(make_layer(args, i))
        known |= check_forms(tensors, kinds[kind], f"model.layers.{i}.")
    for copy in MTP_COPIES if args.num_nextn_predict_layers else ():
        known.add(f"model.layers.{args.num_hidden_layers}.{copy}")
    for name in tensors.shard_of:
        if name not in known and not name.endswith("rotary_emb.inv_freq"):
            raise UserError(
                f"the shards hold `{brief(name)}`, which the model of config.json does not have",
                OTHER,
            )


def forms(module: nn.Module) -> list[tuple[str, tuple[int, ...], bool]]:
    """Return name and shape of a module's tensors, and whether each may be FP8: in linear layers.

    lm_head is one, but is never FP8 and read by rows.
    """
    linear = {f"{name}.weight" for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    linear.discard("lm_head.weight")
    return [(name, tuple(p.shape), name in linear) for name, p in module.state_dict().items()]


def check_forms(tensors: HubTensors, wanted: list, prefix: str) -> set[str]:
    """Compare what the shards hold with `forms`; return the names, with those of scales."""
    known = set()
    for name, shape, may_be_fp8 in wanted:
        name, entry = prefix + name, tensors.entry(prefix + name)
        known.add(name)
        if entry.shape != shape:
            raise UserError(
                f"`{name}` has shape {entry.shape}; config.json says {shape}",
                OTHER,
            )
        if entry.dtype == torch.float8_e4m3fn and may_be_fp8:
            known.add(check_scale(tensors, name, shape))
        elif entry.dtype not in FLOATS:
            raise UserError(
                f"`{name}` is `{entry.dtype}`, which it is in no checkpoint of this family",
                "look on the hub for the FP8 or BF16 form of this checkpoint",
            )
    return known


def check_scale(tensors: HubTensors, name: str, shape: tuple[int, ...]) -> str:
    """Return the name of an FP8 weight's scales; refuse those that do not cover it."""
    if not tensors.config.get("quantization_config"):
        raise UserError(
            f"`{name}` is FP8 and config.json has no `quantization_config`",
            "copy config.json from the model's page on the hub",
        )
    scale = tensors.entry(name + SCALE_SUFFIX)
    want = tuple(-(-size // tensors.block) for size in shape)
    if scale.shape != want or scale.dtype not in (*FLOATS, torch.float8_e8m0fnu):
        raise UserError(
            f"`{name}{SCALE_SUFFIX}` is `{scale.dtype}` of shape {scale.shape}; "
            f"blocks of {tensors.block} need {want} numbers",
            OTHER,
        )
    return name + SCALE_SUFFIX


def dequantized(
    stored: Stored, dtype: torch.dtype, block: int = BLOCK, operations: Operations = PLAIN
) -> Tensor:
    """Return a stored tensor in `dtype`; FP8 by way of bfloat16."""
    tensor, scale = stored
    if scale is not None:
        tensor = operations.dequantize(tensor, scale, block)
    return tensor.to(dtype)
