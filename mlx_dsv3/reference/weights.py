"""Hub checkpoint -> reference modules: a whole model, or the part of a layer that is asked for.

FP8 weights are dequantised in float32 and rounded to bfloat16, whatever the dtype asked for: that
is the value every other path of the project starts from. Only `fp8` arithmetic keeps them as they
are.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mlx_dsv3.errors import UserError
from mlx_dsv3.reference.args import Args
from mlx_dsv3.reference.fp8 import BLOCK, PLAIN, Fp8Linear, Operations
from mlx_dsv3.reference.hub import HubTensors, Stored, check_tensors, dequantized
from mlx_dsv3.reference.model import Model

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
            raise UserError(
                "`--arithmetic fp8` knows blocks of 128 x 128 only",
                "`--arithmetic bf16` knows others",
            )
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    return Arithmetic(name, dtype, device, quantization.get("scale_fmt") == "ue8m0", operations)


def fill(
    module: nn.Module, values: dict[str, Stored], arithmetic: Arithmetic, block: int = BLOCK
) -> None:
    """Give a module (on the meta device) its weights by parameter name, on the device computing.

    A linear layer whose weight stays FP8 is replaced by an `Fp8Linear`. The selection bias of the
    router is float32 at least.
    """
    for name, stored in values.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
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


def meta_model(args: Args) -> Model:
    """Return the modules of a whole model without weights."""
    with torch.device("meta"):
        return Model(args).eval()


def load(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    arithmetic: Arithmetic | None = None,
) -> Model:
    """Read a hub folder (FP8 blocks or bfloat16) into a reference model.

    `dtype` is that of weights and activations (float64, float32 or bfloat16); `arithmetic` takes
    its place where FP8 or a device is wanted. Raises `UserError` for a checkpoint that is not
    whole, or not of this model.
    """
    tensors = HubTensors(folder)
    arithmetic = arithmetic or Arithmetic(str(dtype).removeprefix("torch."), dtype)
    args = Args.from_dict(tensors.config)
    check_tensors(tensors, args)
    model = meta_model(args)
    for name in model.state_dict():
        fill(model, {name: tensors.stored(name)}, arithmetic, tensors.block)
    return model
