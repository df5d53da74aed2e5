"""The hub itself: headers of the real checkpoints, one real tensor, MLX folders. `ARGS='-m hub'`.

Not yet run: written where there is no network.
"""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch

import chat
from convert.__main__ import main
from convert.dequantize import Raw, to_bfloat16
from convert.download import open_repo
from mlx_dsv3.checkpoint.hub import Repo
from mlx_dsv3.errors import UserError
from mlx_dsv3.reference import fp8

pytestmark = pytest.mark.hub
V3 = (91_991, 688_574_839_360)  # tensors and bytes (spec section 2)
CHECKPOINTS = {
    "deepseek-ai/DeepSeek-V3": V3,
    "deepseek-ai/DeepSeek-V3-0324": V3,
    "deepseek-ai/DeepSeek-R1": V3,
    "deepseek-ai/DeepSeek-R1-0528": V3,
    "deepseek-ai/DeepSeek-V3.1": None,
    "moonshotai/Moonlight-16B-A3B-Instruct": None,
    "moonshotai/Kimi-K2-Instruct": None,
}
MLX_FOLDERS = ("mlx-community/DeepSeek-V3-4bit", "mlx-community/DeepSeek-R1-4bit")
SAMPLE = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"  # 576 rows: partial blocks


@pytest.mark.parametrize("repo_id", CHECKPOINTS)
def test_plan(repo_id, capsys):
    """Headers alone; nothing large is fetched."""
    assert not main(["plan", repo_id, "--json"])
    plan = json.loads(capsys.readouterr().out)
    if (expected := CHECKPOINTS[repo_id]) is not None:
        assert (plan["source_tensors"], plan["source_bytes"]) == expected and plan["has_mtp"]
    assert 0 < plan["bytes"] < plan["source_bytes"]


def read(repo: Repo, tensor) -> bytes:
    """Read one tensor's bytes by a range request."""
    from huggingface_hub import HfFileSystem

    path = f"{repo.repo_id}@{repo.revision}/{tensor.shard}"
    with HfFileSystem().open(path, "rb") as file:
        file.seek(tensor.offset)
        return file.read(tensor.nbytes)


def test_a_real_fp8_tensor():
    """Both sides decode it to the same bits, and its size is that of a trained weight."""
    repo = Repo("deepseek-ai/DeepSeek-R1")
    source, _ = open_repo(repo)
    weight, scale = source.tensors[SAMPLE], source.tensors[f"{SAMPLE}_scale_inv"]
    assert (weight.dtype, weight.shape, scale.shape) == ("F8_E4M3", (576, 7168), (5, 56))
    data = bytearray(read(repo, weight))
    factors = np.frombuffer(read(repo, scale), np.float32).reshape(scale.shape)
    raw = Raw(SAMPLE, weight.dtype, weight.shape, data, factors)
    ours = to_bfloat16(raw, source.block)
    codes = torch.frombuffer(data, dtype=torch.float8_e4m3fn).reshape(weight.shape)
    theirs = fp8.dequantize(codes, torch.tensor(factors))
    assert np.array_equal(np.array(ours.astype(mx.float32)), theirs.float().numpy())
    assert 0.001 < float(theirs.float().std()) < 1


@pytest.mark.parametrize("repo_id", MLX_FOLDERS)
def test_memory_plan_of_an_mlx_folder(repo_id, capsys):
    """A table, or one sentence where this machine is too small; either from headers."""
    try:
        chat.main([repo_id, "--plan", "--experts", "streamed"])
        assert "experts" in capsys.readouterr().out
    except UserError as error:
        assert "this machine allows" in error.message
