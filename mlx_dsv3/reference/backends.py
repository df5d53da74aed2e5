"""Which code multiplies FP8: plain torch, Triton kernels, or PyTorch's own block-scaled matmul.

Each candidate is probed on the device before it is trusted: it must run, and it must agree with
the plain loop. PyTorch's block-scaled matmul (cuBLAS) has these two scale layouts on Hopper only.
"""

import importlib.util
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mlx_dsv3.errors import UserError
from mlx_dsv3.reference.fp8 import BLOCK, PLAIN, Operations, quantize_activations, quantize_blocks

NAMES = ("auto", "plain", "triton", "scaled_mm")
# Normalised difference to the plain loop: DeepGEMM's table allows FP8 1e-3 against BF16; two FP8
# products differ by their sums alone, which Hopper keeps to about 2^-14.
AGREEMENT = 1e-4


def scaled_mm(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Multiply as `fp8.block_matmul` does through `torch.nn.functional.scaled_mm`, in bfloat16.

    cuBLAS needs whole blocks of K, token scales with tokens adjacent and their count a multiple of
    4, and weight scales with K blocks adjacent, padded to a multiple of 4.
    """
    T, K = x.shape
    codes = F.pad(x.view(torch.uint8), (0, -K % BLOCK, 0, -T % 4))
    weight = F.pad(weight.view(torch.uint8), (0, -K % BLOCK)).view(torch.float8_e4m3fn)
    x_scale = F.pad(x_scale, (0, 0, 0, -T % 4))
    weight_scale = F.pad(weight_scale, (0, -weight_scale.shape[1] % 4))
    out = F.scaled_mm(
        codes.view(torch.float8_e4m3fn),
        weight.t(),
        scale_a=x_scale.t().contiguous().t(),
        scale_recipe_a=F.ScalingType.BlockWise1x128,
        scale_b=weight_scale.t(),
        scale_recipe_b=F.ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )
    return out[:T]


def triton_operations() -> Operations:
    from mlx_dsv3.reference import kernels  # needs Triton, which is an extra

    return Operations(
        "triton", kernels.quantize_activations, kernels.dequantize, kernels.block_matmul
    )


def scaled_mm_operations() -> Operations:
    """Return PyTorch's matmul, beside the best quantisation at hand."""
    others = triton_operations() if importlib.util.find_spec("triton") else PLAIN
    return Operations("scaled_mm", others.quantize_activations, others.dequantize, scaled_mm)


MAKERS: dict[str, Callable[[], Operations]] = {
    "scaled_mm": scaled_mm_operations,
    "triton": triton_operations,
}


def normalised_difference(a: Tensor, b: Tensor) -> float:
    """Return 1 - 2 <a, b> / (|a|^2 + |b|^2)."""
    a, b = a.double(), b.double()
    return float(1 - 2 * (a * b).sum() / (a.square().sum() + b.square().sum()))


def probe(name: str, device: str) -> tuple[Operations | None, str]:
    """Try a backend on a small product: return its operations, or None and why it is not used."""
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return None, "Triton is not installed"
    generator = torch.Generator().manual_seed(0)
    weight, scale = quantize_blocks(torch.randn(256, 384, generator=generator))
    x = torch.randn(5, 384, generator=generator) * torch.logspace(-1, 1, 384)
    weight, scale, x = weight.to(device), scale.to(device), x.bfloat16().to(device)
    expected = PLAIN.block_matmul(*quantize_activations(x), weight, scale)
    try:
        operations = MAKERS[name]()
        actual = operations.block_matmul(
            *operations.quantize_activations(x, False), weight, scale
        ).float()
    except Exception as error:  # each missing feature raises a type of its own
        reason = str(error).strip().split("\n")[0]
        return None, reason or type(error).__name__
    difference = normalised_difference(actual, expected)
    if not difference < AGREEMENT:
        return None, f"it differs from the plain loop by {difference:.1e} (bound {AGREEMENT:.0e})"
    return operations, ""


def check_device(device: str) -> None:
    """Raise `UserError` unless tensors can be made on `device`: `cpu`, `cuda`, `cuda:1`, `mps`."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?|mps", device):
        raise UserError(
            f"`--device` is `{device}`; the reference runs on `cpu`, `cuda` and `cuda:N`",
            "leave it out for the first GPU, or the CPU where there is none",
        )
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # which one depends on how torch was built
        count = torch.cuda.device_count()
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"`--device {device}` does not work here, where PyTorch finds {count} NVIDIA GPUs: "
            f"{reason}",
            "`--device cpu` runs anywhere",
        ) from None


def choose_operations(name: str, device: str) -> Operations:
    """Return the FP8 operations of `name`, or with `auto` the first that passes its probe.

    Raises `UserError` when the one asked for does not run on `device` or disagrees.
    """
    if name not in NAMES:
        raise UserError(f"there is no FP8 backend `{name}`", f"choose one of {', '.join(NAMES)}")
    if name in MAKERS:
        operations, why = probe(name, device)
        if operations is None:
            raise UserError(
                f"`--matmul {name}` does not work on `{device}`: {why}",
                "`--matmul plain` runs anywhere",
            )
        return operations
    if name == "auto" and not device.startswith("cpu"):
        for candidate in MAKERS:
            operations, _ = probe(candidate, device)
            if operations is not None:
                return operations
    return PLAIN
