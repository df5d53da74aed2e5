"""MTP logits of the MLX module against the reference's and transformers' MTP model.

Pair j is (state g_j after the final norm, token t_{j+1}); row j predicts t_{j+2}. MLX and the
reference number pairs from 0, transformers from 1: the result is the same (spec 4.1).
"""

import mlx.core as mx
import pytest
import tiny
from compare import LOGITS, assert_close

from parity.pairs import BIAS_MEANS, CONFIGS, mlx_drafts, mlx_pairs, random_ids

pytestmark = pytest.mark.usefixtures("both_ways")

CHUNKS = {"full": (22,), "10+5+7": (10, 5, 7), "16+1+2+3": (16, 1, 2, 3)}


@pytest.mark.parametrize("bias_mean", BIAS_MEANS)
@pytest.mark.parametrize("name", CONFIGS)
def test_mtp_logits_equal_reference_and_transformers(random_pair, oracle, name, bias_mean):
    """Any trap of spec section 8, item 8, and a module that reads another layer's tensors."""
    config, ids = tiny.CONFIGS[name], random_ids(1, 23)
    pair, judge = random_pair(config, bias_mean), oracle(config, bias_mean)
    _, g = pair.reference(ids)
    expected, expected_states = pair.reference.mtp(g[:, :-1], ids[:, 1:])
    judged, _ = judge.mtp(judge(ids)[1][:, :-1], ids[:, 1:])
    inputs = mlx_pairs(pair.model, ids)
    logits, _ = pair.mtp(*inputs)
    assert_close(f"{name} {bias_mean:+} no cache, reference", logits, expected, LOGITS)
    for label, chunks in CHUNKS.items():
        logits, states = mlx_drafts(pair.mtp, *inputs, chunks)
        assert_close(f"{name} {bias_mean:+} {label}, reference", logits, expected, LOGITS)
        assert_close(f"{name} {bias_mean:+} {label}, states", states, expected_states, LOGITS)
        assert_close(f"{name} {bias_mean:+} {label}, transformers", logits, judged, LOGITS)


@pytest.mark.parametrize("name", CONFIGS)
def test_mtp_chunks_of_all_sides(random_pair, oracle, name):
    """Positions that start anew in a chunk, on any side: each runs 10+5+7 through its own cache."""
    config, ids = tiny.CONFIGS[name], random_ids(1, 23)
    pair, judge = random_pair(config, 0.0), oracle(config, 0.0)
    _, g = pair.reference(ids)
    _, judge_g = judge(ids)
    caches = pair.reference.make_cache(), judge.make_mtp_cache()
    logits, _ = mlx_drafts(pair.mtp, *mlx_pairs(pair.model, ids), (10, 5, 7))
    for a, b in (0, 10), (10, 15), (15, 22):
        expected, _ = pair.reference.mtp(g[:, a:b], ids[:, a + 1 : b + 1], caches[0])
        judged, _ = judge.mtp(judge_g[:, a:b], ids[:, a + 1 : b + 1], caches[1])
        assert_close(f"{name} pairs {a}-{b}, reference", logits[:, a:b], expected, LOGITS)
        assert_close(f"{name} pairs {a}-{b}, transformers", logits[:, a:b], judged, LOGITS)


@pytest.mark.parametrize("name", CONFIGS)
def test_second_draft_recycles_the_normed_state(random_pair, oracle, name):
    """The state before `shared_head.norm` in the second draft: lower acceptance, nothing else."""
    config, ids = tiny.CONFIGS[name], random_ids(1, 23)
    pair, judge = random_pair(config, 0.0), oracle(config, 0.0)
    _, g = pair.reference(ids)
    reference_cache, judge_cache = pair.reference.make_cache(), judge.make_mtp_cache()
    cache = pair.mtp.make_cache()
    logits, f = pair.mtp(*mlx_pairs(pair.model, ids), cache)
    _, expected_f = pair.reference.mtp(g[:, :-1], ids[:, 1:], reference_cache)
    _, judged_f = judge.mtp(judge(ids)[1][:, :-1], ids[:, 1:], judge_cache)
    draft = int(logits[0, -1].argmax())
    again, _ = pair.mtp(f[:, -1:], mx.array([[draft]]), cache)
    token = ids.new_tensor([[draft]])
    expected, _ = pair.reference.mtp(expected_f[:, -1:], token, reference_cache)
    judged, _ = judge.mtp(judged_f[:, -1:], token, judge_cache)
    assert_close(f"{name} second draft, reference", again, expected, LOGITS)
    assert_close(f"{name} second draft, transformers", again, judged, LOGITS)


def test_long_run_of_pairs_is_expanded(random_pair):
    """The module's own prefill of a long prompt: 200 pairs at once, then 7."""
    pair, ids = random_pair(tiny.A), random_ids(1, 208)
    _, g = pair.reference(ids)
    expected, _ = pair.reference.mtp(g[:, :-1], ids[:, 1:])
    logits, _ = mlx_drafts(pair.mtp, *mlx_pairs(pair.model, ids), (200, 7))
    assert_close("207 pairs", logits, expected, LOGITS)
