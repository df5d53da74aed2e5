"""The format of an MLX folder, written down once: names of files and tensors, packing of weights.

The converter writes by it, the runtime and the memory plan read by it. All here are words, small
calculations on words and shapes, and the one reader of an index and of a manifest; docs/tensors.md
draws the whole.

A *record* is the nine tensors of one expert, adjacent in its file and in this order: gate, up,
down, of each the weight, the scales, the biases. mlx-lm's own arrangement is *stacked*: one tensor
for all experts of a layer.
"""

import re
from collections.abc import Iterator
from numbers import Real
from pathlib import Path
from typing import NamedTuple

from mlx_dsv3.checkpoint.headers import TensorInfo
from mlx_dsv3.config import ModelArgs
from mlx_dsv3.errors import UserError
from mlx_dsv3.json_files import AGAIN, brief, read_json

FORMAT = 1  # the version that a manifest names

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"  # the only file of a checkpoint without an index
WEIGHTS = "model*.safetensors"
SIDECAR = "mtp.safetensors"  # the MTP layer, which the index leaves out: mlx-lm would refuse it
MANIFEST = "conversion.json"  # source, recipe, checksums; only the converter writes one
PARTIAL = ".partial"  # holds everything until a conversion is complete
INDEX_BYTES = 32 << 20  # at most; 20 MB at Kimi-K2's number of tensors, packed as records
# Of a role whose levels were fitted; the weighted ones where an importance was given.
FITTED_ERRORS = ("extremes_rms_error", "weighted_rms_error", "weighted_extremes_rms_error")
LAYOUTS = ("records", "stacked", "mtp")  # of routed experts; `mtp` is a sidecar alone

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PARTS = ("weight", "scales", "biases")
EXPERT_KEY = re.compile(
    r"model\.layers\.(\d+)\.mlp\."
    r"(?:experts\.(\d+)|switch_mlp)\.(gate_proj|up_proj|down_proj)\.(weight|scales|biases)"
)
SCALE_SUFFIX = "_scale_inv"  # of an FP8 weight's block scales in a hub checkpoint

BLOCK_SCALES = "U8"  # dtype of the scales in the block formats, which have no biases
BLOCK_MODES = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}
AFFINE = {(bits, size): "affine" for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64, 128)}
FLOATS = ("BF16", "F16", "F32")


class Quantization(NamedTuple):
    """Bits per weight, weights per scale, and mode, as `mx.quantize` takes them."""

    bits: int
    group_size: int = 64
    mode: str = "affine"

    def fits(self, width: int) -> bool:
        """Say whether rows of `width` can be quantised; mlx-lm leaves others alone."""
        return width % self.group_size == 0

    def as_config(self) -> dict:
        """Return the entry of config.json, which is what `mx.quantize` takes."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def arrays(self, shape: tuple[int, ...]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Yield part, dtype and shape of what a matrix (..., width) is packed into, in order."""
        *rows, width = shape
        yield "weight", "U32", (*rows, width * self.bits // 32)
        groups = (*rows, width // self.group_size)
        if self.mode == "affine":
            yield "scales", "BF16", groups
            yield "biases", "BF16", groups
        else:
            yield "scales", BLOCK_SCALES, groups


def infer_quantization(
    width: int, packed: int, groups: int, in_blocks: bool, name: str = "a weight"
) -> Quantization:
    """Recover the packing of rows of `width` from their 32-bit words and their scales.

    `in_blocks` says that the scales have one byte each, as in the block formats. Raises
    `UserError`, with the weight's `name`, where MLX has no such packing.
    """
    for (bits, group_size), mode in (BLOCK_MODES if in_blocks else AFFINE).items():
        if (width * bits, width) == (packed * 32, groups * group_size):
            return Quantization(bits, group_size, mode)
    raise UserError(
        f"`{name}` has {packed:,} words and {groups:,} scales in a row; MLX packs no row of "
        f"{width:,} weights so",
        "config.json and weights belong to different checkpoints; fetch or convert both again",
    )


def check_tensors(tensors: dict[str, TensorInfo]) -> None:
    """Refuse what no MLX folder holds: MLX says so in a traceback, or computes with it.

    Words and bytes must be part of a packed weight that has all its parts, row by row.
    """
    for name, info in tensors.items():
        path, _, part = name.rpartition(".")
        if info.dtype in FLOATS and part != "scales":
            continue
        parts = {part: info} | {part: tensors.get(f"{path}.{part}") for part in PARTS}
        if not _are_packed(*(parts[part] for part in PARTS)):
            words = [
                f"{part} {info.dtype} {list(info.shape)}" for part, info in parts.items() if info
            ]
            raise UserError(
                f"`{brief(path)}` in `{info.path}` is not packed as MLX does it: "
                + ", ".join(words),
                "convert the checkpoint again into an empty folder",
            )


def _are_packed(
    weight: TensorInfo | None, scales: TensorInfo | None, biases: TensorInfo | None
) -> bool:
    """Say whether these are the parts of one packed weight: words, scales, and perhaps biases."""
    if weight is None or scales is None or weight.dtype != "U32" or not weight.shape:
        return False
    if scales.dtype == BLOCK_SCALES:
        return biases is None and scales.shape[:-1] == weight.shape[:-1]
    if biases is None or not {scales.dtype, biases.dtype} <= set(FLOATS):
        return False
    return scales.shape == biases.shape and scales.shape[:-1] == weight.shape[:-1]


def trunk_file(i: int, count: int) -> str:
    return f"model-trunk-{i + 1:05d}-of-{count:05d}.safetensors"


def experts_file(layer: int) -> str:
    return f"model-experts-{layer:05d}.safetensors"


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a tensor belongs to; embedding and head have none."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def mtp_prefix(args: ModelArgs) -> str:
    """Return how the names of the MTP layer begin: it is the layer after the last."""
    return layer_prefix(args.num_hidden_layers)


def check_counts(args: ModelArgs, tensors: dict[str, TensorInfo]) -> None:
    """Refuse numbers of layers and experts that the tensors do not have, before anything is made.

    Everything is planned, listed and allocated by these two.
    """

    def refuse(name: str, why: str):
        raise UserError(
            f"config.json has `{name}` = `{getattr(args, name)}`; {why}",
            "the download is incomplete, or config.json is another checkpoint's; fetch both again",
        )

    last = layer_prefix(args.num_hidden_layers - 1)
    if not any(name.startswith(last) for name in tensors):
        refuse("num_hidden_layers", f"no tensor of layer {args.num_hidden_layers - 1} is there")
    for layer in range(args.num_hidden_layers):
        gate = f"{layer_prefix(layer)}mlp.gate.weight"
        if gate in tensors and tensors[gate].shape[:1] != (args.n_routed_experts,):
            refuse("n_routed_experts", f"`{gate}` has shape {list(tensors[gate].shape)}")


def record_prefix(layer: int) -> str:
    """Return how the names of a layer's records begin; the number of the expert follows."""
    return layer_prefix(layer) + "mlp.experts."


def stacked_prefix(layer: int) -> str:
    return layer_prefix(layer) + "mlp.switch_mlp."


def module_path(path: str) -> str:
    """Return mlx-lm's module of a path: an expert's projection belongs to `switch_mlp`."""
    prefix, middle, rest = path.partition(".mlp.experts.")
    return f"{prefix}.mlp.switch_mlp.{rest.partition('.')[2]}" if middle else path


def is_file_name(name: object) -> bool:
    """Say whether a name is one of a file in a folder, and leads nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)


def read_index(folder: Path) -> dict[str, list[str]]:
    """Return shard -> names of its tensors, in order, from the index file of `folder`."""
    weight_map = read_json(folder / INDEX, INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"`{folder / INDEX}` has no `weight_map`", AGAIN)
    shards = {}
    for tensor, shard in weight_map.items():
        if not is_file_name(shard) or not shard.endswith(".safetensors"):
            raise UserError(
                f"`{folder / INDEX}` puts `{brief(tensor)}` into `{brief(shard)}`, which is not a "
                "safetensors file beside it",
                "weights lie beside config.json; fetch them again, or move them there",
            )
        shards.setdefault(shard, []).append(tensor)
    return dict(sorted(shards.items()))


def read_manifest(folder: Path) -> dict:
    """Return conversion.json of a finished folder; raise `UserError` unless it is ours.

    Every field that a program reads is there and of its type; the recipe's roles are for whoever
    derives anything from them. Of `source`, keys that earlier versions did not write may lack.
    """
    manifest = read_json(folder / MANIFEST)

    def need(is_good: bool, name: str, value: object) -> None:
        if not is_good:
            raise UserError(
                f"`{folder / MANIFEST}` has `{brief(name)}` = `{brief(value)}`, which "
                "`python -m convert` does not write",
                "convert the checkpoint again into an empty folder",
            )

    need(manifest.get("format") == FORMAT, "format", manifest.get("format"))
    need(manifest.get("layout") in LAYOUTS, "layout", manifest.get("layout"))
    for name in ("plan", "device", "digest"):
        need(isinstance(manifest.get(name), str), name, manifest.get(name))
    for name in ("source", "recipe", "roles", "files"):
        need(isinstance(manifest.get(name), dict), name, manifest.get(name))
    need(isinstance(manifest["recipe"].get("name"), str), "recipe", manifest["recipe"])
    importance = manifest.get("importance", {"file": "", "sha256": ""})
    texts = importance.values() if isinstance(importance, dict) else [None]
    is_good = all(isinstance(text, str) for text in texts) and {*importance} == {"file", "sha256"}
    need(is_good, "importance", importance)
    for name, value in manifest["source"].items():
        kinds = int if name in ("tensors", "bytes") else str | None
        need(isinstance(value, kinds), f"source.{name}", value)
    for name, entry in manifest["files"].items():
        need(is_file_name(name) and _is_file_entry(entry), f"files.{name}", entry)
    for name, row in manifest["roles"].items():
        need(_is_role(row), f"roles.{name}", row)
    return manifest


def _is_file_entry(entry: object) -> bool:
    fields = entry if isinstance(entry, dict) else {}
    return type(fields.get("bytes")) is int and isinstance(fields.get("sha256"), str)


def _is_role(row: object) -> bool:
    if not isinstance(row, dict) or not isinstance(worst := row.get("worst", {}), dict):
        return False
    numbers = [row.get("bytes"), row.get("bits_per_weight")]
    numbers += [part.get("relative_rms_error", 0) for part in (row, worst)]
    numbers += [row.get(name, 0) for name in FITTED_ERRORS]
    return all(isinstance(n, Real) for n in numbers) and isinstance(worst.get("tensor", ""), str)
