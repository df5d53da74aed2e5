"""The forward traps of spec section 8, each as a patch of the MLX model: none raises an error.

A fault changes functions, methods or weights of a loaded model; the product has no flag for any
of them. `select` and `attend_plain` without a fault compute what the product does
(`test_faultless_variants_pass`), so what is caught is the fault and not the patch.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import tiny
from mlx_folder import to_mlx

from mlx_dsv3.model import mla, moe
from mlx_dsv3.model.rope import Rope, rope_frequencies
from parity import pairs
from parity.pairs import Pair


@dataclass(frozen=True)
class Fault:
    """A patch(monkeypatch, pair), and the config and selection-bias mean where it must show.

    `shows_in` says whose logits: the main model's (`logits`) or the MTP module's (`drafts`).
    """

    patch: Callable
    config: str = "A"
    bias_mean: float = 2.0
    shows_in: str = "logits"


def attentions(pair: Pair) -> list:
    return [layer.self_attn for layer in pair.model.layers] + [pair.mtp.self_attn]


def mixtures(pair: Pair) -> list:
    layers = [*pair.model.layers, pair.mtp]
    return [layer.mlp for layer in layers if isinstance(layer.mlp, moe.MoE)]


# --- rope and softmax scale -----------------------------------------------------------------


def half_split_rope(monkeypatch, pair):
    """Pairs (i, i + R/2) instead of (2 i, 2 i + 1), on weights stored for adjacent pairs."""

    for attention in attentions(pair):
        attention.rope.turn = partial(attention.rope.turn, traditional=False)


def normalised_k_pe(monkeypatch, pair):
    """The rope key normed like the latent beside it (a rotation keeps the norm: order is free)."""
    project = mla.MLA.project

    def wrong(self, x, offset):
        q_nope, q_pe, row = project(self, x, offset)
        latent, k_pe = mx.split(row, [row.shape[-1] - self.rope_dims], axis=-1)
        k_pe = mx.fast.rms_norm(k_pe, None, mla.LORA_NORM_EPS)
        return q_nope, q_pe, mx.concatenate([latent, k_pe], axis=-1)

    monkeypatch.setattr(mla.MLA, "project", wrong)


def attend_plain(rope: Rope | None = None):
    """Return an attention with dense scores; with `rope`, the nope dimensions rotate too."""

    def attend(q_nope, q_pe, latents, embed_q, unembed_out, scale):
        L, S, R = q_nope.shape[2], latents.shape[1], q_pe.shape[-1]
        latent, k_pe = latents[:, None, :, :-R], latents[:, None, :, -R:]
        k_nope, v = embed_q(latent, transpose=False), unembed_out(latent)  # (B, H, S, N or V)
        if rope is not None:
            q_nope, k_nope = rope(q_nope, S - L), rope(k_nope, 0)
        scores = q_nope @ k_nope.swapaxes(-1, -2) + q_pe @ k_pe.swapaxes(-1, -2)
        scores = mx.where(mla.causal_mask(L, S), scores * scale, -mx.inf)
        return mx.softmax(scores, axis=-1) @ v

    return attend


def rotated_nope(monkeypatch, pair):
    """The position-free part of queries and keys rotated as well (here N = R)."""
    monkeypatch.setattr(mla, "attend_absorbed", attend_plain(Rope(pair.args)))


def set_scale(power: int, width: str, field: str = "mscale_all_dim"):
    """Return a fault: softmax scale from M(field)^power and from N + R or C + R dimensions."""

    def patch(monkeypatch, pair):
        args = pair.args
        dims = args.qk_rope_head_dim
        dims += args.qk_nope_head_dim if width == "N + R" else args.kv_lora_rank
        mscale = pairs.reference.yarn_mscale(args.rope_scaling["factor"], args.rope_scaling[field])
        for attention in attentions(pair):
            attention.scale = dims**-0.5 * mscale**power

    return patch


def yarn_off(monkeypatch, pair):
    """Plain frequencies because the text is shorter than yarn's original length."""
    plain = rope_frequencies(dataclasses.replace(pair.args, rope_scaling=None))
    for attention in attentions(pair):
        periods = mx.array((1 / plain).astype("float32"))
        attention.rope.turn = partial(attention.rope.turn, freqs=periods)


def no_rotation_factor(monkeypatch, pair):
    """cos and sin without M(mscale) / M(mscale_all_dim): 1 in every release, not in config C."""
    for attention in attentions(pair):
        attention.rope.factor = 1.0


def lora_norms_with_config_eps(monkeypatch, pair):
    """rms_norm_eps in q_a_layernorm and kv_a_layernorm, which always have 1e-6."""
    for attention in attentions(pair):
        attention.q_a_layernorm.eps = pair.args.rms_norm_eps
        attention.kv_a_layernorm.eps = pair.args.rms_norm_eps


# --- cache ----------------------------------------------------------------------------------


def positions_restart_in_a_chunk(monkeypatch, pair):
    """Positions counted from the chunk's start instead of the cache's length."""
    project = mla.MLA.project
    monkeypatch.setattr(mla.MLA, "project", lambda self, x, offset: project(self, x, 0))


def mask_of_the_chunk_alone(monkeypatch, pair):
    """The first L keys taken for the chunk's own: query j sees keys 0..j of the whole cache."""

    def mask(L, S):
        return mx.arange(S) <= mx.arange(L)[:, None]

    monkeypatch.setattr(mla, "causal_mask", mask)


# --- router ---------------------------------------------------------------------------------


def select(
    *,
    group_score="best two",
    dropped=-mx.inf,
    has_bias=True,
    has_groups=True,
    bias_dtype=mx.float32,
    weighs="scores",
    normalises="before scaling",
    scales=True,
):
    """Return a `route` written again, with every rule of spec 3.5 open to change."""

    def route(logits, bias, args):
        scores = mx.sigmoid(logits)
        biased = scores + bias.astype(bias_dtype) if has_bias else scores
        choice = biased
        if args.n_group > 1 and has_groups:
            groups = mx.unflatten(biased, -1, (args.n_group, -1))
            best = mx.sort(groups, axis=-1)[..., -(1 if group_score == "maximum" else 2) :].sum(-1)
            worst_kept = mx.sort(best, axis=-1)[..., -args.topk_group, None]
            choice = mx.where((best >= worst_kept)[..., None], groups, dropped).flatten(-2)
        indices = mx.sort(mx.argsort(-choice, axis=-1)[..., : args.num_experts_per_tok], axis=-1)
        weights = mx.take_along_axis(biased if weighs == "biased" else scores, indices, axis=-1)
        if normalises == "before scaling":
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        if scales:
            weights = weights * args.routed_scaling_factor
        if normalises == "after scaling":
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        return indices, weights

    return route


def selects(**changes):
    """Return a fault of the router."""
    return lambda monkeypatch, pair: monkeypatch.setattr(moe, "route", select(**changes))


def keeps_groups(change: int):
    """Return a fault: topk_group off by one."""

    def patch(monkeypatch, pair):
        wrong = dataclasses.replace(pair.args, topk_group=pair.args.topk_group + change)
        for mixture in mixtures(pair):
            mixture.gate.route = partial(moe.route, args=wrong)

    return patch


def gate_in_bf16(monkeypatch, pair=None):
    """Router logits from a bfloat16 product."""

    def call(self, x):
        logits = (x.astype(mx.bfloat16) @ self.weight.astype(mx.bfloat16).T).astype(mx.float32)
        return moe.route(logits, self.e_score_correction_bias, self.args)

    monkeypatch.setattr(moe.Gate, "__call__", call)


def four_bits(weight: mx.array) -> mx.array:
    packed = mx.quantize(weight, group_size=64, bits=4)
    return mx.dequantize(*packed, group_size=64, bits=4)


def gate_in_four_bits(monkeypatch, pair):
    """Router weights quantised like the other linear layers."""
    for mixture in mixtures(pair):
        mixture.gate.weight = four_bits(mixture.gate.weight)


# --- experts --------------------------------------------------------------------------------


def shared_expert_omitted(monkeypatch, pair):
    for mixture in mixtures(pair):
        mixture.pop("shared_experts")


def shared_expert_scaled(monkeypatch, pair):
    """routed_scaling_factor applied to the sum of routed and shared experts."""
    for mixture in mixtures(pair):
        down = mixture.shared_experts.down_proj
        down.weight = down.weight * pair.args.routed_scaling_factor


def shared_expert_of_half_width(monkeypatch, pair):
    """n_shared_experts 2 taken for two experts, and only the first one computed."""
    for mixture in mixtures(pair):
        down = mixture.shared_experts.down_proj
        used = mx.arange(down.weight.shape[1]) < pair.args.moe_intermediate_size
        down.weight = down.weight * used


def lexicographic_experts(monkeypatch, pair):
    """Experts stacked in the order 0, 1, 10, 11, ..., 2, ..."""
    order = mx.array(sorted(range(pair.args.n_routed_experts), key=str))
    for mixture in mixtures(pair):
        for projection in (mixture.experts.bank.gate_up, mixture.experts.bank.down):
            projection.weight = projection.weight[order]


def gate_and_up_swapped(monkeypatch, pair):
    """silu on the wrong half of the fused projection."""
    for mixture in mixtures(pair):
        projection = mixture.experts.bank.gate_up
        gate, up = mx.split(projection.weight, 2, axis=1)
        projection.weight = mx.concatenate([up, gate], axis=1)


# --- weight layouts -------------------------------------------------------------------------


def q_b_split_rope_first(monkeypatch, pair):
    """A head's rows of q_b_proj read as [rope | nope]."""
    heads, rope = pair.args.num_attention_heads, pair.args.qk_rope_head_dim
    for attention in attentions(pair):
        layer = attention.q_b_proj
        rows = layer.weight.reshape(heads, -1, layer.weight.shape[-1])
        layer.weight = mx.concatenate([rows[:, rope:], rows[:, :rope]], axis=1).flatten(0, 1)


def kv_b_split_all_k_all_v(monkeypatch, pair):
    """kv_b_proj read as [K of all heads | V of all heads] instead of head by head."""
    args = pair.args
    heads, nope = args.num_attention_heads, args.qk_nope_head_dim
    for i, attention in enumerate(attentions(pair)):
        weight = to_mlx(pair.tensors[f"model.layers.{i}.self_attn.kv_b_proj.weight"])
        k, v = mx.split(weight.astype(mx.float32), [heads * nope], axis=0)
        attention.embed_q.weight = k.reshape(heads, nope, -1).swapaxes(-1, -2)
        attention.unembed_out.weight = v.reshape(heads, args.v_head_dim, -1)


# --- MTP ------------------------------------------------------------------------------------


def hidden_first(monkeypatch, pair):
    """[hidden ; embedding] into eh_proj, as the report's equation writes it."""
    embedding, hidden = mx.split(pair.mtp.eh_proj.weight, 2, axis=1)
    pair.mtp.eh_proj.weight = mx.concatenate([hidden, embedding], axis=1)


def unshifted_token(monkeypatch, pair):
    """(g_j, t_j) instead of (g_j, t_{j+1})."""

    def wrong(model, ids):
        x = mx.array(ids.numpy())
        return model.hidden(x)[:, :-1], x[:, :-1]

    monkeypatch.setattr(pairs, "mlx_pairs", wrong)


def pre_norm_state(monkeypatch, pair):
    """The last layer's output before model.norm; hnorm hides its size, not its direction."""

    def wrong(model, ids):
        x = mx.array(ids.numpy())
        h = model.model.embed_tokens(x)
        for layer in model.layers:
            h = layer(h)
        return h[:, :-1], x[:, 1:]

    monkeypatch.setattr(pairs, "mlx_pairs", wrong)


def model_norm_for_shared_head_norm(monkeypatch, pair):
    pair.mtp.shared_head.norm.weight = pair.model.model.norm.weight


def shared_head_norm_missing(monkeypatch, pair):
    """The head reads the layer's output as it is."""
    pair.mtp.shared_head.norm = lambda x: x


def first_pair_masked(monkeypatch, pair):
    """The embedding of pair 0 zeroed, as vLLM does."""
    embed = pair.mtp.shared.embed_tokens

    def wrong(ids):
        return embed(ids) * (mx.arange(ids.shape[1]) > 0)[:, None]

    monkeypatch.setattr(pair.mtp.shared, "embed_tokens", wrong)


def mixed_positions(monkeypatch, pair):
    """Pair j at position j in the first chunk and at j + 1 in later ones, in one cache."""
    rope = pair.mtp.self_attn.rope
    pair.mtp.self_attn.rope = lambda x, offset: rope(x, offset + (offset > 0))


def shifted_positions(monkeypatch, pair):
    """No fault: every pair at position j + 1, as transformers counts."""
    rope = pair.mtp.self_attn.rope
    pair.mtp.self_attn.rope = lambda x, offset: rope(x, offset + 1)


# Config A unless the trap is invisible there; bias mean +2 (V3's own range) unless it hides it.
CONFIGS = tiny.CONFIGS | {"A, rms_norm_eps 1e-2": tiny.A | {"rms_norm_eps": 1e-2}}
FAULTS = {
    # spec section 8, item 1
    "half-split rope": Fault(half_split_rope),
    "half-split rope without yarn": Fault(half_split_rope, config="B"),
    "normalised k_pe": Fault(normalised_k_pe),
    "rotated nope dimensions": Fault(rotated_nope),
    # item 2
    "no squared mscale": Fault(set_scale(0, "N + R")),
    "mscale not squared": Fault(set_scale(1, "N + R")),
    "mscale for mscale_all_dim (equal in A)": Fault(set_scale(2, "N + R", "mscale"), config="C"),
    "scale from C + R (576 in V3)": Fault(set_scale(2, "C + R")),
    "yarn off below its original length": Fault(yarn_off),
    "cos and sin not scaled (1 in A)": Fault(no_rotation_factor, config="C"),
    # item 3
    "topk_group one less": Fault(keeps_groups(-1)),
    "topk_group one more": Fault(keeps_groups(+1)),
    "group score by maximum": Fault(selects(group_score="maximum")),
    "biased weights": Fault(selects(weighs="biased")),
    "zero mask (shows below zero only)": Fault(selects(dropped=0.0), bias_mean=-1.0),
    "renormalised after scaling": Fault(selects(normalises="after scaling")),
    "not renormalised": Fault(selects(normalises="never")),
    "not scaled": Fault(selects(scales=False)),
    "no selection bias": Fault(selects(has_bias=False)),
    "no groups": Fault(selects(has_groups=False)),
    "shared expert omitted": Fault(shared_expert_omitted),
    "shared expert scaled": Fault(shared_expert_scaled),
    "two shared experts, one computed": Fault(shared_expert_of_half_width),
    # item 5
    "q_b split as [rope | nope]": Fault(q_b_split_rope_first),
    "kv_b split as [all K | all V]": Fault(kv_b_split_all_k_all_v),
    # item 6 (the bf16 bias of item 3 too: at a wider gate, in test_mutations.py)
    "router logits in bf16": Fault(gate_in_bf16, bias_mean=0.0),
    "router weights in 4 bits": Fault(gate_in_four_bits, bias_mean=0.0),
    # item 8
    "MTP hidden state first": Fault(hidden_first, shows_in="drafts"),
    "MTP token not shifted": Fault(unshifted_token, shows_in="drafts"),
    "MTP state before model.norm": Fault(pre_norm_state, shows_in="drafts"),
    "MTP model.norm for shared_head.norm": Fault(
        model_norm_for_shared_head_norm, shows_in="drafts"
    ),
    "MTP without shared_head.norm": Fault(shared_head_norm_missing, shows_in="drafts"),
    "MTP pair 0 masked": Fault(first_pair_masked, shows_in="drafts"),
    "MTP positions mixed in one cache": Fault(mixed_positions, shows_in="drafts"),
    # item 10
    "experts in lexicographic order": Fault(lexicographic_experts),
    # beyond the list
    "gate and up swapped": Fault(gate_and_up_swapped),
    "rms_norm_eps in the lora norms": Fault(
        lora_norms_with_config_eps, config="A, rms_norm_eps 1e-2"
    ),
    "positions restart in a chunk": Fault(positions_restart_in_a_chunk),
    "mask of the chunk alone": Fault(mask_of_the_chunk_alone),
}
FAULTLESS = {
    "router written again": selects(),
    "attention with dense scores": lambda monkeypatch, pair: monkeypatch.setattr(
        mla, "attend_absorbed", attend_plain()
    ),
    "MTP positions all one later": shifted_positions,
}
