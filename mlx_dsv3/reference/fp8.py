"""Block FP8 in plain torch: how DeepSeek-V3 stores its weights, and how its own code multiplies.

A weight is float8_e4m3fn; `weight_scale_inv` holds one factor for each 128 x 128 block and
*multiplies*, despite its name. Blocks at the lower and right edge may be partial; the block size
is never inferred from the shapes.

Activations are quantised when they meet an FP8 weight: one scale per token and 128 channels. The
product of each 128 channels is exact to float32 before its two scales apply, so scales cannot be
taken out of the sum. `kernels.py` has the same operations for a GPU; these are their oracle.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

BLOCK = 128
FP8_MAX = 448.0
SLAB_BLOCKS = 16  # rows of blocks dequantised at once: bounds the float32 copies
MIN_AMAX = 1e-4  # DeepSeek-V3 inference, kernel.py: an all-zero group would divide by zero


def expand_scales(scale: Tensor, shape: tuple[int, int], block: int = BLOCK) -> Tensor:
    """Repeat block scales (ceil(rows/block), ceil(columns/block)) to the weight's shape."""
    rows, columns = shape
    return scale.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]


def dequantize_blocks(weight: Tensor, scale: Tensor, block: int = BLOCK) -> Tensor:
    """Return weight * scale in float32, both of any float dtype; the caller rounds to bfloat16."""
    return weight.float() * expand_scales(scale.float(), weight.shape, block)


def dequantize(weight: Tensor, scale: Tensor, block: int = BLOCK) -> Tensor:
    """Return `dequantize_blocks` rounded to bfloat16, a slab of rows at a time."""
    out = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
    step = SLAB_BLOCKS * block
    for start in range(0, weight.shape[0], step):
        rows, scales = slice(start, start + step), scale[start // block :][:SLAB_BLOCKS]
        out[rows] = dequantize_blocks(weight[rows], scales, block)
    return out


def quantize_blocks(weight: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Quantise a float matrix to (float8_e4m3fn weight, float32 scale_inv) by the block maximum.

    Partial blocks count as padded with zeros. An all-zero block gets the scale 1.
    """
    rows, columns = weight.shape
    pad = (0, -columns % block, 0, -rows % block)
    blocks = nn.functional.pad(weight.float().abs(), pad)
    blocks = blocks.unflatten(0, (-1, block)).unflatten(2, (-1, block))
    scale = blocks.amax(dim=(1, 3)) / FP8_MAX
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    scaled = weight.float() / expand_scales(scale, weight.shape, block)
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def round_up_to_power_of_two(scale: Tensor) -> Tensor:
    """Return 2^ceil(log2 scale) for positive normal float32 numbers, from their exponent bits.

    A float log2 is off by one next to a power of two; DeepGEMM counts bits for the same reason.
    """
    bits = scale.contiguous().view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return (exponent << 23).view(torch.float32)


def quantize_activations(x: Tensor, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise x (T, K) per token and 128 channels: e4m3 (T, K) and float32 (T, ceil(K / 128)).

    The scale is max(|x|, 1e-4) / 448, with `ue8m0` rounded up to a power of two (spec 5.1;
    `act_quant` of DeepSeek-V3 inference). A last partial group counts as padded with zeros.
    """
    K = x.shape[-1]
    groups = nn.functional.pad(x.float(), (0, -K % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = groups.abs().amax(-1).clamp_min(MIN_AMAX) / FP8_MAX  # (T, ceil(K / 128))
    if ue8m0:
        scale = round_up_to_power_of_two(scale)
    # Casts beyond 448 give NaN or saturate, by library and version: never let them happen.
    scaled = (groups / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).flatten(-2)[..., :K]
    return scaled.to(torch.float8_e4m3fn), scale


def block_matmul(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Multiply x (T, K) by the transpose of weight (O, K), both e4m3; return float32 (T, O).

    x_scale is (T, ceil(K / 128)), weight_scale (ceil(O / 128), ceil(K / 128)) float32. Products
    of two e4m3 numbers are exact in float32 (8 bits of 24), so each block differs from the exact
    one by the rounding of its sum alone.
    """
    out = x_scale.new_zeros(x.shape[0], weight.shape[0])
    row_scale = weight_scale.repeat_interleave(BLOCK, 0)[: weight.shape[0]]  # (O, ceil(K / 128))
    for i in range(x_scale.shape[-1]):
        columns = slice(i * BLOCK, (i + 1) * BLOCK)
        part = x[:, columns].float() @ weight[:, columns].float().T  # (T, O)
        out += part * x_scale[:, i, None] * row_scale[:, i]
    return out


class Operations(NamedTuple):
    """The FP8 operations of one backend; signatures as in this file."""

    name: str
    quantize_activations: Callable[[Tensor, bool], tuple[Tensor, Tensor]]
    dequantize: Callable[[Tensor, Tensor, int], Tensor]
    block_matmul: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


PLAIN = Operations("plain", quantize_activations, dequantize, block_matmul)


class Fp8Linear(nn.Module):
    """A linear layer whose weight stays FP8 blocks: x is quantised, then multiplied by blocks."""

    def __init__(self, weight: Tensor, scale: Tensor, ue8m0: bool, operations: Operations = PLAIN):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.float())
        self.ue8m0, self.operations = ue8m0, operations

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., O) in the dtype of x (..., K): one cast at the end."""
        codes, scale = self.operations.quantize_activations(x.flatten(0, -2), self.ue8m0)
        y = self.operations.block_matmul(codes, scale, self.weight, self.scale)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])
