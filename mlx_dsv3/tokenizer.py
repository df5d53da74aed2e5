"""The tokenizer of a folder: files from outside, and other packages' code that reads them.

A tokenizer that loads has ids that the embedding has; all else is refused in one sentence, with
what the other packages say.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_dsv3.config import ModelArgs, end_tokens
from mlx_dsv3.errors import UserError, read_text
from mlx_dsv3.json_files import MOST_WORDS, check_count, read_json

FROM_THE_HUB = "copy the tokenizer files of this model from the hub"
# How transformers says which packages a repository's own code imports in vain.
NOT_INSTALLED = re.compile(r"not found in your environment: (.+?)\. Run")
VOCABULARIES = ("tokenizer.json", "vocab.json")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
NO_LIMIT = int(1e30)  # transformers' own word for it; how long a prompt may be is ours to say


def load_checked_tokenizer(folder: Path, args: ModelArgs, config: dict, trust_remote_code: bool):
    """Load the tokenizer and refuse one whose ids the embedding does not have.

    An id beyond the embedding would read foreign memory: MLX does not check. Of config.json
    transformers sees the model type alone: its classes refuse, in tracebacks, fields that the
    tokenizer does not need (an integer for a float, yarn under `kimi_k2`).
    """
    ends = end_tokens(folder, config, args.vocab_size)
    check_files(folder)
    from mlx_lm.utils import load_tokenizer
    from transformers import PreTrainedConfig

    extra = {"model_max_length": NO_LIMIT, "trust_remote_code": trust_remote_code}
    extra["clean_up_tokenization_spaces"] = False  # a text would change when more of it comes
    try:
        extra["config"] = known = PreTrainedConfig(tokenizer_class=config.get("tokenizer_class"))
        known.model_type = args.model_type
        with silenced():
            tokenizer = load_tokenizer(folder, extra, eos_token_ids=ends)
            largest = max(tokenizer.get_vocab().values())
            tokenizer.encode("Hello", add_special_tokens=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # another package's, of any kind; Rust's panics are such
        raise refusal(folder, error) from None
    if largest >= args.vocab_size:
        raise UserError(
            f"the tokenizer of `{folder}` has id {largest}; the model's vocab_size is "
            f"{args.vocab_size}",
            FROM_THE_HUB,
        )
    return tokenizer


@contextmanager
def silenced() -> Iterator[None]:
    """Send to nowhere what other packages print: words of the files, and of no use to a reader.

    Some comes from Rust, and knows of no `sys.stdout`.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    saved, nowhere = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for number in (*saved, nowhere):
            os.close(number)


def check_files(folder: Path) -> None:
    """Refuse what the other packages would read for ever, or into memory whatever its size."""
    for path in filter(Path.exists, map(folder.joinpath, VOCABULARIES)):
        text = read_text(path)  # V3's tokenizer.json has 8 MB: 20 ms
        check_count(text, f"`{path}`", FROM_THE_HUB, MOST_WORDS)
    for path in filter(Path.exists, map(folder.joinpath, SETTINGS)):
        read_json(path, hint=FROM_THE_HUB)
    if (folder / "chat_template.jinja").exists():
        read_text(folder / "chat_template.jinja")


def refusal(folder: Path, error: BaseException) -> UserError:
    """Say why a tokenizer does not load, and what may help."""
    reason = " ".join(str(error).split()) or "no reason given"
    if "trust_remote_code" in reason:
        return UserError(
            f"the tokenizer of `{folder}` is the repository's own code, which nobody allowed",
            "`--trust-remote-code` runs it; read it first",
        )
    module = error.name if isinstance(error, ModuleNotFoundError) else None
    listed = NOT_INSTALLED.search(reason)
    if listed or module and not module.startswith("mlx_lm."):
        names = listed[1].replace(",", "") if listed else module.split(".")[0]
        return UserError(
            f"the tokenizer of `{folder}` needs a package that is not installed: {names}",
            f"`pip install {names}`",
        )
    if module:  # a part of mlx-lm that `chat_template_type` or `tool_parser_type` names
        return UserError(
            f"`tokenizer_config.json` in `{folder}` asks for `{module}`, which mlx-lm has not",
            FROM_THE_HUB,
        )
    return UserError(
        f"the tokenizer of `{folder}` does not load: {type(error).__name__}: {reason[:300]}",
        FROM_THE_HUB,
    )


def vocabulary_mask(tokenizer, vocab_size: int) -> mx.array | None:
    """Return what is added to logits (vocabulary,) so that padding ids are never chosen."""
    mask = np.full(vocab_size, -np.inf, np.float32)
    mask[list(tokenizer.get_vocab().values())] = 0  # 0.12 s at V3's size: once for each load
    return mx.array(mask) if mask.any() else None
