"""From a unit's source bytes to its output arrays, one rule after the other.

Every weight passes through BF16 (`dequantize`) and is then stored as its target says (`quantize`).
This file knows neither the order of work nor the output files; the caller chooses the stream and
evaluates.
"""

import mlx.core as mx
import numpy as np

from convert.dequantize import Raw, read_raw, to_bfloat16
from convert.plan import Plan, Unit
from convert.quantize import Derived, store
from convert.source import Source
from mlx_dsv3.config import ModelArgs
from mlx_dsv3.errors import UserError


def read_unit(source: Source, unit: Unit) -> list[Raw]:
    """Read what a unit needs, one weight a source; makes no MLX call: threads may call it.

    Raises `UserError` where values are not finite.
    """
    return [read_raw(source, name, unit.rows) for name in unit.sources]


def derive(unit: Unit, raws: list[Raw], plan: Plan) -> list[Derived]:
    """Build the output of a unit, unevaluated, target by target; a comparison has none."""
    if unit.rule == "compare":
        refuse_difference(*raws)
        return []
    if unit.rule == "keep":  # the selection bias, the one tensor that is never rounded
        return [Derived([mx.array(np.frombuffer(raws[0].data, np.uint8))], None)]
    matrices = [to_bfloat16(raw, plan.source.block) for raw in raws]
    if unit.rule == "split_kv_b":
        matrices = split_kv_b(matrices[0], plan.source.args)
    pairs = zip(unit.targets, matrices, strict=True)
    paths = [target.path for target in unit.targets]
    if unit.rule == "matrix":  # a stacked target has the name of all experts, a source its own
        paths = [source.removesuffix(".weight") for source in unit.sources]
    return [
        store(
            matrix,
            target.quantization,
            target.dtype,
            plan.recipe.is_fitted,
            importance_of(path, plan),
        )
        for (target, matrix), path in zip(pairs, paths, strict=True)
    ]


def importance_of(path: str, plan: Plan) -> mx.array | None:
    """Return what the input channels of a matrix count: alike where nothing is known of them."""
    if plan.importance is None:
        return None
    found = plan.importance.weights(path)
    return mx.array(1.0 if found is None else found)


def refuse_difference(copy: Raw, original: Raw) -> None:
    """Refuse an embedding or head of the MTP layer that is not a copy: it would be left out."""
    if copy.data != original.data or not np.array_equal(copy.scale, original.scale):
        raise UserError(
            f"`{copy.name}` differs from `{original.name}`; a folder has room for one of them",
            "report the checkpoint: every known release stores the same values twice",
        )


def split_kv_b(weight: mx.array, args: ModelArgs) -> list[mx.array]:
    """Split kv_b_proj per head into `embed_q` and `unembed_out` (spec 2.4.5).

    The rows of a head are its keys' nope part, then its values.
    """
    heads, nope = args.num_attention_heads, args.qk_nope_head_dim
    weight = weight.reshape(heads, nope + args.v_head_dim, -1)  # (H, N + V, C)
    embed_q = mx.contiguous(weight[:, :nope].swapaxes(-1, -2))  # (H, C, N)
    return [embed_q, mx.contiguous(weight[:, nope:])]  # (H, V, C)
