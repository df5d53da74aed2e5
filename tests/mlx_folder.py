"""Write an MLX folder by hand: what `convert` and mlx-lm write, without either of them.

So the tests of the model and its loader stand on their own. `write_mlx` returns the tensors that
the folder then *means* (after quantisation), under hub names, for the reference.
"""

import json
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch

DTYPES = {mx.bfloat16: "BF16", mx.float32: "F32", mx.uint32: "U32", mx.uint8: "U8"}
DTYPES |= {mx.float16: "F16"}
NEVER_PACKED = ("norm.weight", "mlp.gate.weight")


def to_mlx(tensor: torch.Tensor) -> mx.array:
    """Return a float32 tensor of bfloat16 values as a bfloat16 MLX array."""
    return mx.array(tensor.numpy()).astype(mx.bfloat16)


def to_torch(array: mx.array) -> torch.Tensor:
    return torch.from_numpy(np.array(array.astype(mx.float32)))


def array_bytes(array: mx.array) -> bytes:
    return bytes(memoryview(mx.contiguous(array).view(mx.uint8)).cast("B"))


def save_ordered(path: Path, arrays: dict[str, mx.array]) -> None:
    """Write a safetensors file whose data lie in the order of the dictionary."""
    header, chunks, offset = {}, [], 0
    for name, array in arrays.items():
        data = array_bytes(array)
        entry = {"dtype": DTYPES[array.dtype], "shape": list(array.shape)}
        header[name] = entry | {"data_offsets": [offset, offset + len(data)]}
        chunks.append(data)
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(chunks))


def split_heads(config: dict, weight: mx.array) -> tuple[mx.array, mx.array]:
    """Return embed_q (H, C, N) and unembed_out (H, V, C) of a kv_b_proj weight."""
    heads = weight.reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
    nope = config["qk_nope_head_dim"]
    return mx.contiguous(heads[:, :nope].swapaxes(-1, -2)), mx.contiguous(heads[:, nope:])


def join_heads(embed_q: torch.Tensor, unembed_out: torch.Tensor) -> torch.Tensor:
    """Return the kv_b_proj weight of embed_q and unembed_out."""
    return torch.cat([embed_q.transpose(-1, -2), unembed_out], dim=1).flatten(0, 1)


def pack(arrays: dict[str, mx.array], packing: dict) -> dict[str, mx.array]:
    """Quantise every matrix that the group size divides, as mlx-lm's uniform recipes do."""
    out = {}
    for name, array in arrays.items():
        fits = array.shape[-1] % packing["group_size"] == 0
        if array.ndim < 2 or not fits or name.endswith(NEVER_PACKED):
            out[name] = array
            continue
        stem = name.removesuffix("weight")
        parts = mx.quantize(array, **packing)
        out |= {
            stem + part: array
            for part, array in zip(("weight", "scales", "biases"), parts, strict=False)
        }
    return out


def unpack(arrays: dict[str, mx.array], packing: dict | None) -> dict[str, torch.Tensor]:
    """Return float32 tensors; scales are widened before use, as in a float32 model."""
    out = {}
    for name, array in arrays.items():
        stem = name.removesuffix("weight")
        scales, biases = arrays.get(stem + "scales"), arrays.get(stem + "biases")
        if name.endswith((".scales", ".biases")):
            continue
        if name.endswith(".weight") and scales is not None:
            if scales.dtype != mx.uint8:
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            array = mx.dequantize(array, scales, biases, dtype=mx.float32, **packing)
        out[name] = to_torch(array)
    return out


def rejoin(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors under hub names: kv_b_proj put together again."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("embed_q.weight"):
            other = tensors[name.replace("embed_q", "unembed_out")]
            out[name.replace("embed_q", "kv_b_proj")] = join_heads(tensor, other)
        elif not name.endswith("unembed_out.weight"):
            out[name] = tensor
    return out


def stack_experts(config: dict, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Turn `mlp.experts.{e}.*` into mlx-lm's `mlp.switch_mlp.*`, experts in numeric order."""
    out = {}
    for name, array in arrays.items():
        if ".mlp.experts.0." in name:
            rows = [
                arrays[name.replace(".experts.0.", f".experts.{e}.")]
                for e in range(config["n_routed_experts"])
            ]
            out[name.replace(".experts.0.", ".switch_mlp.")] = mx.stack(rows)
        elif ".mlp.experts." not in name:
            out[name] = array
    return out


def write_mlx(
    folder: Path,
    config: dict,
    tensors: dict[str, torch.Tensor],
    *,
    arrangement: str = "records",
    packing: dict | None = None,
    split_kv_b: bool = True,
    mtp: bool = True,
) -> dict[str, torch.Tensor]:
    """Write hub tensors (float32 torch) as an MLX folder; return what the folder means.

    Experts of the main model are `records` or `stacked`; the sidecar always holds records.
    `packing` is {"bits", "group_size", "mode"} or None for bfloat16. With `split_kv_b` False the
    folder has the older `kv_b_proj`, and what is returned holds that one dequantised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            arrays[name] = mx.array(tensor.numpy())
        elif split_kv_b and name.endswith("kv_b_proj.weight"):
            embed_q, unembed_out = split_heads(config, to_mlx(tensor))
            arrays[name.replace("kv_b_proj", "embed_q")] = embed_q
            arrays[name.replace("kv_b_proj", "unembed_out")] = unembed_out
        else:
            arrays[name] = to_mlx(tensor)
    if packing:
        arrays = pack(arrays, packing)
    meaning = rejoin(unpack(arrays, packing))

    prefix = f"model.layers.{config['num_hidden_layers']}."
    main = {name: array for name, array in arrays.items() if not name.startswith(prefix)}
    sidecar = {name: array for name, array in arrays.items() if name.startswith(prefix)}
    if arrangement == "stacked":
        main = stack_experts(config, main)
    trunk = {name: array for name, array in main.items() if ".mlp.experts." not in name}
    experts = {name: array for name, array in main.items() if ".mlp.experts." in name}
    files = {"model-trunk-00001.safetensors": trunk}
    if experts:
        files["model-experts-00001.safetensors"] = experts
    for file, contents in files.items():
        save_ordered(folder / file, contents)
    weight_map = {name: file for file, contents in files.items() for name in contents}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    if mtp and sidecar:
        save_ordered(folder / "mtp.safetensors", sidecar)
    if packing:
        config = config | {"quantization": packing, "quantization_config": packing}
    write_json(folder / "config.json", config)
    return meaning


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def write_tokenizer(folder: Path, size: int) -> None:
    """Write a word-level tokenizer with ids 0 .. size - 1; 1 ends a turn."""
    words = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, size)}
    contents = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<s>"},
    }
    write_json(folder / "tokenizer.json", contents)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    write_json(folder / "tokenizer_config.json", settings | {"bos_token": "<s>"})


def changed_copy(source: Path, target: Path, **config) -> Path:
    """Return a folder of links to an MLX folder's files, with these fields in its config.json."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    found = json.loads((source / "config.json").read_text())
    (target / "config.json").unlink()
    write_json(target / "config.json", found | config)
    return target


def spoil(folder: Path, name: str) -> None:
    """Put a NaN into a tensor of a changed copy."""
    [file] = [file for file in folder.glob("*.safetensors") if name in mx.load(str(file))]
    tensors = mx.load(str(file))
    tensors[name][5] = float("nan")
    mx.eval(tensors)
    file.unlink()
    mx.save_safetensors(str(file), tensors)
