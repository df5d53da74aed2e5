"""Read a golden file and check all of it: names, shapes, dtypes and values, before anyone uses it.

MLX checks no index, and a golden file is made to travel: an id beyond the vocabulary would read
foreign memory. So this is a second statement of the format of `reference/golden.py`, with which
it shares no code. States may hold anything (a NaN is a difference); they are read when they are
used. Nothing here knows the model that the file is compared with (`replay.py`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import NoReturn

import mlx.core as mx
import numpy as np

from mlx_dsv3.checkpoint.headers import TensorInfo, parse_header, read_raw_header
from mlx_dsv3.errors import UserError
from mlx_dsv3.json_files import brief, parse_json

FORMAT = "1"
RECORD_HINT = "`python -m mlx_dsv3.reference.record SOURCE GOLDEN --prompt-file TEXT` writes one"
FIELDS = ("model", "arithmetic", "device", "torch", "headers_sha256", "config")
ARITHMETICS = ("float32", "bf16", "fp8")
DIMENSIONS = {  # in `config`: what has to be the model's too, and the least that each may be
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "kv_lora_rank": 1,
    "n_routed_experts": 1,
    "num_experts_per_tok": 1,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
}
MOST = 2**31 - 1  # MLX counts in int32
LEAST_TOKENS = 3  # the MTP module's only pair then has a target
TOP = 20

# Shapes by letter: L tokens, P positions whose states are kept, T tokens with a target, D hidden,
# K experts per token, W best tokens. Of the MTP module L, P and T are those of its pairs.
HALVES = {"attention": "PD", "mlp": "PD"}
ROUTER = {"experts": "LK", "margins": "L"}
HEAD = {"norm": "PD", "logprobs": "T", "logsumexp": "L", "top_ids": "LW", "top_logprobs": "LW"}
STATE_DTYPES = (mx.float32, mx.bfloat16)
# By the last word of a name: the dtype, the least value and the largest, a letter where it counts
# (V vocabulary, E routed experts). Log-probabilities may be above 0 by a rounding error.
FINITE = 3.4e38
VALUES = {
    "ids": (mx.int32, 0, "V"),
    "top_ids": (mx.int32, 0, "V"),
    "positions": (mx.int32, 0, "L"),
    "experts": (mx.int16, 0, "E"),
    "margins": (mx.float32, 0, math.inf),
    "logsumexp": (mx.float32, -FINITE, FINITE),
    "logprobs": (mx.float32, -FINITE, 0.01),
    "top_logprobs": (mx.float32, -FINITE, 0.01),
}
ASCENDING = ("positions", "experts")
DTYPES = ("F32", "BF16", "I32", "I16")


@dataclass
class Golden:
    """A golden file: metadata, its config, and the tensors of each prompt without their number."""

    about: dict[str, str]
    config: dict
    prompts: list[dict[str, mx.array]]

    @property
    def has_every_state(self) -> bool:
        return all(len(prompt["positions"]) == len(prompt["ids"]) for prompt in self.prompts)

    @property
    def num_tokens(self) -> int:
        return sum(len(prompt["ids"]) for prompt in self.prompts)


def read_golden(path: str | Path) -> Golden:
    """Read a golden file, its states when they are used; raise `UserError` for what is not whole.

    Every name, shape and dtype is then that of the format, every id and index within its range.
    """
    header, about = read_whole_header(path)
    config = check_metadata(path, about)
    tensors = read_tensors(path, header)
    has_mtp = any(name.startswith("0.mtp.") for name in tensors)
    numbers = takewhile(lambda p: p == 0 or f"{p}.ids" in tensors, count())
    prompts = [read_prompt(path, tensors, f"{p}.", config, has_mtp) for p in numbers]
    known = {f"{p}.{name}" for p, prompt in enumerate(prompts) for name in prompt}
    if strange := sorted(tensors.keys() - known):
        refuse(path, f"holds `{strange[0]}`, which is not of its prompts 0 to {len(prompts) - 1}")
    return Golden(about, config, prompts)


def refuse(path: str | Path, what: str) -> NoReturn:
    raise UserError(f"`{path}` {what}", RECORD_HINT)


def read_whole_header(path: str | Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return the tensors of a safetensors file of any name, checked to the byte, and its metadata.

    Our own parser goes first: MLX takes negative and overflowing shapes for lengths.
    """
    try:
        raw, size = read_raw_header(Path(path))
        header = parse_header(Path(path), raw, size)
        about = parse_json(raw, f"`{path}`").get("__metadata__") or {}
    except UserError as error:
        raise UserError(error.message, RECORD_HINT) from None
    except ValueError as error:  # a name that no file can have
        refuse(path, f"is not a file: {error}")
    return header, about


def read_tensors(path: str | Path, header: dict[str, TensorInfo]) -> dict[str, mx.array]:
    """Return the tensors, not yet read; refuse what MLX would read as something else."""
    for name, info in header.items():
        if info.dtype not in DTYPES:
            refuse(path, f"has `{name}` as {info.dtype}; {', '.join(DTYPES)} are known")
    return mx.load(str(path), format="safetensors")


def check_metadata(path: str | Path, about: dict[str, str]) -> dict:
    """Check the metadata and return the golden config."""
    if about.get("format") != FORMAT:
        refuse(path, f"is not a golden file of format {FORMAT}")
    for field in FIELDS:
        if not about.get(field, "\n").isprintable():  # the report prints them
            refuse(path, f"has no readable `{field}` in its metadata")
    if about["arithmetic"] not in ARITHMETICS:
        names, found = ", ".join(ARITHMETICS), brief(about["arithmetic"])
        refuse(path, f"has arithmetic `{found}`; known are {names}")
    where = f"`config` in the metadata of `{path}`"
    config = parse_json(about["config"].encode(), where, RECORD_HINT)
    for name, least in DIMENSIONS.items():
        value = config.get(name)
        if type(value) is not int or not least <= value <= MOST:
            what = f"has `{name}` = `{brief(repr(value))}` in its `config`"
            refuse(path, f"{what}; a whole number from {least} is needed")
    return config


def read_prompt(path, tensors: dict, prefix: str, config: dict, has_mtp: bool) -> dict:
    """Check the tensors of one prompt, whose names begin with `prefix`; return them without it."""
    sizes = {
        "V": config["vocab_size"],
        "D": config["hidden_size"],
        "E": config["n_routed_experts"],
        "K": config["num_experts_per_tok"],
        "W": min(TOP, config["vocab_size"]),
    }
    found = {}

    def take(shapes):
        for name, letters in shapes:
            if prefix + name not in tensors:
                refuse(path, f"lacks `{prefix}{name}`")
            found[name] = tensors[prefix + name]
            check_tensor(path, prefix + name, found[name], letters, sizes)

    take([("ids", "L")])
    if (L := sizes["L"]) < LEAST_TOKENS:
        refuse(path, f"has {L} tokens in `{prefix}ids`; {LEAST_TOKENS} are needed")
    take([("positions", "P")])
    positions = np.array(found["positions"])
    if positions[:1].tolist() != [0]:
        refuse(path, f"has `{prefix}positions` that do not begin with 0")
    sizes["T"] = L - 1
    take(main_shapes(config))
    sizes |= {"L": L - 1, "P": int((positions < L - 1).sum()), "T": L - 2}
    if has_mtp:
        shapes = {"input": "PD"} | HALVES | ROUTER | HEAD
        take((f"mtp.{name}", letters) for name, letters in shapes.items())
    return found


def main_shapes(config: dict) -> Iterator[tuple[str, str]]:
    """Yield name and shape of what the main model leaves; lazily, the layers may be too many."""
    yield "embedding", "PD"
    for i in range(config["num_hidden_layers"]):
        is_moe = i >= config["first_k_dense_replace"] and i % config["moe_layer_freq"] == 0
        for name, letters in (HALVES | (ROUTER if is_moe else {})).items():
            yield f"layers.{i}.{name}", letters
    yield from HEAD.items()


def check_tensor(path, name: str, tensor: mx.array, letters: str, sizes: dict[str, int]) -> None:
    """Refuse a wrong shape, dtype or value; a letter without a size yet gets it here."""
    if len(letters) == tensor.ndim:
        for letter, size in zip(letters, tensor.shape, strict=True):
            sizes.setdefault(letter, size)
    word = name.rpartition(".")[2]
    dtype, least, most = VALUES.get(word, (None, None, None))
    dtypes, shape = (dtype,) if dtype else STATE_DTYPES, tuple(sizes.get(s, s) for s in letters)
    if tensor.shape != shape or tensor.dtype not in dtypes:
        wanted = f"{' or '.join(map(dtype_name, dtypes))} {shape}"
        found = f"{dtype_name(tensor.dtype)} {tensor.shape}"
        refuse(path, f"has `{name}` as {found}; {wanted} is needed")
    if dtype is None:
        return
    values, most = np.array(tensor), sizes[most] - 1 if isinstance(most, str) else most
    wrong = values[~((values >= least) & (values <= most))]  # a NaN is neither
    if wrong.size:
        refuse(path, f"has {wrong[0]} in `{name}`; {least} to {most} is possible")
    if word in ASCENDING and not (np.diff(values) > 0).all():
        refuse(path, f"has `{name}` that do not ascend")
    if word == "top_logprobs" and not (np.exp(values).sum(-1) < 1.01).all():
        refuse(path, f"has `{name}` of more than 100 %")


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]
