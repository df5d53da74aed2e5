"""Block FP8 in plain torch: how DeepSeek-V3's weights are stored.

A weight is float8_e4m3fn; `weight_scale_inv` holds one factor for each 128 x 128 block and
*multiplies*, despite its name. Blocks at the lower and right edge may be partial; the block size
is never inferred from the shapes.
"""

import torch
from torch import Tensor

BLOCK = 128
FP8_MAX = 448.0


def expand_scales(scale: Tensor, shape: tuple[int, int], block: int = BLOCK) -> Tensor:
    """Repeat block scales (ceil(rows/block), ceil(columns/block)) to the weight's shape."""
    rows, columns = shape
    return scale.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]


def dequantize_blocks(weight: Tensor, scale: Tensor, block: int = BLOCK) -> Tensor:
    """Return weight * scale in float32, both of any float dtype; the caller rounds to bfloat16."""
    return weight.float() * expand_scales(scale.float(), weight.shape, block)


def quantize_blocks(weight: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Quantise a float matrix to (float8_e4m3fn weight, float32 scale_inv) by the block maximum.

    Partial blocks count as padded with zeros. An all-zero block gets the scale 1.
    """
    rows, columns = weight.shape
    pad = (0, -columns % block, 0, -rows % block)
    blocks = torch.nn.functional.pad(weight.float().abs(), pad)
    blocks = blocks.unflatten(0, (-1, block)).unflatten(2, (-1, block))
    scale = blocks.amax(dim=(1, 3)) / FP8_MAX
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    scaled = weight.float() / expand_scales(scale, weight.shape, block)
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale
