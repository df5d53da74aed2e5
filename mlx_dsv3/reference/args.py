"""The hub's config.json: the fields that change the arithmetic, under their hub names, checked.

What `model.py` would compute wrongly, or not end to compute, is refused here with the field's name
and value, before anything is allocated. `mlx_dsv3/config.py` reads the same file for MLX and shares
no line with this one: a mistake in one reading shows as a difference between the two.
"""

from dataclasses import MISSING, dataclass, fields

from mlx_dsv3.errors import UserError
from mlx_dsv3.json_files import brief

# What `model.py` computes without asking; a config that says otherwise is refused. Null is absent.
FIXED = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "partial_rotary_factor": 1,
    "use_sliding_window": False,
    "sliding_window": None,
    "index_topk": None,  # the indexer of DeepSeek-V3.2
    "index_n_heads": None,
    "index_head_dim": None,
    "gated_attention": False,  # Instella
    "farskip": False,
}
# The family's model types; a config that was cut down to its dimensions has none.
MODEL_TYPES = ("deepseek_v3", "kimi_k2", None)
# Least and most of each number. Widths and counts are far above any model's, and low enough that
# the sizes of a layer's tensors are numbers that torch can hold.
WIDTH, COUNT = (1, 1 << 20), (1, 1 << 12)
WHOLE = {
    "vocab_size": WIDTH,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "moe_intermediate_size": WIDTH,
    "q_lora_rank": WIDTH,
    "kv_lora_rank": WIDTH,
    "qk_nope_head_dim": WIDTH,
    "qk_rope_head_dim": WIDTH,
    "v_head_dim": WIDTH,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "n_routed_experts": COUNT,
    "num_experts_per_tok": COUNT,
    "n_shared_experts": (0, 1 << 12),
    "n_group": COUNT,
    "topk_group": COUNT,
    "first_k_dense_replace": (0, 1 << 12),
    "moe_layer_freq": COUNT,
    "num_nextn_predict_layers": (0, 1),
}
NUMBERS = {"routed_scaling_factor": (1e-6, 1e6), "rms_norm_eps": (0, 1), "rope_theta": (2, 1e12)}
SWITCHES = ("norm_topk_prob", "rope_interleave")
MAY_BE_NULL = ("q_lora_rank", "n_shared_experts")
YARN = {
    "factor": (1e-6, 1e9),
    "original_max_position_embeddings": (1, 1e12),
    "beta_fast": (1e-6, 1e9),
    "beta_slow": (1e-6, 1e9),
    "mscale": (0, 1e6),
    "mscale_all_dim": (0, 1e6),
    "attention_factor": (1e-6, 1e6),
}
ROPE_SETTINGS = {*YARN, "type", "rope_type", "rope_theta", "partial_rotary_factor", "truncate"}
HINT = "copy config.json from the model's page on the hub"


@dataclass
class Args:
    """The fields of the hub's config.json that change the arithmetic, under their hub names.

    Defaults are those of DeepSeek's configuration_deepseek.py; its model has no MTP module.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    q_lora_rank: int | None = 1536
    n_shared_experts: int | None = 1
    n_group: int = 8
    topk_group: int = 4
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    rope_interleave: bool = True
    num_nextn_predict_layers: int = 0

    @classmethod
    def from_dict(cls, config: dict) -> "Args":
        """Take a hub config, in its own form or the one that transformers 5 writes.

        Raises `UserError` for a setting that would change the arithmetic and is not known here, and
        for a value that no model has.
        """
        where = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        rope = config.get(where)
        if not isinstance(rope, dict | None):
            refuse(where, rope, "an object is needed")
        refuse_unknown(config, where, rope or {})
        config = config | {"rope_scaling": rope}
        theta = (rope or {}).get("rope_theta")
        config["rope_theta"] = config.get("rope_theta") if theta is None else theta
        if config["rope_theta"] is None:
            config["rope_theta"] = cls.rope_theta
        if config.get("n_group", 1) is None:
            config["n_group"] = config["topk_group"] = 1
        if config.get("num_nextn_predict_layers") is None:
            config["num_nextn_predict_layers"] = config.get("num_mtp_layers") or 0
        for field in fields(cls):
            if field.default is MISSING and config.get(field.name) is None:
                raise UserError(f"config.json lacks `{field.name}`", HINT)
        args = cls(**{f.name: config[f.name] for f in fields(cls) if f.name in config})
        check_values(args)
        check_rope(where, rope or {})
        check_router(args)
        return args

    @property
    def yarn(self) -> dict | None:
        """The rope scaling where it is yarn, with what its absent keys mean, else None."""
        scaling = self.rope_scaling or {}
        if (scaling.get("rope_type") or scaling.get("type")) != "yarn":
            return None
        given = {key: value for key, value in scaling.items() if value is not None}
        return {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.0} | given


def refuse(name: str, value, why: str) -> None:
    """Raise `UserError` for the value of a field."""
    raise UserError(f"config.json has `{name}` = `{brief(value)}`; {why}", HINT)


def refuse_unknown(config: dict, where: str, rope: dict) -> None:
    """Raise `UserError` for a setting whose arithmetic is not written down in `model.py`."""
    kind = rope.get("rope_type") or rope.get("type")
    refused = {name: config[name] for name in FIXED if config.get(name) not in (None, FIXED[name])}
    refused |= {f"{where}.{key}": rope[key] for key in rope if key not in ROPE_SETTINGS}
    if config.get("model_type") not in MODEL_TYPES:
        refused["model_type"] = config["model_type"]
    if kind not in (None, "default", "yarn"):
        refused[f"{where}.type"] = kind
    if rope.get("partial_rotary_factor") not in (None, 1):
        refused[f"{where}.partial_rotary_factor"] = rope["partial_rotary_factor"]
    for name, value in refused.items():
        refuse(name, value, "the reference does not know it")


def check_whole(name: str, value, least: int, most: int) -> None:
    """Refuse what is not a whole number of this range; true is none, nor is 1.0."""
    if type(value) is not int or not least <= value <= most:
        refuse(name, value, f"a whole number from {least} to {most} is needed")


def check_number(name: str, value, least: float, most: float) -> None:
    """Refuse what is not a number of this range, NaN included."""
    if type(value) not in (int, float) or not least <= value <= most:
        refuse(name, value, f"a number from {least:g} to {most:g} is needed")


def check_values(args: Args) -> None:
    """Refuse a field of another type than its own, or outside its range."""
    for name, bounds in WHOLE.items():
        if getattr(args, name) is not None or name not in MAY_BE_NULL:
            check_whole(name, getattr(args, name), *bounds)
    for name, bounds in NUMBERS.items():
        check_number(name, getattr(args, name), *bounds)
    for name in SWITCHES:
        if type(getattr(args, name)) is not bool:
            refuse(name, getattr(args, name), "true or false is needed")
    if args.qk_rope_head_dim % 2:
        refuse("qk_rope_head_dim", args.qk_rope_head_dim, "rope turns pairs: it must be even")


def check_rope(where: str, rope: dict) -> None:
    """Refuse a yarn that lacks what has no default, or holds what is no number."""
    kind = rope.get("rope_type") or rope.get("type")
    needed = ("factor", "original_max_position_embeddings") if kind == "yarn" else ()
    if kind is None and rope.get("factor") is not None:
        raise UserError(f"config.json lacks `{where}.type`", HINT)
    for key in needed:
        if rope.get(key) is None:
            raise UserError(f"config.json lacks `{where}.{key}`", HINT)
    for key in YARN:
        if rope.get(key) is not None:
            check_number(f"{where}.{key}", rope[key], *YARN[key])
    if rope.get("truncate") not in (None, True, False):
        refuse(f"{where}.truncate", rope["truncate"], "true or false is needed")


def check_router(args: Args) -> None:
    """Refuse groups and choices that the experts do not allow."""
    size, left = divmod(args.n_routed_experts, args.n_group)
    if left:
        refuse("n_group", args.n_group, f"it does not divide {args.n_routed_experts} experts")
    if args.n_group > 1 and size < 2:
        refuse("n_group", args.n_group, "a group needs two experts for its score")
    if args.topk_group > args.n_group:
        refuse("topk_group", args.topk_group, f"n_group is {args.n_group}")
    if args.num_experts_per_tok > args.topk_group * size:
        why = f"the groups that are kept have {args.topk_group * size} experts"
        refuse("num_experts_per_tok", args.num_experts_per_tok, why)


def block_size(config: dict) -> int:
    """Return the rows and columns of an FP8 block; refuse how else a checkpoint is quantised."""
    if "quantization" in config:
        raise UserError(
            "the source is an MLX folder (config.json has `quantization`)",
            "give the original checkpoint: FP8 or BF16",
        )
    settings = config.get("quantization_config")
    if settings is None:
        return 128
    if not isinstance(settings, dict):
        refuse("quantization_config", settings, "an object is needed")
    if settings.get("quant_method") != "fp8" or settings.get("fmt", "e4m3") != "e4m3":
        method = settings.get("quant_method")
        refuse("quant_method", method, "the reference knows `fp8` (e4m3 in blocks) or none")
    block = settings.get("weight_block_size", [128, 128])
    if not isinstance(block, list) or len(block) != 2 or block[0] != block[1]:
        refuse("weight_block_size", block, "two equal sizes are needed")
    check_whole("weight_block_size", block[0], *WIDTH)
    return block[0]


def check_tokens(config: dict) -> None:
    """Refuse ids of BOS and EOS, and a longest text, that are none."""
    vocabulary, (bos, eos) = config["vocab_size"], map(config.get, ("bos_token_id", "eos_token_id"))
    for name, values in ("bos_token_id", bos), ("eos_token_id", eos):
        for value in values if isinstance(values, list) and name[0] == "e" else [values]:
            if value is not None:
                check_whole(name, value, 0, vocabulary - 1)
    longest = config.get("max_position_embeddings")
    if longest is not None:
        check_whole("max_position_embeddings", longest, 1, 1 << 40)
