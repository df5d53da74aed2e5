"""The format of an MLX folder, written down once: names of files and tensors, packing of weights.

The converter writes by it, the runtime and the memory plan read by it. All here are words, small
calculations on words and shapes, and the one reader of an index and of a manifest; docs/tensors.md
draws the whole.

A *record* is the nine tensors of one expert, adjacent in its file and in this order: gate, up,
down, of each the weight, the scales, the biases. mlx-lm's own arrangement is *stacked*: one tensor
for all experts of a layer.
"""

import re
from collections.abc import Iterable, Iterator
from numbers import Real
from pathlib import Path
from typing import NamedTuple

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


def infer_quantization(width: int, packed: int, groups: int, in_blocks: bool) -> Quantization:
    """Recover the packing of rows of `width` from their 32-bit words and their scales.

    `in_blocks` says that the scales have one byte each, as in the block formats.
    """
    bits, group_size = packed * 32 // width, width // groups
    mode = BLOCK_MODES[bits, group_size] if in_blocks else "affine"
    return Quantization(bits, group_size, mode)


def trunk_file(i: int, count: int) -> str:
    return f"model-trunk-{i + 1:05d}-of-{count:05d}.safetensors"


def experts_file(layer: int) -> str:
    return f"model-experts-{layer:05d}.safetensors"


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def mtp_prefix(args: ModelArgs) -> str:
    """Return how the names of the MTP layer begin: it is the layer after the last."""
    return layer_prefix(args.num_hidden_layers)


def check_depth(args: ModelArgs, names: Iterable[str]) -> None:
    """Refuse a number of layers that the tensors do not have, before anything is made of it."""
    last = layer_prefix(args.num_hidden_layers - 1)
    if not any(name.startswith(last) for name in names):
        raise UserError(
            f"config.json has `num_hidden_layers` = `{args.num_hidden_layers}`; no tensor of "
            f"layer {args.num_hidden_layers - 1} is there",
            "the download is incomplete, or config.json is another checkpoint's; fetch both again",
        )


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
        if not is_file_name(shard):
            raise UserError(
                f"`{folder / INDEX}` puts `{brief(tensor)}` into `{brief(shard)}`, which is not a "
                "file name",
                AGAIN,
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
    return all(isinstance(n, Real) for n in numbers) and isinstance(worst.get("tensor", ""), str)
