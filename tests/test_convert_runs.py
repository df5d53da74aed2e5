"""Checkpoints of many shapes, converted by the real converter, run as the reference runs them.

The same hub tensors go through both loaders: `convert` and `load` on one side, the reference's
`weights.load` on the other.
"""

import mlx.core as mx
import numpy as np
import pytest
import tiny
import torch
from mlx_lm.utils import load_model as load_in_mlx_lm

from convert.__main__ import main as convert
from mlx_dsv3.load import load_model
from mlx_dsv3.reference.weights import load as load_reference

WIDE_KEY = tiny.D | {"kv_lora_rank": 512, "num_hidden_layers": 2}  # 576 rows: 4.5 FP8 blocks
SHAPES = {
    "A": (tiny.A, {}),
    "no query rank": (tiny.B, {}),
    "two mscales": (tiny.C, {}),
    "192 rows": (tiny.D, {}),
    "576 rows": (WIDE_KEY, {}),
    "7 layers": (tiny.D | {"num_hidden_layers": 7}, {"num_shards": 5}),
    "without MTP": (tiny.D | {"num_nextn_predict_layers": 0}, {}),
    "BF16 source": (tiny.D, {"storage": "bf16"}),
    "BF16 scales": (tiny.D, {"scale_dtype": torch.bfloat16}),
    "E8M0 scales": (tiny.D, {"scale_dtype": torch.float8_e8m0fnu}),
    "one shard": (tiny.A, {"num_shards": 1}),
}
IDS = np.random.default_rng(0).integers(0, tiny.A["vocab_size"], (1, 23))


def relative(ours: mx.array, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.array(ours) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("shape", SHAPES)
def test_converted_model_equals_the_reference(tmp_path, shape):
    """A wrong scale, layout or name anywhere between the hub's files and the logits."""
    config, options = SHAPES[shape]
    source = tiny.write_hub(tmp_path / "hub", config, **options)
    out = tmp_path / "out"
    assert not convert(["run", str(source), str(out), "--recipe", "float32"])
    loaded = load_model(out, dtype=mx.float32)
    model, mtp, store = loaded.model, loaded.mtp, loaded.store
    reference, ids = load_reference(source), torch.from_numpy(IDS)
    with torch.no_grad():
        expected, states = reference(ids)
    g = model.hidden(mx.array(IDS))
    assert relative(model.lm_head(g), expected.numpy()) < 1e-4
    if not config["num_nextn_predict_layers"]:
        assert mtp is None
        return
    with torch.no_grad():
        drafts, _ = reference.mtp(states[:, :-1], ids[:, 1:])
    assert relative(mtp(g[:, :-1], mx.array(IDS[:, 1:]))[0], drafts.numpy()) < 1e-4
    store.close()


@pytest.mark.parametrize("recipe", ["q4", "q3-fit", "q2-fit"])
def test_random_folder_gives_mlx_lms_logits(tmp_path, recipe):
    """Selection-bias mean +2, where mlx-lm's zero mask and ours choose the same experts."""
    source = tiny.write_hub(tmp_path / "hub", tiny.D, bias_mean=2.0)
    assert not convert(["run", str(source), str(tmp_path / "out"), "--recipe", recipe])
    theirs, _ = load_in_mlx_lm(tmp_path / "out", strict=True)
    theirs.set_dtype(mx.float32)
    loaded = load_model(tmp_path / "out", dtype=mx.float32)
    model, store = loaded.model, loaded.store
    assert relative(model(mx.array(IDS)), np.array(theirs(mx.array(IDS)))) < 1e-5
    store.close()
