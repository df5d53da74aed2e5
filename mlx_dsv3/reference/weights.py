"""Hub checkpoint -> reference model, one layer at a time.

FP8 weights are dequantised in float32 and rounded to bfloat16, whatever the dtype asked for: that
is the value every other path of the project starts from. Tensors are found through the index, so
a weight and its scale may lie in different shards.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mlx_dsv3.errors import UserError
from mlx_dsv3.reference.fp8 import dequantize_blocks
from mlx_dsv3.reference.model import Args, Model

SCALE_SUFFIX = "_scale_inv"
SINGLE_FILE = "model.safetensors"


class HubTensors:
    """The tensors of a hub folder by name, read when asked for."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise UserError(f"`{folder}` has no config.json", "give the folder of a hub checkpoint")
        self.config = json.loads((self.folder / "config.json").read_text())
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            self.shard_of = json.loads(index.read_text())["weight_map"]
        else:
            with safe_open(self.folder / SINGLE_FILE, "pt") as shard:
                self.shard_of = dict.fromkeys(shard.keys(), SINGLE_FILE)
        quantization = self.config.get("quantization_config") or {}
        self.block = quantization.get("weight_block_size", [128, 128])[0]
        self._shards = {}

    def raw(self, name: str) -> Tensor:
        """Return a tensor as stored."""
        if name not in self.shard_of:
            raise UserError(
                f"`{name}` is in none of the shards of `{self.folder}`",
                "the download looks incomplete; "
                f"`python -m convert plan {self.folder}` lists what is missing",
            )
        shard = self.shard_of[name]
        if shard not in self._shards:
            self._shards[shard] = safe_open(self.folder / shard, "pt")
        return self._shards[shard].get_tensor(name)

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a tensor in `dtype`, dequantised where it is FP8."""
        tensor = self.raw(name)
        if tensor.dtype == torch.float8_e4m3fn:
            scale = self.raw(name + SCALE_SUFFIX)
            tensor = dequantize_blocks(tensor, scale, self.block).bfloat16()
        return tensor.to(dtype)


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> Model:
    """Read a hub folder (FP8 blocks or bfloat16) into a reference model of `dtype`.

    The selection bias of the router stays float32 (float64 in a float64 model). Raises `UserError`
    for a missing tensor.
    """
    tensors = HubTensors(folder)
    with torch.device("meta"):
        model = Model(Args.from_dict(tensors.config))
    for name in model.state_dict():
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        is_bias = name.endswith("e_score_correction_bias")
        value = tensors.weight(name, wide if is_bias else dtype)
        parameter = torch.nn.Parameter(value, requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if module.get_parameter(leaf).shape != value.shape:
            shape, want = tuple(value.shape), tuple(module.get_parameter(leaf).shape)
            raise UserError(f"`{name}` has shape {shape}; config.json says {want}")
        setattr(module, leaf, parameter)
    return model.eval()
