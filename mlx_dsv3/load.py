"""Folder -> model, tokenizer, MTP module and expert store.

Takes what `python -m convert` writes and what `mlx_lm.convert` writes. Trunk tensors come through
`mx.load`; routed experts never do: the store reads them into its banks. Weights stay packed;
scales, biases and plain weights take the activation dtype, the router stays float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_dsv3.checkpoint.folder import Folder, fetch, open_model
from mlx_dsv3.checkpoint.format import EXPERT_KEY, SIDECAR, infer_quantization, mtp_prefix
from mlx_dsv3.checkpoint.headers import TensorInfo
from mlx_dsv3.config import ModelArgs
from mlx_dsv3.device import default_dtype, limit_memory
from mlx_dsv3.errors import UserError
from mlx_dsv3.experts.products import RoutedExperts
from mlx_dsv3.experts.reader import LOAD_AGAIN
from mlx_dsv3.experts.store import ExpertStore
from mlx_dsv3.memory import MemoryPlan, make_plan
from mlx_dsv3.model.decoder import Model
from mlx_dsv3.model.mla import MLA
from mlx_dsv3.model.moe import MLP, MoE
from mlx_dsv3.model.mtp import MTP
from mlx_dsv3.tokenizer import load_checked_tokenizer, vocabulary_mask

Progress = Callable[[int, int], None]  # bytes in memory, of so many
DIFFERENT = "config.json and weights are of different checkpoints; fetch or convert both again"


@dataclass
class Loaded:
    """A model ready to run. `mtp` is None where the folder has no `mtp.safetensors`.

    `close`, or the end of a `with`, gives memory, threads and files back; so does dropping it.
    `tokenizer` is mlx-lm's wrapper; None from `load_model`. `vocabulary_mask` (vocabulary,) is
    -inf for the padding ids that the tokenizer lacks and 0 elsewhere; None where it lacks none.
    """

    model: Model
    mtp: MTP | None
    store: ExpertStore
    plan: MemoryPlan
    args: ModelArgs
    config: dict
    tokenizer: object = None
    vocabulary_mask: mx.array | None = None

    def close(self) -> None:
        """Free the weights, end the threads and close the files. Closing again does nothing."""
        if "store" in vars(self):
            self.store.close()
            del self.model, self.mtp, self.store

    def __getattr__(self, name: str):
        if name in ("model", "mtp", "store"):
            raise UserError("the model was closed", LOAD_AGAIN)
        raise AttributeError(f"`Loaded` has no `{name}`")

    def __enter__(self) -> "Loaded":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def load_trunk(tensors: dict[str, TensorInfo]) -> dict[str, mx.array]:
    """Return everything but routed experts, unread (MLX reads at first use)."""
    weights = {}
    for path in sorted({info.path for name, info in tensors.items() if is_trunk(name)}):
        loaded = mx.load(str(path))
        weights.update({name: array for name, array in loaded.items() if is_trunk(name)})
    return weights


def is_trunk(name: str) -> bool:
    return EXPERT_KEY.fullmatch(name) is None and "rotary_emb.inv_freq" not in name


def split_kv_b(weights: dict[str, mx.array], args: ModelArgs) -> dict[str, mx.array]:
    """Turn a `kv_b_proj` (older MLX folders) into `embed_q` and `unembed_out`; others pass.

    A packed one is unpacked and packed again in its own format, as mlx-lm does.
    """
    out = dict(weights)
    for name in [name for name in weights if name.endswith("kv_b_proj.weight")]:
        prefix = name.removesuffix("kv_b_proj.weight")
        weight = out.pop(name)
        packing = None
        if (scales := out.pop(f"{prefix}kv_b_proj.scales", None)) is not None:
            biases = out.pop(f"{prefix}kv_b_proj.biases", None)
            in_blocks = scales.dtype == mx.uint8
            packed, groups = weight.shape[-1], scales.shape[-1]
            packing = infer_quantization(args.kv_lora_rank, packed, groups, in_blocks, name)
            weight = mx.dequantize(weight, scales, biases, **packing.as_config())
        rows = args.num_attention_heads * (args.qk_nope_head_dim + args.v_head_dim)
        if weight.shape != (rows, args.kv_lora_rank):
            raise UserError(
                f"`{name}` has shape {weight.shape}; config.json says {(rows, args.kv_lora_rank)}",
                DIFFERENT,
            )
        heads = weight.reshape(args.num_attention_heads, -1, args.kv_lora_rank)
        nope = args.qk_nope_head_dim
        w_uk, w_uv = heads[:, :nope].swapaxes(-1, -2), heads[:, nope:]  # (H, C, N), (H, V, C)
        for leaf, part in (("embed_q", w_uk), ("unembed_out", w_uv)):
            packed = [mx.contiguous(part)]
            if packing and packing.fits(part.shape[-1]):
                packed = mx.quantize(part, **packing.as_config())
            for suffix, array in zip(("weight", "scales", "biases"), packed, strict=False):
                out[f"{prefix}{leaf}.{suffix}"] = array
    return out


def cast_weights(weights: dict[str, mx.array], dtype: mx.Dtype) -> dict[str, mx.array]:
    """Give every float tensor the activation dtype, and the router's tensors float32."""

    def cast(name: str, array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        return array.astype(mx.float32 if ".mlp.gate." in f".{name}" else dtype)

    return {name: cast(name, array) for name, array in weights.items()}


def quantize_like(module: nn.Module, weights: dict[str, mx.array]) -> None:
    """Turn the layers whose weights have scales into quantised ones of the same format."""

    def packing(path: str, layer: nn.Module) -> dict | bool:
        scales = weights.get(f"{path}.scales")
        if scales is None or not hasattr(layer, "to_quantized"):
            return False
        in_blocks = scales.dtype == mx.uint8
        width, packed = layer.weight.shape[-1], weights[f"{path}.weight"].shape[-1]
        name = f"{path}.weight"
        return infer_quantization(width, packed, scales.shape[-1], in_blocks, name).as_config()

    nn.quantize(module, class_predicate=packing)


def fill(module: nn.Module, weights: dict[str, mx.array], source: str) -> None:
    """Load weights into a module, by name and shape; raise `UserError` for any that differ."""
    quantize_like(module, weights)
    parameters = dict(tree_flatten(module.parameters()))
    for name in sorted(parameters.keys() ^ weights.keys()):
        where = "is missing from" if name in parameters else "is unknown to the model, in"
        raise UserError(
            f"`{name}` {where} `{source}`", "convert the checkpoint again into an empty folder"
        )
    for name, array in weights.items():
        if array.shape != parameters[name].shape:
            raise UserError(
                f"`{name}` in `{source}` has shape {array.shape}; "
                f"config.json says {parameters[name].shape}",
                DIFFERENT,
            )
    module.load_weights(list(weights.items()))


def join_layers(module: nn.Module, advance: Callable[[int], None]) -> None:
    """Merge the projections that share an input, and read every weight, a layer at a time."""
    for _, child in module.named_modules():
        if isinstance(child, MLA | MLP):
            child.join()
    done = 0
    for part in (*getattr(module, "layers", ()), module):
        mx.eval(part.parameters())
        nbytes = sum(array.nbytes for _, array in tree_flatten(part.parameters()))
        advance(nbytes - done if part is module else nbytes)
        done += nbytes


def plan_memory(
    folder: str | Path | Folder,
    *,
    dtype: mx.Dtype | None = None,
    with_mtp: bool = True,
    **options,
) -> MemoryPlan:
    """Return the memory plan of an MLX folder, from headers alone; see `memory.make_plan`."""
    folder = open_model(folder, with_mtp)
    return make_plan(folder.all_tensors, folder.args, dtype or default_dtype(), **options)


def fill_model(
    folder: Folder, store: ExpertStore, dtype: mx.Dtype, advance: Callable[[int], None]
) -> tuple[Model, MTP | None]:
    """Build model and MTP module and bring their weights in; tell `advance` of bytes that came."""
    model = Model(folder.args)
    weights = cast_weights(split_kv_b(load_trunk(folder.tensors), folder.args), dtype)
    fill(model, weights, str(folder.path))
    join_layers(model, advance)
    for i, layer in enumerate(model.layers):
        if isinstance(layer.mlp, MoE):
            layer.mlp.experts = open_experts(store, i, advance)
    return model, load_mtp(folder, model, store, dtype, advance) if folder.sidecar else None


def open_experts(store: ExpertStore, i: int, advance: Callable[[int], None]) -> RoutedExperts:
    """Open the experts of a layer, and read them where all have a slot."""
    bank = store.open_layer(i)
    advance(bank.nbytes if bank.is_resident else 0)
    return RoutedExperts(bank)


def counting(plan: MemoryPlan, progress: Progress | None) -> Callable[[int], None]:
    """Return what is told of bytes that came, and tells their sum."""
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, plan.loaded_bytes)

    advance(0)
    return advance


def load_model(
    folder: str | Path | Folder,
    *,
    dtype: mx.Dtype | None = None,
    plan: MemoryPlan | None = None,
    progress: Progress | None = None,
    **options,
) -> Loaded:
    """Load everything but the tokenizer from an MLX folder or repository, by a memory plan.

    Without a plan one is made from `options`; see `memory.make_plan`. What the machine lacks of a
    repository is fetched when the plan fits. On a GPU it sets MLX's limits for the whole process
    (`device.limit_memory`).
    """
    dtype = dtype or default_dtype()
    if dtype not in (mx.float32, mx.bfloat16):
        raise UserError(f"dtype `{dtype}` overflows in this model; use float32 or bfloat16")
    folder = open_model(folder)
    args = folder.args
    plan = plan or make_plan(folder.all_tensors, args, dtype, **options)
    folder = fetch(folder)
    store = ExpertStore(folder.all_tensors, args, dtype, plan.slots)
    try:
        model, mtp = fill_model(folder, store, dtype, counting(plan, progress))
    except BaseException:
        store.close()
        raise
    if not store.is_streamed:
        store.close()  # nothing is left to read
    limit_memory()
    return Loaded(model, mtp, store, plan, args, folder.config)


def load_mtp(
    folder: Folder,
    model: Model,
    store: ExpertStore,
    dtype: mx.Dtype,
    advance: Callable[[int], None],
) -> MTP:
    """Read the sidecar: hub names `model.layers.{L}.*`, experts as records."""
    args = model.args
    prefix = mtp_prefix(args)
    mtp = MTP(args, model)
    weights = cast_weights(split_kv_b(load_trunk(folder.sidecar), args), dtype)
    for name in weights:
        if not name.startswith(prefix):
            raise UserError(
                f"`{name}` in `{folder.path / SIDECAR}` is not of layer {args.num_hidden_layers}"
            )
    fill(mtp, {name.removeprefix(prefix): array for name, array in weights.items()}, SIDECAR)
    join_layers(mtp, advance)
    mtp.mlp.experts = open_experts(store, args.num_hidden_layers, advance)
    return mtp


def load(
    folder: str | Path | Folder,
    *,
    experts: str = "auto",
    expert_memory_gb: float | None = None,
    context: int | None = None,
    dtype: mx.Dtype | None = None,
    trust_remote_code: bool = False,
    with_mtp: bool = True,
    plan: MemoryPlan | None = None,
    progress: Progress | None = None,
    check_tokenizer: Callable[[object], None] | None = None,
) -> Loaded:
    """Load an MLX folder: model, tokenizer, MTP module if it has one, experts as planned.

    `with load(folder) as loaded:` closes it at the end, and so does `loaded.close()`.
    `folder` is a path, the hub id of such a folder (a str; fetched once into huggingface_hub's
    cache, after the memory plan was made from its headers), or what `open_model` returned.
    `experts` is `resident`, `streamed` or `auto`; `expert_memory_gb` bounds the expert slots (GB
    of 10^9 bytes); `context` is the length in tokens that memory is planned for; `dtype` is that
    of the activations, bfloat16 on a GPU and float32 on the CPU by default; without `with_mtp` the
    MTP module takes no memory and there are no drafts. On a GPU it sets MLX's limits for the whole
    process (`device.limit_memory`). A `plan` made before goes before these options. `progress` is
    called after each layer with the bytes that are in memory and those that will be.
    `check_tokenizer` is called with the tokenizer before anything large is read. Raises `UserError`
    for a folder that cannot be run, with what is wrong in it.
    """
    opened, dtype = open_model(folder, with_mtp), dtype or default_dtype()
    plan = plan or make_plan(
        opened.all_tensors,
        opened.args,
        dtype,
        experts=experts,
        expert_memory_gb=expert_memory_gb,
        context=context,
    )
    args, config = opened.args, opened.config
    tokenizer = load_checked_tokenizer(opened.path, args, config, trust_remote_code)
    if check_tokenizer is not None:
        check_tokenizer(tokenizer)
    loaded = load_model(opened, dtype=dtype, plan=plan, progress=progress)
    loaded.tokenizer = tokenizer
    loaded.vocabulary_mask = vocabulary_mask(tokenizer, args.vocab_size)
    return loaded
