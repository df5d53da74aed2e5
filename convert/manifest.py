"""The small files of a finished folder: config.json, index, conversion.json, and what is copied.

conversion.json holds no time, no host and no path, so that a resumed run writes the very bytes of
an uninterrupted one.
"""

import hashlib
import json
import shutil
from collections import defaultdict
from math import sqrt
from pathlib import Path

import mlx.core as mx

from convert.journal import Done
from convert.plan import Plan, role_rows
from convert.source import copied_files
from mlx_dsv3.checkpoint.format import FORMAT, INDEX, SIDECAR, module_path


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


def make_manifest(plan: Plan, done: dict[int, Done], files: dict[str, dict]) -> dict:
    """Return conversion.json; `digest` covers everything else in it."""
    manifest = {
        "format": FORMAT,
        "source": plan.identity.as_dict()
        | {"tensors": len(plan.source.tensors), "bytes": plan.source.nbytes},
        "recipe": plan.recipe.as_dict(),
        **importance_entry(plan),
        "layout": plan.layout,
        "plan": plan.digest,
        "versions": {"mlx": mx.__version__},
        "device": device_kind(),
        "roles": role_entries(plan, done),
        "files": files,
    }
    return manifest | {"digest": manifest_digest(manifest)}


def importance_entry(plan: Plan) -> dict:
    """Return what conversion.json says of the importance: nothing where there was none."""
    if plan.importance is None:
        return {}
    found = plan.importance
    return {"importance": {"file": found.path.name, "sha256": found.sha256}}


def manifest_digest(manifest: dict) -> str:
    """Return the sha256 over a manifest without its own `digest`."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


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


def file_entry(path: Path) -> dict:
    """Return a file's size and sha256, as `shasum -a 256` prints it."""
    with open(path, "rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def quantization_config(plan: Plan) -> dict | None:
    """Return config.json's `quantization`, or None: the default, then what differs, by path.

    The MTP module's paths are always listed: mlx-lm has no module of that name and ignores them.
    """
    default = plan.recipe.default
    if default is None:
        return None
    config = dict(default.as_config())
    for unit in plan.units:
        for target in unit.targets:
            if target.quantization and (unit.file == SIDECAR or target.quantization != default):
                config[module_path(target.path)] = target.quantization.as_config()
    return config


def role_entries(plan: Plan, done: dict[int, Done]) -> dict[str, dict]:
    """Return conversion.json's table: size, bits and relative RMS error of every role.

    Errors are summed in the order of the units, so that they do not depend on the order of work.
    With fitted levels the error of `extremes` stands beside; with an importance both follow
    weighed by it.
    """
    sums: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for unit in plan.units:
        for target, errors in zip(unit.targets, done[unit.index].errors, strict=True):
            if errors:
                total = sums[target.role][target.path]
                total[:] = map(sum, zip(total or [0.0] * len(errors), errors, strict=True))
    entries = {}
    for row in role_rows(plan):
        entries[row.role] = {
            "tensors": len(row.tensors),
            "weights": row.weights,
            "bytes": row.nbytes,
            "bits_per_weight": round(8 * row.nbytes / row.weights, 3),
            **_role_errors(sums.get(row.role)),
        }
    return entries


def _role_errors(tensors: dict[str, list[float]] | None) -> dict:
    if not tensors:
        return {}
    relative = {name: _relative(*sums[:2]) for name, sums in tensors.items()}
    worst = max(relative, key=relative.get)
    errors, squares, *more = map(sum, zip(*tensors.values(), strict=True))
    entry = {"relative_rms_error": _relative(errors, squares)}
    if more:
        entry["extremes_rms_error"] = _relative(more[0], squares)
    if more[1:]:
        entry["weighted_rms_error"] = _relative(more[1], more[2])
        entry["weighted_extremes_rms_error"] = _relative(more[3], more[2])
    return entry | {"worst": {"tensor": worst, "relative_rms_error": relative[worst]}}


def _relative(squared_errors: float, squares: float) -> float:
    """Return the relative error, rounded so that the text is stable."""
    return float(f"{sqrt(squared_errors / squares):.4e}") if squares else 0.0
