"""A checkpoint on the hub: opened by its headers, shards fetched and checked against them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from convert.manifest import COPIED
from convert.source import (
    INDEX_FILE,
    SINGLE_FILE,
    Source,
    Tensor,
    check_index,
    read_header,
    read_index,
    refuse_config,
)
from mlx_dsv3.checkpoint.hub import HEADER_REQUESTS, Repo
from mlx_dsv3.config import read_config, read_json
from mlx_dsv3.errors import UserError


def open_repo(repo: Repo, prefix: Callable[[dict], str] = lambda _: "") -> Source:
    """Open a checkpoint on the hub by its headers; no shard is downloaded.

    `prefix` names, for a config.json, the tensors that matter; other shards are left alone.
    """
    folder = repo.small_files(("config.json", INDEX_FILE, *COPIED))
    config = read_config(folder)
    refuse_config(config)
    if (folder / INDEX_FILE).is_file():
        shards = read_index(read_json(folder / INDEX_FILE), INDEX_FILE, prefix(config))
    else:
        shards = {SINGLE_FILE: None}
    missing = [shard for shard in shards if shard not in repo.sizes]
    if missing:
        raise UserError(
            f"`{repo.repo_id}` has no `{missing[0]}` ({len(missing)} of {len(shards)} shards)",
            "give the repository of a whole checkpoint",
        )
    with ThreadPoolExecutor(HEADER_REQUESTS) as pool:
        headers = dict(zip(shards, pool.map(repo.header, shards), strict=True))
    source = Source(folder, config, headers)
    source.repo_id, source.revision = repo.repo_id, repo.revision
    source.sha256_of = {shard: repo.sha256[shard] for shard in shards if shard in repo.sha256}
    source.path_of = lambda shard: fetch_checked(repo, source, shard, None)
    source.read_small = lambda name: read_range(repo, source.tensors[name])
    check_index(source, shards)
    return source


def fetch_checked(repo: Repo, source: Source, shard: str, folder: Path | None) -> Path:
    """Fetch a shard and refuse it unless it has the header that was planned with."""
    path = repo.fetch(shard, folder)
    raw, size = source.headers[shard]
    if path.stat().st_size != size or read_header(path) != raw:
        path.unlink()
        raise UserError(
            f"`{shard}` is not the file that was planned with",
            "repeat the same command to fetch it again",
        )
    return path


def read_range(repo: Repo, tensor: Tensor) -> bytes:
    return repo.read(tensor.shard, tensor.start, tensor.nbytes)


def missing_in_cache(repo: Repo, source: Source) -> int:
    """Return the bytes of shards that the hub's cache does not hold yet."""
    from huggingface_hub import try_to_load_from_cache

    def is_cached(shard: str) -> bool:
        found = try_to_load_from_cache(repo.repo_id, shard, revision=repo.revision)
        return isinstance(found, str)

    return sum(size for shard, size in source.shard_bytes.items() if not is_cached(shard))
