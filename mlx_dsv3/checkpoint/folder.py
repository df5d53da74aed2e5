"""An MLX folder as its headers describe it, checked; on this machine, or still on the hub.

MODEL is a path or a hub id. A repository is used from huggingface_hub's cache where all its files
are there, without asking the hub; else it is opened by range requests, so that a plan can be made
and refused before anything large is fetched. `fetch` then brings what is lacking.
"""

import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import filter as matching
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

from mlx_dsv3.checkpoint.format import (
    INDEX,
    MANIFEST,
    PARTIAL,
    SIDECAR,
    SINGLE,
    WEIGHTS,
    check_counts,
    check_tensors,
    mtp_prefix,
    read_index,
    read_manifest,
)
from mlx_dsv3.checkpoint.headers import (
    TensorInfo,
    join_headers,
    parse_header,
    read_header,
)
from mlx_dsv3.checkpoint.hub import HEADER_REQUESTS, Repo, cached_snapshots, is_repo_id
from mlx_dsv3.checkpoint.unfinished import how_to_finish, lacks_sidecar
from mlx_dsv3.config import ModelArgs, read_config
from mlx_dsv3.errors import UserError, in_line
from mlx_dsv3.sizes import gigabytes

# What belongs to a model besides its weights.
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*")
TOKENIZERS = ("tokenizer.json", "*.model", "*.tiktoken")
CONVERT_HINT = "`python -m convert run {} OUT` makes an MLX folder of a hub checkpoint"
INCOMPLETE_HINT = "the folder is incomplete; convert or download it again"


@dataclass
class Folder:
    """`tensors` are the main model's, `sidecar` the MTP module's, by name.

    With a `repo` the weights are not all in `path` yet; `fetch` brings them.
    """

    path: Path
    config: dict
    args: ModelArgs
    tensors: dict[str, TensorInfo]
    sidecar: dict[str, TensorInfo]
    repo: Repo | None = None

    @property
    def all_tensors(self) -> dict[str, TensorInfo]:
        return self.tensors | self.sidecar


def open_model(model: str | Path | Folder, with_mtp: bool = True) -> Folder:
    """Open MODEL by its headers: a path, or, as a str, a hub id where there is no such path.

    Without `with_mtp` the MTP module is left out, as where the folder has none. Raises `UserError`
    for what cannot be run.
    """
    if isinstance(model, Folder):
        return model if with_mtp else replace(model, sidecar={})
    if isinstance(model, Path) or Path(model).exists() or not is_repo_id(model):
        return open_folder(Path(model), with_mtp)
    snapshots = cached_snapshots(model)
    for snapshot in snapshots:
        if is_complete(snapshot, with_mtp):
            return open_folder(snapshot, with_mtp)
    try:
        return open_repo(Repo(model, waits=()), with_mtp)
    except UserError as error:
        if any(is_complete(snapshot, with_mtp=False) for snapshot in snapshots):
            hint = f"only `{SIDECAR}` is not on this machine: `--drafts 0` does without it"
            raise UserError(error.message, hint) from None
        raise


def open_folder(path: Path, with_mtp: bool = True) -> Folder:
    """Read the headers of an MLX folder on this machine."""
    if not path.is_dir():
        raise UserError(f"`{path}` is not a folder", "give an MLX folder, or `make demo` for one")
    return describe(path, str(path), files_in(path) - left_out(with_mtp), read_header)


def left_out(with_mtp: bool) -> set[str]:
    """Return the files that are not looked at."""
    return set() if with_mtp else {SIDECAR}


def files_in(path: Path) -> set[str]:
    """Return the names that exist in a folder; a cache may hold links to nothing."""
    return {file.name for file in path.iterdir() if file.exists()}


def open_repo(repo: Repo, with_mtp: bool = True) -> Folder:
    """Read the headers of a repository by range requests, and fetch its small files."""
    path, present = repo.small_files(SMALL_FILES), set(repo.sizes) - left_out(with_mtp)
    ModelArgs.from_dict(check_config(path, repo.repo_id))  # before a request for each shard
    names = [*weight_names(path, repo.repo_id, present), *({SIDECAR} & present)]
    with ThreadPoolExecutor(HEADER_REQUESTS) as pool:
        raw = dict(zip(names, pool.map(repo.header, names), strict=True))

    def header(file: Path) -> dict[str, TensorInfo]:
        return parse_header(file, *raw[file.name])

    return replace(describe(path, repo.repo_id, present, header), repo=repo)


def describe(path: Path, name: str, present: set[str], header: Callable[[Path], dict]) -> Folder:
    """Return a folder of which the files `present` exist; `name` is what the user called it."""
    if PARTIAL in present:
        present = present - left_unfinished(path, name, present)
    config = check_config(path, name)
    args = ModelArgs.from_dict(config)
    files = weight_names(path, name, present)
    tensors = join_headers(header(path / file) for file in files)
    check_index(path, name, tensors)
    if any(key.startswith(mtp_prefix(args)) for key in tensors):
        raise UserError(
            f"`{name}` is a hub checkpoint (its shards hold the MTP layer), not an MLX folder",
            CONVERT_HINT.format(name),
        )
    check_counts(args, tensors)
    sidecar = header(path / SIDECAR) if SIDECAR in present else {}
    check_tensors(tensors | sidecar)
    return Folder(path, config, args, tensors, sidecar)


def left_unfinished(path: Path, name: str, present: set[str]) -> set[str]:
    """Return what is not to be looked at while `.partial` is there; refuse where nothing else is.

    The main model of a folder that `convert mtp` has begun with is as whole as before.
    """
    command = how_to_finish(path, name)
    if "config.json" not in present:
        raise UserError(
            f"`{name}` is still in conversion (it holds `{PARTIAL}`)", f"`{command}` finishes it"
        )
    if not lacks_sidecar(path):
        return set()
    note = f"`{name}` is used without its MTP layer, which `{command}` has yet to finish"
    print(in_line(note), file=sys.stderr)
    return {SIDECAR}


def check_config(path: Path, name: str) -> dict:
    """Return the config of an MLX folder; raise `UserError` for that of a hub checkpoint."""
    config = read_config(path)
    quantization = config.get("quantization_config") or {}
    if "quant_method" in quantization and "quantization" not in config:
        raise UserError(
            f"`{name}` is a hub checkpoint (quantization method "
            f"`{quantization['quant_method']}`), not an MLX folder",
            CONVERT_HINT.format(name),
        )
    return config


def weight_names(path: Path, name: str, present: set[str]) -> list[str]:
    """Return the weight files: those of the index, else every `model*.safetensors`."""
    if INDEX in present:
        files = list(read_index(path))
    else:
        files = sorted(file for file in present if fnmatch(file, WEIGHTS) and "/" not in file)
    if not files:
        inner = [*map(str, path.glob("*/*.safetensors")), *matching(present, "*/*.safetensors")]
        hint = f"weights lie beside config.json; there is `{min(inner)}`" if inner else ""
        raise UserError(
            f"`{name}` has no weights (no `{WEIGHTS}`)", hint or CONVERT_HINT.format(name)
        )
    for file in files:
        if file not in present:
            raise UserError(
                f"`{file}` is missing from `{name}`; its index names it", INCOMPLETE_HINT
            )
    return files


def check_index(path: Path, name: str, tensors: dict[str, TensorInfo]) -> None:
    """Refuse an index that names tensors which no file holds."""
    if not (path / INDEX).is_file():
        return
    for key in chain.from_iterable(read_index(path).values()):
        if key not in tensors:
            raise UserError(
                f"the index of `{name}` names `{key}`, which is in none of its files",
                INCOMPLETE_HINT,
            )


def is_complete(snapshot: Path, with_mtp: bool) -> bool:
    """Say whether a cached revision has every file that it needs; other tools leave some out.

    Without an index that is known of a single file only.
    """
    present = files_in(snapshot)
    has_tokenizer = any(fnmatch(file, word) for file in present for word in TOKENIZERS)
    if "config.json" not in present or not has_tokenizer:
        return False
    needed = {SIDECAR} if with_mtp and MANIFEST in present else set()
    if needed:
        needed &= set(read_manifest(snapshot)["files"])
    if INDEX in present:
        needed |= set(read_index(snapshot))
    else:
        needed |= {SINGLE}
    return needed <= present


def fetch(folder: Folder) -> Folder:
    """Bring what is still on the hub into huggingface_hub's cache, the sidecar first.

    Says on stderr what is fetched, and where to. An interrupted download resumes there.
    """
    if folder.repo is None:
        return folder
    repo = folder.repo
    names = {info.path.name for info in folder.all_tensors.values()}
    missing = sorted(names - files_in(folder.path), key=lambda name: (name != SIDECAR, name))
    blobs = folder.path.parents[1] / "blobs"  # what is there lacks only its link
    lacking = [name for name in missing if not (blobs / repo.sha256.get(name, "none")).exists()]
    wanted = sum(repo.sizes[name] for name in lacking)
    if wanted > (free := shutil.disk_usage(folder.path).free):
        raise UserError(
            f"`{repo.repo_id}` lacks {gigabytes(wanted)} on this machine, and the disk of "
            f"`{folder.path}` has {gigabytes(free)} free",
            "make room, or set HF_HOME to a folder on a larger disk",
        )
    if lacking:
        print(f"fetching {gigabytes(wanted)} of `{repo.repo_id}`", file=sys.stderr)
    for name in missing:
        repo.fetch(name, None)
    return open_folder(folder.path, with_mtp=bool(folder.sidecar))
