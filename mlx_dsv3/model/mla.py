"""Multi-head latent attention over a latent cache.

The cache holds one row `[latent | rope key]` of width C + R for each position, shared by all
heads; nothing is ever kept per head. Two forms compute the same: *absorbed* carries the few
queries into the latent space, *expanded* unpacks keys and values for the heads. Absorbed costs
(H, L) x S x (2 C + R), expanded a fixed H x S x C x (N + V) first: for V3 they meet at 171
queries. So decoding, verification of drafts and short follow-up turns are absorbed, and only a
long prefill expands, in blocks of bounded memory.
"""

# B batch  L queries  S cached  D hidden  H heads  N nope  R rope  V value  C latent (kv_lora_rank)

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear

from mlx_dsv3.config import ModelArgs
from mlx_dsv3.model.cache import LatentCache
from mlx_dsv3.model.linear import Joined, Linear
from mlx_dsv3.model.rope import Rope, softmax_scale

ABSORBED_MAX_QUERIES = 170  # V3's break-even by arithmetic; 200-400 expected on a GPU
SCORE_BYTES = 256 << 20  # scores alive in one block, its three copies together
EXPANDED_BYTES = 128 << 20  # keys and values of one group of heads
LORA_NORM_EPS = 1e-6  # the checkpoint's code never passes `rms_norm_eps` to these two norms


def causal_mask(L: int, S: int) -> mx.array:
    """Return (L, S) booleans: query j, the (S - L + j)-th position, sees keys up to itself."""
    return mx.arange(S) <= mx.arange(S - L, S)[:, None]


def attend_absorbed(q_nope, q_pe, latents, embed_q, unembed_out, scale):
    """Attend over the latent cache without expanding keys or values.

    q_nope (B, H, L, N), q_pe (B, H, L, R), latents (B, S, C + R) -> (B, H, L, V). Queries are taken
    in blocks whose scores fit SCORE_BYTES.
    """
    H, L, S = q_nope.shape[1], q_nope.shape[2], latents.shape[1]
    q = mx.concatenate([embed_q(q_nope), q_pe], axis=-1) * scale  # (B, H, L, C + R)
    block = max(1, SCORE_BYTES // (12 * H * S))
    outs = []
    for start in range(0, L, block):
        end = min(start + block, L)
        seen = S - L + end
        outs.append(attend_latents(q[:, :, start:end], latents[:, :seen], q_pe.shape[-1]))
    out_latent = outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=2)
    return unembed_out(out_latent)  # (B, H, L, C) -> (B, H, L, V)


def attend_latents(q, latents, rope_dims: int):
    """Multi-query attention of q (B, H, L, C + R) over latents (B, S, C + R) -> (B, H, L, C)."""
    B, H, L, width = q.shape
    S = latents.shape[1]
    scores = q.reshape(B, H * L, width) @ latents.swapaxes(-1, -2)  # (B, H L, S)
    scores = scores.reshape(B, H, L, S).astype(mx.float32)
    if L > 1:
        scores = mx.where(causal_mask(L, S), scores, -mx.inf)
    weights = mx.softmax(scores, axis=-1).astype(latents.dtype)
    out = weights.reshape(B, H * L, S) @ latents[..., :-rope_dims]  # the latent is also the value
    return out.reshape(B, H, L, width - rope_dims)


def head_slice(layer: nn.Module, heads: slice, x: mx.array, transpose: bool) -> mx.array:
    """Apply some heads of a `MultiLinear` (H, out, in), plain or quantised, to x (B, 1, S, in)."""
    weight = layer["weight"][heads]
    if "scales" not in layer:
        return x @ (weight.swapaxes(-1, -2) if transpose else weight)
    biases = layer.get("biases")
    return mx.quantized_matmul(
        x,
        weight,
        layer["scales"][heads],
        None if biases is None else biases[heads],
        transpose=transpose,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )


def attend_expanded(q_nope, q_pe, latents, embed_q, unembed_out, scale):
    """Attend with keys and values expanded, one group of heads and block of queries at a time.

    Same shapes and result as `attend_absorbed`. Keys are cut at the block's last position, so
    the part of a causal square that is masked anyway is mostly not computed.
    """
    B, H, L, N = q_nope.shape
    R, S, itemsize = q_pe.shape[-1], latents.shape[1], latents.itemsize
    latent, k_pe = latents[:, None, :, :-R], latents[:, None, :, -R:]  # (B, 1, S, C), (B, 1, S, R)
    V = unembed_out["weight"].shape[1]
    group = max(1, EXPANDED_BYTES // (B * S * (N + R + V) * itemsize))
    block = max(16, SCORE_BYTES // (3 * B * min(group, H) * S * itemsize))
    groups = []
    for first in range(0, H, group):
        heads = slice(first, min(first + group, H))
        k_nope = head_slice(embed_q, heads, latent, transpose=False)  # (B, h, S, N)
        k = mx.concatenate([k_nope, mx.broadcast_to(k_pe, (*k_nope.shape[:3], R))], axis=-1)
        v = head_slice(unembed_out, heads, latent, transpose=True)  # (B, h, S, V)
        q = mx.concatenate([q_nope[:, heads], q_pe[:, heads]], axis=-1)
        outs = []
        for start in range(0, L, block):
            end = min(start + block, L)
            seen = S - L + end
            out = mx.fast.scaled_dot_product_attention(
                q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], scale=scale, mask="causal"
            )
            outs.append(out)
        groups.append(mx.concatenate(outs, axis=2))
    return mx.concatenate(groups, axis=1)


class MLA(nn.Module):
    """Latent attention; parameters bear mlx-lm's names (`kv_b_proj` split for absorption)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
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
        """Return q_nope (B, H, L, N), q_pe (B, H, L, R) and new cache rows (B, L, C + R)."""
        B, L, _ = x.shape
        q, row = self.qkv_a_proj(x)
        if "q_b_proj" in self:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q = q.reshape(B, L, self.num_heads, -1).swapaxes(1, 2)  # (B, H, L, N + R)
        q_nope, q_pe = mx.split(q, [self.nope_dims], axis=-1)
        latent, k_pe = mx.split(row, [row.shape[-1] - self.rope_dims], axis=-1)
        # One rope key serves every head; it is turned together with theirs, as one more head.
        pe = self.rope(mx.concatenate([q_pe, k_pe[:, None]], axis=1), offset)  # (B, H + 1, L, R)
        row = mx.concatenate([self.kv_a_layernorm(latent), pe[:, -1]], axis=-1)
        return q_nope, pe[:, :-1], row

    def extend(self, x: mx.array, cache: LatentCache) -> None:
        """Append the rows of x (B, L, D) to the cache; attend from nowhere."""
        cache.append(self.project(x, cache.length)[2])

    def __call__(
        self, x: mx.array, cache: LatentCache | None = None, last: int | None = None
    ) -> mx.array:
        """Attend from x (B, L, D) over `cache` and x itself.

        With `last`, only the last so many rows attend, and only theirs are returned.
        """
        B, L = x.shape[0], last or x.shape[1]
        q_nope, q_pe, latents = self.project(x, cache.length if cache is not None else 0)
        if L < x.shape[1]:
            q_nope, q_pe = q_nope[:, :, -L:], q_pe[:, :, -L:]
        if cache is not None:
            latents = cache.append(latents)
        attend = attend_absorbed if L <= ABSORBED_MAX_QUERIES else attend_expanded
        out = attend(q_nope, q_pe, latents, self.embed_q, self.unembed_out, self.scale)
        return self.o_proj(out.swapaxes(1, 2).reshape(B, L, -1))
