"""Small random DeepSeek-V3 models from a seed, as tensors and as folders in the hub's layout.

The shapes reach every branch of the arithmetic (spec 7.1): A has everything, B has no query
rank, one group and no yarn, C separates mscale from mscale_all_dim, D has widths that quantise
and 192 rows that end inside an FP8 block. Weights are far from a trainer's initial ones, so that
errors show: norms spread around 1, a selection bias with a mean to choose.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from mlx_dsv3.reference.fp8 import quantize_blocks
from mlx_dsv3.reference.model import Args, Model

YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}
A = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "rope_scaling": YARN,
    "max_position_embeddings": 163840,
    "num_nextn_predict_layers": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
B = A | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_scaling": None}
C = A | {"rope_scaling": YARN | {"mscale_all_dim": 0.707}}
D = A | {
    "hidden_size": 192,
    "intermediate_size": 320,
    "moe_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "n_shared_experts": 1,
    "rms_norm_eps": 1e-6,
}
CONFIGS = {"A": A, "B": B, "C": C, "D": D}

FP8_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
NEVER_FP8 = ("norm.weight", "embed_tokens.weight", "lm_head.weight", "head.weight", "mlp.gate.")


def random_tensors(config: dict, seed: int = 0, bias_mean: float = 2.0) -> dict[str, torch.Tensor]:
    """Return float32 tensors under hub names, rounded to bfloat16 except the selection bias."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {}
    for name, parameter in Model(Args.from_dict(config)).state_dict().items():
        shape = parameter.shape
        if name.endswith("e_score_correction_bias"):
            tensors[name] = bias_mean + 0.3 * normal(*shape)
        elif name.endswith("norm.weight"):
            tensors[name] = (1 + 0.3 * normal(*shape)).bfloat16().float()
        else:
            fan_in = 1 if name.endswith("embed_tokens.weight") else shape[-1]
            tensors[name] = (normal(*shape) / fan_in**0.5).bfloat16().float()
    return tensors


def with_mtp_copies(config: dict, tensors: dict) -> dict[str, torch.Tensor]:
    """Add the hub's duplicates of embedding and head under the MTP layer's names."""
    if not config.get("num_nextn_predict_layers"):
        return tensors
    prefix = f"model.layers.{config['num_hidden_layers']}."
    return tensors | {
        prefix + "embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        prefix + "shared_head.head.weight": tensors["lm_head.weight"].clone(),
    }


def is_fp8(name: str, tensor: torch.Tensor) -> bool:
    """Say whether the hub stores this tensor as FP8 blocks (spec 2.2)."""
    return (
        tensor.ndim == 2
        and "eh_proj" not in name
        and not name.endswith(NEVER_FP8[:4])
        and (NEVER_FP8[4] not in name)
    )


def stored_tensors(tensors: dict, storage: str, scale_dtype=torch.float32) -> dict:
    """Return the tensors as a shard holds them: `fp8` with block scales, or `bf16`."""
    stored = {}
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            stored[name] = tensor
        elif storage == "fp8" and is_fp8(name, tensor):
            weight, scale = quantize_blocks(tensor)
            if scale_dtype != torch.float32:  # requantise by the rounded scale
                scale = scale.log2().ceil().exp2().to(scale_dtype)
                wide = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
                wide = wide[: tensor.shape[0], : tensor.shape[1]]
                weight = (tensor / wide).to(torch.float8_e4m3fn)
            stored[name], stored[name + "_scale_inv"] = weight, scale
        else:
            stored[name] = tensor.bfloat16()
    return stored


def write_hub(
    folder: Path,
    config: dict,
    *,
    seed: int = 0,
    bias_mean: float = 2.0,
    storage: str = "fp8",
    scale_dtype=torch.float32,
    num_shards: int = 3,
) -> Path:
    """Write a random checkpoint in the hub's layout; every fifth scale lies in another shard."""
    tensors = random_tensors(config, seed, bias_mean)
    stored = stored_tensors(with_mtp_copies(config, tensors), storage, scale_dtype)
    return write_shards(folder, config, stored, storage, num_shards)


def write_shards(folder, config, stored, storage="fp8", num_shards=3) -> Path:
    """Spread stored tensors over shards, with an index and a config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = [{} for _ in range(num_shards)]
    weight_map, place = {}, 0
    for i, (name, tensor) in enumerate(stored.items()):
        if not name.endswith("_scale_inv"):
            place = i * num_shards // len(stored)
        stray = name.endswith("_scale_inv") and i % 5 == 0
        shard = (place + stray) % num_shards
        shards[shard][name] = tensor.contiguous()
        weight_map[name] = f"model-{shard + 1:05d}-of-{num_shards:06d}.safetensors"
    for shard, contents in enumerate(shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:06d}.safetensors"
        save_file(contents, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if storage == "fp8":
        config = config | {"quantization_config": FP8_CONFIG}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def write_tokenizer(folder: Path, num_tokens: int = 100) -> Path:
    """Write a tokenizer of whole words (`w0 w1 ...`), which mlx-lm's tools want to find."""
    words = {f"w{i}": i + 2 for i in range(num_tokens - 2)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, **words}, "unk_token": "w0"},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "w0",
    }
    (Path(folder) / "tokenizer.json").write_text(json.dumps(tokenizer))
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings))
    return Path(folder)
