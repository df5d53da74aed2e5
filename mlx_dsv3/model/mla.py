"""Multi-head latent attention over a latent cache (DeepSeek-V3 report 2.1.1, spec 3.4).

The cache holds one row `[latent | rope key]` of width C + R for each position, shared by all
heads; nothing is ever kept per head. Two forms compute the same: *absorbed* carries the few
queries into the latent space, *expanded* unpacks keys and values for the heads. Absorbed costs
(H, L) x S x (2 C + R), expanded a fixed H x S x C x (N + V) first: for V3 they meet at 171
queries. So decoding, verification of drafts and short follow-up turns are absorbed, and only a
long prefill expands, in blocks of bounded memory.
"""

# B batch  L queries  S cached  D hidden  H heads  N nope  R rope  V value  C latent (kv_lora_rank)

from collections.abc import Iterator
from copy import copy

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_dsv3.config import ModelArgs
from mlx_dsv3.model.cache import LatentCache
from mlx_dsv3.model.linear import Joined, Linear
from mlx_dsv3.model.rope import Rope, softmax_scale

ABSORBED_MAX_QUERIES = 170  # V3's break-even by arithmetic; 200-400 expected on a GPU
SCORE_BYTES = 256 << 20  # scores alive in one block, its three copies together
EXPANDED_BYTES = 128 << 20  # keys and values of one group of heads
LORA_NORM_EPS = 1e-6  # the original never passes `rms_norm_eps` to these two norms (spec 3.1)


def causal_mask(L: int, S: int) -> mx.array:
    """Return (L, S) booleans: query j, the (S - L + j)-th position, sees keys up to itself."""
    return mx.arange(S) <= mx.arange(S - L, S)[:, None]


def blocks(L: int, S: int, size: int) -> Iterator[tuple[slice, int]]:
    """Yield blocks of queries, each with the number of positions that its last query sees."""
    for start in range(0, L, size):
        end = min(start + size, L)
        yield slice(start, end), S - L + end


def absorbed_size(L: int, S: int, H: int) -> int:
    """Return the queries of a block of the absorbed form."""
    return min(L, max(1, SCORE_BYTES // (12 * H * S)))


def attend_absorbed(q_nope, q_pe, latents, embed_q, unembed_out, scale):
    """Attend over the latent cache without expanding keys or values.

    q_nope (B, H, L, N), q_pe (B, H, L, R), latents (B, S, C + R) -> (B, H, L, V). Queries are taken
    in blocks whose scores fit SCORE_BYTES, evaluated one by one where there are several.
    """
    _, H, L, R = q_pe.shape
    S = latents.shape[1]
    q = mx.concatenate([embed_q(q_nope), q_pe], axis=-1) * scale  # (B, H, L, C + R)
    outs, size = [], absorbed_size(L, S, H)
    for block, seen in blocks(L, S, size):
        # One key serves every head: the heads are rows of one product.
        queries, keys = q[:, :, block].flatten(1, 2), latents[:, :seen]
        scores = mx.unflatten(queries @ keys.swapaxes(-1, -2), 1, (H, -1))  # (B, H, L, S)
        scores = scores.astype(mx.float32)  # bfloat16 sums stop growing (test_softmax_is_fp32)
        if L > 1:
            scores = mx.where(causal_mask(scores.shape[2], seen), scores, -mx.inf)
        weights = mx.softmax(scores, axis=-1).astype(keys.dtype).flatten(1, 2)  # (B, H L, S)
        outs.append(mx.unflatten(weights @ keys[..., :-R], 1, (H, -1)))  # values: the latents
        if size < L:
            mx.eval(outs[-1])
    return unembed_out(mx.concatenate(outs, axis=2))  # (B, H, L, C) -> (B, H, L, V)


def some_heads(layer: nn.Module, heads: slice) -> nn.Module:
    """Return some heads of a `MultiLinear` (H, out, in), plain or quantised."""
    return copy(layer).update(tree_map(lambda array: array[heads], layer.parameters()))


def expanded_sizes(L: int, S: int, H: int, width: int, itemsize: int) -> tuple[int, int]:
    """Return the heads of a group and the queries of a block, for keys and values of `width`."""
    group = min(H, max(1, EXPANDED_BYTES // (S * itemsize * width)))
    return group, min(L, max(16, SCORE_BYTES // (3 * S * itemsize * group)))


def attend_expanded(q_nope, q_pe, latents, embed_q, unembed_out, scale):
    """Attend with keys and values expanded, for one group of heads after another.

    Same shapes and result as `attend_absorbed`.
    """
    _, H, L, N = q_nope.shape
    B, S, _ = latents.shape
    R, V = q_pe.shape[-1], unembed_out["weight"].shape[1]
    latent, k_pe = mx.split(latents[:, None], [-R], axis=-1)  # (B, 1, S, C), (B, 1, S, R)
    latent = mx.contiguous(latent)  # or a product would copy it for every head
    mx.eval(q_nope, q_pe, latent, k_pe)
    group, size = expanded_sizes(L, B * S, H, N + R + V, latents.itemsize)
    outs = []
    for first in range(0, H, group):
        heads = slice(first, first + group)
        up = some_heads(embed_q, heads), some_heads(unembed_out, heads)
        outs.append(attend_group(q_nope[:, heads], q_pe[:, heads], latent, k_pe, *up, scale, size))
    return mx.concatenate(outs, axis=1)


def attend_group(q_nope, q_pe, latent, k_pe, embed_q, unembed_out, scale, size):
    """Attend with some heads, in blocks of `size` queries: (B, h, L, V).

    Keys are cut at the block's last position, so the part of a causal square that is masked anyway
    is mostly not computed. Each block is evaluated: MLX interleaves what a graph lets it, and
    would hold the scores of many blocks at once.
    """
    k = embed_q(latent, transpose=False)  # (B, h, S, N)
    k = mx.concatenate([k, mx.broadcast_to(k_pe, (*k.shape[:3], k_pe.shape[-1]))], axis=-1)
    mx.eval(k)
    v = unembed_out(latent)  # (B, h, S, V)
    mx.eval(v)
    outs = []
    for block, seen in blocks(q_pe.shape[2], k.shape[2], size):
        q = mx.concatenate([q_nope[:, :, block], q_pe[:, :, block]], axis=-1)
        keys, values = k[:, :, :seen], v[:, :, :seen]
        out = mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask="causal")
        mx.eval(out)
        outs.append(out)
    return mx.concatenate(outs, axis=2)


class MLA(nn.Module):
    """Latent attention; parameters have mlx-lm's names (`kv_b_proj` split for absorption)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        from mlx_lm.models.mla import MultiLinear  # 2 s: it brings the whole package

        D, H, C = args.hidden_size, args.num_attention_heads, args.kv_lora_rank
        N, R, V = args.qk_nope_head_dim, args.qk_rope_head_dim, args.v_head_dim
        self.num_heads, self.nope_dims, self.rope_dims = H, N, R
        self.scale = softmax_scale(args)
        if args.q_lora_rank is None:
            self.q_proj = Linear(D, H * (N + R))
        else:
            self.q_a_proj = Linear(D, args.q_lora_rank)
            self.q_a_layernorm = nn.RMSNorm(args.q_lora_rank, eps=LORA_NORM_EPS)
            self.q_b_proj = Linear(args.q_lora_rank, H * (N + R))
        self.kv_a_proj_with_mqa = Linear(D, C + R)
        self.kv_a_layernorm = nn.RMSNorm(C, eps=LORA_NORM_EPS)
        self.embed_q = MultiLinear(N, C, H)
        self.unembed_out = MultiLinear(C, V, H)
        self.o_proj = Linear(H * V, D)
        self.rope = Rope(args)

    def join(self) -> None:
        """Merge the projections that read the layer's input, once weights are loaded."""
        q = self.pop("q_proj" if "q_proj" in self else "q_a_proj")
        self.qkv_a_proj = Joined(q, self.pop("kv_a_proj_with_mqa"))

    def project(self, x: mx.array, offset: int) -> tuple[mx.array, mx.array, mx.array]:
        """Return q_nope (B, H, L, N), q_pe (B, H, L, R) and the new latents (B, L, C + R)."""
        B, L, _ = x.shape
        q, latents = self.qkv_a_proj(x)
        if "q_b_proj" in self:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q = q.reshape(B, L, self.num_heads, -1).swapaxes(1, 2)  # (B, H, L, N + R)
        q_nope, q_pe = mx.split(q, [self.nope_dims], axis=-1)
        latent, k_pe = mx.split(latents, [-self.rope_dims], axis=-1)
        # One rope key serves every head; it is turned together with theirs, as one more head.
        pe = self.rope(mx.concatenate([q_pe, k_pe[:, None]], axis=1), offset)  # (B, H + 1, L, R)
        # The norm is the latent's alone: the rope key has none (spec 3.3).
        return q_nope, pe[:, :-1], mx.concatenate([self.kv_a_layernorm(latent), pe[:, -1]], axis=-1)

    def __call__(self, x: mx.array, cache=None, last: int | None = None) -> mx.array:
        """Attend from x (B, L, D) over `cache` and x itself.

        With `last`, only the last so many rows attend, and only theirs are returned.
        """
        cache = LatentCache() if cache is None else cache
        q_nope, q_pe, latents = self.project(x, cache.length)
        latents = cache.append(latents)  # (B, S, C + R)
        if last:
            q_nope, q_pe = q_nope[:, :, -last:], q_pe[:, :, -last:]
        attend = attend_absorbed if q_pe.shape[2] <= ABSORBED_MAX_QUERIES else attend_expanded
        out = attend(q_nope, q_pe, latents, self.embed_q, self.unembed_out, self.scale)
        return self.o_proj(out.swapaxes(1, 2).flatten(-2))  # (B, L, H V) -> (B, L, D)
