"""FP8 blocks to BF16 in MLX: bitwise what plain torch gives (spec 2.3, 7.3)."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from convert.dequantize import decode_scales, dequantize_blocks
from mlx_dsv3.reference.fp8 import dequantize_blocks as oracle


def bits(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16))


def random_codes(rows: int, columns: int) -> torch.Tensor:
    """Return e4m3 codes, every finite one of them, as bytes."""
    finite = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    generator = torch.Generator().manual_seed(rows)
    return finite[torch.randint(len(finite), (rows, columns), generator=generator)]


@pytest.mark.parametrize("shape", [(128, 128), (576, 256), (192, 320), (64, 40), (300, 130)])
@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
def test_dequantise_is_bitwise_the_torch_form(shape, block):
    """Edge blocks are partial (576 rows: 4.5 blocks); the block size is never rows / scale rows."""
    codes = random_codes(*shape)
    scale_shape = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    scale = torch.rand(scale_shape, generator=torch.Generator().manual_seed(1)) * 1e-2 + 1e-4
    got = dequantize_blocks(mx.array(codes.numpy()), mx.array(scale.numpy()), block)
    if block[0] == block[1]:
        weight = codes.view(torch.float8_e4m3fn)
        want = oracle(weight, scale, block[0]).bfloat16()
    else:
        wide = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        weight = codes.view(torch.float8_e4m3fn).float()
        want = (weight * wide[: shape[0], : shape[1]]).bfloat16()
    assert (bits(got) == want.view(torch.uint16).numpy()).all()


def test_every_code_decodes_as_in_torch():
    """All 256 codes, NaN included: a table that is off by one exponent is plausible and wrong."""
    codes = torch.arange(256, dtype=torch.uint8)[None]
    got = dequantize_blocks(mx.array(codes.numpy()), mx.ones((1, 2)), (128, 128))
    want = codes.view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(np.array(got.astype(mx.float32)), want)


def test_scales_in_every_stored_dtype():
    """E8M0 is an exponent, not a number: mlx-lm reads its bytes as integers."""
    values = np.array([[2.0**-9, 0.25, 1.0, 2.0**20]], np.float32)
    stored = torch.from_numpy(values)
    for dtype, raw in (
        ("F32", stored.numpy().tobytes()),
        ("BF16", stored.bfloat16().view(torch.uint8).numpy().tobytes()),
        ("F8_E8M0", stored.to(torch.float8_e8m0fnu).view(torch.uint8).numpy().tobytes()),
    ):
        np.testing.assert_array_equal(decode_scales(raw, dtype, (1, 4)), values)


def test_e8m0_ends():
    """Code 255 is NaN, code 0 is 2^-127, both beside ordinary powers."""
    scales = decode_scales(bytes([0, 127, 254, 255]), "F8_E8M0", (1, 4))[0]
    assert scales[:3].tolist() == [2.0**-127, 1.0, 2.0**127] and np.isnan(scales[3])
