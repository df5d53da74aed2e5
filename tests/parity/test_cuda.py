"""The lane of the original hardware: recording the demo model on a GPU, `pytest -m cuda`.

What a GPU computes is compared with the golden files of the CPU path; the kernels' own tests are
in test_kernels.py. MLX is not needed for these, nor is the network.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlx_dsv3.reference import backends, record, weights

ROOT = Path(__file__).parents[2]
CHECKPOINT, GOLDEN = ROOT / "demo" / "checkpoint", ROOT / "tests" / "golden"
pytestmark = pytest.mark.cuda
# Mean row error of a state against the CPU's. Float32: sums in another order. FP8 and BF16: one
# rounding that falls otherwise moves a BF16 state by 2^-9, and routing with it now and then.
BOUNDS = {"float32": 1e-4, "fp8": 3e-2, "bf16": 3e-2}


def mean_row_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (actual.double() - expected.double()).norm(dim=-1)
    return float((difference / expected.double().norm(dim=-1)).mean())


def record_on(device: str, out: Path, arithmetic: str, matmul: str = "auto") -> dict:
    argv = [str(CHECKPOINT), str(out), "--device", device, "--arithmetic", arithmetic]
    argv += ["--matmul", matmul, "--states", "all"]
    assert record.main([*argv, "--prompt-file", str(GOLDEN / "chat.txt")]) == 0
    return load_file(out)


def compare(found: dict, expected: dict, bound: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key.endswith((".attention", ".mlp", ".input", "norm", "embedding")):
            assert mean_row_error(found[key], value) < bound, key
        elif key.endswith("logprobs") and "top" not in key:
            assert (found[key] - value).abs().mean() < 10 * bound, key


@pytest.mark.parametrize("arithmetic", ["float32", "fp8"])
def test_demo_model_against_the_cpu(tmp_path, arithmetic):
    """A recording of the GPU is one of the CPU, up to rounding: stages, logits, MTP."""
    found = record_on("cuda", tmp_path / "golden.safetensors", arithmetic)
    compare(found, load_file(GOLDEN / f"demo-{arithmetic}.safetensors"), BOUNDS[arithmetic])


@pytest.mark.parametrize("matmul", ["plain", "triton", "scaled_mm"])
def test_every_backend_records_the_same(tmp_path, matmul):
    """Whichever code multiplies, the golden file is the plain loop's up to rounding."""
    if matmul in backends.MAKERS:
        operations, why = backends.probe(matmul, "cuda")
        if operations is None:
            pytest.skip(why)
    found = record_on("cuda", tmp_path / "golden.safetensors", "fp8", matmul)
    compare(found, load_file(GOLDEN / "demo-fp8.safetensors"), BOUNDS["fp8"])


@torch.inference_mode()
def test_one_layer_on_both_devices():
    """One FP8 layer with the same input, where no routing difference can hide an error."""
    config = weights.HubTensors(CHECKPOINT).config
    outs, x = [], None
    for device in ("cpu", "cuda"):
        operations = backends.choose_operations("auto", device)
        arithmetic = weights.arithmetic_of("fp8", config, device, operations)
        model = weights.load(CHECKPOINT, arithmetic=arithmetic)
        if x is None:
            ids = torch.arange(40)[None]
            x = model.model.layers[0](model.model.embed_tokens(ids))
        outs.append(model.model.layers[1].self_attn(x.to(device)).cpu())
    assert mean_row_error(outs[1], outs[0]) < 1e-2
