"""The small files of a finished folder: config.json, index, conversion.json, and what is copied.

conversion.json holds no time, no host and no path, so that a resumed run writes the very bytes of
an uninterrupted one.
"""

import hashlib
import json
import shutil
from pathlib import Path

import mlx.core as mx

from convert.journal import Done
from convert.plan import Plan, quantization_config
from convert.summary import role_record
from mlx_dsv3.checkpoint.format import FORMAT, INDEX, SIDECAR

# Code in the repository (tokenizers of Moonlight and Kimi) is copied and never run.
COPIED = (
    "tokenizer*",
    "*.tiktoken",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.jinja",
    "generation_config.json",
    "LICENSE*",
    "*.py",
)


def device_kind() -> str:
    """Return `cpu` or `gpu`: the same weights may be rounded to other codes there."""
    return "gpu" if mx.default_device().type == mx.gpu else "cpu"


def output_config(plan: Plan) -> dict:
    """Return the hub's config without its FP8 block and with our quantisation.

    Where the checkpoint has no MTP layer, the promise of one is taken back.
    """
    config = plan.source.args.fill(plan.source.config)
    config.pop("_name_or_path", None)
    config.pop("quantization_config", None)
    if quantization := quantization_config(plan):
        config["quantization"] = config["quantization_config"] = quantization
    if plan.source.args.has_mtp and not plan.with_mtp:
        config["num_nextn_predict_layers"] = 0
    return dict(sorted(config.items()))


def output_index(plan: Plan) -> dict:
    """Return the index of everything but the sidecar, which mlx-lm would refuse."""
    files = [file for file in plan.files.values() if file.name != SIDECAR]
    total = sum(part.nbytes for file in files for part in file.parts)
    weight_map = {part.name: file.name for file in files for part in file.parts}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def conversion_record(plan: Plan, done: dict[int, Done], files: dict[str, dict]) -> dict:
    """Return conversion.json; `digest` covers everything else in it."""
    record = {
        "format": FORMAT,
        "source": plan.identity.record()
        | {"tensors": len(plan.source.tensors), "bytes": plan.source.nbytes},
        "recipe": plan.recipe.as_dict(),
        "layout": plan.layout,
        "plan": plan.digest,
        "versions": {"mlx": mx.__version__},
        "device": device_kind(),
        "roles": role_record(plan, done),
        "files": files,
    }
    return record | {"digest": record_digest(record)}


def record_digest(record: dict) -> str:
    """Return the sha256 over a conversion record without its own `digest`."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def copied_files(folder: Path) -> list[Path]:
    """Return the source's tokenizer, template, licence and code files."""
    found = {path for pattern in COPIED for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def write_small_files(plan: Plan, folder: Path) -> list[str]:
    """Write config.json and index, copy the rest, into `folder`; return their names."""
    write_json(folder / "config.json", output_config(plan))
    write_json(folder / INDEX, output_index(plan))
    copies = copied_files(plan.source.folder)
    for path in copies:
        shutil.copyfile(path, folder / path.name)
    return ["config.json", INDEX, *(path.name for path in copies)]


def write_json(path: Path, value: dict) -> None:
    path.write_text(json_text(value), encoding="utf-8")


def json_text(value: dict) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def file_record(path: Path) -> dict:
    """Return a file's size and sha256, as `shasum -a 256` prints it."""
    with open(path, "rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
