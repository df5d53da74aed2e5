"""The FP8 operations of `fp8.py` as Triton kernels: activations, weights, block-scaled product.

Only `backends.py` imports this file, and only where Triton is asked for or found, so the package
needs no Triton. e4m3 codes are made and read by bit arithmetic: the same on every GPU, on those
that have no FP8 instructions, and in Triton's interpreter on a CPU (whose own cast to e4m3 is
wrong for some values). The product runs on FP8 tensor cores where `NATIVE` says so, else in
float16, which holds every e4m3 number exactly.

Grouped experts have no kernel of their own: the recorder streams one expert at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlx_dsv3.reference.fp8 import BLOCK

TILE_ROWS = 128  # output rows of a weight in one tile: one scale per tile and 128 channels


@triton.jit
def encode_e4m3(x):
    """Return e4m3 codes (int32) of float32 x in [-448, 448], rounded to nearest even."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # 23 mantissa bits to 3: add half of the last place kept, less one where that place is even.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes count steps of 2^-9, the last place of a float32 near 2^14.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    small = shifted.to(tl.int32, bitcast=True) & 0xF
    code = tl.where(magnitude < 0x3C800000, small, normal)
    return tl.where(bits < 0, code | 0x80, code)


@triton.jit
def decode_e4m3(code):
    """Return the float16 numbers of e4m3 codes (uint8); exact but for NaN, which reads as 480."""
    wide = code.to(tl.int16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)  # exponent bias 15 for 7: 2^-8 too small
    return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def quantize_kernel(x, codes, scales, T, K, num_groups, UE8M0: tl.constexpr, ROWS: tl.constexpr):
    """Quantise ROWS tokens x 128 channels: one scale for each token."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    columns = group * 128 + tl.arange(0, 128)
    inside = (rows[:, None] < T) & (columns[None, :] < K)
    offsets = rows[:, None].to(tl.int64) * K + columns[None, :]
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(values), axis=1), 1e-4)
    scale = tl.div_rn(amax, 448.0)
    if UE8M0:
        bits = scale.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) + tl.where((bits & 0x7FFFFF) != 0, 1, 0)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    wide_scale = tl.broadcast_to(scale[:, None], values.shape)
    scaled = tl.minimum(tl.maximum(tl.div_rn(values, wide_scale), -448.0), 448.0)
    tl.store(codes + offsets, encode_e4m3(scaled).to(tl.uint8), mask=inside)
    tl.store(scales + rows * num_groups + group, scale, mask=rows < T)


@triton.jit
def dequantize_kernel(codes, scales, out, num_rows, K, num_groups, ROWS: tl.constexpr):
    """Write bfloat16 bits of one 128-column part of ROWS rows, ROWS dividing 128."""
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    group = tl.program_id(1)
    columns = group * 128 + tl.arange(0, 128)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < K)
    offsets = rows[:, None].to(tl.int64) * K + columns[None, :]
    code = tl.load(codes + offsets, mask=inside, other=0)
    scale = tl.load(scales + (first // 128) * num_groups + group)
    value = decode_e4m3(code).to(tl.float32) * scale
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest even
    rounded = tl.where((code & 0x7F) == 0x7F, 0x7FC0, rounded)
    tl.store(out + offsets, rounded.to(tl.int16), mask=inside)


@triton.jit
def matmul_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    out,
    T,
    num_rows,
    K,
    num_groups,
    NATIVE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute a tile of TOKENS x ROWS; each 128 channels are summed before their scales apply."""
    first = tl.program_id(1) * ROWS
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    rows = first + tl.arange(0, ROWS)
    x_rows = x + tokens[:, None].to(tl.int64) * K
    weight_rows = weight + rows[None, :].to(tl.int64) * K
    total = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for group in range(num_groups):
        k = group * 128 + tl.arange(0, 128)
        is_token, is_row = tokens < T, rows < num_rows
        a = tl.load(x_rows + k[None, :], mask=is_token[:, None] & (k[None, :] < K), other=0)
        b = tl.load(weight_rows + k[:, None], mask=is_row[None, :] & (k[:, None] < K), other=0)
        if NATIVE:
            a, b = a.to(tl.float8e4nv, bitcast=True), b.to(tl.float8e4nv, bitcast=True)
        else:
            a, b = decode_e4m3(a), decode_e4m3(b)
        part = tl.dot(a, b, out_dtype=tl.float32)
        token_scale = tl.load(x_scale + tokens * num_groups + group, mask=is_token, other=0.0)
        row_scale = tl.load(weight_scale + (first // 128) * num_groups + group)
        total += part * token_scale[:, None] * row_scale
    offsets = tokens[:, None].to(tl.int64) * num_rows + rows[None, :]
    tl.store(out + offsets, total, mask=(tokens[:, None] < T) & (rows[None, :] < num_rows))


def has_fp8_tensor_cores(device: torch.device) -> bool:
    """Say whether the GPU multiplies e4m3 itself: compute capability 8.9 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantize_activations(x: Tensor, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise x (T, K) as `fp8.quantize_activations` does, bit for bit."""
    x = x.contiguous()
    T, K = x.shape
    num_groups = triton.cdiv(K, BLOCK)
    codes = torch.empty(T, K, dtype=torch.uint8, device=x.device)
    scales = torch.empty(T, num_groups, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(T, 8), num_groups)
    quantize_kernel[grid](x, codes, scales, T, K, num_groups, UE8M0=ue8m0, ROWS=8)
    return codes.view(torch.float8_e4m3fn), scales


def dequantize(weight: Tensor, scale: Tensor, block: int = BLOCK) -> Tensor:
    """Return weight (O, K) times its block scales in bfloat16, as `fp8.dequantize` does."""
    assert block == BLOCK, f"blocks of {block}"
    num_rows, K = weight.shape
    out = torch.empty(num_rows, K, dtype=torch.bfloat16, device=weight.device)
    codes, scale = weight.contiguous().view(torch.uint8), scale.float().contiguous()
    grid = (triton.cdiv(num_rows, 32), scale.shape[1])
    dequantize_kernel[grid](
        codes, scale, out.view(torch.int16), num_rows, K, scale.shape[1], ROWS=32
    )
    return out


def block_matmul(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    native: bool | None = None,
) -> Tensor:
    """Multiply as `fp8.block_matmul` does; equal to it up to the rounding of 128-term sums.

    `native` asks for FP8 tensor cores, by default where the GPU has them. Those of Hopper keep
    about 14 bits within the 128 terms (DeepSeek-V3 report, 3.3.2).
    """
    T, K = x.shape
    num_rows, num_groups = weight.shape[0], x_scale.shape[1]
    native = has_fp8_tensor_cores(x.device) if native is None else native
    out = torch.empty(T, num_rows, dtype=torch.float32, device=x.device)
    tokens = 16 if T <= 16 else 64
    matmul_kernel[(triton.cdiv(T, tokens), triton.cdiv(num_rows, TILE_ROWS))](
        x.contiguous().view(torch.uint8),
        x_scale.contiguous(),
        weight.contiguous().view(torch.uint8),
        weight_scale.contiguous(),
        out,
        T,
        num_rows,
        K,
        num_groups,
        NATIVE=native,
        TOKENS=tokens,
        ROWS=TILE_ROWS,
    )
    return out
