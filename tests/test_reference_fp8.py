"""FP8 arithmetic in plain torch against float64: every case of spec 7.3, every bound of 5.3."""

import pytest
import torch
from compare import cosine_difference

from mlx_dsv3.reference.fp8 import (
    Fp8Linear,
    block_matmul,
    dequantize_blocks,
    expand_scales,
    quantize_activations,
    quantize_blocks,
    round_up_to_power_of_two,
)

K = 7168


def normal(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frobenius(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


# --- activations ----------------------------------------------------------------------------


def test_all_zero_group():
    """Older revisions of the official kernel divide by zero here and fill the row with NaN."""
    codes, scale = quantize_activations(torch.zeros(2, 256))
    assert not codes.float().any()
    assert scale.tolist() == [[torch.tensor(1e-4).div(448).item()] * 2] * 2
    assert scale[0, 0].item() == pytest.approx(2.232e-7, rel=1e-3)


def test_largest_code_and_power_of_two_scales():
    """amax 448 has scale 1; 449 with UE8M0 has scale 2; a power of two stays what it is."""
    x = torch.zeros(2, 128)
    x[0, 3], x[1, 5] = -448, 449
    codes, scale = quantize_activations(x)
    assert scale[0, 0] == 1 and codes[0, 3].float() == -448
    codes, scale = quantize_activations(x, ue8m0=True)
    assert scale[:, 0].tolist() == [1.0, 2.0] and codes[1, 5].float() == 224


def test_exponent_bits_at_powers_of_two():
    """A float log2 of the number next to a power of two rounds to the wrong exponent."""
    powers = torch.tensor([2.0**e for e in range(-22, 12)])
    above = torch.nextafter(powers, torch.tensor(torch.inf))
    below = torch.nextafter(powers, torch.tensor(0.0))
    assert torch.equal(round_up_to_power_of_two(powers), powers)
    assert torch.equal(round_up_to_power_of_two(above), 2 * powers)
    assert torch.equal(round_up_to_power_of_two(below), powers)


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_code_is_nan_and_each_group_has_its_scale(dtype, ue8m0):
    """amax / (amax / 448) may be 448.00003; a scale of the row instead of the group; ties."""
    x = (normal(64, 300) * torch.logspace(-6, 6, 64)[:, None]).to(dtype)
    codes, scale = quantize_activations(x, ue8m0)
    assert scale.shape == (64, 3) and codes.shape == x.shape
    assert not codes.float().isnan().any()
    wide = codes.float() * scale.repeat_interleave(128, 1)[:, :300]
    group = torch.nn.functional.pad(x.float(), (0, 84)).unflatten(1, (3, 128)).abs().amax(-1)
    limit = group.clamp_min(1e-4).repeat_interleave(128, 1)[:, :300] * (2**-4) * (1 + ue8m0)
    assert ((wide - x.float()).abs() <= limit).all()
    assert codes.float().abs().amax() == 448 or ue8m0


def test_rounding_is_to_nearest_even():
    """17 lies between the codes 16 and 18, 19 between 18 and 20: both go to the even mantissa."""
    x = torch.zeros(1, 128)
    x[0, :4] = torch.tensor([448.0, 17.0, 19.0, 2.0**-10])
    codes, _ = quantize_activations(x)
    assert codes[0, :4].float().tolist() == [448.0, 16.0, 20.0, 0.0]


# --- the product ----------------------------------------------------------------------------


def activations(kind: str, tokens: int = 32) -> torch.Tensor:
    x = normal(tokens, K, seed=1)
    if kind == "log-normal tails":
        x = x * normal(tokens, K, seed=2).exp()
    if kind == "sparse outliers":
        is_outlier = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.005
        x = torch.where(is_outlier, 50 * x, x)
    return x


@pytest.mark.parametrize(
    ("kind", "ue8m0", "expected"),
    [
        ("Gaussian", False, 2.6e-2),
        ("log-normal tails", False, 2.0e-2),
        ("sparse outliers", False, 1.0e-2),
        ("Gaussian", True, 2.7e-2),
        ("log-normal tails", True, 2.6e-2),
        ("sparse outliers", True, 2.4e-2),
    ],
)
def test_product_against_float64(kind, ue8m0, expected):
    """What quantised activations cost (spec 5.3, K = 7168): more is a bug, and so is less."""
    weight, scale = quantize_blocks(normal(256, K))
    wide = weight.double() * expand_scales(scale, weight.shape).double()
    x = activations(kind)
    exact = x.double() @ wide.T
    y = block_matmul(*quantize_activations(x, ue8m0), weight, scale)
    assert frobenius(y, exact) == pytest.approx(expected, rel=0.15)
    assert cosine_difference(y, exact) < 1e-3  # DeepGEMM's measure and bound


@pytest.mark.parametrize("shape", [(3, 576, 256), (1, 192, 320), (5, 130, 128), (2, 1, 129)])
def test_product_of_codes_is_exact_to_float32(shape):
    """Ragged edges, and scales inside the sum: hoisting them out is off by their spread."""
    tokens, rows, columns = shape
    weight, scale = quantize_blocks(normal(rows, columns) * torch.logspace(-2, 2, columns))
    codes, x_scale = quantize_activations(normal(tokens, columns, seed=1))
    wide_x = codes.double() * x_scale.double().repeat_interleave(128, 1)[:, :columns]
    wide_w = weight.double() * expand_scales(scale, weight.shape).double()
    exact = wide_x @ wide_w.T
    y = block_matmul(codes, x_scale, weight, scale)
    assert y.dtype == torch.float32 and y.shape == (tokens, rows)
    largest = (wide_x.abs() @ wide_w.abs().T).amax()
    assert (y.double() - exact).abs().max() <= 2e-6 * largest


def test_weights_in_bf16_and_their_quantisation():
    """Spec 5.3: BF16 rounding costs 1.7e-3 and nothing with power-of-two scales; FP8 2.6e-2."""
    wide = normal(512, K)
    weight, scale = quantize_blocks(wide)
    assert frobenius(dequantize_blocks(weight, scale), wide.double()) == pytest.approx(
        2.6e-2, rel=0.05
    )
    exact = dequantize_blocks(weight, scale)
    assert frobenius(exact.bfloat16(), exact.double()) == pytest.approx(1.7e-3, rel=0.1)
    exact = dequantize_blocks(weight, round_up_to_power_of_two(scale))
    assert frobenius(exact.bfloat16(), exact.double()) == 0


def test_bf16_product_against_float64():
    """Spec 5.3: both operands rounded to BF16, one GEMM: 2.4e-3; 2.9e-3 with its result rounded."""
    x, weight = normal(32, K, seed=1), normal(256, K)
    exact = x.double() @ weight.double().T
    y = x.bfloat16().float() @ weight.bfloat16().float().T
    assert frobenius(y, exact) == pytest.approx(2.4e-3, rel=0.05)


def test_round_trip_with_power_of_two_scales():
    """Bit-exact where each block attains a code above 224: one power of two fits each block."""
    weight, scale = quantize_blocks(normal(320, 200))  # each block attains the code 448
    scale = round_up_to_power_of_two(scale)
    wide = dequantize_blocks(weight, scale)
    _, found = quantize_blocks(wide)
    found = round_up_to_power_of_two(found)
    assert torch.equal(found, scale)
    again = (wide / expand_scales(found, wide.shape)).to(torch.float8_e4m3fn)
    assert torch.equal(again.view(torch.uint8), weight.view(torch.uint8))


def test_linear_layer_keeps_dtype_and_shape():
    """Float32 out of a BF16 layer would silently widen everything after it."""
    weight, scale = quantize_blocks(normal(192, 256))
    layer = Fp8Linear(weight, scale, ue8m0=False)
    x = normal(2, 3, 256, seed=1).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16 and y.shape == (2, 3, 192)
    exact = x.double() @ dequantize_blocks(weight, scale).double().T
    assert cosine_difference(y, exact) < 1e-3
