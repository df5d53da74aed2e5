"""Figures of a plan and of a finished conversion, by role; prints nothing."""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import zip_longest
from math import prod, sqrt

from convert.journal import Done
from convert.outputs import Target, Unit
from convert.plan import Plan
from mlx_dsv3.checkpoint.format import SCALE_SUFFIX


@dataclass
class RoleRow:
    """One role's line in the table of `plan`."""

    role: str
    tensors: set[str] = field(default_factory=set)
    source_types: set[str] = field(default_factory=set)
    stored_as: set[str] = field(default_factory=set)
    weights: int = 0
    source_bytes: int = 0
    nbytes: int = 0


def role_rows(plan: Plan) -> list[RoleRow]:
    """Return the table of roles, largest first, without what is only compared."""
    rows: dict[str, RoleRow] = {}
    for unit in plan.units:
        for source, target in pairs(unit):
            row = rows.setdefault(target.role, RoleRow(target.role))
            if source:
                _add_source(plan, row, source, unit.rows)
            row.nbytes += sum(nbytes for _, nbytes in target.writes)
            row.stored_as.add(label(target))
    return sorted(rows.values(), key=lambda row: -row.nbytes)


def pairs(unit: Unit) -> list[tuple[str | None, Target]]:
    """Return each target with the tensor that it comes from; kv_b's second half has None."""
    return list(zip_longest(unit.sources[: len(unit.targets)], unit.targets))


def _add_source(plan: Plan, row: RoleRow, name: str, rows: tuple[int, int] | None) -> None:
    tensor = plan.source.tensors[name]
    num_rows = rows[1] - rows[0] if rows else tensor.shape[0]
    row.weights += num_rows * prod(tensor.shape[1:])
    row.source_bytes += tensor.nbytes // tensor.shape[0] * num_rows
    row.source_types.add(tensor.dtype)
    if name not in row.tensors and plan.source.scale_of(name):
        row.source_bytes += plan.source.tensors[name + SCALE_SUFFIX].nbytes
    row.tensors.add(name)


def label(target: Target) -> str:
    """Return how a target is stored, short: `4 bits/64`, `mxfp4`, `BF16`."""
    quantization = target.quantization
    if quantization is None:
        return target.dtype
    if quantization.mode != "affine":
        return quantization.mode
    return f"{quantization.bits} bits/{quantization.group_size}"


def role_record(plan: Plan, done: dict[int, Done]) -> dict[str, dict]:
    """Return conversion.json's table: size, bits and relative RMS error of every role.

    Errors are summed in the order of the units, so that they do not depend on the order of work.
    """
    sums: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    for unit in plan.units:
        for target, errors in zip(unit.targets, done[unit.index].errors, strict=True):
            if errors:
                total = sums[target.role][target.path]
                total[0] += errors[0]
                total[1] += errors[1]
    record = {}
    for row in role_rows(plan):
        record[row.role] = {
            "tensors": len(row.tensors),
            "weights": row.weights,
            "bytes": row.nbytes,
            "bits_per_weight": round(8 * row.nbytes / row.weights, 3),
            **_role_errors(sums.get(row.role)),
        }
    return record


def _role_errors(tensors: dict[str, list[float]] | None) -> dict:
    if not tensors:
        return {}
    relative = {name: _relative(*pair) for name, pair in tensors.items()}
    worst = max(relative, key=relative.get)
    total = [sum(pair[i] for pair in tensors.values()) for i in (0, 1)]
    return {
        "relative_rms_error": _relative(*total),
        "worst": {"tensor": worst, "relative_rms_error": relative[worst]},
    }


def _relative(squared_errors: float, squares: float) -> float:
    """Return the relative error, rounded so that the text is stable."""
    return float(f"{sqrt(squared_errors / squares):.4e}") if squares else 0.0
