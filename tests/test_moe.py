"""The router against the written rule, and experts computed over the slots of a bank."""

import copy
import dataclasses

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
import torch
from compare import FORMS, LAYER, assert_close, same_bits
from parity.faults import select

from mlx_dsv3.checkpoint.format import Quantization
from mlx_dsv3.config import ModelArgs
from mlx_dsv3.decoding.draft_control import MAX_DRAFTS
from mlx_dsv3.experts import products
from mlx_dsv3.experts.bank import Projection
from mlx_dsv3.experts.products import RoutedExperts, compute_experts, compute_lazily
from mlx_dsv3.model import cpu
from mlx_dsv3.model.linear import Joined, Linear
from mlx_dsv3.model.moe import MLP, Gate, MoE, route

# spec 3.5, the worked example
LOGITS = mx.array([[0.0, -1.5, 1.7, 1.9, -1.7, -2.0, -1.8, 0.9, 1.4, -1.7, -2.0, 0.2]])
BIAS = mx.array([-0.6, -0.98, -0.99, -0.75, -0.76, -0.65, -0.34, -0.7, -0.72, -0.75, 0.06, -0.71])
EXAMPLE = {7: 0.814498, 8: 0.919021, 10: 0.136565, 11: 0.629916}


def make_args(**changes) -> ModelArgs:
    return ModelArgs.from_dict(tiny.A | changes)


TWELVE = {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}


def chosen(router, args: ModelArgs) -> dict[int, float]:
    indices, weights = router(LOGITS, BIAS, args)
    return dict(zip(indices[0].tolist(), weights[0].tolist(), strict=True))


def route_literally(logits: np.ndarray, bias: np.ndarray, args: ModelArgs):
    """Choose experts for one token by the sentences of spec 3.5."""
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    choice = scores + bias
    groups = choice.reshape(args.n_group, -1)
    group_scores = np.sort(groups, axis=1)[:, -2:].sum(1)
    kept = np.argsort(-group_scores, kind="stable")[: args.topk_group]
    size = groups.shape[1]
    candidates = [g * size + i for g in sorted(kept) for i in range(size)]
    best = sorted(candidates, key=lambda e: (-choice[e], e))[: args.num_experts_per_tok]
    weights = scores[sorted(best)]
    if args.norm_topk_prob:
        weights = weights / weights.sum()
    return sorted(best), weights * args.routed_scaling_factor


def test_worked_example():
    """The selection rule of spec 3.5 with its numbers."""
    weights = chosen(route, make_args(**TWELVE))
    assert weights == pytest.approx(EXAMPLE, abs=1e-6)


@pytest.mark.parametrize(
    "change, experts",
    [
        ({"group_score": "maximum"}, {3, 5, 10, 11}),
        ({"has_bias": False}, {0, 2, 7, 8}),
        ({"has_groups": False}, {3, 7, 8, 10}),
    ],
)
def test_worked_example_tells_wrong_rules_apart(change, experts):
    """An example that a wrong rule also satisfies proves nothing: the spec's wrong answers."""
    assert set(chosen(select(**change), make_args(**TWELVE))) == experts


def test_zero_mask_picks_a_dropped_expert():
    """Scores of the kept groups below zero lose against a mask of 0.0 (old remote code, mlx-lm)."""
    experts = set(chosen(select(dropped=0.0), make_args(**TWELVE)))
    assert {7, 8, 10} < experts
    assert (experts - {7, 8, 10}).pop() in range(6), "an expert of groups 0 and 1"


@pytest.mark.parametrize("renormalises", [True, False])
@pytest.mark.parametrize("bias_mean", [2.0, 0.0, -1.0, -5.0])
@pytest.mark.parametrize(
    "shape", [(16, 4, 2, 3), (16, 1, 1, 3), (64, 8, 4, 8), (64, 8, 8, 6), (32, 2, 1, 16)]
)
def test_route_equals_the_written_rule(shape, bias_mean, renormalises):
    """Any error of selection; at -1 and -5 every selection score is negative."""
    experts, n_group, topk_group, per_token = shape
    args = make_args(
        n_routed_experts=experts,
        n_group=n_group,
        topk_group=topk_group,
        num_experts_per_tok=per_token,
        norm_topk_prob=renormalises,
    )
    rng = np.random.default_rng(experts + n_group)
    logits = rng.standard_normal((50, experts)).astype(np.float32)
    bias = (bias_mean + 0.3 * rng.standard_normal(experts)).astype(np.float32)
    indices, weights = route(mx.array(logits), mx.array(bias), args)
    assert indices.shape == weights.shape == (50, per_token) and weights.dtype == mx.float32
    for token in range(50):
        expected, expected_weights = route_literally(logits[token], bias, args)
        assert indices[token].tolist() == expected
        np.testing.assert_allclose(np.array(weights[token]), expected_weights, rtol=1e-5)


@pytest.mark.parametrize("n_group, topk_group", [(1, 1), (4, 2), (8, 1)])
@pytest.mark.parametrize("bias", [0.0, -3.0])
def test_ties_go_to_the_lower_id(n_group, topk_group, bias):
    """Equal scores everywhere: the lowest ids of the lowest groups, on every backend."""
    args = make_args(
        n_routed_experts=64, n_group=n_group, topk_group=topk_group, num_experts_per_tok=6
    )
    indices, weights = route(mx.zeros((3, 64)), mx.full((64,), bias), args)
    assert indices.tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    assert mx.allclose(weights, mx.full((3, 6), 2.5 / 6), rtol=1e-6)


def test_a_tie_inside_a_full_group():
    """The last place between two equal experts, the lower one in a later position of the sort."""
    logits = mx.array([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0, 2.0, 4.0]])
    args = make_args(n_routed_experts=8, n_group=1, topk_group=1, num_experts_per_tok=4)
    assert route(logits, mx.zeros(8), args)[0].tolist() == [[1, 2, 3, 7]]


def test_vanishing_scores_give_no_nan():
    """All chosen scores zero: 0 / (0 + 1e-20), where mlx-lm divides by zero."""
    _, weights = route(mx.full((1, 16), -200.0), mx.zeros(16), make_args())
    assert weights.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.usefixtures("both_ways")
def test_gate_is_float32_for_bf16_states(random_pair):
    """A gate cast with the model: bf16 logits choose other experts (47 % at V3's bias)."""
    pair = random_pair(tiny.A, dtype=mx.bfloat16)
    gate = pair.model.layers[1].mlp.gate
    assert gate.weight.dtype == gate.e_score_correction_bias.dtype == mx.float32
    x = mx.random.normal((64, 64), key=mx.random.key(0)).astype(mx.bfloat16)
    indices, weights = gate(x)
    logits = np.array(x.astype(mx.float32)) @ np.array(gate.weight).T
    expected = route(mx.array(logits), gate.e_score_correction_bias, pair.args)
    assert mx.array_equal(indices, expected[0])
    assert_close("weights", weights, expected[1], LAYER)
    assert pair.model.layers[1].mlp(x[None]).dtype == mx.bfloat16


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("length", [1, 23, 408])
def test_one_set_of_experts_for_every_token(random_pair, length):
    """Every row in the same slots: a gather that assumes spread, empty slots in between."""
    pair = random_pair(tiny.A)
    mixture, expected = pair.model.layers[2].mlp, copy.deepcopy(pair.reference.model.layers[2].mlp)
    bias = torch.full((16,), -5.0)
    bias[[5, 6, 12]] = 5.0
    expected.gate.e_score_correction_bias.data = bias
    mixture.gate.e_score_correction_bias = mx.array(bias.numpy())
    x = mx.random.normal((1, length, 64), key=mx.random.key(length))
    assert set(mixture.gate(x)[0].flatten().tolist()) == {5, 6, 12}
    out = expected(torch.from_numpy(np.array(x)))
    assert_close(f"{length} tokens", mixture(x), out, LAYER)


PACKINGS = {
    "float32": None,
    "q4": Quantization(4, 64, "affine"),
    "q8": Quantization(8, 32, "affine"),
    "mxfp4": Quantization(4, 32, "mxfp4"),
}


@dataclasses.dataclass
class ArrayBank:
    """A resident bank made of arrays, without files."""

    gate_up: Projection
    down: Projection
    num_experts: int
    dearest: Quantization | None
    wants_ids: bool = False


def random_bank(experts: int, hidden: int, width: int, packing: Quantization | None) -> ArrayBank:
    def projection(seed: int, rows: int, columns: int) -> Projection:
        weight = mx.random.normal((experts, rows, columns), key=mx.random.key(seed)) / columns**0.5
        if packing is None:
            return Projection(weight, None, None, None)
        parts = mx.quantize(weight, packing.group_size, packing.bits, packing.mode)
        return Projection(*parts, *[None] * (3 - len(parts)), packing)

    gate_up, down = projection(0, 2 * width, hidden), projection(1, hidden, width)
    return ArrayBank(gate_up, down, experts, packing)


def random_choices(packing) -> tuple[ArrayBank, mx.array, mx.array]:
    """Return a bank, 90 states and three experts for each."""
    bank = random_bank(16, 128, 64, packing)
    x = mx.random.normal((90, 128), key=mx.random.key(2))
    indices = mx.argsort(mx.random.uniform(shape=(90, 16), key=mx.random.key(3)), axis=-1)[:, :3]
    return bank, x, mx.sort(indices, axis=-1)


@pytest.mark.parametrize("packing", PACKINGS)
def test_sorted_rows_equal_unsorted_rows(packing):
    """Rows sent back in the wrong order, or a prefill that rounds unlike decoding."""
    bank, x, indices = random_choices(PACKINGS[packing])
    assert indices.size >= 4 * bank.num_experts
    is_sorted = compute_lazily(bank, x, indices)
    bank.num_experts = indices.size
    unsorted = compute_lazily(bank, x, indices)
    assert is_sorted.shape == (90, 3, 128)
    assert same_bits(is_sorted, unsorted)


@pytest.mark.parametrize("rows, is_sorted", [(3, False), (63, False), (66, True), (270, True)])
def test_four_rows_an_expert_are_sorted(monkeypatch, rows, is_sorted):
    """Unsorted, a long prefill would read each expert's weights once a row."""
    bank, x, indices = random_choices(None)
    used = []

    def spy(bank, x, slots, is_sorted):
        used.append((is_sorted, slots.flatten().tolist()))
        return compute_experts(bank, x, slots, is_sorted)

    monkeypatch.setattr(products, "compute_experts", spy)
    compute_lazily(bank, x[: rows // 3], indices[: rows // 3])
    ((was_sorted, slots),) = used
    assert was_sorted == is_sorted and len(slots) == rows
    assert not is_sorted or slots == sorted(slots)


@pytest.mark.parametrize("packing", PACKINGS)
def test_token_does_not_see_its_neighbours(packing):
    """A token's experts give the same bits alone and among 90."""
    bank, x, indices = random_choices(PACKINGS[packing])
    whole = compute_lazily(bank, x, indices)
    for token in 0, 41, 89:
        alone = compute_lazily(bank, x[token : token + 1], indices[token : token + 1])
        assert same_bits(alone, whole[token : token + 1])


@pytest.mark.parametrize("packing", PACKINGS)
def test_result_does_not_depend_on_slots(packing):
    """An expert gives the same bits in whichever slot of its bank it lies."""
    bank, x, indices = random_choices(PACKINGS[packing])
    order = mx.random.permutation(16, key=mx.random.key(5))

    def moved(projection: Projection) -> Projection:
        parts = (projection.weight, projection.scales, projection.biases)
        parts = [None if part is None else part[order] for part in parts]
        return Projection(*parts, projection.quantization)

    elsewhere = dataclasses.replace(bank, gate_up=moved(bank.gate_up), down=moved(bank.down))
    slots = mx.argsort(order)[indices]
    rows = x[:, None, None]
    expected = compute_experts(bank, rows, indices, is_sorted=False)
    assert same_bits(compute_experts(elsewhere, rows, slots, is_sorted=False), expected)


@pytest.mark.parametrize("packing", PACKINGS)
def test_experts_equal_a_loop(packing):
    """silu on the wrong half, a transposed weight, an expert's rows given to its neighbour."""
    bank, x, indices = random_choices(PACKINGS[packing])
    packed = PACKINGS[packing]

    def dense(projection: Projection, expert: int) -> mx.array:
        parts = (projection.weight, projection.scales, projection.biases)
        parts = [None if part is None else part[expert] for part in parts]
        if packed is None:
            return parts[0]
        return mx.dequantize(*parts, packed.group_size, packed.bits, packed.mode, dtype=mx.float32)

    y = compute_lazily(bank, x, indices)
    for token, choice in (0, 0), (41, 2), (89, 1):
        expert = indices[token, choice].item()
        gate, up = mx.split(dense(bank.gate_up, expert) @ x[token], 2)
        expected = dense(bank.down, expert) @ (nn.silu(gate) * up)
        assert_close(f"token {token}", y[token, choice], expected, FORMS)


@pytest.mark.parametrize(
    "tokens, wants_ids, way",
    [(1, False, "lazily"), (5, False, "lazily"), (1, True, "by_id"), (90, False, "by_id")],
)
def test_ids_are_read_where_they_are_wanted(monkeypatch, tokens, wants_ids, way):
    """A bank that streams needs them at each step, a resident one on a CPU for a prompt alone."""
    bank, x, indices = random_choices(PACKINGS["q4"])
    bank.wants_ids, used = wants_ids, []

    def spy(name: str):
        def compute(bank, x, experts):
            used.append((name, type(experts)))
            return mx.zeros((*experts.shape, x.shape[-1]))

        return compute

    for name in "lazily", "by_id":
        monkeypatch.setattr(products, f"compute_{name}", spy(name))
    y = RoutedExperts(bank)(x[None, :tokens], indices[None, :tokens], meanwhile=x)
    assert used == [(way, np.ndarray if way == "by_id" else mx.array)]
    assert y.shape == (1, tokens, 3, 128)


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_resident_step_waits_for_nothing(random_pair, tokens):
    """A value read in the middle of a step stops the GPU; MLX refuses it while a trace is made."""
    model = random_pair(tiny.A).model
    ids = mx.arange(tokens)[None]
    traced = mx.compile(lambda ids: model(ids, model.make_cache()))(ids)
    assert_close(f"{tokens} tokens", traced, model(ids), LAYER)


@pytest.mark.usefixtures("both_ways")
def test_without_shared_experts(random_pair):
    """n_shared_experts null: the routed sum alone."""
    mixture = random_pair(tiny.A).model.layers[1].mlp
    x = mx.random.normal((1, 5, 64), key=mx.random.key(0))
    shared = mixture.shared_experts(x)
    whole = mixture(x)
    mixture.pop("shared_experts")
    assert_close("routed", mixture(x), whole - shared, LAYER)
    assert "shared_experts" not in MoE(dataclasses.replace(make_args(), n_shared_experts=None))


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    "formats, products",
    [
        ([None, None], 1),
        ([(64, 4), (64, 4)], 1),
        ([(64, 4), (64, 4), (64, 4)], 1),
        ([(64, 4), (64, 8)], 2),
        ([(64, 4), (32, 4)], 2),
        ([None, (64, 4)], 2),
    ],
)
def test_joined_layers_equal_separate_ones(formats, products):
    """Gate and up as one product; apart where mixed recipes pack them differently."""
    layers = []
    for rows, packing in zip((48, 16, 8), formats, strict=False):
        layer = nn.Linear(64, rows, bias=False)
        layers.append(nn.QuantizedLinear.from_linear(layer, *packing) if packing else layer)
    x = mx.random.normal((3, 64), key=mx.random.key(0))
    expected = [layer(x) for layer in layers]
    joined = Joined(*layers)
    assert len(joined.layers) == products
    for out, want in zip(joined(x), expected, strict=True):
        assert_close(f"{formats}", out, want, LAYER)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("block_bytes", [1 << 20, 40 * 4 * 64])
def test_many_rows_equal_few(monkeypatch, packing, block_bytes):
    """On a CPU many rows take another product: the same numbers, whatever the blocks."""
    monkeypatch.setattr(cpu, "BLOCK_BYTES", block_bytes)
    layer, q = Linear(64, 96), PACKINGS[packing]
    if q is not None:
        layer = layer.to_quantized(group_size=q.group_size, bits=q.bits, mode=q.mode)
    x = mx.random.normal((2, 24, 64), key=mx.random.key(0))
    rows = [layer(x[:, i : i + 1]) for i in range(24)]
    assert_close(packing, layer(x), mx.concatenate(rows, axis=1), LAYER)
    most = max(cpu.MIN_TOKENS, cpu.fewest_rows(q) + cpu.WAIT_ROWS) - 1
    few, many = layer(x[:, :most]), layer(x)
    monkeypatch.setattr(cpu, "takes", lambda *call: False)
    assert same_bits(few, layer(x[:, :most]))
    assert most >= 24 or not same_bits(many, layer(x))  # both products did run


def test_a_format_that_was_not_measured(monkeypatch):
    """1 bit is in no table of ours: every forward of such a folder ended in a KeyError."""
    layer = Linear(64, 96).to_quantized(group_size=64, bits=1, mode="affine")
    x = mx.random.normal((1, 40, 64), key=mx.random.key(0))
    rows = [layer(x[:, i : i + 1]) for i in range(40)]
    assert_close("1 bit", layer(x), mx.concatenate(rows, axis=1), LAYER)


def test_verification_never_takes_the_product_of_many_rows():
    """Its rows must equal those of plain steps to the bit."""
    assert cpu.MIN_TOKENS > MAX_DRAFTS + 1


def test_products_leave_the_threads_of_blas_alone():
    """Two BLAS threads that wait for each other took 24 ms for a product of 1 ms, a core busy."""

    def threads() -> set[int]:
        return {info["num_threads"] for info in cpu.blas().info() if info["user_api"] == "blas"}

    before, seen = threads(), []

    class Watched(np.ndarray):
        def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
            seen.append(threads())
            plain = [np.asarray(array) for array in inputs]
            return getattr(ufunc, method)(*plain, out=tuple(map(np.asarray, out)), **options)

    x = np.ones((9, 64), np.float32).view(Watched)
    cpu.multiply(x, mx.ones((32, 64)), None, None, None)
    assert seen == [{1} if before else set()]  # Accelerate has no switch
    assert threads() == before


@pytest.mark.usefixtures("both_ways")
def test_mlp_keeps_gate_and_up_apart():
    """silu(gate) * up, not silu(up) * gate."""
    mlp = MLP(64, 96)
    x = mx.random.normal((3, 64), key=mx.random.key(0))
    gate, up, down = (layer.weight for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    expected = (nn.silu(x @ gate.T) * (x @ up.T)) @ down.T
    mlp.join()
    assert_close("mlp", mlp(x), expected, LAYER)


def test_gate_reads_its_own_args():
    """The numbers come from the config, not from V3: 6 of 64 experts, no groups (Moonlight)."""
    gate = Gate(
        make_args(
            n_routed_experts=64,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=6,
            routed_scaling_factor=2.446,
        )
    )
    gate.weight = mx.random.normal((64, 64), key=mx.random.key(0))
    indices, weights = gate(mx.random.normal((2, 7, 64), key=mx.random.key(1)))
    assert indices.shape == (2, 7, 6)
    assert mx.allclose(weights.sum(-1), mx.full((2, 7), 2.446), rtol=1e-6)
