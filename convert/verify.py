"""Read a finished folder back and say what is wrong with it.

Four questions: are these the files that were written, no more and no fewer (conversion.json lists
them); are the bytes those that were written (sha256 of every file); are they sensible (headers,
index, finite values); and do they follow from the original (`--source`: units derived again and
compared). Findings are sentences; none means that the folder is good.

What no program reads as a part of a model may be added: README.md, a licence, .gitattributes, what
a file manager or a download leaves. In a folder that `convert mtp` has completed, conversion.json
speaks of config.json and the sidecar alone: of the other files nobody noted what they should be,
and they are looked at for sense.
"""

import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from math import ceil
from pathlib import Path

import mlx.core as mx

from convert import recipe as recipes
from convert.dequantize import all_finite
from convert.manifest import device_kind, file_entry, json_text, manifest_digest
from convert.plan import Plan, Target, Unit
from convert.planner import build
from convert.quantize import Derived
from convert.source import Source, read_bytes
from convert.transform import derive, read_unit
from convert.writer import read_ranges
from mlx_dsv3.checkpoint.folder import SMALL_FILES
from mlx_dsv3.checkpoint.format import (
    INDEX,
    MANIFEST,
    PARTIAL,
    SIDECAR,
    WEIGHTS,
    Quantization,
    read_index,
    read_manifest,
)
from mlx_dsv3.checkpoint.headers import TensorInfo, read_header
from mlx_dsv3.checkpoint.importance import Importance
from mlx_dsv3.checkpoint.unfinished import how_to_finish
from mlx_dsv3.errors import UserError
from mlx_dsv3.json_files import brief

# Besides a model's small files: weights, and the folder in which tokenizers look for templates.
WEIGHT_FILES = ("*.safetensors", "additional_chat_templates")
CHUNK_BYTES = 64 << 20
SAMPLE_PER_ROLE = 4
# Of 8 bits 1 group in 1,400 to 5,000 when sums were taken in another order, of 2 to 4 bits none.
MOST_OTHER_GROUPS = 1 / 500


def open_manifest(folder: Path) -> dict:
    """Return conversion.json of a finished folder; raise `UserError` where there is none."""
    if not folder.is_dir():
        raise UserError(f"`{folder}` is not a folder", "give a folder that `convert run` wrote")
    if (folder / PARTIAL).exists():
        hint = f"`{how_to_finish(folder, str(folder))}` finishes it"
        raise UserError(f"`{folder}` is still in conversion", hint)
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"`{folder}` has no {MANIFEST}", "only folders of `convert run` can be verified"
        )
    return read_manifest(folder)


def check_files(folder: Path, manifest: dict, jobs: int) -> Iterator[str]:
    """Yield a sentence for every file that is not what conversion.json says."""
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    if manifest.get("digest") != manifest_digest(manifest) or text != json_text(manifest):
        yield f"`{MANIFEST}` does not match its own digest"
        return
    yield from check_list(folder, manifest)
    files = manifest["files"]
    present = [name for name in files if (folder / name).is_file()]
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(lambda name: file_entry(folder / name), present)
        for name, entry in zip(present, found, strict=True):
            if entry["bytes"] != files[name]["bytes"]:
                yield f"`{name}` has {entry['bytes']:,} bytes, not {files[name]['bytes']:,}"
            elif entry["sha256"] != files[name]["sha256"]:
                yield f"`{name}` was changed: its sha256 is not that of {MANIFEST}"


def check_list(folder: Path, manifest: dict) -> Iterator[str]:
    """Yield a sentence for every file that conversion.json lists in vain or does not list."""
    files, is_mtp = manifest["files"], manifest["layout"] == "mtp"
    for name in files:
        if not (folder / name).is_file():
            is_there = os.path.lexists(folder / name)
            yield f"`{name}` is {'not a file' if is_there else 'missing'}"
    needed = {"config.json", SIDECAR if is_mtp else INDEX} - set(files)
    yield from (f"`{MANIFEST}` does not list `{name}`" for name in sorted(needed))
    if not is_mtp:
        found = {path.name for path in folder.iterdir()} - {*files, *needed, MANIFEST}
        added = [name for name in sorted(found) if belongs_to_a_model(name)]
        yield from (f"`{name}` was added: {MANIFEST} does not list it" for name in added)


def belongs_to_a_model(name: str) -> bool:
    """Say whether a program may read a file of this name; some disks do not tell `A` from `a`."""
    words = {*SMALL_FILES, *WEIGHT_FILES} - {"LICENSE*"}
    return any(fnmatch(name.lower(), word) for word in words)


def check_values(folder: Path, manifest: dict, jobs: int) -> Iterator[str]:
    """Yield a sentence for every tensor that the index misses or that is not finite."""
    weights = {path.name: None for path in sorted(folder.glob(WEIGHTS))}
    indexed = read_index(folder) if (folder / INDEX).is_file() else weights
    yield from (f"`{INDEX}` does not name `{name}`" for name in weights if name not in indexed)
    listed = set(indexed) if manifest["layout"] == "mtp" else set(manifest["files"])
    with ThreadPoolExecutor(jobs) as pool:
        for shard in [*indexed, *([SIDECAR] if (folder / SIDECAR).is_file() else [])]:
            if shard not in listed and shard != SIDECAR:
                yield f"`{INDEX}` names `{shard}`, which {MANIFEST} does not list"
            try:
                header = read_header(folder / shard)
            except UserError as error:
                yield error.message
                continue
            if indexed.get(shard) and set(header) != set(indexed[shard]):
                yield f"`{shard}` and `{INDEX}` name different tensors"
            finite = pool.map(is_finite, header.values())
            for name, good in zip(header, finite, strict=True):
                if not good:
                    yield f"`{name}` in `{shard}` has values that are not finite"


def is_finite(tensor: TensorInfo) -> bool:
    """Say whether a BF16 or F32 tensor holds neither NaN nor infinity; read in chunks."""
    if tensor.dtype not in ("BF16", "F32"):
        return True
    for start in range(0, tensor.nbytes, CHUNK_BYTES):
        count = min(CHUNK_BYTES, tensor.nbytes - start)
        if not all_finite(tensor.dtype, read_bytes(tensor.path, tensor.offset + start, count)):
            return False
    return True


def plan_again(manifest: dict, source: Source, importance: Importance | None = None) -> Plan:
    """Plan the conversion of a manifest again; refuse another source, or another importance."""
    check_importance(manifest, importance)
    recipe = recipes.from_dict(manifest["recipe"], f"`{MANIFEST}`")
    plan = build(source, recipe, manifest["layout"], importance)
    noted = manifest["source"]
    if plan.digest != manifest["plan"] or plan.identity.is_that_of(noted) is False:
        where = "the folder that was converted"
        if noted.get("id"):
            where = f"`--source {noted['id']} --revision {noted.get('revision')}`"
        raise UserError(f"the source is not the one that {MANIFEST} was made from", f"give {where}")
    return plan


def check_importance(manifest: dict, importance: Importance | None) -> None:
    """Refuse a file that is not the one of the conversion; its name may be another."""
    noted = manifest.get("importance") or {}
    if noted.get("sha256") == (importance and importance.sha256):
        return
    if not noted:
        raise UserError(f"{MANIFEST} names no importance", "repeat it without `--importance`")
    name = brief(noted["file"])
    what = f"`{importance.path}` is another file" if importance else "without it nothing follows"
    raise UserError(
        f"the folder was converted with the importance `{name}`; {what}",
        "`--importance FILE` gives that file",
    )


def check_headers(folder: Path, plan: Plan) -> Iterator[str]:
    """Yield a sentence for every file that is not laid out as this plan lays it out."""
    for name, file in plan.files.items():
        is_whole = (folder / name).is_file() and (folder / name).stat().st_size == file.nbytes
        if not is_whole or read_bytes(folder / name, 0, len(file.header)) != file.header:
            yield f"`{name}` does not hold the tensors that follow from the source"


def check_against_source(
    folder: Path, manifest: dict, plan: Plan, full: bool
) -> Iterator[tuple[Unit, str | None]]:
    """Derive a sample of units again, or all; yield each with a sentence where it differs.

    On the kind of device that the folder was made on, the bits must be the same. On another one a
    code may differ by one step, because CPU and GPU round ties differently. With fitted levels a
    few groups may differ by more: where two fits are as good, the last bit of a sum decides.
    """
    is_same_device = manifest["device"] == device_kind()
    for unit in plan.units if full else sample(plan):
        raws = read_unit(plan.source, unit)
        outputs = derive(unit, raws, plan)
        stored = iter(read_ranges(folder, unit))
        wrong = None
        for target, output in zip(unit.targets, outputs, strict=True):
            found = [next(stored) for _ in output.arrays]
            most = MOST_OTHER_GROUPS if plan.recipe.is_fitted else 0.0
            if not agrees(target, output, found, is_same_device, most):
                wrong = target.path + (f"` rows `{unit.rows}" if unit.rows else "")
        text = f"`{wrong}` in `{unit.file}` does not follow from the source"
        yield unit, text if wrong else None


def agrees(
    target: Target, derived: Derived, stored: list[bytes], is_same_device: bool, most: float = 0.0
) -> bool:
    """Say whether stored bytes are what was derived again, but for a share `most` of the groups."""
    if all(bytes(memoryview(a)) == b for a, b in zip(derived.arrays, stored, strict=True)):
        return True
    quantization = target.quantization
    if is_same_device or quantization is None or quantization.mode != "affine":
        return False
    again = _open_parts(derived.arrays, quantization)
    found = _open_parts([mx.array(memoryview(part)) for part in stored], quantization)
    settings = quantization.as_config()
    step = mx.maximum(mx.abs(again[1]), mx.abs(found[1])).astype(mx.float32)[..., None]
    values = [mx.dequantize(*parts, **settings).astype(mx.float32) for parts in (again, found)]
    difference = mx.abs(values[0] - values[1]).reshape(*step.shape[:-1], -1)
    is_other = (difference > 1.02 * step).any(-1)  # 2 %: the restored values are BF16
    return bool(is_other.sum() <= ceil(most * is_other.size))


def _open_parts(parts: list[mx.array], quantization: Quantization) -> list[mx.array]:
    """Return weight, scales and biases with one row for each group, from flat bytes."""
    words = quantization.group_size * quantization.bits // 32
    weight, scales, biases = (part.reshape(-1) for part in parts)
    return [
        weight.view(mx.uint32).reshape(-1, words),
        scales.view(mx.bfloat16).reshape(-1, 1),
        biases.view(mx.bfloat16).reshape(-1, 1),
    ]


def sample(plan: Plan) -> list[Unit]:
    """Return a few units of every role, always the same ones."""
    by_role = {}
    for unit in plan.units:
        for role in {target.role for target in unit.targets}:
            by_role.setdefault(role, []).append(unit)
    draw = random.Random(0)
    picked = {}
    for _, units in sorted(by_role.items()):
        for unit in draw.sample(units, min(SAMPLE_PER_ROLE, len(units))):
            picked[unit.index] = unit
    return list(picked.values())
