"""The whole of DeepSeek-V3 with its MTP module, in plain torch, to read top to bottom.

The slow, literal form: keys and values are expanded for every head, scores are one dense matrix,
experts are a loop. It defines what the fast MLX modules must compute and shares no code with them.
Modules have the hub's tensor names, so `state_dict()` of the model *is* the checkpoint (the MTP
module is layer `num_hidden_layers`; its copies of embedding and head are the main model's).

Runs in float64, float32 or bfloat16: the dtype of the weights is the dtype of the activations.
RMSNorm statistics, the router and the softmax are float32 at least. It does not know about files,
FP8 or tokenizers (`weights.py`, `fp8.py`).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_dsv3.reference.args import Args

LORA_NORM_EPS = 1e-6  # q_a_layernorm and kv_a_layernorm never see `rms_norm_eps`


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return the attention temperature factor M(mscale) of yarn."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_frequencies(args: Args) -> Tensor:
    """Return the radians per position of each rope pair, float64, shape (R/2,)."""
    dim, theta = args.qk_rope_head_dim, args.rope_theta
    freqs = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if args.yarn is None:
        return freqs

    def correction(num_rotations):  # the dimension that turns so often within the trained length
        length = args.yarn["original_max_position_embeddings"]
        return dim * math.log(length / (num_rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = correction(args.yarn["beta_fast"]), correction(args.yarn["beta_slow"])
    if args.rope_scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / span).clamp(0, 1)
    return freqs / args.yarn["factor"] * ramp + freqs * (1 - ramp)


def softmax_scale(args: Args) -> float:
    """Return the factor of the attention scores: from nope + rope, times M(mscale_all_dim)^2."""
    scale = (args.qk_nope_head_dim + args.qk_rope_head_dim) ** -0.5
    if args.yarn and args.yarn["mscale_all_dim"]:
        scale *= yarn_mscale(args.yarn["factor"], args.yarn["mscale_all_dim"]) ** 2
    return scale


def rotation(args: Args, start: int, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of positions start..start+length-1, each (length, R/2)."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    freqs = rope_frequencies(args).to(like.device, wide)
    positions = torch.arange(start, start + length, device=like.device, dtype=wide)
    angles = torch.outer(positions, freqs)
    factor = 1.0
    if args.yarn:
        mscale, all_dim = args.yarn["mscale"], args.yarn["mscale_all_dim"]
        factor = yarn_mscale(args.yarn["factor"], mscale)
        factor /= yarn_mscale(args.yarn["factor"], all_dim) if all_dim else 1.0
        factor = args.yarn.get("attention_factor", factor)
    return angles.cos() * factor, angles.sin() * factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool = True) -> Tensor:
    """Rotate pairs of the last dimension of x (..., L, R): adjacent ones, or (i, i + R/2)."""
    if not interleave:
        a, b = x.to(cos.dtype).chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
    pairs = x.to(cos.dtype).unflatten(-1, (-1, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precision to float32; leave float32 and float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = at_least_float32(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def linear(in_features: int, out_features: int) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=False)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = linear(hidden_size, intermediate_size)
        self.up_proj = linear(hidden_size, intermediate_size)
        self.down_proj = linear(intermediate_size, hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MLA(nn.Module):
    """Multi-head latent attention, naive: K and V expanded for every head and cached position.

    `cache` is a dict that holds the normed latent and the rotated rope key of earlier positions.
    """

    def __init__(self, args: Args):
        super().__init__()
        self.args = args
        self.H, self.N, self.R = (
            args.num_attention_heads,
            args.qk_nope_head_dim,
            args.qk_rope_head_dim,
        )
        D, C, V = args.hidden_size, args.kv_lora_rank, args.v_head_dim
        if args.q_lora_rank is None:
            self.q_proj = linear(D, self.H * (self.N + self.R))
        else:
            self.q_a_proj = linear(D, args.q_lora_rank)
            self.q_a_layernorm = RMSNorm(args.q_lora_rank, LORA_NORM_EPS)
            self.q_b_proj = linear(args.q_lora_rank, self.H * (self.N + self.R))
        self.kv_a_proj_with_mqa = linear(D, C + self.R)
        self.kv_a_layernorm = RMSNorm(C, LORA_NORM_EPS)
        self.kv_b_proj = linear(C, self.H * (self.N + V))
        self.o_proj = linear(self.H * V, D)
        self.scale = softmax_scale(args)

    def forward(self, x, cache: dict | None = None):
        L = x.shape[1]
        start = cache["latent"].shape[1] if cache else 0
        cos, sin = rotation(self.args, start, L, x)
        interleave = self.args.rope_interleave

        if self.args.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (self.H, self.N + self.R)).transpose(1, 2)  # (B, H, L, N + R)
        q_nope, q_pe = q.split([self.N, self.R], dim=-1)
        q = torch.cat([q_nope, apply_rope(q_pe, cos, sin, interleave)], dim=-1)

        latent, k_pe = self.kv_a_proj_with_mqa(x).split([self.args.kv_lora_rank, self.R], dim=-1)
        latent = self.kv_a_layernorm(latent)  # the rope key is not normed
        k_pe = apply_rope(k_pe, cos, sin, interleave)
        if cache is not None:
            if cache:
                latent = torch.cat([cache["latent"], latent], dim=1)  # (B, S, C)
                k_pe = torch.cat([cache["k_pe"], k_pe], dim=1)  # (B, S, R)
            cache.update(latent=latent, k_pe=k_pe)

        kv = self.kv_b_proj(latent).unflatten(-1, (self.H, -1)).transpose(1, 2)
        k_nope, v = kv.split([self.N, self.args.v_head_dim], dim=-1)  # (B, H, S, N), (B, H, S, V)
        k = torch.cat([k_nope, k_pe[:, None].expand(-1, self.H, -1, -1)], dim=-1)

        scores = at_least_float32(q @ k.transpose(-1, -2)) * self.scale  # (B, H, L, S)
        S = k.shape[2]
        future = torch.arange(S, device=x.device) > torch.arange(start, S, device=x.device)[:, None]
        weights = scores.masked_fill(future, -math.inf).softmax(-1).to(v.dtype)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2))


class Gate(nn.Module):
    """The router: sigmoid scores, expert groups, a bias that selects but never weighs."""

    def __init__(self, args: Args):
        super().__init__()
        self.args = args
        self.weight = nn.Parameter(torch.zeros(args.n_routed_experts, args.hidden_size))
        bias = torch.zeros(args.n_routed_experts)
        self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)

    def scores(self, x):
        """Return scores and selection scores (T, E), and group scores (T, G), for x (T, D).

        Selection scores are -inf in the groups that are dropped.
        """
        args = self.args
        scores = F.linear(at_least_float32(x), at_least_float32(self.weight)).sigmoid()
        biased = scores + self.e_score_correction_bias.to(scores.dtype)
        groups = biased.unflatten(-1, (args.n_group, -1))  # (T, G, E / G)
        if args.n_group == 1:
            return scores, biased, biased.new_zeros(len(biased), 1)
        group_scores = groups.topk(2, dim=-1).values.sum(-1)
        kept = group_scores.topk(args.topk_group, dim=-1).indices
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, kept, False)
        return scores, groups.masked_fill(dropped[..., None], -math.inf).flatten(-2), group_scores

    def forward(self, x):
        """Return expert ids and weights, each (T, K), for x (T, D)."""
        args = self.args
        scores, biased, _ = self.scores(x)
        indices = biased.topk(args.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, indices)
        if args.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return indices, weights * args.routed_scaling_factor

    def margins(self, x):
        """Return (T,): by how much the choice of groups and of experts was made, in score.

        The last group kept against the first one dropped, or the last expert chosen against the
        next, whichever is closer; inf where there was no choice.
        """

        def gap(values, count):
            if values.shape[-1] <= count:
                return values.new_full(values.shape[:-1], math.inf)
            best = values.topk(count + 1, dim=-1).values
            return best[..., -2] - best[..., -1]

        _, biased, group_scores = self.scores(x)
        groups = gap(group_scores, self.args.topk_group)
        return torch.minimum(groups, gap(biased, self.args.num_experts_per_tok))


def add_expert(out, expert: nn.Module, idx: int, x, indices, weights):
    """Return out (T, D) plus the weighted output of one expert for the tokens that chose it."""
    token, choice = torch.where(indices == idx)
    y = expert(x[token])
    return out.index_add(0, token, y.to(out.dtype) * weights[token, choice, None])


class MoE(nn.Module):
    def __init__(self, args: Args):
        super().__init__()
        D, F_ = args.hidden_size, args.moe_intermediate_size
        self.gate = Gate(args)
        self.experts = nn.ModuleList(MLP(D, F_) for _ in range(args.n_routed_experts))
        self.shared_experts = MLP(D, F_ * args.n_shared_experts) if args.n_shared_experts else None

    def forward(self, x):
        flat = x.flatten(0, -2)  # (T, D)
        indices, weights = self.gate(flat)
        out = torch.zeros_like(flat, dtype=weights.dtype)
        for idx in indices.unique().tolist():
            out = add_expert(out, self.experts[idx], idx, flat, indices, weights)
        return self.with_shared(out, x)

    def with_shared(self, out, x):
        """Return the sum of routed experts (T, D) in the shape and dtype of x, plus the shared."""
        out = out.to(x.dtype).view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x)


class DecoderLayer(nn.Module):
    def __init__(self, args: Args, is_moe: bool):
        super().__init__()
        self.self_attn = MLA(args)
        self.mlp = MoE(args) if is_moe else MLP(args.hidden_size, args.intermediate_size)
        self.input_layernorm = RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(args.hidden_size, args.rms_norm_eps)

    def attend(self, h, cache: dict | None = None):
        """Return the residual state after attention."""
        return h + self.self_attn(self.input_layernorm(h), cache)

    def forward(self, h, cache: dict | None = None):
        h = self.attend(h, cache)
        return h + self.mlp(self.post_attention_layernorm(h))


class SharedHead(nn.Module):
    """The MTP module's own final norm; its head is the main model's."""

    def __init__(self, args: Args):
        super().__init__()
        self.norm = RMSNorm(args.hidden_size, args.rms_norm_eps)


class MTPLayer(DecoderLayer):
    """One decoder block over pairs (next token, state of the main model)."""

    def __init__(self, args: Args):
        super().__init__(args, is_moe=True)
        self.enorm = RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.hnorm = RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.eh_proj = linear(2 * args.hidden_size, args.hidden_size)
        self.shared_head = SharedHead(args)

    def pairs(self, embedding, g):
        """Return the block's input for embeddings of next tokens and states, each (B, L, D)."""
        pair = torch.cat([self.enorm(embedding), self.hnorm(g)], dim=-1)  # embedding first
        return self.eh_proj(pair)

    def forward(self, embedding, g, cache: dict | None = None):
        return self.shared_head.norm(super().forward(self.pairs(embedding, g), cache))


def is_moe_layer(args: Args, i: int) -> bool:
    """Say whether layer i of the decoder has routed experts."""
    return i >= args.first_k_dense_replace and i % args.moe_layer_freq == 0


def make_layer(args: Args, i: int) -> DecoderLayer:
    """Return layer i of the checkpoint, untrained; those after the decoder's are MTP modules."""
    if i >= args.num_hidden_layers:
        return MTPLayer(args)
    return DecoderLayer(args, is_moe_layer(args, i))


class Decoder(nn.Module):
    def __init__(self, args: Args):
        super().__init__()
        self.args = args
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        num_layers = args.num_hidden_layers + args.num_nextn_predict_layers
        self.layers = nn.ModuleList(make_layer(args, i) for i in range(num_layers))
        self.norm = RMSNorm(args.hidden_size, args.rms_norm_eps)


class Model(nn.Module):
    def __init__(self, args: Args):
        super().__init__()
        self.args = args
        self.model = Decoder(args)
        self.lm_head = linear(args.hidden_size, args.vocab_size)

    def make_cache(self) -> list[dict]:
        """Return one empty latent cache for each layer, the MTP layer included."""
        return [{} for _ in self.model.layers]

    def forward(self, ids: Tensor, cache: list[dict] | None = None) -> tuple[Tensor, Tensor]:
        """Return logits (B, L, vocabulary) and the states after the final norm, g (B, L, D)."""
        h = self.model.embed_tokens(ids)
        for i in range(self.args.num_hidden_layers):
            h = self.model.layers[i](h, cache[i] if cache else None)
        g = self.model.norm(h)
        return self.lm_head(g), g

    def mtp(
        self, g: Tensor, next_ids: Tensor, cache: list[dict] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the MTP logits and states for pairs (g_j, t_{j+1}): row j predicts t_{j+2}.

        g is (B, L, D), next_ids (B, L): the token that follows each state. The returned state f
        takes the place of g when the module is applied again for a further draft.
        """
        i = self.args.num_hidden_layers
        embedding = self.model.embed_tokens(next_ids)
        f = self.model.layers[i](embedding, g, cache[i] if cache else None)
        return self.lm_head(f), f
