"""A tiny model whose experts stream: its folder, its banks, and what a slot must hold."""

import dataclasses
from pathlib import Path

import mlx.core as mx
import numpy as np
import tiny
from mlx_folder import write_mlx

from mlx_dsv3.checkpoint.headers import read_headers
from mlx_dsv3.config import ModelArgs
from mlx_dsv3.experts.bank import EMPTY, Bank
from mlx_dsv3.experts.store import ExpertStore
from mlx_dsv3.load import Loaded, load_model, plan_memory

CONFIG = tiny.D | {
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 4,
}
E, K = CONFIG["n_routed_experts"], CONFIG["num_experts_per_tok"]
PACKINGS = {
    "q4": {"bits": 4, "group_size": 64, "mode": "affine"},
    "q8": {"bits": 8, "group_size": 64, "mode": "affine"},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}
PROMPT = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], 300)


def write_experts(folder: Path, packing: str, arrangement: str = "records") -> Path:
    tensors = tiny.random_tensors(CONFIG)
    for name in tensors:  # an even router, so that a prompt touches every expert
        if name.endswith("e_score_correction_bias"):
            tensors[name][:] = 2.0
    write_mlx(folder, CONFIG, tensors, arrangement=arrangement, packing=PACKINGS[packing])
    return folder


def load_with(folder: Path, capacity: int) -> Loaded:
    plan = plan_memory(folder, dtype=mx.float32)
    plan = dataclasses.replace(plan, slots=dict.fromkeys(plan.slots, capacity))
    return load_model(folder, dtype=mx.float32, plan=plan)


def open_store(folder: Path, capacity: int) -> ExpertStore:
    tensors = read_headers(sorted(folder.glob("*.safetensors")))
    return ExpertStore(tensors, ModelArgs.from_dict(CONFIG), mx.float32, {1: capacity})


def expected_rows(folder: Path) -> dict[str, np.ndarray]:
    """Return a full bank's bytes of layer 1, the truth for every slot."""
    store = open_store(folder, E)
    bank = store.open_layer(1)
    rows = {
        target: np.frombuffer(view, np.uint8).reshape(E, -1).copy()
        for target, (view, _, _) in bank._rows.items()
    }
    store.close()
    return rows


def check_slots(bank: Bank, truth: dict[str, np.ndarray]) -> None:
    for slot, expert in enumerate(bank.expert_in.tolist()):
        if expert == EMPTY:
            continue
        assert bank.slot_of[expert] == slot
        for target, rows in truth.items():
            view, _ = bank.row(slot, target)
            assert np.array_equal(np.frombuffer(view, np.uint8), rows[expert]), (slot, expert)
    mapped = np.flatnonzero(bank.slot_of != EMPTY)
    assert sorted(bank.expert_in[bank.expert_in != EMPTY]) == mapped.tolist()
