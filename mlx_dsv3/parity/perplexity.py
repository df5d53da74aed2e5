"""Perplexity of a text file: a figure without a golden file, for recipes of one model.

Each window of tokens begins with BOS and knows nothing of the one before it.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx

from mlx_dsv3.checkpoint.folder import Folder
from mlx_dsv3.errors import UserError, read_text
from mlx_dsv3.load import Loaded, load_checked_tokenizer
from mlx_dsv3.model.decoder import Model
from mlx_dsv3.parity.golden import dtype_name

HEAD_ROWS = 256  # positions whose logits are alive at once
MOST_NATS = 700.0  # per token; e to the power of more is beyond a float, and NaN is not less


def measure_perplexity(
    folder: Folder,
    file: Path,
    context: int,
    load: Callable[[], Loaded],
    trust_remote_code: bool = False,
) -> dict[str, int | float | str]:
    """Return the figures of a text file in windows of `context` tokens, BOS included."""
    bos, text = folder.config.get("bos_token_id"), read_text(file)
    tokenizer = load_checked_tokenizer(folder.path, folder.args, folder.config, trust_remote_code)
    ids = ids_of(tokenizer, text, bos)
    if not (found := list(windows(ids, bos, context))):
        few = "no tokens" if not ids else "one token, and nothing before it to predict it from"
        raise UserError(f"`{file}` has {few}", "give a longer text")
    loaded = load()
    with loaded:
        losses = [window_loss(loaded.model, window) for window in found]
        activations = dtype_name(loaded.model.model.norm.weight.dtype)
    num = sum(len(window) - 1 for window in found)
    nats = sum(losses) / num
    if not nats < MOST_NATS:
        raise UserError(
            f"`{folder.path}` computes a loss of {nats} nats per token, which is not a perplexity",
            f"`python -m convert verify {folder.path}` says whether its weights are damaged",
        )
    return {
        "tokens": num,
        "context": context,
        "activations": activations,
        "nats_per_token": nats,
        "perplexity": math.exp(nats),
        # Tokens that nothing predicts (the first ones of windows without BOS) cost the mean.
        "bits_per_byte": nats * len(ids) / math.log(2) / len(text.encode("utf-8")),
    }


def ids_of(tokenizer, text: str, bos: int | None) -> list[int]:
    """Return the ids of a text, without a BOS at its start: each window brings its own."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids[1:] if bos is not None and ids[:1] == [bos] else ids


def windows(ids: list[int], bos: int | None, context: int) -> Iterator[list[int]]:
    """Yield windows of `context` tokens; in each, every token but the first one is predicted."""
    head = [] if bos is None else [bos]
    step = context - len(head)
    for start in range(0, len(ids), step):
        if len(window := head + ids[start : start + step]) > 1:
            yield window


def window_loss(model: Model, window: list[int]) -> float:
    """Return the sum of -log p in nats over every token of a window but the first."""
    total = 0.0
    states = model.hidden(mx.array([window]))[0]
    for first in range(0, len(window) - 1, HEAD_ROWS):
        rows = states[first : min(first + HEAD_ROWS, len(window) - 1)]
        logits = model.lm_head(rows).astype(mx.float32)
        targets = mx.array(window[first + 1 : first + 1 + len(rows)])
        chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        total += float((mx.logsumexp(logits, axis=-1) - chosen).sum())
    return total
