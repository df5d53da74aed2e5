"""Positions beyond yarn's original length: MLX, reference and transformers.

Config A with two layers and two heads, so that it costs 6 s. The experts are in the last layer
only: where two experts tie within float32, sides may choose differently, and that position alone
is wrong; such positions are known from the reference's margins and left out (none, with this
seed).
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
import tiny
import torch
from compare import LOGITS, assert_close, position_factor, to_numpy

from parity.pairs import load_reference, random_ids

CHUNK = 1024
TIE = 2e-6  # margin of selection scores below which float32 sides may choose differently


def choice_margins(gate, x) -> torch.Tensor:
    """Return by how much the last chosen expert, and the last kept group, beat the next one."""
    args = gate.args
    scores = torch.nn.functional.linear(x.flatten(0, -2), gate.weight).sigmoid()
    groups = (scores + gate.e_score_correction_bias).unflatten(-1, (args.n_group, -1))
    best = groups.topk(2, dim=-1).values.sum(-1).sort(descending=True)
    margin = best.values[:, args.topk_group - 1] - best.values[:, args.topk_group]
    kept = best.indices[:, : args.topk_group, None].expand(-1, -1, groups.shape[-1])
    rest = groups.gather(1, kept).flatten(1).sort(descending=True).values
    last = args.num_experts_per_tok - 1
    return torch.minimum(margin, rest[:, last] - rest[:, last + 1])


def chunked(step, length: int):
    """Return step(start, end) over chunks of CHUNK, each result joined along positions."""
    parts = [step(a, min(a + CHUNK, length)) for a in range(0, length, CHUNK)]
    return [torch.cat(outs, 1) for outs in zip(*parts, strict=True)]


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


def check(name, actual, expected, ties: np.ndarray):
    """Compare at every position but ties, the bound growing with the position."""
    kept = ~ties[: actual.shape[1]]
    assert kept.mean() > 0.999, f"{(~kept).sum()} ties"
    factor = position_factor(actual.shape[1])[kept]
    assert_close(name, to_numpy(actual)[:, kept], to_numpy(expected)[:, kept], LOGITS, factor)


@dataclass
class Expected:
    """Logits, states and MTP logits of the reference, and where its choice of experts is a tie."""

    logits: torch.Tensor
    g: torch.Tensor
    drafts: torch.Tensor
    ties: np.ndarray
    draft_ties: np.ndarray


def run_reference(model, ids) -> Expected:
    margins = []
    hooks = [
        layer.mlp.gate.register_forward_hook(
            lambda gate, x, _: margins.append(choice_margins(gate, x[0]))
        )
        for layer in model.model.layers[1:]
    ]
    cache, length = model.make_cache(), ids.shape[1]
    logits, g = chunked(lambda a, b: model(ids[:, a:b], cache), length)
    ties = (torch.cat(margins) < TIE).numpy()
    margins.clear()
    drafts, _ = chunked(lambda a, b: model.mtp(g[:, a:b], ids[:, a + 1 : b + 1], cache), length - 1)
    draft_ties = ties[:-1] | (torch.cat(margins) < TIE).numpy()
    for hook in hooks:
        hook.remove()
    return Expected(logits, g, drafts, ties, draft_ties)


def run_mlx(pair, ids) -> tuple[mx.array, mx.array]:
    """Prefill all but 8 positions in the expanded form, the last 8 absorbed, in 5 + 2 + 1."""
    x, cache, states, start = mx.array(ids.numpy()), pair.model.make_cache(), [], 0
    for length in (ids.shape[1] - 8, 5, 2, 1):
        states.append(pair.model.hidden(x[:, start : start + length], cache))
        mx.eval(states)
        start += length
    states = mx.concatenate(states, axis=1)
    drafts, _ = pair.mtp(states[:, :-1], x[:, 1:])
    return pair.model.lm_head(states), drafts


@pytest.mark.parametrize("length", [4608, pytest.param(8192, marks=pytest.mark.slow)])
def test_long_positions(random_pair, oracle, length):
    """Yarn switched at its original length, 4,096; angles too coarse; a long causal square."""
    pair, ids = random_pair(tiny.A | SMALL, 0.0), random_ids(1, length)
    expected = run_reference(pair.reference, ids)
    logits, drafts = run_mlx(pair, ids)
    check(f"{length}, reference", logits, expected.logits, expected.ties)
    check(f"{length - 1} pairs, reference", drafts, expected.drafts, expected.draft_ties)

    judge = oracle(pair.config, 0.0)
    cache, mtp_cache = judge.make_cache(), judge.make_mtp_cache()
    judged, g = chunked(lambda a, b: judge(ids[:, a:b], cache), length)
    judged_drafts, _ = chunked(
        lambda a, b: judge.mtp(g[:, a:b], ids[:, a + 1 : b + 1], mtp_cache), length - 1
    )
    check(f"{length}, transformers", logits, judged, expected.ties)
    check(f"{length - 1} pairs, transformers", drafts, judged_drafts, expected.draft_ties)
    check("reference, transformers", expected.logits, judged, expected.ties)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["A", "C"])
def test_8192_positions_against_float64(random_pair, name):
    """The same against the reference in float64, four heads, where only MLX's error remains."""
    pair, ids = (
        random_pair(tiny.CONFIGS[name] | {"num_hidden_layers": 2}, 0.0),
        random_ids(1, 8192),
    )
    exact = load_reference(pair.config, pair.tensors, torch.float64)
    expected = run_reference(exact, ids)
    logits, drafts = run_mlx(pair, ids)
    check(f"{name} 8192, float64", logits, expected.logits, expected.ties)
    check(f"{name} 8191 pairs, float64", drafts, expected.drafts, expected.draft_ties)
