"""The hub's config.json: the fields that matter, under the hub's own names, checked.

`ModelArgs.from_dict` accepts the forms that occur in the wild (`rope_scaling` or the
`rope_parameters` of transformers 5, `type` or `rope_type`, fields that newer writers leave out)
and refuses in words what this package would compute wrongly. Standard library only: nothing here
knows about arrays or tensors.
"""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mlx_dsv3.errors import UserError
from mlx_dsv3.fields import (
    ASSUMED,
    CONFIG_HINT,
    ROPE_KEYS,
    YARN,
    YARN_DEFAULTS,
    check_assumed,
    check_ids,
    refuse,
    typed_value,
)
from mlx_dsv3.json_files import brief, read_json

MODEL_TYPES = ("deepseek_v3", "kimi_k2")


@dataclass
class ModelArgs:
    """Model dimensions and constants; every field has its name in the hub's config.json.

    The defaults are those of the model's own configuration_deepseek.py (mlx-lm's differ).
    """

    model_type: str
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
    num_nextn_predict_layers: int = 0  # theirs is 1, of which their model reads nothing
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    rope_interleave: bool = True
    max_position_embeddings: int = 4096

    @classmethod
    def from_dict(cls, config: dict) -> "ModelArgs":
        """Take the dictionary of a config.json and check it.

        Raises `UserError` for a missing field or a model that this package does not run.
        """
        if config.get("model_type") not in MODEL_TYPES:
            raise UserError(
                f"config.json has model_type `{brief(config.get('model_type'))}`; "
                "mlx_dsv3 runs `deepseek_v3` and `kimi_k2`",
                "`mlx_lm.chat --model FOLDER` runs other model types",
            )
        for name, value in ASSUMED.items():
            check_assumed(name, config.get(name), value)
        config = config | _read_rope(config)
        if config.get("num_nextn_predict_layers") is None:
            config["num_nextn_predict_layers"] = config.get("num_mtp_layers") or 0
        if config.get("n_group", 0) is None:  # no groups
            config |= {"n_group": 1, "topk_group": 1}
        names = [field.name for field in fields(cls)]
        required = names[: names.index("q_lora_rank")]
        missing = [name for name in required if config.get(name) is None]
        if missing:
            raise UserError(f"config.json lacks `{missing[0]}`", CONFIG_HINT)
        args = cls(
            **{
                field.name: typed_value(field.name, field.type, config[field.name])
                for field in fields(cls)
                if field.name in config
            }
        )
        args.check()
        for name in ("bos_token_id", "eos_token_id"):
            check_ids(name, config.get(name), args.vocab_size)
        return args

    def fill(self, config: dict) -> dict:
        """Return the config these were read from, with every field said in the hub's spelling.

        transformers refuses an integer in a float field; mlx-lm has defaults of its own and does
        not read `rope_parameters`.
        """
        renamed = ("rope_parameters", "num_mtp_layers")
        return {k: v for k, v in config.items() if k not in renamed} | asdict(self)

    @property
    def is_yarn(self) -> bool:
        return bool(self.rope_scaling) and self.rope_scaling["type"] == "yarn"

    def yarn_scale(self, name: str) -> float:
        """Return yarn's M(a) = 0.1 a ln(factor) + 1 for the a of a name; 1 without yarn."""
        factor = self.rope_scaling["factor"] if self.is_yarn else 1
        return 1.0 if factor <= 1 else 0.1 * self.rope_scaling[name] * math.log(factor) + 1.0

    @property
    def has_mtp(self) -> bool:
        return self.num_nextn_predict_layers > 0

    def is_moe_layer(self, layer: int) -> bool:
        """Say whether decoder layer `layer` has routed experts (the MTP layer always has)."""
        if layer >= self.num_hidden_layers:
            return True
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def check(self) -> None:
        """Refuse, with the field's name and value, what would be computed wrongly."""
        if self.n_routed_experts % self.n_group:
            refuse("n_group", self.n_group, f"does not divide {self.n_routed_experts} experts")
        if not 1 <= self.topk_group <= self.n_group:
            refuse("topk_group", self.topk_group, f"n_group is {self.n_group}")
        selectable = self.topk_group * self.n_routed_experts // self.n_group
        if self.num_experts_per_tok > selectable:
            refuse("num_experts_per_tok", self.num_experts_per_tok, f"groups keep {selectable}")
        if self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            refuse("n_group", self.n_group, "a group needs two experts for its score")
        if self.qk_rope_head_dim % 2:
            refuse("qk_rope_head_dim", self.qk_rope_head_dim, "rope turns pairs")


def _read_rope(config: dict) -> dict:
    """Return `rope_theta` and `rope_scaling` (with `type`, or None) of either spelling.

    `rope_scaling` goes before `rope_parameters`, and a `rope_theta` within before one outside, as
    in transformers.
    """
    where = "rope_scaling" if config.get("rope_scaling") not in (None, {}) else "rope_parameters"
    given = {} if config.get(where) is None else config[where]
    if not isinstance(given, dict):
        refuse(where, given, "an object is needed")
    kind = given.get("rope_type") or given.get("type")
    if kind is None and "factor" in given:
        raise UserError(f"config.json lacks `{where}.type`", CONFIG_HINT)
    if kind not in (None, "default", "yarn"):
        refuse(f"{where}.type", kind, "`yarn` is the only value implemented")
    for key, value in given.items():
        if key not in ROPE_KEYS:
            refuse(f"{where}.{key}", value, "it is not implemented")
    partial = given.get("partial_rotary_factor")
    check_assumed(f"{where}.partial_rotary_factor", partial, ASSUMED["partial_rotary_factor"])
    theta = given.get("rope_theta")
    if theta is None:
        theta = config.get("rope_theta", ModelArgs.rope_theta)
    if kind != "yarn":
        return {"rope_theta": theta, "rope_scaling": None}
    # To transformers a null `truncate` is false, other nulls are absent keys.
    said = {k: v for k, v in given.items() if k in YARN and (v is not None or k == "truncate")}
    scaling = YARN_DEFAULTS | said
    for key in ("factor", "original_max_position_embeddings"):
        if key not in scaling:
            raise UserError(f"config.json lacks `{where}.{key}`", CONFIG_HINT)
    typed = {key: typed_value(f"{where}.{key}", YARN[key], value) for key, value in scaling.items()}
    return {"rope_theta": theta, "rope_scaling": {"type": "yarn"} | typed}


def read_config(folder: Path) -> dict:
    """Return the config.json of a model folder; raise `UserError` when there is none."""
    if not folder.is_dir():
        raise UserError(f"`{folder}` is not a folder", "give a folder that holds config.json")
    if not (folder / "config.json").exists():
        inner = [path.parent for path in folder.glob("*/config.json")]
        hint = f"`{min(inner)}` has one" if inner else "give the folder of a model"
        raise UserError(f"`{folder}` has no config.json", hint)
    config = read_json(folder / "config.json")
    for name in ("quantization", "quantization_config"):
        if not isinstance(config.get(name), dict | None):
            refuse(name, config[name], "an object is needed")
    _check_quantization(config.get("quantization"), "quantization")
    if not isinstance(config.get("tokenizer_class"), str | None):
        refuse("tokenizer_class", config["tokenizer_class"], "a name is needed")
    return config


def _check_quantization(entry: dict | None, where: str) -> None:
    """Refuse an MLX folder's `quantization`, or that of a module in it, of another shape.

    The weights' own shapes decide how they are read; other programs go by these values.
    """
    if entry is None:
        return
    for name in ("bits", "group_size"):
        if type(entry.get(name)) is not int or not 1 <= entry[name] <= 1024:
            refuse(f"{where}.{name}", entry.get(name), "it takes 1 to 1,024")
    if not isinstance(entry.get("mode", "affine"), str):
        refuse(f"{where}.mode", entry["mode"], "a name is needed")
    for name, value in entry.items():
        if isinstance(value, dict):
            _check_quantization(value, f"{where}.{name}")


def read_generation(folder: Path) -> dict:
    """Return generation_config.json, unchecked; empty where the folder has none."""
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}


def end_tokens(folder: Path, config: dict, vocab_size: int) -> list[int]:
    """Return the ids that end a reply by generation_config.json, else by config.json."""
    sources = {"generation_config.json": read_generation(folder), "config.json": config}
    for name, source in sources.items():
        if (value := source.get("eos_token_id")) is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise UserError(
                f"`eos_token_id` in `{folder / name}` is `{brief(value)}`; it takes token ids "
                f"below {vocab_size}",
                f"fetch {name} again",
            )
        return ids
    return []
