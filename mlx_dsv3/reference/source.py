"""What both programs begin with: the checkpoint's folder, the ids of a text, the arithmetic."""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer

from mlx_dsv3.errors import UserError
from mlx_dsv3.reference import backends, weights
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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--matmul", choices=backends.NAMES, default="auto", help="which code multiplies FP8"
    )


def resolve(source: str) -> Path:
    """Return the folder of a checkpoint; a hub id is downloaded through the hub's cache."""
    if Path(source).is_dir() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))


def choose_arithmetic(args: argparse.Namespace, config: dict, device: str) -> Arithmetic:
    """Return the arithmetic that the flags ask for, by default the checkpoint's own."""
    name = args.arithmetic or ("fp8" if "quantization_config" in config else "bf16")
    operations = backends.choose_operations(args.matmul, device)
    return weights.arithmetic_of(name, config, device, operations)


def open_tokenizer(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        hint = "download it; a recording also takes a `.json` file with one list of token ids"
        raise UserError(f"`{folder}` has no tokenizer.json", hint)
    return Tokenizer.from_file(str(file))


def encode(tokenizer: Tokenizer, text: str, config: dict) -> list[int]:
    """Return the ids of a text, with BOS in front unless the text begins with it."""
    ids, bos = tokenizer.encode(text, add_special_tokens=False).ids, config.get("bos_token_id")
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
