"""The recipe for a given memory: bits and group size of each role in each layer.

The folder is to run resident: trunk, MTP module, latent cache and transients of the memory plan
are in the sum. What is left is spent where it buys most. Every role of a layer is an *item*; its
error is the squared error of its output over the output's square, measured with fitted levels on
rows of its own weights, each input channel weighed by its importance and each expert by the share
of tokens that it gets. Where only headers are known, weights are taken as normally distributed.

The sum of all errors, some of which count more (COUNTS), is made least: of each item's choices
those on the convex hull of error over bytes are bought in the order of error saved per byte.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from math import ceil, prod
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from convert.dequantize import read_raw, to_bfloat16
from convert.plan import Plan, Unit
from convert.planner import build
from convert.quantize import error_sums, fit
from convert.recipe import ALLOWED, EXPERTS, RECIPES, ROLES, Recipe
from convert.source import Source
from convert.transform import importance_of, split_kv_b
from mlx_dsv3.checkpoint.format import Quantization, layer_of
from mlx_dsv3.checkpoint.headers import TensorInfo
from mlx_dsv3.checkpoint.importance import Importance
from mlx_dsv3.errors import UserError
from mlx_dsv3.memory import DEFAULT_CONTEXT, make_plan, sold_limit_bytes
from mlx_dsv3.sizes import gigabytes

# Drafts of an MTP module with few bits are hardly ever accepted (convert/recipe.py).
BITS = dict.fromkeys(EXPERTS, (2, 3, 4, 5, 6, 8)) | {"mtp": (8,)}
OTHER_BITS = (4, 5, 6, 8)  # of what every token meets
# What an error counts, beside the same one of any other role: nothing runs in parallel to these,
# and the last layers see all of it. On the judge 4 to 16 serve alike (docs/log.md).
COUNTS = dict.fromkeys(("embedding", "head", "dense"), 8)
SAMPLED = 3  # matrices of an item, about
SAMPLE_ROWS, SAMPLE_WEIGHTS = 128, 1 << 16  # of each of its matrices
UNBOUNDED = 1 << 62


class Choice(NamedTuple):
    """One way to store an item: its bytes in memory, and its relative squared error."""

    quantization: Quantization
    nbytes: int
    error: float


class Item(NamedTuple):
    """A role of a layer (None: embedding and head), and its choices, smallest first."""

    role: str
    layer: int | None
    choices: list[Choice]


class Fitted(NamedTuple):
    """A recipe, the choices that make it, and what its folder takes of what a machine allows."""

    recipe: Recipe
    chosen: list[tuple[Item, Choice]]
    total_bytes: int
    limit_bytes: int
    survey: "Survey"


Matrices = dict[str, tuple[Unit, int, tuple[int, ...]]]  # path -> unit, its target, shape


@dataclass(frozen=True)
class Survey:
    """What can be chosen; `fixed_bytes` is all that no choice changes, `context` in tokens."""

    items: list[Item]
    fixed_bytes: int
    context: int
    is_measured: bool

    @property
    def least_bytes(self) -> int:
        return self.fixed_bytes + sum(item.choices[0].nbytes for item in self.items)

    def fit(self, gb: float) -> Fitted:
        """Choose for a machine that is sold with `gb` GB of memory.

        Raises `UserError` with the least memory that would do.
        """
        limit = sold_limit_bytes(gb)
        if self.least_bytes > limit:
            raise too_little(gb, limit, self.least_bytes, self.context)
        chosen = choose(self.items, limit - self.fixed_bytes)
        total = self.fixed_bytes + sum(choice.nbytes for choice in chosen)
        pairs = list(zip(self.items, chosen, strict=True))
        return Fitted(recipe_of(f"fit-{gb:g}", pairs), pairs, total, limit, self)


def survey(
    source: Source, context: int | None = None, importance: Importance | None = None
) -> Survey:
    """Measure what each choice costs and loses; seconds, also for 671B."""
    context = min(context or DEFAULT_CONTEXT, source.args.max_position_embeddings)
    plan = build(source, replace(RECIPES["q8"], levels="fitted"), "records", importance)
    is_measured = source.repo is None and bool(source.stamps)
    groups = matrices_by_item(plan)
    errors = measured_errors if is_measured else normal_errors
    items = [Item(*key, choices_of(plan, key[0], found, errors)) for key, found in groups.items()]
    eight = sum(nbytes_of(found, Quantization(8)) for found in groups.values())
    return Survey(items, needed_bytes(plan, context) - eight, context, is_measured)


def matrices_by_item(plan: Plan) -> dict[tuple[str, int | None], Matrices]:
    """Return the matrices of each item: what can be quantised of a role in a layer."""
    parts = {part.name: part for file in plan.files.values() for part in file.parts}
    found = defaultdict(dict)
    for unit in plan.units:
        for i, target in enumerate(unit.targets):
            if target.quantization:
                *rows, words = parts[f"{target.path}.weight"].shape
                shape = (*rows, words * 4)  # four codes of 8 bits in a word
                found[target.role, layer_of(target.path)].setdefault(target.path, (unit, i, shape))
    return dict(sorted(found.items(), key=lambda entry: (entry[0][0], entry[0][1] or 0)))


def nbytes_of(matrices: Matrices, quantization: Quantization) -> int:
    """Return the bytes of an item in memory, scales and biases in BF16."""
    weights = sum(prod(shape) for _, _, shape in matrices.values())
    return weights * quantization.bits // 8 + 4 * (weights // quantization.group_size)


def needed_bytes(plan: Plan, context: int) -> int:
    """Return what the folder of a plan takes when it runs resident, in bfloat16."""
    tensors = {
        part.name: TensorInfo(Path(name), part.dtype, part.shape, 0, part.nbytes)
        for name, file in plan.files.items()
        for part in file.parts
    }
    options = {"experts": "resident", "context": context, "limit_bytes": UNBOUNDED}
    return make_plan(tensors, plan.source.args, mx.bfloat16, **options).total_bytes


def choices_of(plan: Plan, role: str, matrices: Matrices, errors: Callable) -> list[Choice]:
    """Return the choices on the lower convex hull of error over bytes, smallest first."""
    candidates = [
        Quantization(bits, size)
        for bits in BITS.get(role, OTHER_BITS)
        for size in ALLOWED["affine"][0]
        if all(shape[-1] % size == 0 for _, _, shape in matrices.values())
    ]
    found = errors(plan, matrices, candidates)
    sizes = [nbytes_of(matrices, candidate) for candidate in candidates]
    return hull([Choice(*parts) for parts in zip(candidates, sizes, found, strict=True)])


def hull(choices: list[Choice]) -> list[Choice]:
    """Return the choices that are best at some price of a byte."""
    best = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.error)):
        if best and choice.error >= best[-1].error:
            continue
        while len(best) > 1 and saving(best[-2], best[-1]) <= saving(best[-1], choice):
            best.pop()
        best.append(choice)
    return best


def saving(a: Choice, b: Choice) -> float:
    """Return the error that each byte more saves."""
    return (a.error - b.error) / max(b.nbytes - a.nbytes, 1)


def choose(items: list[Item], budget: int) -> list[Choice]:
    """Return a choice for each item; `budget` is enough for the smallest of all."""
    level = [0] * len(items)
    left = budget - sum(item.choices[0].nbytes for item in items)
    steps = [
        (COUNTS.get(item.role, 1) * saving(a, b), i, n, b.nbytes - a.nbytes)
        for i, item in enumerate(items)
        for n, (a, b) in enumerate(pairwise(item.choices))
    ]
    for _, i, n, nbytes in sorted(steps, key=lambda step: -step[0]):
        if n == level[i] and nbytes <= left:  # after a step that is too large come no others
            level[i], left = n + 1, left - nbytes
    return [item.choices[n] for item, n in zip(items, level, strict=True)]


def measured_errors(plan: Plan, matrices: Matrices, candidates: list[Quantization]) -> list[float]:
    """Return the relative squared error of each candidate, on rows of some of the matrices."""
    sums = np.zeros((len(candidates), 2))
    for matrix, importance, share in samples(plan, matrices):
        exact = matrix.astype(mx.float32)
        weights = 1 if importance is None else importance
        for row, candidate in zip(sums, candidates, strict=True):
            arrays = fit(matrix, candidate, importance)
            restored = mx.dequantize(*arrays, **candidate.as_config()).astype(mx.float32)
            squares = [(weights * mx.square(x)).sum() for x in (restored - exact, exact)]
            row += share * np.array([square.item() for square in squares])
    return [float(error / square) if square else 0.0 for error, square in sums]


def samples(plan: Plan, matrices: Matrices) -> Iterator[tuple[mx.array, mx.array | None, float]]:
    """Yield rows of a few matrices, evenly spaced, with importance and share of tokens."""
    entries = list(matrices.items())
    for path, (unit, i, _) in entries[:: max(1, len(entries) // SAMPLED)]:
        matrix = read_rows(plan, unit, i)
        stride = max(1, matrix.size // SAMPLE_WEIGHTS)
        share = plan.importance.share(path) if plan.importance else 1.0
        yield matrix[..., ::stride, :], importance_of(path, plan), share


def read_rows(plan: Plan, unit: Unit, i: int) -> mx.array:
    """Read the first rows of a matrix; kv_b whole, since its halves lie by head."""
    source, is_split = plan.source, unit.rule == "split_kv_b"
    name = unit.sources[0 if is_split else i]
    rows = None if is_split else (0, min(SAMPLE_ROWS, source.tensors[name].shape[0]))
    matrix = to_bfloat16(read_raw(source, name, rows), source.block)
    return split_kv_b(matrix, source.args)[i] if is_split else matrix


def normal_errors(plan: Plan, matrices: Matrices, candidates: list[Quantization]) -> list[float]:
    """Return the relative squared error of each candidate on normally distributed weights."""
    return [normal_error(candidate) for candidate in candidates]


@lru_cache
def normal_error(quantization: Quantization) -> float:
    matrix = mx.random.normal((SAMPLE_ROWS, 2048), key=mx.random.key(0)).astype(mx.bfloat16)
    arrays = fit(matrix, quantization)
    error, square = error_sums(matrix, arrays, quantization).tolist()
    return error / square


def recipe_of(name: str, chosen: list[tuple[Item, Choice]]) -> Recipe:
    """Write choices down: what most layers of a role have, and the layers that differ."""
    by_role = dict.fromkeys(ROLES, Quantization(8))
    for role in by_role:
        found = [choice.quantization for item, choice in chosen if item.role == role]
        by_role[role] = max(found, key=found.count, default=by_role[role])
    by_layer = defaultdict(dict)
    for item, choice in chosen:
        if item.layer is not None and choice.quantization != by_role[item.role]:
            by_layer[item.layer][item.role] = choice.quantization
    return Recipe(name, by_role, levels="fitted", by_layer=dict(sorted(by_layer.items())))


def too_little(gb: float, limit: int, least: int, context: int) -> UserError:
    enough = next(n for n in range(ceil(gb), 1 << 20) if sold_limit_bytes(n) >= least)
    return UserError(
        f"a machine with {gb:g} GB lets the model use {gigabytes(max(limit, 0))}; resident it "
        f"takes {gigabytes(least)} with the least bits, at a context of {context:,} tokens",
        f"`--fit-memory {enough}` is the least; with less, experts are streamed: `--recipe q2-fit`",
    )


def fitted_rows(fitted: Fitted) -> list[tuple[str, str, int, float]]:
    """Return (role, how it is stored, bytes, relative RMS error) for a table."""
    found = defaultdict(list)
    for item, choice in fitted.chosen:
        found[item.role].append(choice)
    rows = []
    for role, choices in found.items():
        counts = Counter(f"{c.quantization.bits}/{c.quantization.group_size}" for c in choices)
        words = ", ".join(f"{n} x {kind}" for kind, n in sorted(counts.items()))
        error = (sum(c.error for c in choices) / len(choices)) ** 0.5
        rows.append((role, words, sum(c.nbytes for c in choices), error))
    return rows
