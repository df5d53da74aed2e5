"""The memory plan: sums from headers, slots that fit a budget, refusals that say what would."""

import mlx.core as mx
import pytest
import tiny
from mlx_folder import write_mlx

from mlx_dsv3.errors import UserError
from mlx_dsv3.load import load_model, plan_memory

PACKING = {"bits": 4, "group_size": 64, "mode": "affine"}
EXPERTS, K, LAYERS = tiny.D["n_routed_experts"], tiny.D["num_experts_per_tok"], 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    write_mlx(folder, tiny.D, tiny.random_tensors(tiny.D), packing=PACKING)
    return folder


def array_bytes(module) -> int:
    from mlx.utils import tree_flatten

    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_plan_is_what_loading_takes(folder, dtype):
    """Every byte of trunk, MTP module and banks, in both activation dtypes."""
    plan = plan_memory(folder, dtype=dtype)
    model, mtp, store, *_ = load_model(folder, dtype=dtype, plan=plan)
    assert plan.trunk_bytes == array_bytes(model)
    assert plan.mtp_bytes == array_bytes(mtp)
    assert plan.expert_bytes == sum(bank.nbytes for bank in store.banks.values())
    cache = model.make_cache()
    model(mx.zeros((1, 256), mx.int32), cache)
    rows = sum(layer.nbytes for layer in [*cache, mtp.make_cache()] if not layer.empty())
    per_token = plan_memory(folder, dtype=dtype, context=256).cache_bytes
    assert rows * (LAYERS + 1) // LAYERS == per_token
    store.close()


def test_budget_becomes_slots(folder):
    """Slots are even, the rest buys one more for some layers, and the sum keeps the budget."""
    one = plan_memory(folder, dtype=mx.float32)
    each = sum(one.slot_bytes.values())
    plan = plan_memory(folder, dtype=mx.float32, expert_memory_gb=5.5 * each / 1e9)
    assert set(plan.slots.values()) == {5, 6} and not plan.is_resident
    assert 5 * each < plan.expert_bytes <= 5.5 * each
    everything = plan_memory(folder, dtype=mx.float32, expert_memory_gb=EXPERTS * each / 1e9)
    assert everything.is_resident


def test_auto_streams_when_it_must(folder):
    """`auto` is resident where everything fits, else fills what is left."""
    whole = plan_memory(folder, dtype=mx.float32, context=100)
    assert whole.is_resident
    limit = whole.total_bytes - 1
    plan = plan_memory(folder, dtype=mx.float32, context=100, limit_bytes=limit)
    assert not plan.is_resident and plan.total_bytes <= limit
    with pytest.raises(UserError, match="resident and this machine allows") as error:
        plan_memory(folder, dtype=mx.float32, context=100, limit_bytes=limit, experts="resident")
    assert "--experts streamed --expert-memory" in error.value.hint
    budget = float(error.value.hint.split("--expert-memory ")[1].split("`")[0])
    again = plan_memory(
        folder,
        dtype=mx.float32,
        context=100,
        limit_bytes=limit,
        experts="streamed",
        expert_memory_gb=budget,
    )
    assert again.total_bytes <= limit


def test_below_the_minimum_names_the_minimum(folder):
    with pytest.raises(UserError, match="is below the least") as error:
        plan_memory(folder, dtype=mx.float32, expert_memory_gb=1e-6)
    least = float(error.value.hint.split("--expert-memory ")[1].split("`")[0])
    plan = plan_memory(folder, dtype=mx.float32, expert_memory_gb=least)
    assert set(plan.slots.values()) == {K}


def test_nothing_fits(folder):
    with pytest.raises(UserError, match="this machine allows") as error:
        plan_memory(folder, dtype=mx.float32, limit_bytes=1000)
    assert "--context" in error.value.hint


def test_context_is_bounded_by_the_model(folder):
    plan = plan_memory(folder, dtype=mx.float32, context=10**9)
    assert plan.context == tiny.D["max_position_embeddings"]
    with pytest.raises(UserError, match="`--experts` is `some`"):
        plan_memory(folder, dtype=mx.float32, experts="some")
