"""A long prompt takes the memory that was planned for it, by MLX's own peak."""

from dataclasses import replace

import mlx.core as mx
import pytest
import tiny
from mlx_folder import write_mlx

from mlx_dsv3.generate import make_state, prefill
from mlx_dsv3.load import load_model, plan_memory
from mlx_dsv3.memory import OVERHEAD_BYTES
from mlx_dsv3.model import mla

PACKING = {"bits": 4, "group_size": 64, "mode": "affine"}
EXPERTS = tiny.D["n_routed_experts"]
# What a long prompt holds most of: expanded keys and values, scores, rows of experts.
LONG = {
    "keys and values": {"num_attention_heads": 16, "kv_lora_rank": 256},
    "scores": {"num_attention_heads": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
    "experts": {"num_experts_per_tok": 12, "hidden_size": 512},
}


@pytest.mark.parametrize("most", LONG)
@pytest.mark.parametrize("experts", ["resident", "streamed"])
def test_a_long_prompt_takes_what_was_planned(most, experts, tmp_path, monkeypatch):
    """Keys and values were not in the plan, and MLX held the scores of many blocks at once."""
    monkeypatch.setattr(mla, "EXPANDED_BYTES", 8 << 20)
    monkeypatch.setattr(mla, "SCORE_BYTES", (64 if most == "scores" else 8) << 20)
    config = tiny.D | {"num_hidden_layers": 2, "n_group": 1, "topk_group": 1} | LONG[most]
    write_mlx(tmp_path, config, tiny.random_tensors(config), packing=PACKING)
    slots = {1: EXPERTS, 2: EXPERTS if experts == "resident" else config["num_experts_per_tok"]}
    plan = plan_memory(tmp_path, context=700, dtype=mx.float32)
    loaded = load_model(tmp_path, dtype=mx.float32, plan=replace(plan, slots=slots))
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory() + loaded.plan.cache_bytes
    mx.reset_peak_memory()
    ids = [i % 160 for i in range(700)]
    for _ in prefill(loaded.model, loaded.mtp, make_state(loaded), ids, loaded.plan.prefill_chunk):
        pass
    planned = loaded.plan.transient_bytes - OVERHEAD_BYTES
    assert 0.85 < (mx.get_peak_memory() - before) / planned < 1.1
