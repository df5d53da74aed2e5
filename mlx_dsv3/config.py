"""The hub's config.json: the fields that matter, under the hub's own names, checked.

`ModelArgs.from_dict` accepts the forms that occur in the wild (`rope_scaling` or the
`rope_parameters` of transformers 5, `type` or `rope_type`, fields that newer writers leave out)
and `check` refuses in words what this package would compute wrongly. Standard library only:
nothing here knows about arrays or tensors.
"""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

from mlx_dsv3.errors import UserError

MODEL_TYPES = ("deepseek_v3", "kimi_k2")


@dataclass
class ModelArgs:
    """Model dimensions and constants; every field bears its name in the hub's config.json."""

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
    q_lora_rank: int | None = None
    n_shared_experts: int | None = None
    n_group: int = 1
    topk_group: int = 1
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    num_nextn_predict_layers: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    max_position_embeddings: int = 163840
    hidden_act: str = "silu"
    attention_bias: bool = False
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, config: dict) -> "ModelArgs":
        """Take the dictionary of a config.json and check it.

        Raises `UserError` for a missing field or a model that this package does not run.
        """
        config = dict(config)
        if config.get("model_type") not in MODEL_TYPES:
            raise UserError(
                f"config.json has model_type `{config.get('model_type')}`; "
                "mlx_dsv3 runs `deepseek_v3` and `kimi_k2`",
                "`mlx_lm.chat --model FOLDER` runs other model types",
            )
        _translate_rope(config)
        if config.get("num_nextn_predict_layers") is None:
            config["num_nextn_predict_layers"] = config.get("num_mtp_layers") or 0
        names = [field.name for field in fields(cls)]
        required = [field.name for field in fields(cls)][: names.index("q_lora_rank")]
        missing = [name for name in required if config.get(name) is None]
        if missing:
            raise UserError(f"config.json lacks `{missing[0]}`", _HUB_CONFIG_HINT)
        given = {name: config[name] for name in names if config.get(name) is not None}
        for field in fields(cls):
            _check_type(field.name, field.type, given.get(field.name))
        args = cls(**given)
        args.check()
        return args

    @property
    def is_yarn(self) -> bool:
        return bool(self.rope_scaling) and self.rope_scaling["type"] == "yarn"

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
        expected = {
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
        }
        for name, value in expected.items():
            if getattr(self, name) != value:
                _refuse(name, getattr(self, name), f"`{value}` is the only value implemented")
        if self.n_routed_experts % self.n_group:
            _refuse("n_group", self.n_group, f"does not divide {self.n_routed_experts} experts")
        if not 1 <= self.topk_group <= self.n_group:
            _refuse("topk_group", self.topk_group, f"n_group is {self.n_group}")
        selectable = self.topk_group * self.n_routed_experts // self.n_group
        if self.num_experts_per_tok > selectable:
            _refuse("num_experts_per_tok", self.num_experts_per_tok, f"groups keep {selectable}")
        if self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            _refuse("n_group", self.n_group, "a group needs two experts for its score")
        if self.num_nextn_predict_layers > 1:
            _refuse("num_nextn_predict_layers", self.num_nextn_predict_layers, "one is implemented")
        if self.rope_scaling and self.rope_scaling["type"] != "yarn":
            _refuse("rope_scaling.type", self.rope_scaling["type"], "only `yarn` is implemented")


def _check_type(name: str, wanted: type, value) -> None:
    """Refuse a word where a number must be: it would fail far from here, or count as true."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and wanted in (int, float, int | None) and not is_number:
        _refuse(name, value, "a number is needed")


_HUB_CONFIG_HINT = "copy config.json from the model's page on the hub"


def _refuse(name: str, value, why: str) -> None:
    raise UserError(f"config.json has `{name}` = `{value}`; {why}", _HUB_CONFIG_HINT)


def _translate_rope(config: dict) -> None:
    """Bring both spellings of the rope settings to `rope_theta` and `rope_scaling.type`."""
    scaling = config.get("rope_scaling")
    if parameters := config.pop("rope_parameters", None):
        config["rope_theta"] = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
        scaling = parameters
    if scaling:
        scaling = dict(scaling)
        kind = scaling.pop("rope_type", None) or scaling.get("type")
        if kind is None and "factor" in scaling:
            raise UserError("config.json lacks `rope_scaling.type`", _HUB_CONFIG_HINT)
        scaling["type"] = kind or "default"
    if not scaling or scaling["type"] == "default":
        config["rope_scaling"] = None
        return
    needed = ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings")
    defaults = {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.0}
    scaling = defaults | scaling
    if scaling["type"] == "yarn":
        missing = [name for name in needed if scaling.get(name) is None]
        if missing:
            raise UserError(f"config.json lacks `rope_scaling.{missing[0]}`", _HUB_CONFIG_HINT)
    config["rope_scaling"] = scaling


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return M(mscale) = 0.1 * mscale * ln(factor) + 1, or 1 where factor <= 1 (yarn)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def read_json(path: Path) -> dict:
    """Read a JSON object; raise `UserError` with the file's name when it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` is not JSON: {error}", "fetch the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"`{path}` holds a {type(value).__name__}, not an object")
    return value


def read_config(folder: Path) -> dict:
    """Return the config.json of a model folder; raise `UserError` when there is none."""
    if not folder.is_dir():
        raise UserError(f"`{folder}` is no folder", "give a folder that holds config.json")
    if not (folder / "config.json").is_file():
        raise UserError(f"`{folder}` has no config.json", "give the folder of a model")
    return read_json(folder / "config.json")
