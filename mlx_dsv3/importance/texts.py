"""Texts, cut into windows of tokens; and what tells one measurement from another."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from mlx_dsv3.checkpoint.folder import Folder
from mlx_dsv3.checkpoint.format import MANIFEST, read_manifest
from mlx_dsv3.checkpoint.importance import FORMAT, least_rows
from mlx_dsv3.errors import UserError, read_text
from mlx_dsv3.load import load_checked_tokenizer
from mlx_dsv3.parity.perplexity import ids_of, windows


@dataclass
class Texts:
    """Windows of several texts, and of each text what a file of importance says of it."""

    windows: list[list[int]]
    about: list[dict[str, str | int]]

    @property
    def rows(self) -> int:
        return sum(map(len, self.windows))


def read_texts(folder: Folder, files: list[Path], context: int, trusts: bool) -> Texts:
    """Cut texts into windows of `context` tokens, BOS included, as `parity perplexity` does.

    Raises `UserError` for a text that does not fill one, and for too few tokens in all.
    """
    texts, bos = [read_text(file) for file in files], folder.config.get("bos_token_id")
    tokenizer = load_checked_tokenizer(folder.path, folder.args, folder.config, trusts)
    cut, about = [], []
    for file, text in zip(files, texts, strict=True):
        ids = ids_of(tokenizer, text, bos)
        whole = context - (bos is not None)
        if len(ids) < whole:
            hint = "give a longer text"
            if len(ids) > 16:
                hint += f", or `--context {len(ids) + context - whole}` for shorter windows"
            raise UserError(f"`{file}` has {len(ids):,} tokens; a window takes {whole:,}", hint)
        cut += windows(ids, bos, context)
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        about.append({"name": file.name, "sha256": sha256, "tokens": len(ids)})
    cut.sort(key=len, reverse=True)  # those of one length run together
    found = Texts(cut, about)
    if found.rows < (least := least_rows(folder.args)):
        raise UserError(
            f"the text has {found.rows:,} tokens; {least:,} are the least for this model",
            "give a longer text, or several after `--text`",
        )
    return found


def describe(folder: Folder, texts: Texts, context: int, dtype: str) -> dict[str, str]:
    """Return a file's metadata; `key` tells this measurement from every other."""
    is_ours = (folder.path / MANIFEST).is_file()
    manifest = read_manifest(folder.path) if is_ours else {"source": {}, "recipe": {"name": ""}}
    about = {
        "kind": "importance",
        "format": FORMAT,
        "model": folder.path.resolve().name,
        "recipe": manifest["recipe"]["name"],
        "source": json.dumps(manifest["source"]),
        "texts": json.dumps(texts.about),
        "rows": str(texts.rows),
        "context": str(context),
        "activations": dtype,
        "num_experts_per_tok": str(folder.args.num_experts_per_tok),
    }
    return about | {"key": digest(about, folder, manifest)}


def digest(about: dict[str, str], folder: Folder, manifest: dict) -> str:
    """Return what a measurement is known by: weights, texts, windows, activations.

    Weights are known by conversion.json, or by size and time where there is none.
    """
    files = sorted({info.path for info in folder.all_tensors.values()})
    known = manifest.get("digest")
    if not known and folder.repo is None:
        known = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    told = [about, known or folder.repo.revision, [file.name for file in files], folder.config]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
