"""Perplexity of a text file: a figure without a golden file, for recipes of one model.

Each window of tokens begins with BOS and knows nothing of the one before it.
"""

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import mlx.core as mx

from mlx_dsv3.checkpoint.folder import Folder
from mlx_dsv3.errors import UserError
from mlx_dsv3.load import Loaded, load_checked_tokenizer
from mlx_dsv3.model.decoder import Model
from mlx_dsv3.parity.golden import dtype_name

HEAD_ROWS = 256  # positions whose logits are alive at once


def measure_perplexity(
    folder: Folder, file: Path, context: int, load: Callable[[], Loaded]
) -> dict[str, int | float | str]:
    """Return the figures of a text file in windows of `context` tokens, BOS included."""
    if not file.is_file():
        raise UserError(f"`{file}` is not a file", "give a text file in UTF-8")
    bos, text = check_bos(folder), file.read_text(encoding="utf-8")
    tokenizer = load_checked_tokenizer(folder.path, folder.args, folder.config, False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if bos is not None and ids[:1] == [bos]:
        ids = ids[1:]
    if len(ids) < 2:
        raise UserError(f"`{file}` has {len(ids)} tokens", "give a longer text")
    loaded = load()
    with closing(loaded.store):
        loss = windows_loss(loaded.model, ids, bos, context)
    num = len(ids) - (bos is None)
    return {
        "tokens": num,
        "context": context,
        "activations": dtype_name(loaded.model.model.norm.weight.dtype),
        "nats_per_token": loss / num,
        "perplexity": math.exp(loss / num),
        "bits_per_byte": loss / math.log(2) / len(text.encode("utf-8")),
    }


def check_bos(folder: Folder) -> int | None:
    """Return the BOS of config.json, if it has one; the tokenizer is checked elsewhere."""
    bos, size = folder.config.get("bos_token_id"), folder.args.vocab_size
    if bos is not None and (type(bos) is not int or not 0 <= bos < size):
        raise UserError(  # MLX checks no index: an id beyond it would read foreign memory
            f"config.json of `{folder.path}` has `bos_token_id` = `{bos}`; "
            f"the model has ids 0 to {size - 1}",
            "copy config.json from the model's page on the hub",
        )
    return bos


def windows_loss(model: Model, ids: list[int], bos: int | None, context: int) -> float:
    """Return the sum of -log p in nats."""
    total, head, step = 0.0, [] if bos is None else [bos], context - (bos is not None)
    for start in range(0, len(ids), step):
        window = head + ids[start : start + step]
        if len(window) < 2:
            continue
        states = model.hidden(mx.array([window]))[0]
        for first in range(0, len(window) - 1, HEAD_ROWS):
            rows = states[first : min(first + HEAD_ROWS, len(window) - 1)]
            logits = model.lm_head(rows).astype(mx.float32)
            targets = mx.array(window[first + 1 : first + 1 + len(rows)])
            chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
            total += float((mx.logsumexp(logits, axis=-1) - chosen).sum())
    return total
