"""The memory plan: sums from headers, slots that fit a budget, refusals that say what would."""

import mlx.core as mx
import pytest
import tiny
from drafted import Drafted
from mlx_folder import write_mlx

from mlx_dsv3.checkpoint.folder import open_folder
from mlx_dsv3.device import BUFFER_CACHE_BYTES, MOST_WIRED_SHARE
from mlx_dsv3.errors import UserError
from mlx_dsv3.load import load_model, plan_memory
from mlx_dsv3.memory import (
    DEFAULT_CONTEXT,
    LEAST_CONTEXT,
    PREFILL_CHUNKS,
    RESIDENT_CHUNK,
    USABLE_SHARE,
)
from mlx_dsv3.transients import transient_bytes

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
    loaded = load_model(folder, dtype=dtype, plan=plan)
    model, mtp, store = loaded.model, loaded.mtp, loaded.store
    assert plan.trunk_bytes == array_bytes(model)
    assert plan.mtp_bytes == array_bytes(mtp)
    assert plan.expert_bytes == sum(bank.nbytes for bank in store.banks.values())
    cache = model.make_cache()
    model(mx.zeros((1, 256), mx.int32), cache)
    rows = sum(layer.nbytes for layer in cache)
    per_token = plan_memory(folder, dtype=dtype, context=256).cache_bytes
    assert rows * (LAYERS + 1) // LAYERS == per_token
    store.close()


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_decoded_token_takes_its_rows_alone(folder, drafts):
    """An array that nothing evaluates keeps a row and its graph alive for every token.

    mlx-lm's cache with values of width 0 took as much again as the rows, or twice with drafts.
    """
    plan = plan_memory(folder, dtype=mx.float32)
    loaded = load_model(folder, dtype=mx.float32, plan=plan)
    model, mtp, store = loaded.model, loaded.mtp, loaded.store
    beside, _ = Drafted(model, mtp).growth(drafts, 160)
    assert abs(beside) < 0.2 * plan.cache_bytes / plan.context
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


def test_what_little_is_lacking_is_lacking_in_few_layers(folder):
    """The other layers are resident: they need no ids on the host. The budget is kept."""
    each = sum(plan_memory(folder, dtype=mx.float32).slot_bytes.values())
    for share in (0.5, 0.6, 0.9, 0.999):
        budget = share * EXPERTS * each
        plan = plan_memory(folder, dtype=mx.float32, expert_memory_gb=budget / 1e9)
        counts = list(plan.slots.values())
        assert budget - each < plan.expert_bytes <= budget, share
        assert counts == sorted(counts, reverse=True) and counts[-1] >= EXPERTS // 2
        assert len({count for count in counts if count < EXPERTS}) <= 2
    assert counts[:-1] == [EXPERTS] * (len(counts) - 1) and counts[-1] == EXPERTS - 1


def test_streamed_chunks_are_as_large_as_memory_allows(folder):
    """Every chunk reads its experts again, so few large ones; but not at the experts' cost."""

    def chunk(**options) -> int:
        return plan_memory(folder, dtype=mx.float32, context=20000, **options).prefill_chunk

    assert chunk(experts="resident") == RESIDENT_CHUNK
    assert chunk(experts="streamed") == PREFILL_CHUNKS[0]
    resident = plan_memory(folder, dtype=mx.float32, context=20000, experts="resident")
    args = open_folder(folder).args
    tight = resident.total_bytes - transient_bytes(args, mx.float32, RESIDENT_CHUNK, 20000)
    tight += transient_bytes(args, mx.float32, RESIDENT_CHUNK - 1, 20000)
    assert chunk(experts="resident", limit_bytes=tight) < RESIDENT_CHUNK
    least = resident.fixed_bytes + sum(resident.slot_bytes.values()) * (K + 1)
    plan = plan_memory(
        folder, dtype=mx.float32, context=20000, experts="streamed", limit_bytes=least
    )
    assert plan.prefill_chunk < RESIDENT_CHUNK and plan.total_bytes <= least
    assert min(plan.slots.values()) >= K
    assert plan_memory(folder, dtype=mx.float32, context=100).prefill_chunk == 100


def test_contradicting_flags(folder):
    with pytest.raises(UserError, match="`--experts resident` keeps all of them"):
        plan_memory(folder, experts="resident", expert_memory_gb=1.0)


def test_without_drafts_the_module_takes_no_memory(folder):
    plan = plan_memory(folder, dtype=mx.float32, with_mtp=False)
    whole = plan_memory(folder, dtype=mx.float32)
    assert plan.mtp_bytes == 0 and len(plan.slots) == len(whole.slots) - 1
    loaded = load_model(open_folder(folder, with_mtp=False), dtype=mx.float32)
    model, mtp = loaded.model, loaded.mtp
    assert mtp is None and model(mx.zeros((1, 2), mx.int32)).shape[1] == 2


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


@pytest.mark.parametrize("budget", [float("nan"), float("inf"), -1.0])
def test_a_budget_is_a_number_of_bytes(folder, budget):
    """Of a program or of parity's flag: NaN and infinity ended in tracebacks."""
    with pytest.raises(UserError, match="`--expert-memory` is `"):
        plan_memory(folder, dtype=mx.float32, expert_memory_gb=budget)


def test_nothing_fits(folder):
    with pytest.raises(UserError, match="this machine allows") as error:
        plan_memory(folder, dtype=mx.float32, limit_bytes=1000)
    assert f"a context of {LEAST_CONTEXT:,} tokens; a recipe with fewer bits" in error.value.hint
    with pytest.raises(UserError, match="so does a smaller `--context`"):
        plan_memory(folder, dtype=mx.float32, limit_bytes=1000, context=5000)


def test_the_default_context_shrinks_until_it_fits(folder):
    """A model that fits was refused for the sake of 32,768 tokens that nobody had asked for."""
    whole = plan_memory(folder, dtype=mx.float32)
    assert whole.context == DEFAULT_CONTEXT
    for length in (16384, 4096, LEAST_CONTEXT):
        limit = plan_memory(folder, dtype=mx.float32, context=length).total_bytes
        plan = plan_memory(folder, dtype=mx.float32, experts="resident", limit_bytes=limit)
        assert length <= plan.context < DEFAULT_CONTEXT and plan.total_bytes <= limit
        with pytest.raises(UserError, match="this machine allows"):
            plan_memory(
                folder,
                dtype=mx.float32,
                experts="resident",
                limit_bytes=limit,
                context=DEFAULT_CONTEXT,
            )


def test_context_is_bounded_by_the_model(folder):
    plan = plan_memory(folder, dtype=mx.float32, context=10**9)
    assert plan.context == tiny.D["max_position_embeddings"]
    with pytest.raises(UserError, match="`--experts` is `some`"):
        plan_memory(folder, dtype=mx.float32, experts="some")


def pretend_metal(monkeypatch, recommended: int, memory: int) -> None:
    """Answer as Metal would for its device, whatever the default one is."""
    info = {"max_recommended_working_set_size": recommended, "memory_size": memory}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", {mx.gpu: info}.__getitem__)


def test_a_mac_allows_what_metal_recommends(folder, monkeypatch):
    """And MLX's cache of freed buffers, which Metal's allocator has, counts."""
    without = plan_memory(folder, dtype=mx.float32)
    pretend_metal(monkeypatch, 8 * 10**9, 12 * 10**9)
    plan = plan_memory(folder, dtype=mx.float32)
    assert plan.limit_bytes == int(8 * 10**9 * USABLE_SHARE)
    assert plan.transient_bytes - without.transient_bytes == BUFFER_CACHE_BYTES


def test_a_mac_may_be_told_to_allow_more(folder, monkeypatch):
    """The setting named is enough for the plan refused; it is not named where memory ends."""
    pretend_metal(monkeypatch, 10**9, 16 * 10**9)
    with pytest.raises(UserError, match="this machine allows") as error:
        plan_memory(folder, dtype=mx.float32, experts="resident")
    wired = int(error.value.hint.split("iogpu.wired_limit_mb=")[1].split("`")[0]) << 20
    assert wired < MOST_WIRED_SHARE * 16 * 10**9
    pretend_metal(monkeypatch, wired, 16 * 10**9)
    assert plan_memory(folder, dtype=mx.float32, experts="resident").is_resident
    pretend_metal(monkeypatch, 10**9, 10**9 + 1)
    with pytest.raises(UserError, match="this machine allows") as error:
        plan_memory(folder, dtype=mx.float32, experts="resident")
    assert "iogpu" not in error.value.hint


def test_another_gpu_allows_its_free_memory(folder, monkeypatch):
    """MLX's CUDA backend: the plan counted the host's memory, which the model is not put into."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "device_info", {mx.gpu: {"free_memory": 8 * 10**9}}.__getitem__)
    plan = plan_memory(folder, dtype=mx.float32)
    assert plan.limit_bytes == int(8 * 10**9 * USABLE_SHARE)
