"""Triton kernels and PyTorch's block-scaled matmul against the plain loop.

On a GPU: `pytest -m cuda tests/test_kernels.py`. Without one the kernels run in Triton's
interpreter, a lane of its own: `TRITON_INTERPRET=1 pytest tests/test_kernels.py`. The interpreter
says nothing about speed, tensor cores or compiled code; it does check every index and every bit.
"""

import importlib.util
import os

import pytest
import torch

from mlx_dsv3.errors import UserError
from mlx_dsv3.reference import backends, fp8
from mlx_dsv3.reference.backends import normalised_difference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton")
lane = pytest.mark.skipif(
    not INTERPRETED, reason="lane: TRITON_INTERPRET=1 and the extra `triton` (`make triton`)"
)
device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=lane), pytest.param("cuda", marks=pytest.mark.cuda)]
)
# Ragged in every direction: 576 and 192 rows end inside a block of rows, 300 and 64 columns
# inside one of columns, 17 and 70 tokens inside a tile; one token, one row, one channel more.
SHAPES = [(1, 1, 129), (3, 576, 256), (17, 192, 300), (70, 130, 64), (16, 128, 128), (5, 257, 640)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def normal(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_codes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))


def operands(tokens: int, rows: int, columns: int) -> list[torch.Tensor]:
    x = normal(tokens, columns, seed=1) * torch.logspace(-3, 3, tokens)[:, None]
    weight = normal(rows, columns) * torch.logspace(-2, 2, columns)
    return [*fp8.quantize_activations(x), *fp8.quantize_blocks(weight)]


@device
@shapes
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantise_is_bitwise_the_plain_form(device, shape, dtype, ue8m0):
    """A reciprocal for a division, half away from even, or a group's neighbour in its maximum."""
    from mlx_dsv3.reference import kernels

    tokens, _, columns = shape
    x = (normal(tokens, columns) * torch.logspace(-6, 6, tokens)[:, None]).to(dtype)
    x[0, : columns // 2] = 0
    codes, scale = kernels.quantize_activations(x.to(device), ue8m0)
    expected, expected_scale = fp8.quantize_activations(x, ue8m0)
    assert torch.equal(scale.cpu(), expected_scale)
    assert same_codes(codes, expected)


@device
def test_rounding_of_every_midpoint(device):
    """All codes, the midpoints between them and their float32 neighbours, subnormals included."""
    from mlx_dsv3.reference import kernels

    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (codes[1:] + codes[:-1]) / 2
    near = [torch.nextafter(middle, torch.tensor(end)) for end in (0.0, 1e9)]
    values = torch.cat([codes, middle, *near])
    values = torch.cat([values, -values])
    values = torch.nn.functional.pad(values, (0, -len(values) % 127)).view(-1, 127)
    x = torch.cat([torch.full((len(values), 1), 448.0), values], dim=1)  # every scale is 1
    actual, scale = kernels.quantize_activations(x.to(device))
    assert (scale == 1).all()
    assert same_codes(actual, x.to(torch.float8_e4m3fn))


@device
@shapes
def test_dequantise_is_bitwise_the_plain_form(device, shape):
    """Scale rows by rows / 128 whatever the tile; NaN codes stay NaN."""
    from mlx_dsv3.reference import kernels

    _, rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    weight = codes.view(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) + 0.01
    actual = kernels.dequantize(weight.to(device), scale.to(device)).cpu()
    expected = fp8.dequantize(weight, scale)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(1e9), expected.nan_to_num(1e9))


@device
@shapes
@pytest.mark.parametrize("native", [False, True])
def test_product_against_the_plain_loop(device, shape, native):
    """Scales out of the sum, a tile's edge, another group's scale: all far above these bounds.

    Float16 operands sum in float32; Hopper's FP8 tensor cores keep about 14 bits, hence 1e-4.
    """
    from mlx_dsv3.reference import kernels

    if native and device == "cuda" and not kernels.has_fp8_tensor_cores(torch.device(device)):
        pytest.skip("no FP8 tensor cores")
    parts = operands(*shape)
    expected = fp8.block_matmul(*parts)
    actual = kernels.block_matmul(*(part.to(device) for part in parts), native=native)
    assert actual.dtype == torch.float32
    bound = 1e-4 if native and device == "cuda" else 1e-10
    assert normalised_difference(actual.cpu(), expected) < bound


@device
@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(device, seed):
    """Shapes that nobody chose: all three operations at once."""
    from mlx_dsv3.reference import kernels

    generator = torch.Generator().manual_seed(seed)
    shape = [int(torch.randint(1, high, (), generator=generator)) for high in (90, 400, 700)]
    x_codes, x_scale, weight, scale = (part.to(device) for part in operands(*shape))
    assert torch.equal(
        kernels.dequantize(weight, scale).cpu(), fp8.dequantize(weight.cpu(), scale.cpu())
    ), shape
    actual = kernels.block_matmul(x_codes, x_scale, weight, scale).cpu()
    expected = fp8.block_matmul(x_codes.cpu(), x_scale.cpu(), weight.cpu(), scale.cpu())
    assert normalised_difference(actual, expected) < 1e-4, shape


# --- choice of a backend ----------------------------------------------------------------------


def test_plain_on_a_cpu():
    """`auto` on a CPU is the plain loop, also where Triton is installed."""
    assert backends.choose_operations("auto", "cpu") is fp8.PLAIN
    assert backends.choose_operations("plain", "cpu") is fp8.PLAIN


def test_a_backend_asked_for_by_name_must_work():
    """A silent fallback would label a golden file with what did not run."""
    with pytest.raises(UserError, match="`--matmul scaled_mm` does not work on `cpu`"):
        backends.choose_operations("scaled_mm", "cpu")
    with pytest.raises(UserError, match="no FP8 backend `cublas`"):
        backends.choose_operations("cublas", "cpu")


def test_a_backend_that_disagrees_is_refused(monkeypatch):
    """DeepGEMM's SM100 path corrupts results silently under the wrong scales; a probe sees it."""

    def wrong(x, x_scale, weight, weight_scale):
        return fp8.block_matmul(x, x_scale, weight, weight_scale.flip(1))

    monkeypatch.setitem(
        backends.MAKERS, "scaled_mm", lambda: fp8.PLAIN._replace(block_matmul=wrong)
    )
    operations, why = backends.probe("scaled_mm", "cpu")
    assert operations is None and "differs from the plain loop" in why


@pytest.mark.cuda
@shapes
def test_pytorch_block_scaled_matmul(shape):
    """cuBLAS where the hardware has it (Hopper): scale layouts, padded tokens and blocks."""
    operations, why = backends.probe("scaled_mm", "cuda")
    if operations is None:
        pytest.skip(why)
    tokens, rows, columns = shape
    rows = -(-rows // 16) * 16  # cuBLAS wants rows of 16 bytes
    parts = operands(tokens, rows, columns)
    actual = operations.block_matmul(*(part.cuda() for part in parts)).float().cpu()
    expected = fp8.block_matmul(*parts)
    assert normalised_difference(actual, expected) < 1e-4
    assert (actual - expected).norm() / expected.norm() < 1e-2
