"""`convert mtp`: give the MTP layer back to a folder that somebody else converted.

Other converters drop layer `num_hidden_layers`. The sidecar written here is the one of a whole
conversion, byte for byte; config.json gains its entries, and nothing else in the folder changes.
"""

from pathlib import Path

from convert.inventory import holds_mtp
from convert.manifest import quantization_config, write_json
from convert.plan import Plan
from convert.planner import build
from convert.recipe import RECIPES
from convert.source import Source
from mlx_dsv3.checkpoint.format import MANIFEST, PARTIAL, SIDECAR
from mlx_dsv3.checkpoint.unfinished import JOURNAL
from mlx_dsv3.config import ModelArgs, read_config
from mlx_dsv3.errors import UserError

SAME_MODEL = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "q_lora_rank",
    "moe_intermediate_size",
    "n_routed_experts",
)


def plan_sidecar(source: Source, folder: Path) -> Plan:
    """Plan the sidecar for `folder`: 8 bits, or BF16 where the folder is not quantised.

    Raises `UserError` for a folder that is not one of this model in MLX, or has the layer already.
    """
    if not holds_mtp(source):
        raise UserError("the source holds no MTP layer", "take the original checkpoint")
    config = read_config(folder)
    receiver = ModelArgs.from_dict(config)
    for name in SAME_MODEL:
        ours, theirs = getattr(source.args, name), getattr(receiver, name)
        if ours != theirs:
            raise UserError(
                f"`{folder}` is another model: its `{name}` is {theirs}, the source's is {ours}",
                "give the checkpoint that the folder was converted from",
            )
    is_begun = (folder / PARTIAL / JOURNAL).exists()
    if not is_begun and ((folder / SIDECAR).exists() or (folder / MANIFEST).exists()):
        raise UserError(
            f"`{folder}` comes from this converter or has `{SIDECAR}` already",
            "with the file nothing is lacking; `python -m convert run SOURCE DEST` converts with "
            "the MTP layer",
        )
    if "quantization" not in config and config.get("quantization_config"):
        raise UserError(
            f"`{folder}` is a checkpoint, not an MLX folder", "give the converted folder as DEST"
        )
    return build(source, RECIPES["q8" if "quantization" in config else "bf16"], "mtp")


def write_config(plan: Plan, folder: Path) -> list[str]:
    """Write the folder's config.json, with the sidecar's modules added, into `.partial`."""
    config = read_config(folder.parent)
    config["num_nextn_predict_layers"] = 1
    if "quantization" in config:
        added = quantization_config(plan)
        paths = {path: entry for path, entry in added.items() if isinstance(entry, dict)}
        config["quantization"] = config["quantization"] | paths
        config["quantization_config"] = config["quantization"]
    write_json(folder / "config.json", config)
    return ["config.json"]
