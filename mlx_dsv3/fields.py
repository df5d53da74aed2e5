"""What each field of a config.json may hold: the implemented value, a type, a range.

Tables, and the checks that go by them. Which fields there are, and what they mean together, is
`config.py`'s. Every refusal names the field and its value.
"""

from mlx_dsv3.errors import UserError
from mlx_dsv3.json_files import brief

CONFIG_HINT = "copy config.json from the model's page on the hub"
# Fields that change the arithmetic, or would in a relative that calls itself `deepseek_v3`
# (DeepSeek-V3.2's indexer, Instella's gates), with the one value that is implemented. Absent and
# null mean that value. Everything else in a config.json leaves the arithmetic alone:
# `num_key_value_heads` and `head_dim` too, which latent attention does not read.
ASSUMED = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "partial_rotary_factor": 1,
    "use_sliding_window": False,
    "sliding_window": None,
    "index_topk": None,
    "index_n_heads": None,
    "index_head_dim": None,
    "gated_attention": False,
    "farskip": False,
}
# Least and most of every number: far beyond any model, and small enough to compute with. What
# config.json says is compared with the tensors before anything is made (`format.check_counts`).
RANGES = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**24),
    "moe_intermediate_size": (1, 2**20),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 4096),
    "kv_lora_rank": (1, 2**20),
    "qk_nope_head_dim": (1, 4096),
    "qk_rope_head_dim": (2, 4096),
    "v_head_dim": (1, 4096),
    "n_routed_experts": (1, 4096),
    "num_experts_per_tok": (1, 4096),
    "q_lora_rank": (1, 2**20),
    "n_shared_experts": (0, 64),
    "n_group": (1, 4096),
    "topk_group": (1, 4096),
    "first_k_dense_replace": (0, 2**20),
    "moe_layer_freq": (1, 2**20),
    "routed_scaling_factor": (1e-6, 10**6),
    "num_nextn_predict_layers": (0, 1),
    "rms_norm_eps": (1e-20, 1),
    "rope_theta": (1.001, 10**12),  # its logarithm divides
    "max_position_embeddings": (1, 2**31 - 1),
    "factor": (1, 10**6),
    "original_max_position_embeddings": (1, 2**31 - 1),
    "beta_fast": (1e-3, 10**6),
    "beta_slow": (1e-3, 10**6),
    "mscale": (0, 1000),
    "mscale_all_dim": (0, 1000),
    "attention_factor": (1e-3, 1000),
}
YARN = dict.fromkeys(("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"), float)
YARN |= {"original_max_position_embeddings": int, "attention_factor": float, "truncate": bool}
# What absent or null keys mean to transformers and to the model's own code.
YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
ROPE_KEYS = {*YARN, "type", "rope_type", "rope_theta", "partial_rotary_factor"}


def refuse(name: str, value, why: str) -> None:
    """Raise `UserError` for a field."""
    raise UserError(f"config.json has `{name}` = `{brief(value)}`; {why}", CONFIG_HINT)


def check_assumed(name: str, value, assumed) -> None:
    """Refuse another value than the implemented one; null is that one too."""
    if value not in (None, assumed):
        only = "it is not" if assumed is None else f"`{assumed}` is the only value"
        refuse(name, value, f"{only} implemented")


def check_ids(name: str, value, size: int) -> None:
    """Refuse what is no token, nor a list of those that end: MLX would read foreign memory."""
    for token in value if isinstance(value, list) and name == "eos_token_id" else [value]:
        if token is not None and not (type(token) is int and 0 <= token < size):
            refuse(name, value, "a token of the vocabulary is needed")


def typed_value(name: str, wanted: type, value):
    """Return a value as its field needs it; refuse what would fail far from here, or count as true.

    An integer is a float too; a float is not an integer, not even 4.0, and neither is a bool.
    """
    if wanted in (str, dict | None) or (value is None and wanted == int | None):
        return value
    if wanted is bool:
        return value if type(value) is bool else refuse(name, value, "true or false is needed")
    is_number = type(value) is int or (type(value) is float and wanted is float)
    if not is_number or value != value:  # NaN
        refuse(name, value, f"{'a number' if wanted is float else 'an integer'} is needed")
    least, most = RANGES[name.rpartition(".")[2]]
    if not least <= value <= most:
        refuse(name, value, f"it takes {least:,} to {most:,}")
    return float(value) if wanted is float else value
