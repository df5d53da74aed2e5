"""Routed experts: from byte extents in files to the slots of a bank.

An expert on disk is a handful of extents (file, offset, length, destination); a *record* folder
has them adjacent, a *stacked* folder (`switch_mlp`, mlx-lm's) spread over nine tensors, and both
go through the same code. Bytes are read with `preadv` straight into the rows of the bank's
arrays; only scales that must be widened pass through a buffer. No layer arithmetic here but the
gathered product itself.

Banks are owned by the store and are never assigned into, cast or updated: MLX would put another
array in their place and later reads would go to the orphan.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_dsv3.config import ModelArgs
from mlx_dsv3.errors import UserError
from mlx_dsv3.headers import TensorInfo

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PARTS = ("weight", "scales", "biases")
READERS = 8  # threads; a disk wants 8-16 requests in flight
EXPERT_KEY = re.compile(
    r"model\.layers\.(\d+)\.mlp\."
    r"(?:experts\.(\d+)|switch_mlp)\.(gate_proj|up_proj|down_proj)\.(weight|scales|biases)"
)
FLOATS = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
PACKED = {"U32": mx.uint32, "U8": mx.uint8}


@dataclass(frozen=True)
class Quantization:
    """How the weights of one projection are packed."""

    bits: int
    group_size: int
    mode: str


def infer_quantization(in_dims: int, packed: int, groups: int, scale_dtype: str) -> Quantization:
    """Recover bits, group size and mode from shapes; block formats have one-byte scales."""
    bits, group_size = packed * 32 // in_dims, in_dims // groups
    if scale_dtype != "U8":
        return Quantization(bits, group_size, "affine")
    modes = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}
    return Quantization(bits, group_size, modes[bits, group_size])


@dataclass
class Projection:
    """One linear map of C experts: weight (C, out, in or packed), scales and biases if packed."""

    weight: mx.array
    scales: mx.array | None
    biases: mx.array | None
    quantization: Quantization | None

    def gather(self, x: mx.array, slots: mx.array, is_sorted: bool) -> mx.array:
        """Multiply x (..., 1, in) by the expert in each slot (...): (..., 1, out)."""
        if self.quantization is None:
            weight = self.weight.swapaxes(-1, -2)
            return mx.gather_mm(x, weight, rhs_indices=slots, sorted_indices=is_sorted)
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.biases,
            rhs_indices=slots,
            transpose=True,
            group_size=self.quantization.group_size,
            bits=self.quantization.bits,
            mode=self.quantization.mode,
            sorted_indices=is_sorted,
        )


@dataclass
class Bank:
    """C slots of one layer's experts: gate and up as one projection of 2 F rows, and down."""

    gate_up: Projection
    down: Projection


@dataclass(frozen=True)
class Extent:
    """Bytes of one expert in a file, and where they go inside a slot's row."""

    path: Path
    offset: int
    length: int
    source_dtype: str
    target: str  # "gate_up.weight" and so on
    begin: int  # byte in the slot's row


class LayerExperts:
    """One layer's experts on disk: dtypes, shapes, and the extents of each expert."""

    def __init__(self, layer: int, tensors: dict[str, TensorInfo], args: ModelArgs):
        self.layer, self.args = layer, args
        prefix = f"model.layers.{layer}.mlp"
        self.tensors = tensors
        stacked, record = f"{prefix}.switch_mlp", f"{prefix}.experts"
        is_stacked = f"{stacked}.gate_proj.weight" in tensors
        if is_stacked and f"{record}.0.gate_proj.weight" in tensors:
            raise UserError(
                f"layer {layer} has its experts twice: as `{record}.*` and as `{stacked}.*`",
                "convert the checkpoint again into an empty folder",
            )
        self.is_stacked = is_stacked
        self.prefix = stacked if is_stacked else record

    def info(self, expert: int, projection: str, part: str) -> TensorInfo | None:
        """Return one expert's part: a whole record tensor or its share of a stacked one."""
        if not self.is_stacked:
            return self.tensors.get(f"{self.prefix}.{expert}.{projection}.{part}")
        whole = self.tensors.get(f"{self.prefix}.{projection}.{part}")
        if whole is None:
            return None
        if whole.shape[0] != self.args.n_routed_experts:
            raise UserError(
                f"`{self.prefix}.{projection}.{part}` holds {whole.shape[0]} experts; "
                f"config.json says {self.args.n_routed_experts}"
            )
        nbytes = whole.nbytes // whole.shape[0]
        offset = whole.offset + expert * nbytes
        return TensorInfo(whole.path, whole.dtype, whole.shape[1:], offset, nbytes)

    def required(self, expert: int, projection: str, part: str, like: TensorInfo) -> TensorInfo:
        """Return a part that must exist with the dtype and shape of the first expert's."""
        info = self.info(expert, projection, part)
        name = f"{self.prefix}.{expert}.{projection}.{part}"
        if info is None:
            raise UserError(
                f"`{name}` is in none of the files of `{like.path.parent}`",
                "the folder is incomplete; convert or download it again",
            )
        if (info.dtype, info.shape) != (like.dtype, like.shape):
            raise UserError(
                f"`{name}` is {info.dtype} {info.shape}, expert 0 has {like.dtype} {like.shape}"
            )
        return info

    def parts(self, projection: str) -> dict[str, TensorInfo]:
        """Return the parts that expert 0 has of a projection."""
        found = {part: self.info(0, projection, part) for part in PARTS}
        if found["weight"] is None:
            raise UserError(
                f"layer {self.layer} has no `{self.prefix}.*.{projection}.weight`",
                "the folder is incomplete; convert or download it again",
            )
        return {part: info for part, info in found.items() if info is not None}

    def quantization(self, projection: str) -> Quantization | None:
        """Return how a projection is packed, None where it is not."""
        args, parts = self.args, self.parts(projection)
        down = projection == "down_proj"
        in_dims = args.moe_intermediate_size if down else args.hidden_size
        out_dims = args.hidden_size if down else args.moe_intermediate_size
        weight, scales = parts["weight"], parts.get("scales")
        expected = (out_dims, in_dims) if scales is None else (out_dims, weight.shape[-1])
        if weight.shape != expected or (scales is not None and scales.shape[0] != out_dims):
            raise UserError(
                f"layer {self.layer}: an expert's `{projection}.weight` has shape {weight.shape}; "
                f"config.json says {(out_dims, in_dims)}"
            )
        if scales is None:
            return None
        return infer_quantization(in_dims, weight.shape[-1], scales.shape[-1], scales.dtype)

    def extents(self, expert: int) -> list[Extent]:
        """Return the byte ranges of one expert, in file order."""
        extents = []
        for projection in PROJECTIONS:
            target = "down" if projection == "down_proj" else "gate_up"
            for part, like in self.parts(projection).items():
                info = self.required(expert, projection, part, like)
                begin = info.nbytes if projection == "up_proj" else 0
                extent = Extent(
                    info.path, info.offset, info.nbytes, info.dtype, f"{target}.{part}", begin
                )
                extents.append(extent)
        return sorted(extents, key=lambda extent: (str(extent.path), extent.offset))


def bank_dtype(source: str, dtype: mx.Dtype) -> mx.Dtype:
    """Return the dtype of a bank array: packed words stay, floats take the activation dtype."""
    return PACKED.get(source) or dtype


def make_projection(
    experts: LayerExperts, names: tuple[str, ...], capacity: int, dtype: mx.Dtype
) -> Projection:
    """Allocate C slots for one or two projections stacked along their rows."""
    quantizations = {experts.quantization(name) for name in names}
    if len(quantizations) > 1:
        raise UserError(
            f"layer {experts.layer}: `gate_proj` and `up_proj` of the experts are quantised "
            "differently; mlx_dsv3 computes them as one product",
            "convert the checkpoint again with one of `python -m convert`'s recipes",
        )
    arrays = {}
    for part, info in experts.parts(names[0]).items():
        rows, columns = info.shape
        shape = (capacity, rows * len(names), columns)
        arrays[part] = mx.zeros(shape, bank_dtype(info.dtype, dtype))
    mx.eval(arrays)
    parts = [arrays.get(part) for part in PARTS]
    return Projection(*parts, quantization=quantizations.pop())


def widen(buffer: bytearray, source: str, target: mx.Dtype) -> bytes:
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


def read_exactly(fd: int, buffers: list, offset: int, path: Path) -> None:
    """Fill the buffers from `offset` on; raise `UserError` at a short file or a read error."""
    wanted = sum(len(buffer) for buffer in buffers)
    done = 0
    while done < wanted:
        try:
            count = os.preadv(fd, buffers, offset + done)
        except OSError as error:
            raise UserError(f"reading `{path}` at byte {offset + done}: {error.strerror}") from None
        if count == 0:
            raise UserError(
                f"`{path}` ends at byte {offset + done}, inside an expert",
                "the file was cut; convert or download it again",
            )
        done += count
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if buffers:
            buffers = [memoryview(buffers[0])[count:], *buffers[1:]]


class ExpertStore:
    """The routed experts of a folder and the banks they are computed from.

    `tensors` maps names to where they lie (main model and MTP sidecar); `dtype` is the activation
    dtype, which scales are held in. Call `open_layer` for each MoE layer, `close` at the end.
    """

    def __init__(self, tensors: dict[str, TensorInfo], args: ModelArgs, dtype: mx.Dtype):
        self.tensors, self.args, self.dtype = tensors, args, dtype
        self.banks: dict[int, Bank] = {}
        self._views: dict[int, dict[str, memoryview]] = {}
        self._files: dict[Path, int] = {}
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="expert-reader")

    def open_layer(self, layer: int) -> Bank:
        """Allocate a bank for every expert of a layer, fill it, and return it."""
        experts = LayerExperts(layer, self.tensors, self.args)
        capacity = self.args.n_routed_experts
        bank = Bank(
            make_projection(experts, ("gate_proj", "up_proj"), capacity, self.dtype),
            make_projection(experts, ("down_proj",), capacity, self.dtype),
        )
        self.banks[layer] = bank
        self._views[layer] = {
            f"{name}.{part}": memoryview(array).cast("B")
            for name in ("gate_up", "down")
            for part in PARTS
            if (array := getattr(getattr(bank, name), part)) is not None
        }
        plans = [experts.extents(expert) for expert in range(capacity)]
        for path in {extent.path for extents in plans for extent in extents}:
            self._files.setdefault(path, os.open(path, os.O_RDONLY))
        reads = [self._pool.submit(self._read, layer, e, plans[e]) for e in range(capacity)]
        for read in reads:
            read.result()
        return bank

    def _read(self, layer: int, slot: int, extents: list[Extent]) -> None:
        """Read one expert into a slot; adjacent extents are one request. Runs on a thread."""
        start = 0
        for i in range(1, len(extents) + 1):
            last = extents[i - 1]
            joins = i < len(extents) and (
                extents[i].path == last.path and extents[i].offset == last.offset + last.length
            )
            if not joins:
                self._read_run(layer, slot, extents[start:i])
                start = i

    def _read_run(self, layer: int, slot: int, extents: list[Extent]) -> None:
        buffers, widened = [], []
        for extent in extents:
            row = self._row(layer, slot, extent.target)
            target = self._array_dtype(layer, extent.target)
            if FLOATS.get(extent.source_dtype, target) == target:
                buffers.append(row[extent.begin : extent.begin + extent.length])
                continue
            scratch = bytearray(extent.length)
            ratio = target.size / FLOATS[extent.source_dtype].size
            begin = int(extent.begin * ratio)
            view = row[begin : begin + int(extent.length * ratio)]
            buffers.append(scratch)
            widened.append((scratch, extent.source_dtype, target, view))
        first = extents[0]
        read_exactly(self._files[first.path], buffers, first.offset, first.path)
        for scratch, source, target, view in widened:
            view[:] = widen(scratch, source, target)

    def _array_dtype(self, layer: int, target: str) -> mx.Dtype:
        name, part = target.split(".")
        return getattr(getattr(self.banks[layer], name), part).dtype

    def _row(self, layer: int, slot: int, target: str) -> memoryview:
        view = self._views[layer][target]
        row_bytes = len(view) // self.args.n_routed_experts
        return view[slot * row_bytes : (slot + 1) * row_bytes]

    def close(self) -> None:
        """Stop the readers and close the files; the banks stay usable."""
        self._pool.shutdown()
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
