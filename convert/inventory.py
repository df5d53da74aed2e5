"""Every tensor that a DeepSeek-V3 checkpoint must hold: hub name, shape, role (spec 2.2).

Written from config.json alone, then compared with what the shards hold: nothing may be missing,
nothing may be left over, and every FP8 weight has scales of the right shape. Knows nothing about
files, recipes or MLX.
"""

from collections.abc import Iterator
from itertools import chain
from math import ceil
from typing import NamedTuple

from convert.source import Source
from mlx_dsv3.checkpoint.format import (
    PROJECTIONS,
    SCALE_SUFFIX,
    check_counts,
    layer_prefix,
    mtp_prefix,
    record_prefix,
)
from mlx_dsv3.config import ModelArgs
from mlx_dsv3.errors import UserError

SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")
WEIGHT_DTYPES = ("F8_E4M3", "BF16", "F32")
NEVER_QUANTIZED = ("norm", "router", "bias")
MOST_MISSING = 1000  # that are counted
INCOMPLETE = "the download looks incomplete; compare the folder with the file list on the hub"


class HubTensor(NamedTuple):
    """One tensor as the hub names it."""

    name: str
    shape: tuple[int, ...]
    role: str


def outer_tensors(args: ModelArgs) -> Iterator[HubTensor]:
    """Yield embedding, final norm and head."""
    yield HubTensor("model.embed_tokens.weight", (args.vocab_size, args.hidden_size), "embedding")
    yield HubTensor("model.norm.weight", (args.hidden_size,), "norm")
    yield HubTensor("lm_head.weight", (args.vocab_size, args.hidden_size), "head")


def layer_tensors(args: ModelArgs, layer: int) -> Iterator[HubTensor]:
    """Yield a layer's tensors except its routed experts."""
    prefix, width = layer_prefix(layer), (args.hidden_size,)
    yield HubTensor(prefix + "input_layernorm.weight", width, "norm")
    yield from attention_tensors(args, prefix + "self_attn.")
    yield HubTensor(prefix + "post_attention_layernorm.weight", width, "norm")
    if not args.is_moe_layer(layer):
        yield from mlp_tensors(prefix + "mlp.", args.intermediate_size, args, "dense")
        return
    router = (args.n_routed_experts, args.hidden_size)
    yield HubTensor(prefix + "mlp.gate.weight", router, "router")
    yield HubTensor(prefix + "mlp.gate.e_score_correction_bias", router[:1], "bias")
    if args.n_shared_experts:
        shared = args.moe_intermediate_size * args.n_shared_experts
        yield from mlp_tensors(prefix + "mlp.shared_experts.", shared, args, "shared")


def attention_tensors(args: ModelArgs, prefix: str) -> Iterator[HubTensor]:
    """Yield the tensors of MLA; without a query rank there is one query projection."""
    heads, nope, value = args.num_attention_heads, args.qk_nope_head_dim, args.v_head_dim
    latent, query = args.kv_lora_rank, args.q_lora_rank
    query_rows = heads * (nope + args.qk_rope_head_dim)
    if query is None:
        yield HubTensor(prefix + "q_proj.weight", (query_rows, args.hidden_size), "attention")
    else:
        yield HubTensor(prefix + "q_a_proj.weight", (query, args.hidden_size), "attention")
        yield HubTensor(prefix + "q_a_layernorm.weight", (query,), "norm")
        yield HubTensor(prefix + "q_b_proj.weight", (query_rows, query), "attention")
    kv_a = (latent + args.qk_rope_head_dim, args.hidden_size)
    yield HubTensor(prefix + "kv_a_proj_with_mqa.weight", kv_a, "attention")
    yield HubTensor(prefix + "kv_a_layernorm.weight", (latent,), "norm")
    kv_b = (heads * (nope + value), latent)
    yield HubTensor(prefix + "kv_b_proj.weight", kv_b, "attention")
    yield HubTensor(prefix + "o_proj.weight", (args.hidden_size, heads * value), "attention")


def mlp_tensors(prefix: str, width: int, args: ModelArgs, role: str) -> Iterator[HubTensor]:
    """Yield gate, up and down of one MLP of `width`."""
    wide, narrow = (width, args.hidden_size), (args.hidden_size, width)
    for projection, shape in zip(PROJECTIONS, (wide, wide, narrow), strict=True):
        yield HubTensor(f"{prefix}{projection}.weight", shape, role)


def expert_tensors(args: ModelArgs, layer: int, expert: int) -> Iterator[HubTensor]:
    """Yield gate, up and down of one routed expert."""
    prefix = f"{record_prefix(layer)}{expert}."
    for tensor in mlp_tensors(prefix, args.moe_intermediate_size, args, ""):
        role = "experts_down" if "down_proj" in tensor.name else "experts_gate_up"
        yield tensor._replace(role="mtp" if layer == args.num_hidden_layers else role)


def mtp_tensors(args: ModelArgs) -> Iterator[HubTensor]:
    """Yield the MTP layer's tensors except experts and duplicates; all have the role `mtp`."""
    prefix, hidden = mtp_prefix(args), args.hidden_size
    yield HubTensor(prefix + "enorm.weight", (hidden,), "norm")
    yield HubTensor(prefix + "hnorm.weight", (hidden,), "norm")
    yield HubTensor(prefix + "eh_proj.weight", (hidden, 2 * hidden), "mtp")
    for tensor in layer_tensors(args, args.num_hidden_layers):
        yield tensor if tensor.role in NEVER_QUANTIZED else tensor._replace(role="mtp")
    yield HubTensor(prefix + "shared_head.norm.weight", (hidden,), "norm")


def mtp_duplicates(args: ModelArgs) -> dict[str, str]:
    """Return the MTP layer's copies of embedding and head, each with the original's name."""
    prefix = mtp_prefix(args)
    return {
        prefix + "embed_tokens.weight": "model.embed_tokens.weight",
        prefix + "shared_head.head.weight": "lm_head.weight",
    }


def moe_layers(args: ModelArgs) -> list[int]:
    return [layer for layer in range(args.num_hidden_layers) if args.is_moe_layer(layer)]


def holds_mtp(source: Source) -> bool:
    """Say whether the shards hold an MTP layer; config.json may promise one that is not there."""
    prefix = mtp_prefix(source.args)
    return source.args.has_mtp and any(name.startswith(prefix) for name in source.tensors)


def main_tensors(args: ModelArgs) -> Iterator[HubTensor]:
    """Yield every tensor of the main model."""
    yield from outer_tensors(args)
    for layer in range(args.num_hidden_layers):
        yield from layer_tensors(args, layer)
    for layer in moe_layers(args):
        yield from layer_experts(args, layer)


def layer_experts(args: ModelArgs, layer: int) -> Iterator[HubTensor]:
    for expert in range(args.n_routed_experts):
        yield from expert_tensors(args, layer, expert)


def check_tensors(source: Source, only_mtp: bool = False) -> None:
    """Raise `UserError` unless the shards hold exactly the tensors that config.json implies.

    With `only_mtp`, the MTP layer is looked at and nothing else.
    """
    args, prefix = source.args, mtp_prefix(source.args) if only_mtp else ""
    left = {name for name in source.tensors if name.startswith(prefix)}
    left = {name for name in left if not name.endswith("rotary_emb.inv_freq")}
    if not only_mtp:
        check_counts(args, source.tensors)
    expected = [] if only_mtp else [main_tensors(args)]
    if holds_mtp(source):
        expected += [mtp_tensors(args), layer_experts(args, args.num_hidden_layers)]
        outer = (args.vocab_size, args.hidden_size)
        copies = [HubTensor(name, outer, "mtp") for name in mtp_duplicates(args)]
        expected.append(copy for copy in copies if copy.name in left)
    missing = []
    for tensor in chain(*expected):
        if tensor.name in left:
            left -= _check_tensor(source, tensor)
        elif len(missing) < MOST_MISSING:
            missing.append(tensor.name)
        else:  # config.json may promise millions
            break
    if missing:
        or_more = " or more" if len(missing) == MOST_MISSING else ""
        raise UserError(
            f"`{missing[0]}` is in none of {len(source.shard_bytes)} shards"
            + (f" ({len(missing):,}{or_more} tensors are missing)" if len(missing) > 1 else ""),
            INCOMPLETE,
        )
    for name in sorted(left):
        _refuse_extra(source, name)


def _check_tensor(source: Source, tensor: HubTensor) -> set[str]:
    """Check a tensor's shape, dtype and scales; return the names that this accounts for."""
    found = source.tensors[tensor.name]
    if found.shape != tensor.shape:
        raise UserError(
            f"`{tensor.name}` has shape {list(found.shape)}; config.json says {list(tensor.shape)}",
            "config.json and shards belong to different checkpoints; fetch both again",
        )
    if found.dtype not in WEIGHT_DTYPES or (tensor.role == "bias" and found.dtype == "F8_E4M3"):
        raise UserError(
            f"`{tensor.name}` has dtype `{found.dtype}`; F8_E4M3, BF16 and F32 convert",
            "look on the hub for the FP8 or BF16 form of this checkpoint",
        )
    if found.dtype != "F8_E4M3":
        return {tensor.name}
    _check_scale(source, tensor)
    return {tensor.name, tensor.name + SCALE_SUFFIX}


def _check_scale(source: Source, tensor: HubTensor) -> None:
    if not source.config.get("quantization_config"):
        raise UserError(
            f"`{tensor.name}` is FP8 and config.json has no `quantization_config`",
            "copy config.json from the model's page on the hub",
        )
    scale = source.tensors.get(tensor.name + SCALE_SUFFIX)
    if scale is None or len(tensor.shape) != 2:
        raise UserError(
            f"`{tensor.name}` is FP8 and its `weight{SCALE_SUFFIX}` is in none of "
            f"{len(source.shard_bytes)} shards",
            INCOMPLETE,
        )
    want = tuple(ceil(n / block) for n, block in zip(tensor.shape, source.block, strict=True))
    if scale.shape != want or scale.dtype not in SCALE_DTYPES:
        raise UserError(
            f"`{tensor.name}{SCALE_SUFFIX}` is {scale.dtype} {list(scale.shape)}; "
            f"blocks of {list(source.block)} need {list(want)} in F32, BF16 or F8_E8M0",
            "config.json and shards belong to different checkpoints; fetch both again",
        )


def _refuse_extra(source: Source, name: str) -> None:
    where = source.tensors[name].shard
    if name.endswith(SCALE_SUFFIX):
        raise UserError(f"`{name}` in `{where}` does not scale an FP8 weight", INCOMPLETE)
    raise UserError(
        f"`{where}` holds `{name}`, which a `{source.args.model_type}` with this config.json does "
        "not have",
        "nothing is dropped silently; report the checkpoint if it should convert",
    )
