"""Hub checkpoint -> reference modules: a whole model, or the part of a layer that is asked for.

FP8 weights are dequantised in float32 and rounded to bfloat16, whatever the dtype asked for: that
is the value every other path of the project starts from. Only `fp8` arithmetic keeps them as they
are. Tensors are found through the index, so a weight and its scale may lie in different shards,
and read with plain reads: a mapped shard would count as memory of this process.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlx_dsv3.errors import UserError
from mlx_dsv3.reference.fp8 import BLOCK, PLAIN, Fp8Linear, Operations
from mlx_dsv3.reference.model import Args, Model

SCALE_SUFFIX = "_scale_inv"
SINGLE_FILE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
}
NAMES = ("fp8", "bf16", "float32")


@dataclass(frozen=True)
class Arithmetic:
    """How a reference computes: dtype of activations, and whether FP8 weights stay FP8.

    `fp8` is that of DeepSeek's own code (spec 5.1): BF16 activations, quantised where they meet an
    FP8 weight. kv_b_proj is dequantised, as the absorbed form does it.
    """

    name: str = "float32"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    ue8m0: bool = False
    operations: Operations = PLAIN

    def keeps_fp8(self, name: str) -> bool:
        return self.name == "fp8" and "kv_b_proj" not in name


def arithmetic_of(
    name: str, config: dict, device: str = "cpu", operations: Operations = PLAIN
) -> Arithmetic:
    """Return the arithmetic `fp8`, `bf16` or `float32` for the checkpoint with this config.json.

    Scales of activations are powers of two where the config says `scale_fmt: ue8m0`.
    """
    if name not in NAMES:
        raise UserError(f"there is no arithmetic `{name}`", f"choose one of {', '.join(NAMES)}")
    quantization = config.get("quantization_config") or {}
    if name == "fp8":
        if quantization.get("quant_method") != "fp8":
            raise UserError(
                "`--arithmetic fp8` needs FP8 weights; this checkpoint has none",
                "`--arithmetic bf16` is the arithmetic of such a checkpoint",
            )
        if quantization.get("weight_block_size", [BLOCK, BLOCK]) != [BLOCK, BLOCK]:
            raise UserError("`--arithmetic fp8` knows blocks of 128 x 128 only")
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    return Arithmetic(name, dtype, device, quantization.get("scale_fmt") == "ue8m0", operations)


class Entry(NamedTuple):
    """Where a tensor lies in its shard."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Stored(NamedTuple):
    """A tensor as stored, with the scales of an FP8 weight."""

    tensor: Tensor
    scale: Tensor | None = None


def read_header(path: Path) -> tuple[bytes, dict[str, Entry]]:
    """Return the raw header of a safetensors file and its tensors."""
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        raw = file.read(length)
    if len(prefix) < 8 or len(raw) < length:
        raise UserError(f"`{path.name}` is cut off within its header", "download it again")
    entries = {}
    for name, info in json.loads(raw).items():
        if name != "__metadata__":
            begin, end = info["data_offsets"]
            dtype, shape = DTYPES.get(info["dtype"]), tuple(info["shape"])
            entries[name] = Entry(path, dtype, shape, 8 + length + begin, end - begin)
    return raw, entries


class HubTensors:
    """The tensors of a hub folder by name, read when asked for."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise UserError(f"`{folder}` has no config.json", "give the folder of a hub checkpoint")
        self.config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            self.shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            self.shard_of = dict.fromkeys(self._header(SINGLE_FILE)[1], SINGLE_FILE)
        quantization = self.config.get("quantization_config") or {}
        self.block = quantization.get("weight_block_size", [128, 128])[0]
        self._headers = {}

    def _header(self, shard: str) -> tuple[bytes, dict[str, Entry]]:
        if not (self.folder / shard).is_file():
            raise UserError(f"`{shard}` is missing from `{self.folder}`", "download it again")
        return read_header(self.folder / shard)

    def entry(self, name: str) -> Entry:
        """Return where a tensor lies; raise `UserError` when no shard has it."""
        shard = self.shard_of.get(name)
        if shard is not None and shard not in self._headers:
            self._headers[shard] = self._header(shard)
        if shard is None or name not in self._headers[shard][1]:
            raise UserError(
                f"`{name}` is in none of the shards of `{self.folder}`",
                "the download looks incomplete; "
                f"`python -m convert plan {self.folder}` lists what is missing",
            )
        return self._headers[shard][1][name]

    def _read(self, entry: Entry, start: int, nbytes: int) -> Tensor:
        """Return bytes of a tensor as a flat tensor of its dtype."""
        if entry.dtype is None:
            raise UserError(f"`{entry.path.name}` holds tensors of a dtype that is not known here")
        buffer = bytearray(nbytes)
        with open(entry.path, "rb", buffering=0) as file:
            file.seek(entry.start + start)
            view, done = memoryview(buffer), 0
            while done < nbytes and (count := file.readinto(view[done:])):
                done += count
        if done < nbytes:
            raise UserError(f"`{entry.path.name}` is cut off", "download it again")
        return torch.frombuffer(buffer, dtype=entry.dtype)

    def raw(self, name: str) -> Tensor:
        """Return a tensor as stored."""
        entry = self.entry(name)
        return self._read(entry, 0, entry.nbytes).view(entry.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of a matrix as stored."""
        entry = self.entry(name)
        row_bytes = entry.nbytes // entry.shape[0]
        rows = self._read(entry, start * row_bytes, (stop - start) * row_bytes)
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
            raw, size = self._header(shard)[0], (self.folder / shard).stat().st_size
            digest.update(f"{shard} {size} ".encode() + raw)
        return digest.hexdigest()

    def source_sha256(self) -> str:
        """Return a digest that tells checkpoints of one shape apart: headers, norms and biases."""
        digest = hashlib.sha256(self.headers_sha256().encode())
        for name in sorted(self.shard_of):
            entry = self.entry(name)
            if len(entry.shape) == 1:
                values = self._read(entry, 0, entry.nbytes)
                digest.update(name.encode() + bytes(values.view(torch.uint8).tolist()))
        return digest.hexdigest()


def dequantized(
    stored: Stored, dtype: torch.dtype, block: int = BLOCK, operations: Operations = PLAIN
) -> Tensor:
    """Return a stored tensor in `dtype`; FP8 by way of bfloat16."""
    tensor, scale = stored
    if scale is not None:
        tensor = operations.dequantize(tensor, scale, block)
    return tensor.to(dtype)


def fill(
    module: nn.Module, values: dict[str, Stored], arithmetic: Arithmetic, block: int = BLOCK
) -> None:
    """Give a module (on the meta device) its weights by parameter name, on the device computing.

    A linear layer whose weight stays FP8 is replaced by an `Fp8Linear`. The selection bias of the
    router is float32 at least. Raises `UserError` for a tensor of another shape.
    """
    for name, stored in values.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        shape, want = tuple(stored.tensor.shape), tuple(owner.get_parameter(leaf).shape)
        if shape != want:
            raise UserError(f"`{name}` has shape {shape}; config.json says {want}")
        here = Stored(*(None if part is None else part.to(arithmetic.device) for part in stored))
        if here.scale is not None and arithmetic.keeps_fp8(name):
            parent, _, child = path.rpartition(".")
            layer = Fp8Linear(*here, arithmetic.ue8m0, arithmetic.operations)
            setattr(module.get_submodule(parent), child, layer)
            continue
        is_bias = name.endswith("e_score_correction_bias")
        is_half = arithmetic.dtype == torch.bfloat16
        dtype = torch.float32 if is_bias and is_half else arithmetic.dtype
        value = dequantized(here, dtype, block, arithmetic.operations)
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))


def meta_model(config: dict) -> Model:
    """Return the modules of a whole model without weights."""
    with torch.device("meta"):
        return Model(Args.from_dict(config)).eval()


def load(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    arithmetic: Arithmetic | None = None,
) -> Model:
    """Read a hub folder (FP8 blocks or bfloat16) into a reference model.

    `dtype` is that of weights and activations (float64, float32 or bfloat16); `arithmetic` takes
    its place where FP8 or a device is wanted. Raises `UserError` for a missing tensor.
    """
    tensors = HubTensors(folder)
    arithmetic = arithmetic or Arithmetic(str(dtype).removeprefix("torch."), dtype)
    model = meta_model(tensors.config)
    for name in model.state_dict():
        fill(model, {name: tensors.stored(name)}, arithmetic, tensors.block)
    return model
