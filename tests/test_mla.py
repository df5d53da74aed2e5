"""Both forms of latent attention against a literal one, and the latent cache around them."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
import torch
from compare import BF16_ATTENTION, FORMS, assert_close, same_bits
from mlx_lm.models.mla import MultiLinear

from mlx_dsv3.model import mla
from mlx_dsv3.model.cache import LatentCache
from mlx_dsv3.model.mla import (
    attend_absorbed,
    attend_expanded,
    causal_mask,
    some_heads,
)

# B batch  L queries  S cached  H heads  N nope  R rope  V value  C latent
H, N, R, V, C = 4, 16, 8, 12, 32
SCALE = 0.2


def random_inputs(B: int, L: int, S: int, seed: int = 0, dtype=mx.float32):
    """Return q_nope, q_pe, rows, embed_q, unembed_out as the two forms take them."""
    keys = mx.random.split(mx.random.key(seed), 5)
    q_nope = mx.random.normal((B, H, L, N), key=keys[0]).astype(dtype)
    q_pe = mx.random.normal((B, H, L, R), key=keys[1]).astype(dtype)
    rows = mx.random.normal((B, S, C + R), key=keys[2]).astype(dtype)
    embed_q, unembed_out = MultiLinear(N, C, H), MultiLinear(C, V, H)
    embed_q.weight = (mx.random.normal((H, C, N), key=keys[3]) / C**0.5).astype(dtype)
    unembed_out.weight = (mx.random.normal((H, V, C), key=keys[4]) / C**0.5).astype(dtype)
    return q_nope, q_pe, rows, embed_q, unembed_out


def attend_literally(q_nope, q_pe, rows, embed_q, unembed_out, scale) -> np.ndarray:
    """Attend head by head and query by query in float64."""
    arrays = (q_nope, q_pe, rows, embed_q.weight, unembed_out.weight)
    q_nope, q_pe, rows, w_uk, w_uv = (np.array(a.astype(mx.float32), np.float64) for a in arrays)
    B, _, L, _ = q_nope.shape
    S = rows.shape[1]
    out = np.zeros((B, H, L, V))
    for b in range(B):
        latent, k_pe = rows[b, :, :C], rows[b, :, C:]
        for h in range(H):
            k, v = latent @ w_uk[h], latent @ w_uv[h].T  # (S, N), (S, V)
            for j in range(L):
                seen = S - L + j + 1
                scores = (k[:seen] @ q_nope[b, h, j] + k_pe[:seen] @ q_pe[b, h, j]) * scale
                weights = np.exp(scores - scores.max())
                out[b, h, j] = weights @ v[:seen] / weights.sum()
    return out


@pytest.mark.parametrize("cached", [0, 1, 2, 255, 300])
@pytest.mark.parametrize("L", [1, 2, 3, 8, 33])
def test_forms_agree(L, cached):
    """Absorbed and expanded are one function; L = 2 on 0 or 1 cached rows is a first verification.

    Both against float64, so that they are not wrong together.
    """
    for B in 1, 2:
        inputs = random_inputs(B, L, cached + L, seed=L + cached)
        absorbed = attend_absorbed(*inputs, SCALE)
        expanded = attend_expanded(*inputs, SCALE)
        expected = attend_literally(*inputs, SCALE)
        assert_close(f"absorbed B={B}", absorbed, expected, FORMS)
        assert_close(f"expanded B={B}", expanded, expected, FORMS)


@pytest.mark.parametrize("heads", [1, 2, 3, 4])
@pytest.mark.parametrize("block", [1, 16, 17, 40])
def test_blocks_and_head_groups(monkeypatch, heads, block):
    """Uneven last blocks and head groups, keys cut one too short, a group's heads out of order."""
    L, S = 40, 67
    inputs = random_inputs(2, L, S)
    expected = attend_literally(*inputs, SCALE)
    monkeypatch.setattr(mla, "EXPANDED_BYTES", heads * 2 * S * (N + R + V) * 4)
    monkeypatch.setattr(mla, "SCORE_BYTES", 3 * 2 * heads * S * 4 * block)
    assert_close("expanded", attend_expanded(*inputs, SCALE), expected, FORMS)
    monkeypatch.setattr(mla, "SCORE_BYTES", 12 * H * S * block)
    assert_close("absorbed", attend_absorbed(*inputs, SCALE), expected, FORMS)


def test_causal_mask_counts_from_the_end():
    """An L x L mask, or one aligned at the first key, hides or shows the wrong cached rows."""
    mask = np.array(causal_mask(2, 5))
    assert mask.tolist() == [[True] * 4 + [False], [True] * 5]
    assert np.array(causal_mask(1, 3)).all()
    assert np.array_equal(np.array(causal_mask(4, 4)), np.tri(4, dtype=bool))


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("cached", [0, 1, 2, 254, 255, 256, 257, 511])
def test_verification_across_a_growth_step(random_pair, monkeypatch, cached):
    """L = 2 when the cache is empty, has one row, or reallocates at 256 in the middle of them."""
    layer = random_pair(tiny.A).model.layers[1].self_attn
    x = mx.random.normal((1, cached + 2, 64), key=mx.random.key(cached))
    whole = layer(x)[:, cached:]
    for limit in (0, 10**6):  # expanded, absorbed
        monkeypatch.setattr(mla, "ABSORBED_MAX_QUERIES", limit)
        cache = LatentCache()
        if cached:
            layer(x[:, :cached], cache)
        out = layer(x[:, cached:], cache)
        assert cache.length == cached + 2
        assert_close(f"limit {limit}, {cached} cached", out, whole, FORMS)


@pytest.mark.usefixtures("both_ways")
def test_cache_holds_normed_latent_and_rotated_key_only(random_pair):
    """576 numbers a token: per-head keys, or a rope key that is rotated again at every use."""
    pair = random_pair(tiny.A)
    layer, args, cache = pair.model.layers[1].self_attn, pair.args, LatentCache()
    x = mx.random.normal((1, 5, 64), key=mx.random.key(0))
    layer(x[:, :3], cache)
    layer(x[:, 3:], cache)
    assert cache.latents.shape == (1, 5, args.kv_lora_rank + args.qk_rope_head_dim)
    expected = {}
    pair.reference.model.layers[1].self_attn(torch.from_numpy(np.array(x)), expected)
    joined = np.concatenate([expected["latent"].numpy(), expected["k_pe"].numpy()], axis=-1)
    assert_close("cache rows", cache.latents, joined, FORMS)


@pytest.mark.usefixtures("both_ways")
def test_trimmed_rows_leave_no_trace(random_pair):
    """Rejected drafts: after a trim the next rows must overwrite them and take their positions."""
    layer = random_pair(tiny.A).model.layers[1].self_attn
    x = mx.random.normal((1, 12, 64), key=mx.random.key(1))
    wrong = mx.random.normal((1, 3, 64), key=mx.random.key(2))
    plain, rewound = LatentCache(), LatentCache()
    layer(x[:, :8], plain)
    layer(x[:, :8], rewound)
    layer(wrong, rewound)
    rewound.trim(3)
    expected = [layer(x[:, 8:10], plain), layer(x[:, 10:], plain)]
    actual = [layer(x[:, 8:10], rewound), layer(x[:, 10:], rewound)]
    assert same_bits(mx.concatenate(actual, 1), mx.concatenate(expected, 1))
    assert same_bits(plain.latents, rewound.latents)


@pytest.mark.parametrize("form", [attend_absorbed, attend_expanded])
def test_bf16_attention(form):
    """A bfloat16 model rounds at each product and nowhere else: sums and softmax are float32."""
    inputs = random_inputs(1, 8, 200, dtype=mx.bfloat16)
    out = form(*inputs, SCALE)
    assert out.dtype == mx.bfloat16
    assert_close(form.__name__, out, attend_literally(*inputs, SCALE), BF16_ATTENTION)


@pytest.mark.parametrize("form", [attend_absorbed, attend_expanded])
def test_softmax_is_fp32(form):
    """A bf16 softmax sum saturates: 4,096 equal scores then weigh far more than 1 together.

    Equal queries and keys make every weight 1 / 4096 and the output the mean of the values.
    """
    S = 4096
    q_nope, q_pe, rows, embed_q, unembed_out = random_inputs(1, 2, S, dtype=mx.bfloat16)
    rows = mx.concatenate([rows[..., :C] * 0 + 1, rows[..., C:] * 0], axis=-1)
    out = form(q_nope, q_pe, rows, embed_q, unembed_out, SCALE)
    expected = unembed_out.weight.astype(mx.float32).sum(-1)  # (H, V): the value of latent 1
    expected = mx.broadcast_to(expected[None, :, None], out.shape)
    error = mx.abs(out.astype(mx.float32) - expected).max() / mx.abs(expected).max()
    assert error.item() < 0.02


def test_few_queries_expand_nothing():
    """Verification that re-expands the cache: 2 queries on 8,192 rows need no key of any head.

    Keys of 4 heads would take 2 MB, scores of two queries take 0.26 MB a copy.
    """
    inputs = random_inputs(1, 2, 8192)
    mx.eval(inputs[:3], inputs[3].parameters(), inputs[4].parameters())

    def peak(form) -> int:
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(form(*inputs, SCALE))
        return mx.get_peak_memory() - before

    keys = H * 8192 * N * 4
    assert peak(attend_expanded) > keys
    assert peak(attend_absorbed) < keys / 1.5


@pytest.mark.parametrize("L, is_absorbed", [(1, True), (2, True), (170, True), (171, False)])
def test_number_of_queries_decides_the_form(random_pair, monkeypatch, L, is_absorbed):
    """A switch on L == 1 would expand the whole cache at every verification step."""
    layer, used = random_pair(tiny.A).model.layers[1].self_attn, []

    def spy(form):
        def attend(*inputs):
            used.append(form)
            return form(*inputs)

        return attend

    monkeypatch.setattr(mla, "attend_absorbed", spy(attend_absorbed))
    monkeypatch.setattr(mla, "attend_expanded", spy(attend_expanded))
    layer(mx.zeros((1, L, 64)))
    assert used == [attend_absorbed if is_absorbed else attend_expanded]


@pytest.mark.parametrize("mode", ["affine", "mxfp4", None])
@pytest.mark.parametrize("heads", [slice(0, 4), slice(1, 3), slice(3, 4)])
def test_some_heads(mode, heads):
    """Some heads of a packed layer must be those heads of the whole layer's output."""
    layer = MultiLinear(64, 32, H)
    if mode:
        layer = layer.to_quantized(group_size=32, bits=4, mode=mode)
    for width, transpose in (64, True), (32, False):
        x = mx.random.normal((1, 1, 5, width), key=mx.random.key(0))
        whole = layer(x, transpose=transpose)[:, heads]
        part = some_heads(layer, heads)(x, transpose=transpose)
        assert_close(f"{mode} transpose={transpose}", part, whole, FORMS)


def test_single_query_needs_no_mask():
    """One query sees every row; a mask of S - L + 1 keys would hide the last."""
    q_nope, q_pe, rows, embed_q, unembed_out = random_inputs(1, 1, 9)
    inputs = (q_nope, q_pe, rows, embed_q, unembed_out, SCALE)
    assert_close("one query", attend_absorbed(*inputs), attend_literally(*inputs), FORMS)
