"""MLX folders of any shape with random weights, written in a stream: inputs for the benchmarks.

The files are those that `convert` plans for a checkpoint of this config.json; only the bytes are
made up. Packed words are random, scales such that activations stay of size one.
"""

import json
import os
from pathlib import Path

import numpy as np

from convert.inventory import layer_experts, main_tensors, mtp_tensors
from convert.manifest import quantization_config
from convert.plan import Part
from convert.planner import build
from convert.recipe import RECIPES
from convert.source import Source
from mlx_dsv3.checkpoint.format import SIDECAR
from mlx_dsv3.config import ModelArgs

CHUNK = 32 << 20
BASE = {
    "model_type": "deepseek_v3",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 384,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 163840,
    "num_nextn_predict_layers": 1,
}


def source_of(config: dict) -> Source:
    """Return a BF16 checkpoint that exists as headers only."""
    args, entries, place = ModelArgs.from_dict(config), {}, 0
    tensors = list(main_tensors(args))
    if args.has_mtp:
        tensors += [*mtp_tensors(args), *layer_experts(args, args.num_hidden_layers)]
    for tensor in tensors:
        dtype = "F32" if tensor.role == "bias" else "BF16"
        nbytes = int(np.prod(tensor.shape)) * (4 if dtype == "F32" else 2)
        offsets = [place, place + nbytes]
        entries[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": offsets}
        place += nbytes
    raw = json.dumps(entries).encode()
    return Source(Path(), config, {"model.safetensors": (raw, 8 + len(raw) + place)})


def part_bytes(part: Part, bits: int, rng: np.random.Generator):
    """Yield a tensor's bytes in pieces: random words, sane scales, norms of one."""
    count = part.nbytes // {"U32": 4, "U8": 1, "BF16": 2, "F32": 4}[part.dtype]
    step = (2 / (1 << bits)) / max(part.shape[-1] * 64, 64) ** 0.5 * 1.7
    for start in range(0, count, CHUNK // 4):
        size = min(CHUNK // 4, count - start)
        if part.dtype in ("U32", "U8"):
            dtype = np.uint32 if part.dtype == "U32" else np.uint8
            yield rng.integers(0, np.iinfo(dtype).max, size, dtype, endpoint=True).tobytes()
            continue
        values = np.zeros(size, np.float32)
        if part.name.endswith("norm.weight"):
            values[:] = 1
        elif part.name.endswith(".scales"):
            values[:] = step
        elif part.name.endswith(".biases"):
            values[:] = -step * ((1 << bits) - 1) / 2
        elif part.name.endswith("gate.weight"):
            values = rng.standard_normal(size, np.float32) * (3 / part.shape[-1] ** 0.5)
        elif part.name.endswith(".weight"):
            values = rng.standard_normal(size, np.float32) / part.shape[-1] ** 0.5
        if part.dtype == "F32":
            yield values.tobytes()
        else:
            yield (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def write_folder(
    folder: Path, config: dict, recipe: str = "q4", layout: str = "records", seed: int = 0
) -> Path:
    """Write an MLX folder of `config` with random weights; returns the folder."""
    plan = build(source_of(config), RECIPES[recipe], layout)
    bits = plan.recipe.default.bits if plan.recipe.default else 8
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for name, file in plan.files.items():
        with open(folder / name, "wb") as out:
            out.write(file.header)
            for part in file.parts:
                part_bits = 8 if name == SIDECAR and plan.recipe.default else bits
                for piece in part_bytes(part, part_bits, rng):
                    out.write(piece)
        if name != SIDECAR:
            weight_map |= {part.name: name for part in file.parts}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = dict(config)
    if (quantization := quantization_config(plan)) is not None:
        config |= {"quantization": quantization, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def drop_from_page_cache(folder: Path) -> None:
    """Ask the system to forget a folder's pages, so that the next reads are cold (Linux)."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
