"""The demo model with fewer slots than experts: the same logits and the same talk."""

import dataclasses
import re

import mlx.core as mx
import numpy as np
import pytest

from demo_model.test_chat import QUESTION, run
from mlx_dsv3.load import load_model, plan_memory


def logits_of(folder, capacity: int, ids: list[int], decoded: int) -> np.ndarray:
    """Return the logits of a prefill and of tokens one by one."""
    plan = plan_memory(folder, dtype=mx.float32)
    plan = dataclasses.replace(plan, slots=dict.fromkeys(plan.slots, capacity))
    loaded = load_model(folder, dtype=mx.float32, plan=plan)
    model, store = loaded.model, loaded.store
    cache = model.make_cache()
    out = [model(mx.array([ids]), cache)[0]]
    for i in range(decoded):
        out.append(model(mx.array([[ids[i % len(ids)]]]), cache)[0])
    rows = np.array(mx.concatenate(out))
    store.close()
    return rows


@pytest.fixture(scope="module")
def long_prompt(ask) -> list[int]:
    """Return a prompt that touches every expert of every layer."""
    turns = [
        f"What is {a} plus {b}? And what colour is a carrot?" for a in range(9) for b in (2, 7)
    ]
    return ask(*turns[:17])


@pytest.mark.parametrize(
    "capacities, decoded",
    [((4, 31), 30), pytest.param((4, 5, 8, 16, 31), 200, marks=pytest.mark.slow)],
)
def test_logits_at_every_capacity(demo_q4, long_prompt, capacities, decoded):
    resident = logits_of(demo_q4, 32, long_prompt, decoded)
    for capacity in capacities:
        found = logits_of(demo_q4, capacity, long_prompt, decoded)
        assert np.array_equal(found, resident), capacity


def test_chat_streams_and_says_so(demo_q4):
    done = run(demo_q4, "-p", QUESTION, "--expert-memory", "0.002")
    assert done.returncode == 0 and "Paris" in done.stdout
    assert re.search(r"streamed: \d+-?\d* of 32 per layer .* reads at \d+\.\d+ GB/s", done.stderr)
    assert re.search(r"experts [\d,]+ of [\d,]+ hits, \d", done.stderr)


def test_chat_refuses_too_little_expert_memory(demo_q4):
    done = run(demo_q4, "-p", QUESTION, "--expert-memory", "0.0001")
    assert done.returncode == 2 and "is below the least" in done.stderr
