"""Each forward trap of spec section 8, patched in: the parity bound must catch every one.

The check is test_model's and test_mtp's: logits and MTP logits against the reference, at once and
in chunks through the cache, largest relative error of a position <= 1e-4. `faults.py` names the
config and bias mean where each trap must show.
"""

import mlx.core as mx
import numpy as np
import pytest
import tiny
import torch
from compare import LOGITS, assert_close, relative_error, to_numpy

from mlx_dsv3.config import ModelArgs
from mlx_dsv3.model import moe
from mlx_dsv3.reference import model as reference
from parity import pairs
from parity.faults import CONFIGS, FAULTLESS, FAULTS, four_bits, gate_in_bf16, select
from parity.pairs import BIAS_MEANS, mlx_drafts, mlx_logits, random_ids


def outputs(pair, ids) -> dict[str, list]:
    """Return what each side makes of a sequence: MLX at once and in chunks, then the reference."""
    expected, g = pair.reference(ids)
    drafts, _ = pair.reference.mtp(g[:, :-1], ids[:, 1:])
    inputs = pairs.mlx_pairs(pair.model, ids)
    return {
        "logits": [mlx_logits(pair.model, ids), mlx_logits(pair.model, ids, (10, 5, 8)), expected],
        "drafts": [
            mlx_drafts(pair.mtp, *inputs, (22,))[0],
            mlx_drafts(pair.mtp, *inputs, (10, 5, 7))[0],
            drafts,
        ],
    }


@pytest.mark.parametrize("name", FAULTS)
def test_bound_catches(random_pair, monkeypatch, name):
    """A check too weak to see a trap that makes plausible text and raises nothing."""
    fault = FAULTS[name]
    pair = random_pair(CONFIGS[fault.config], fault.bias_mean)
    fault.patch(monkeypatch, pair)
    *actual, expected = outputs(pair, random_ids(1, 23))[fault.shows_in]
    error = max(relative_error(logits, expected) for logits in actual)
    print(f"{error:.1e} {name}")
    assert error > LOGITS.relative, f"{name} changes {fault.shows_in} by {error:.1e} only"


@pytest.mark.parametrize("bias_mean", BIAS_MEANS)
@pytest.mark.parametrize("config", CONFIGS)
def test_unmutated_model_passes(random_pair, config, bias_mean):
    """The other half: the same check on the same configs and bias means without a fault."""
    pair = random_pair(CONFIGS[config], bias_mean)
    for where, (*actual, expected) in outputs(pair, random_ids(1, 23)).items():
        for logits in actual:
            assert_close(f"{config} {bias_mean:+} {where}", logits, expected, LOGITS)


@pytest.mark.parametrize("name", FAULTLESS)
def test_faultless_variants_pass(random_pair, monkeypatch, name):
    """A fault's scaffolding that is wrong by itself would make every one of its traps `caught`.

    MTP positions that all count from 1 are right too: only differences enter (spec 4.1).
    """
    for bias_mean in BIAS_MEANS:
        pair = random_pair(tiny.A, bias_mean)
        with monkeypatch.context() as patch:
            FAULTLESS[name](patch, pair)
            for where, (*actual, expected) in outputs(pair, random_ids(1, 23)).items():
                for logits in actual:
                    assert_close(f"{name} {bias_mean:+} {where}", logits, expected, LOGITS)


# A gate of V3's proportions and selection bias: a large offset of small spread (spec 3.5).
WIDE = tiny.A | {
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
}
SEEDS = range(5)


def wide_gates(seed: int) -> tuple[moe.Gate, reference.Gate, torch.Tensor]:
    """Return one random gate on both sides, and 64 normal states."""
    generator = torch.Generator().manual_seed(seed)
    experts, hidden = WIDE["n_routed_experts"], WIDE["hidden_size"]
    expected = reference.Gate(reference.Args.from_dict(WIDE)).requires_grad_(False)
    expected.weight.copy_(torch.randn(experts, hidden, generator=generator) / hidden**0.5)
    expected.e_score_correction_bias.copy_(7 + 0.06 * torch.randn(experts, generator=generator))
    gate = moe.Gate(ModelArgs.from_dict(WIDE))
    gate.weight = mx.array(expected.weight.numpy())
    gate.e_score_correction_bias = mx.array(expected.e_score_correction_bias.numpy())
    return gate, expected, torch.randn(64, hidden, generator=generator)


def dense(indices, weights) -> np.ndarray:
    """Return weights (T, K) of experts (T, K) as a matrix (T, E)."""
    indices, weights = to_numpy(indices).astype(int), to_numpy(weights)
    out = np.zeros((len(indices), WIDE["n_routed_experts"]))
    np.put_along_axis(out, indices, weights, axis=1)
    return out


@pytest.mark.parametrize("seed", SEEDS)
def test_wide_gate_equals_reference(seed):
    """The unmutated half of the two tests below: 256 experts, bias 7 +- 0.06."""
    gate, expected, x = wide_gates(seed)
    actual = dense(*gate(mx.array(x.numpy())))
    assert_close(f"gate, seed {seed}", actual, dense(*expected(x)), LOGITS)


@pytest.mark.parametrize("seed", SEEDS)
def test_bound_catches_bf16_bias(monkeypatch, seed):
    """The bias rounded to bf16: a handful of values left near 7, other experts chosen."""
    gate, expected, x = wide_gates(seed)
    monkeypatch.setattr(moe, "route", select(bias_dtype=mx.bfloat16))
    assert relative_error(dense(*gate(mx.array(x.numpy()))), dense(*expected(x))) > LOGITS.relative
    chosen = np.array(gate(mx.array(x.numpy()))[0])
    right = np.sort(expected(x)[0].numpy(), axis=1)
    assert (chosen != right).any(axis=1).mean() > 0.1, "other experts, not other weights"


@pytest.mark.parametrize("fault", ["bf16", "4 bits"])
@pytest.mark.parametrize("seed", SEEDS)
def test_bound_catches_coarse_gate(monkeypatch, fault, seed):
    """Router logits from bf16, or router weights in 4 bits: wrong weights, other experts."""
    gate, expected, x = wide_gates(seed)
    if fault == "bf16":
        gate_in_bf16(monkeypatch)
    else:
        gate.weight = four_bits(gate.weight)
    assert relative_error(dense(*gate(mx.array(x.numpy()))), dense(*expected(x))) > LOGITS.relative
