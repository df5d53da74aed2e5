"""How much each input channel of a linear layer counts: written by `mlx_dsv3.importance`.

A safetensors file with the mean square of every channel over the rows of a text, float32, by the
converter's names of modules: (in,) for most, (H, 1, in) where a layer has a matrix for each head.
Of routed experts `gate_proj` (it stands for `up_proj` too, which has the same input) and
`down_proj` are (E, in) over the rows that were routed to each, and `rows` (E,) counts those. What
is stored is what was measured; it is drawn towards the layer's mean as it is read. Such files
travel: every value is looked at before it counts.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np

from mlx_dsv3.checkpoint.format import layer_prefix
from mlx_dsv3.checkpoint.headers import TensorInfo, parse_header, read_raw_header
from mlx_dsv3.config import ModelArgs
from mlx_dsv3.errors import UserError
from mlx_dsv3.json_files import brief, parse_json

FORMAT = "1"
DTYPES = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
ROUTED = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj")
# Rows of its layer's mean that count beside an expert's own: squares have heavy tails. Least error
# on the judge with 4 to 250 rows an expert was at 32 to 128 (docs/log.md).
DRAWN = 64
LEAST_ROWS, LEAST_EXPERT_ROWS = 1024, 16  # in all; for each routed expert, on average
MOST_ROWS = 10**15  # of an expert: sums stay within 64 bits
HINT = "`python -m mlx_dsv3.importance MODEL --text FILE OUT` measures one"


def shapes(args: ModelArgs, with_mtp: bool) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a model's file; embedding, norms and router have none."""
    D, found = args.hidden_size, {"lm_head": (args.hidden_size,)}
    for layer in range(args.num_hidden_layers + with_mtp):
        prefix = layer_prefix(layer)
        found |= {f"{prefix}self_attn.{k}": v for k, v in _attention(args).items()}
        if not args.is_moe_layer(layer):
            found |= _mlp(f"{prefix}mlp.", D, args.intermediate_size)
            continue
        width, experts = args.moe_intermediate_size, f"{prefix}mlp.experts."
        if args.n_shared_experts:
            found |= _mlp(f"{prefix}mlp.shared_experts.", D, width * args.n_shared_experts)
        E = args.n_routed_experts
        found |= {f"{experts}gate_proj": (E, D), f"{experts}down_proj": (E, width)}
        found[f"{experts}rows"] = (E,)
    if with_mtp:
        found[f"{prefix}eh_proj"] = (2 * D,)
    return found


def _attention(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    D, H, rank = args.hidden_size, args.num_attention_heads, args.q_lora_rank
    query = {"q_proj": (D,)} if rank is None else {"q_a_proj": (D,), "q_b_proj": (rank,)}
    return query | {
        "kv_a_proj_with_mqa": (D,),
        "embed_q": (H, 1, args.qk_nope_head_dim),
        "unembed_out": (H, 1, args.kv_lora_rank),
        "o_proj": (H * args.v_head_dim,),
    }


def _mlp(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj": (hidden,),
        f"{prefix}up_proj": (hidden,),
        f"{prefix}down_proj": (width,),
    }


def least_rows(args: ModelArgs) -> int:
    """Return the tokens that a text must have: an expert gets one in E / K of them."""
    each = args.n_routed_experts / args.num_experts_per_tok
    return max(LEAST_ROWS, int(LEAST_EXPERT_ROWS * each))


@dataclass(frozen=True)
class Importance:
    """A file that was looked at; `means` are those of all rows of a layer's routed experts."""

    path: Path
    sha256: str
    about: dict[str, str]
    source: dict
    tensors: dict[str, TensorInfo]
    rows: dict[str, np.ndarray]
    means: dict[str, np.ndarray]

    def weights(self, path: str) -> np.ndarray | None:
        """Return the mean squares of a module's input, float32; None for what has none.

        They have the shape of the matrix, (..., in), or broadcast to it. An expert's are drawn
        towards its layer's mean: as if DRAWN rows of that kind had come to it besides its own.
        """
        found = ROUTED.fullmatch(path)
        if not found:
            return self._values(path) if path in self.tensors else None
        prefix, expert, kind = found.groups()
        name = f"{prefix}{'down' if kind == 'down' else 'gate'}_proj"
        if name not in self.tensors:
            return None
        own, count = self._values(name, int(expert)), self.rows[prefix][int(expert)]
        drawn = (count * own.astype(np.float64) + DRAWN * self.means[name]) / (count + DRAWN)
        return drawn.astype(np.float32)

    def share(self, path: str) -> float:
        """Return the share of tokens that reach a module; of no routed expert it is 0."""
        found = ROUTED.fullmatch(path)
        if not found or (rows := self.rows.get(found[1])) is None:
            return 1.0
        per_token = int(self.about["num_experts_per_tok"])
        # One row more for each than there was: rarely is not never.
        return float(per_token * (rows[int(found[2])] + 1) / (rows.sum() + len(rows)))

    def _values(self, name: str, row: int | None = None) -> np.ndarray:
        """Return a tensor, or one row of it, from the file."""
        return _read(self.tensors[name], row)

    @cached_property
    def with_mtp(self) -> bool:
        return any(name.endswith(".eh_proj") for name in self.tensors)

    def check(self, args: ModelArgs, identity=None) -> None:
        """Refuse the importance of another model, or one of too few rows.

        `identity` is the converter's, of the source; where either side has none, shapes decide.
        """
        expected = shapes(args, self.with_mtp)
        for name in sorted(expected.keys() | self.tensors.keys()):
            found = self.tensors[name].shape if name in self.tensors else None
            if found != expected.get(name):
                has, needs = _words(found), _words(expected.get(name))
                _refuse(self.path, f"is of another model: `{name}` {has} there; the model {needs}")
        if str(args.num_experts_per_tok) != self.about["num_experts_per_tok"]:
            _refuse(self.path, "is of another model: it has another number of experts per token")
        self._check_source(identity)
        if (rows := int(self.about["rows"])) < (least := least_rows(args)):
            hint = "measure it over a longer text"
            raise UserError(f"`{self.path}` has {rows:,} rows; {least:,} are the least", hint)

    def _check_source(self, identity) -> None:
        """Refuse weights that are others under the same headers: R1's are not V3's."""
        noted = self.source.get("headers_sha256")
        if identity is None or noted != identity.source.headers_sha256:
            return  # another form of a checkpoint: nobody knows
        if identity.is_that_of(self.source) is False:
            name = self.source.get("id") or self.about.get("model")
            _refuse(self.path, f"is of other weights than the source's: those of `{brief(name)}`")


def _words(shape: tuple[int, ...] | None) -> str:
    return "is not" if shape is None else f"has {list(shape)}"


def _refuse(path: Path, what: str) -> NoReturn:
    raise UserError(f"`{path}` {what}", HINT)


def read(path: str | Path) -> Importance:
    """Read a file and look at every value; raise `UserError` for what is not of this format."""
    path = Path(path)
    raw, size = read_raw_header(path)
    tensors = parse_header(path, raw, size)
    about = parse_json(raw, f"the safetensors header of `{path}`").get("__metadata__") or {}
    source = _check_about(path, about)
    rows, means = {}, {}
    for name, info in sorted(tensors.items(), reverse=True):  # `rows` before the projections
        values = _checked(path, name, info)
        prefix = name.rpartition(".")[0] + "."
        if info.dtype == "I64":
            rows[prefix] = values
        elif prefix in rows:
            means[name] = rows[prefix] @ values.astype(np.float64) / max(rows[prefix].sum(), 1)
            _check_experts(path, name, values, rows[prefix])
        elif not values.any():
            _refuse(path, f"holds `{brief(name)}`, which is 0 in every channel")
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Importance(path, sha256, about, source, tensors, rows, means)


def _check_about(path: Path, about: dict[str, str]) -> dict:
    """Check the metadata; return what they say of the measured model's source."""
    if about.get("kind") != "importance":
        _refuse(path, "holds no importance")
    if about.get("format") != FORMAT:
        hint = "measure it again with this version"
        raise UserError(f"`{path}` has format `{brief(about.get('format'))}`, not {FORMAT}", hint)
    for name in ("rows", "num_experts_per_tok"):
        if not re.fullmatch(r"[1-9][0-9]{0,14}", about.get(name, "")):
            _refuse(path, f"has `{brief(about.get(name))}` as its `{name}`, not a number")
    source = parse_json(about.get("source", ""), f"`source` of `{path}`", HINT)
    if not all(isinstance(value, str | int | None) for value in source.values()):
        _refuse(path, "has a damaged `source`")
    return source


def _checked(path: Path, name: str, info: TensorInfo) -> np.ndarray:
    """Return a tensor's values, which are finite and not negative."""
    is_count = name.endswith(".experts.rows")
    dtype, ranks = ("I64", (1,)) if is_count else ("F32", (1, 2, 3))
    if info.dtype != dtype or len(info.shape) not in ranks:
        _refuse(path, f"holds `{brief(name)}` as {info.dtype} {list(info.shape)}")
    values = _read(info)
    if not np.isfinite(values).all():
        _refuse(path, f"holds `{brief(name)}`, which has values that are not finite")
    if (values < 0).any():
        _refuse(path, f"holds `{brief(name)}`, which has values below 0")
    if is_count and (values > MOST_ROWS).any():
        _refuse(path, f"holds `{brief(name)}`, which counts more than {MOST_ROWS:,} rows")
    return values


def _check_experts(path: Path, name: str, values: np.ndarray, rows: np.ndarray) -> None:
    if values.ndim != 2 or len(values) != len(rows):
        _refuse(path, f"holds `{brief(name)}` of {list(values.shape)} and {len(rows)} counts")
    if not rows.any():
        _refuse(path, f"counts no rows for `{brief(name)}`")


def _read(info: TensorInfo, row: int | None = None) -> np.ndarray:
    """Return a tensor, or one row of it: of V3's, 0.6 GB, never more than 8 MB at a time."""
    count, offset, shape = int(np.prod(info.shape)), info.offset, info.shape
    if row is not None:
        count, shape = count // shape[0], shape[1:]
        offset += row * count * DTYPES[info.dtype].itemsize
    return np.fromfile(info.path, DTYPES[info.dtype], count, offset=offset).reshape(shape)
