"""Roundings between the trained weights and a chat: FP8 blocks on disk, then 4 bits.

A simulation for training and for `evaluate.py`; the converter's own rounding is MLX's, which
chooses the offset of a group a little differently.
"""

import torch

from demo.model_config import CONFIG
from mlx_dsv3.reference.fp8 import dequantize_blocks, quantize_blocks

GROUP = 64
LAYERS = CONFIG["num_hidden_layers"]


def is_fp8(name: str) -> bool:
    """Say whether the hub stores this tensor as FP8 blocks: every projection except eh_proj."""
    return name.endswith("_proj.weight") and "eh_proj" not in name or "kv_a_proj_with_mqa" in name


def four_bit_names(names) -> list[str]:
    """Return the tensors that recipe q4 holds in 4 bits: matrices outside routers and MTP layer."""
    mtp = f"model.layers.{LAYERS}."
    wide = ("embed_tokens.weight", "lm_head.weight")
    return [n for n in names if (is_fp8(n) or n.endswith(wide)) and not n.startswith(mtp)]


def round_groups(x: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Round to 2^bits levels between the least and the largest value of each group of 64."""
    groups = x.unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
    return (((groups - low) / step).round() * step + low).flatten(-2)


def round_four_bit(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Round a matrix as q4 does; kv_b_proj is split per head and its key part turned first."""
    if "kv_b_proj" not in name:
        return round_groups(weight)
    nope = CONFIG["qk_nope_head_dim"]
    heads = weight.unflatten(0, (CONFIG["num_attention_heads"], -1))  # (H, N + V, C)
    keys = round_groups(heads[:, :nope].transpose(1, 2).contiguous()).transpose(1, 2)
    return torch.cat([keys, round_groups(heads[:, nope:].contiguous())], dim=1).flatten(0, 1)


def as_stored(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return what a reader of the exported checkpoint sees: through FP8 or BF16, in float32."""
    if name.endswith("e_score_correction_bias"):
        return weight.float()
    if is_fp8(name):
        weight = dequantize_blocks(*quantize_blocks(weight.float()))
    return weight.to(torch.bfloat16).float()
