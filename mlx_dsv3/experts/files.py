"""Routed experts on disk: the requests that bring one expert into the rows of a slot.

A *record* folder has the nine tensors of an expert adjacent in one file, a *stacked* folder
(mlx-lm's `switch_mlp`) has a share of nine tensors. Both become a list of requests, each one
range of adjacent bytes. Knows files, dtypes and layouts; reads nothing, and knows no bank.
"""

from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dsv3.checkpoint.format import (
    BLOCK_SCALES,
    PARTS,
    PROJECTIONS,
    Quantization,
    infer_quantization,
    record_prefix,
    stacked_prefix,
)
from mlx_dsv3.checkpoint.headers import TensorInfo
from mlx_dsv3.config import ModelArgs
from mlx_dsv3.errors import UserError

# Adjacent spans join up to this size: V3's record (24.8 MB at 4 bits) becomes its three
# projections, a small model's record one request. Disks need 12-16 requests of 4-8 MB in flight.
REQUEST_BYTES = 9 << 20
FLOAT_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
AGAIN = "the folder is incomplete; convert or download it again"


class Span(NamedTuple):
    """Adjacent bytes of one tensor and their place: `begin` counts in bytes of the file's dtype."""

    target: str  # "gate_up.weight" and so on
    begin: int
    nbytes: int
    dtype: str


class Request(NamedTuple):
    """One read: spans that follow each other in a file."""

    path: Path
    offset: int
    nbytes: int
    spans: tuple[Span, ...]


class LayerExperts:
    """One layer's experts on disk: dtypes, shapes, and the requests for each expert."""

    def __init__(self, layer: int, tensors: dict[str, TensorInfo], args: ModelArgs):
        self.layer, self.args, self.tensors = layer, args, tensors
        stacked, record = stacked_prefix(layer), record_prefix(layer)
        self.is_stacked = f"{stacked}gate_proj.weight" in tensors
        experts = range(args.n_routed_experts)
        if self.is_stacked and any(f"{record}{i}.gate_proj.weight" in tensors for i in experts):
            raise UserError(
                f"layer {layer} has its experts twice: as `{record}*` and as `{stacked}*`",
                "convert the checkpoint again into an empty folder",
            )
        self.prefix = stacked if self.is_stacked else record

    def info(self, expert: int, projection: str, part: str) -> TensorInfo | None:
        """Return one expert's part: a whole record tensor or its share of a stacked one."""
        if not self.is_stacked:
            return self.tensors.get(f"{self.prefix}{expert}.{projection}.{part}")
        whole = self.tensors.get(f"{self.prefix}{projection}.{part}")
        if whole is None:
            return None
        if whole.shape[0] != self.args.n_routed_experts:
            raise UserError(
                f"`{self.prefix}{projection}.{part}` holds {whole.shape[0]} experts; "
                f"config.json says {self.args.n_routed_experts}"
            )
        nbytes = whole.nbytes // whole.shape[0]
        offset = whole.offset + expert * nbytes
        return TensorInfo(whole.path, whole.dtype, whole.shape[1:], offset, nbytes)

    def required(self, expert: int, projection: str, part: str, like: TensorInfo) -> TensorInfo:
        """Return a part that must exist with the dtype and shape of the first expert's."""
        info = self.info(expert, projection, part)
        name = f"{self.prefix}{expert}.{projection}.{part}"
        if info is None:
            raise UserError(f"`{name}` is in none of the files of `{like.path.parent}`", AGAIN)
        if (info.dtype, info.shape) != (like.dtype, like.shape):
            raise UserError(
                f"`{name}` is {info.dtype} {info.shape}, expert 0 has {like.dtype} {like.shape}"
            )
        return info

    def parts(self, projection: str) -> dict[str, TensorInfo]:
        """Return the parts that expert 0 has of a projection."""
        found = {part: self.info(0, projection, part) for part in PARTS}
        if found["weight"] is None:
            name = f"{self.prefix}*.{projection}.weight"
            raise UserError(f"layer {self.layer} has no `{name}`", AGAIN)
        found = {part: info for part, info in found.items() if info is not None}
        weights = ("U32",) if "scales" in found else FLOAT_BYTES
        kinds = {"weight": weights, "scales": (*FLOAT_BYTES, BLOCK_SCALES), "biases": FLOAT_BYTES}
        for part, info in found.items():
            if info.dtype not in kinds[part]:
                name = f"{self.prefix}*.{projection}.{part}"
                raise UserError(f"layer {self.layer} has `{name}` in {info.dtype}", AGAIN)
        return found

    def quantization(self, projection: str) -> Quantization | None:
        """Return how a projection is packed, None where it is not."""
        args, parts = self.args, self.parts(projection)
        in_dims, out_dims = args.hidden_size, args.moe_intermediate_size
        if projection == "down_proj":
            in_dims, out_dims = out_dims, in_dims
        weight, scales = parts["weight"], parts.get("scales")
        expected = (out_dims, in_dims) if scales is None else (out_dims, weight.shape[-1])
        if weight.shape != expected or (scales is not None and scales.shape[0] != out_dims):
            raise UserError(
                f"layer {self.layer}: an expert's `{projection}.weight` has shape {weight.shape}; "
                f"config.json says {(out_dims, in_dims)}"
            )
        if scales is None:
            return None
        in_blocks = scales.dtype == BLOCK_SCALES
        name = f"{self.prefix}*.{projection}.weight"
        return infer_quantization(in_dims, weight.shape[-1], scales.shape[-1], in_blocks, name)

    def requests(self, expert: int) -> tuple[Request, ...]:
        """Return the reads of one expert, in file order, adjacent spans joined."""
        found = []
        for projection in PROJECTIONS:
            target = "down" if projection == "down_proj" else "gate_up"
            for part, like in self.parts(projection).items():
                info = self.required(expert, projection, part, like)
                begin = info.nbytes if projection == "up_proj" else 0  # up's rows follow gate's
                span = Span(f"{target}.{part}", begin, info.nbytes, info.dtype)
                found.append((str(info.path), info.offset, info.path, span))
        joined: list[Request] = []
        for _, offset, path, span in sorted(found, key=lambda entry: entry[:2]):
            last = joined[-1] if joined else None
            if last and (last.path, last.offset + last.nbytes) == (path, offset):
                if last.nbytes + span.nbytes <= REQUEST_BYTES:
                    nbytes, spans = last.nbytes + span.nbytes, (*last.spans, span)
                    joined[-1] = Request(path, last.offset, nbytes, spans)
                    continue
            joined.append(Request(path, offset, span.nbytes, (span,)))
        return tuple(joined)


def convert_floats(buffer: bytearray, source: str, target: mx.Dtype) -> bytes:
    """Convert float bytes from a file's dtype to a bank's (float32 or bfloat16)."""
    if source == "BF16":
        bits = np.frombuffer(buffer, np.uint16).astype(np.uint32) << 16
    else:
        kind = {"F16": np.float16, "F32": np.float32}[source]
        bits = np.frombuffer(buffer, kind).astype(np.float32).view(np.uint32)
    if target == mx.float32:
        return bits.tobytes()
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
    return (rounded >> 16).astype(np.uint16).tobytes()
