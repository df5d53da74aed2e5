"""Write the trained weights as a DeepSeek-V3 checkpoint: FP8 blocks, several shards, one index.

The layout is the hub's: file names, tensor names, dtypes, the copies of embedding and head in the
MTP layer. Scales of one layer lie in another shard than their weights, as happens in the real
files, so that readers must go through the index.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from demo import tokenizer
from demo.rounding import is_fp8
from mlx_dsv3.reference.fp8 import quantize_blocks

NUM_SHARDS = 4


def hub_tensors(state: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """Return every tensor of the checkpoint under its hub name and dtype."""
    state = {name: tensor.detach().cpu() for name, tensor in state.items()}
    mtp = f"model.layers.{layers}."
    state[mtp + "embed_tokens.weight"] = state["model.embed_tokens.weight"].clone()
    state[mtp + "shared_head.head.weight"] = state["lm_head.weight"].clone()
    tensors = {}
    for name, tensor in state.items():
        if is_fp8(name):
            tensors[name], tensors[name + "_scale_inv"] = quantize_blocks(tensor)
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = tensor.float()
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    return tensors


def shard_of(name: str) -> int:
    """Choose the shard, 1..NUM_SHARDS: embedding first, head and MTP last."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is None:
        return 1 if "embed_tokens" in name else NUM_SHARDS
    number = int(layer[1])
    if number == 2 and name.endswith("_scale_inv"):
        return 3  # the weights of layer 2 are in shard 2
    return {0: 1, 1: 1, 2: 2, 3: 3}.get(number, NUM_SHARDS)


def natural(name: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def write_shards(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the shards and the index."""
    weight_map = {}
    for number in range(1, NUM_SHARDS + 1):
        file = f"model-{number:05d}-of-{NUM_SHARDS:06d}.safetensors"
        names = sorted((n for n in tensors if shard_of(n) == number), key=natural)
        save_file({n: tensors[n].contiguous() for n in names}, folder / file, {"format": "pt"})
        (folder / file).chmod(0o644)
        weight_map |= dict.fromkeys(names, file)
    index = {
        "metadata": {},
        "weight_map": {n: weight_map[n] for n in sorted(weight_map, key=natural)},
    }
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def export(state: dict[str, torch.Tensor], config: dict, tok, folder: Path) -> None:
    """Write a whole checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(hub_tensors(state, config["num_hidden_layers"]), folder)
    write_json(folder / "config.json", config)
    generation = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1}
    write_json(folder / "generation_config.json", generation | {"transformers_version": "4.33.1"})
    tokenizer.save(tok, folder)
    shutil.copyfile(Path(__file__).parent / "LICENSE", folder / "LICENSE")
