"""What both programs begin with: the checkpoint's folder, the ids of a text, the arithmetic.

What the user gave is checked before a checkpoint is fetched or read: the device, the code that
multiplies, texts. Ids are checked wherever they come from.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer

from mlx_dsv3.errors import UserError, read_text
from mlx_dsv3.json_files import MOST_WORDS, check_count
from mlx_dsv3.reference import backends, weights
from mlx_dsv3.reference.args import Args, check_tokens
from mlx_dsv3.reference.hub import HubTensors
from mlx_dsv3.reference.weights import Arithmetic


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add SOURCE and the flags that say how to compute."""
    original = "folder or hub id of the original checkpoint"
    parser.add_argument("source", metavar="SOURCE", help=original)
    parser.add_argument(
        "--arithmetic",
        choices=weights.NAMES,
        help="fp8 is that of the original code (default: fp8 for an FP8 checkpoint, else bf16)",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N (default: the first GPU, or the CPU where there is none)",
    )
    parser.add_argument(
        "--matmul", choices=backends.NAMES, default="auto", help="which code multiplies FP8"
    )


def resolve(source: str) -> Path:
    """Return the folder of a checkpoint; a hub id is downloaded through the hub's cache."""
    if Path(source).is_dir() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        return Path(source)
    from huggingface_hub import errors, snapshot_download

    spelling = "check the spelling; for a private one, `hf auth login`"
    again = "check the connection and repeat the same command, or give a folder that exists"
    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except errors.GatedRepoError:
        hint = f"accept its terms on huggingface.co/{source}, then `hf auth login`"
        raise UserError(f"`{source}` is gated", hint) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        message = f"there is no folder and no repository `{source}`, or it is private"
        raise UserError(message, spelling) from None
    except errors.LocalEntryNotFoundError:
        message = f"there is no folder `{source}`, and the hub cannot be reached"
        raise UserError(message, again) from None
    except Exception as error:  # httpx's, or a full disk; each version of the hub has others
        if isinstance(error, OSError) and error.strerror and error.filename:
            raise
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise UserError(f"`{source}` cannot be fetched: {reason}", again) from None


def open_checkpoint(args: argparse.Namespace, device: str) -> tuple[HubTensors, Arithmetic]:
    """Return the checkpoint that the flags name, and the arithmetic that they ask for."""
    backends.check_device(device)
    operations = backends.choose_operations(args.matmul, device)
    tensors = HubTensors(resolve(args.source))
    config = tensors.config
    Args.from_dict(config)
    check_tokens(config)
    name = args.arithmetic or ("fp8" if config.get("quantization_config") else "bf16")
    return tensors, weights.arithmetic_of(name, config, device, operations)


@contextmanager
def enough_memory(device: str) -> Iterator[None]:
    """Tell in a sentence where memory ends; torch has an error for each kind of it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not is_memory and "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(
            f"the memory of `{device}` does not suffice",
            "a shorter text, or fewer texts at once, take less; so does `--max-tokens`",
        ) from None


def open_tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.exists():
        hint = "download it; a recording also takes a `.json` file with one list of token ids"
        raise UserError(f"`{folder}` has no tokenizer.json", hint)
    text = read_text(file)
    check_count(text, f"`{file}`", most=MOST_WORDS)
    try:
        tokenizer = Tokenizer.from_str(text)
        tokenizer.encode("Hello", add_special_tokens=False)  # a word that it may lack
        return tokenizer
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a bare Exception, or a panic of Rust's, which is none
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"`{file}` is no tokenizer: {reason}", "fetch the file again") from None


def encode(tokenizer: Tokenizer, text: str, config: dict) -> list[int]:
    """Return the ids of a text, with BOS in front unless the text begins with it."""
    ids, bos = tokenizer.encode(text, add_special_tokens=False).ids, config.get("bos_token_id")
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def check_ids(ids: list[int], config: dict, what: str, num_more: int = 0) -> None:
    """Raise `UserError` for ids beyond the vocabulary, and for more than the model can place.

    `what` names where they come from; `num_more` tokens are to follow.
    """
    vocabulary, longest = config["vocab_size"], config.get("max_position_embeddings")
    if strange := [i for i in ids if not 0 <= i < vocabulary]:
        raise UserError(
            f"{what} holds the id {strange[0]}, outside the vocabulary of {vocabulary}",
            "is it of another model? its tokenizer.json makes the ids of a text",
        )
    if longest is not None and len(ids) + num_more > longest:
        more = f" and `--max-tokens` is {num_more:,}" if num_more else ""
        raise UserError(
            f"{what} has {len(ids):,} tokens{more}; `max_position_embeddings` is {longest:,}",
            "shorten it, or give a smaller `--max-tokens`",
        )
