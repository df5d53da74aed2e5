"""Logits of the MLX model against the reference and transformers, through every path of the cache.

The bound is `compare.LOGITS`: relative error of each position's logits <= 1e-4.
"""

import mlx.core as mx
import pytest
import tiny
import torch
from compare import LOGITS, assert_close

from mlx_dsv3.model import mla
from parity.pairs import BIAS_MEANS, CONFIGS, mlx_logits, random_ids

pytestmark = pytest.mark.usefixtures("both_ways")

CHUNKS = {"full": (23,), "10+5+8": (10, 5, 8), "17+1+2+3": (17, 1, 2, 3)}


@pytest.mark.parametrize("bias_mean", BIAS_MEANS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_reference_and_transformers(random_pair, oracle, name, bias_mean):
    """Any forward trap: three implementations, written apart, must give the same logits."""
    config, ids = tiny.CONFIGS[name], random_ids(1, 23)
    pair = random_pair(config, bias_mean)
    expected, _ = pair.reference(ids)
    judged, _ = oracle(config, bias_mean)(ids)
    for label, chunks in ({"no cache": ()} | CHUNKS).items():
        logits = mlx_logits(pair.model, ids, chunks)
        assert_close(f"{name} {bias_mean:+} {label}, reference", logits, expected, LOGITS)
        assert_close(f"{name} {bias_mean:+} {label}, transformers", logits, judged, LOGITS)


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_through_the_cache_of_all_sides(random_pair, oracle, name):
    """A chunk's mask or positions that forget the cache: each side runs 10+5+8 through its own."""
    config, ids = tiny.CONFIGS[name], random_ids(1, 23)
    pair, judge = random_pair(config), oracle(config)
    caches = pair.reference.make_cache(), judge.make_cache()
    bounds = (0, 10), (10, 15), (15, 23)
    expected = [pair.reference(ids[:, a:b], caches[0])[0] for a, b in bounds]
    judged = [judge(ids[:, a:b], caches[1])[0] for a, b in bounds]
    logits = mlx_logits(pair.model, ids, (10, 5, 8))
    assert_close(f"{name} 10+5+8, reference", logits, torch.cat(expected, 1), LOGITS)
    assert_close(f"{name} 10+5+8, transformers", logits, torch.cat(judged, 1), LOGITS)


def test_batch_of_two(random_pair):
    """A reshape that mixes batch and positions: invisible with one sequence."""
    pair, ids = random_pair(tiny.A), random_ids(2, 23)
    expected, _ = pair.reference(ids)
    assert_close("batch 2", mlx_logits(pair.model, ids, (10, 5, 8)), expected, LOGITS)


# name -> (ABSORBED_MAX_QUERIES, SCORE_BYTES, EXPANDED_BYTES); 200 positions, 4 heads of 44 floats
FORMS = {
    "as shipped": (170, 256 << 20, 128 << 20),  # 200 queries: expanded, one group, one block
    "expanded, groups of 3 and 1 heads, blocks of 16 queries": (0, 1, 3 * 200 * 44 * 4),
    "expanded, one head at a time, blocks of 58 queries": (0, 58 * 3 * 200 * 4, 1),
    "absorbed": (10**6, 256 << 20, 128 << 20),
    "absorbed, blocks of 7 queries": (10**6, 7 * 12 * 4 * 200, 1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_long_prefill_in_every_form(random_pair, monkeypatch, name, form):
    """Blocks that cut keys, queries or heads at the wrong place: uneven last blocks and groups.

    200 queries at once, then 8 short ones, then 200 on top of them: the second long chunk meets a
    filled cache that has grown twice.
    """
    limit, score_bytes, expanded_bytes = FORMS[form]
    monkeypatch.setattr(mla, "ABSORBED_MAX_QUERIES", limit)
    monkeypatch.setattr(mla, "SCORE_BYTES", score_bytes)
    monkeypatch.setattr(mla, "EXPANDED_BYTES", expanded_bytes)
    config = tiny.CONFIGS[name] | {"num_hidden_layers": 2}
    pair, ids = random_pair(config, 0.0), random_ids(1, 408)
    expected, _ = pair.reference(ids)
    logits = mlx_logits(pair.model, ids, (200, 8, 200))
    assert_close(f"{name} {form}", logits, expected, LOGITS)


PACKINGS = {
    "q4": {"bits": 4, "group_size": 64, "mode": "affine"},
    "q8": {"bits": 8, "group_size": 64, "mode": "affine"},
    "q3": {"bits": 3, "group_size": 32, "mode": "affine"},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}


@pytest.mark.parametrize("arrangement", ["records", "stacked"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_folder_means_its_dequantised_tensors(random_pair, packing, arrangement):
    """Bits, group or mode inferred wrongly, biases dropped, scales widened wrongly.

    The reference has the same codes, dequantised. 408 tokens reach the sorted expert path and the
    expanded form, whose heads are sliced out of packed arrays.
    """
    config, ids = tiny.D | {"num_hidden_layers": 2}, random_ids(1, 208)
    pair = random_pair(config, packing=PACKINGS[packing], arrangement=arrangement)
    assert pair.mtp.self_attn.embed_q.bits == PACKINGS[packing]["bits"]
    expected, g = pair.reference(ids)
    logits = mlx_logits(pair.model, ids, (200, 8))
    assert_close(f"{packing} {arrangement}", logits, expected, LOGITS)
    drafted, _ = pair.mtp(mx.array(g[:, :-1].numpy()), mx.array(ids[:, 1:].numpy()))
    expected, _ = pair.reference.mtp(g[:, :-1], ids[:, 1:])
    assert_close(f"{packing} {arrangement} MTP", drafted, expected, LOGITS)
