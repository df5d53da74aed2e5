"""The MTP module by itself: what it shares, how its positions and its cache behave."""

import mlx.core as mx
import pytest
import tiny
from compare import LAYER, LOGITS, assert_close, same_bits
from mlx.utils import tree_flatten
from parity.pairs import mlx_pairs, random_ids

pytestmark = pytest.mark.usefixtures("both_ways")


@pytest.fixture
def pair(random_pair):
    return random_pair(tiny.A)


def parameter_names(module) -> set[str]:
    return {name for name, _ in tree_flatten(module.parameters())}


def test_embedding_and_head_are_the_main_models(pair):
    """A second copy of both: 3.7 GB at V3's size, and another dtype by accident."""
    names = parameter_names(pair.mtp)
    assert not {name for name in names if "embed_tokens" in name or "head.weight" in name}
    assert pair.mtp.shared.embed_tokens is pair.model.model.embed_tokens
    assert pair.mtp.shared.lm_head is pair.model.lm_head
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} < names


def test_layer_is_moe_even_in_a_dense_model(random_pair):
    """first_k_dense_replace counts the main model's layers, not this one."""
    pair = random_pair(tiny.A | {"num_hidden_layers": 1, "first_k_dense_replace": 1})
    assert pair.mtp.mlp.experts is not None
    ids = random_ids(1, 8)
    _, g = pair.reference(ids)
    expected, _ = pair.reference.mtp(g[:, :-1], ids[:, 1:])
    logits, _ = pair.mtp(*mlx_pairs(pair.model, ids))
    assert_close("dense model", logits, expected, LAYER)


@pytest.mark.parametrize("shift", [1, 1000])
def test_positions_count_from_anywhere(pair, shift):
    """Rope scores depend on differences only: pair j at j or j + 1 is the same (spec 4.1)."""
    g, next_ids = mlx_pairs(pair.model, random_ids(1, 23))
    expected, _ = pair.mtp(g, next_ids, pair.mtp.make_cache())
    rope = pair.mtp.self_attn.rope
    pair.mtp.self_attn.rope = lambda x, offset: rope(x, offset + shift)
    logits, _ = pair.mtp(g, next_ids, pair.mtp.make_cache())
    assert_close(f"shift {shift}", logits, expected, LOGITS)
    assert not same_bits(logits, expected), "the shift reached the rope"


def test_trimmed_drafts_leave_no_trace(pair):
    """Chain entries left in the cache: their states were guesses (spec 4.3, step 3)."""
    g, next_ids = mlx_pairs(pair.model, random_ids(1, 23))
    drafted, plain = pair.mtp.make_cache(), pair.mtp.make_cache()
    _, f = pair.mtp(g[:, :9], next_ids[:, :9], drafted)
    pair.mtp(g[:, :9], next_ids[:, :9], plain)
    for token in 3, 5:  # two more drafts, then back to the 9 exact pairs
        _, f = pair.mtp(f[:, -1:], mx.array([[token]]), drafted)
    drafted.trim(2)
    assert drafted.length == 9
    actual, _ = pair.mtp(g[:, 9:12], next_ids[:, 9:12], drafted)
    expected, _ = pair.mtp(g[:, 9:12], next_ids[:, 9:12], plain)
    assert same_bits(actual, expected)
    assert same_bits(drafted.latents, plain.latents)


def test_extend_fills_the_cache_as_a_call_does(pair):
    """Pairs put into the cache without their logits: the next draft must not see a difference."""
    g, next_ids = mlx_pairs(pair.model, random_ids(1, 23))
    extended, called = pair.mtp.make_cache(), pair.mtp.make_cache()
    for start, end in (0, 9), (9, 11):
        pair.mtp.extend(g[:, start:end], next_ids[:, start:end], extended)
        pair.mtp(g[:, start:end], next_ids[:, start:end], called)
    assert extended.length == called.length == 11
    assert same_bits(extended.latents, called.latents)
    actual, _ = pair.mtp(g[:, 11:12], next_ids[:, 11:12], extended)
    expected, _ = pair.mtp(g[:, 11:12], next_ids[:, 11:12], called)
    assert same_bits(actual, expected)


def test_caches_of_both_models_are_apart(pair):
    """Pairs in the main model's cache: the module has one of its own."""
    cache, ids = pair.model.make_cache(), random_ids(1, 6)
    assert len(cache) == pair.config["num_hidden_layers"]
    g = pair.model.hidden(mx.array(ids.numpy()), cache)
    own = pair.mtp.make_cache()
    pair.mtp(g[:, :-1], mx.array(ids[:, 1:].numpy()), own)
    assert [c.length for c in cache] == [6] * 4 and own.length == 5


def test_states_are_what_the_head_reads(pair):
    """f is after shared_head.norm: the head of f gives the logits, and f can be recycled."""
    logits, f = pair.mtp(*mlx_pairs(pair.model, random_ids(1, 23)))
    assert same_bits(pair.model.lm_head(f), logits)
