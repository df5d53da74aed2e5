"""A checkpoint on the hub: opened by its headers, shards fetched and checked against them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from convert.manifest import COPIED
from convert.source import Source, check_index, needed_shards, refuse_config
from mlx_dsv3.checkpoint.format import INDEX
from mlx_dsv3.checkpoint.headers import TensorInfo, read_raw_header
from mlx_dsv3.checkpoint.hub import HEADER_REQUESTS, Repo
from mlx_dsv3.config import ModelArgs, read_config
from mlx_dsv3.errors import UserError


def open_repo(repo: Repo, only_mtp: bool = False) -> Source:
    """Open a checkpoint on the hub by its headers; no shard is downloaded.

    With `only_mtp`, shards that hold nothing of the MTP layer are left alone.
    """
    folder = repo.small_files(("config.json", INDEX, *COPIED))
    config = read_config(folder)
    refuse_config(config)
    shards = needed_shards(folder, ModelArgs.from_dict(config), only_mtp)
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
    if read_raw_header(path) != source.headers[shard]:
        path.unlink()
        raise UserError(
            f"`{shard}` is not the file that was planned with",
            "repeat the same command to fetch it again",
        )
    return path


def read_range(repo: Repo, tensor: TensorInfo) -> bytes:
    return repo.read(tensor.shard, tensor.offset, tensor.nbytes)


def missing_in_cache(repo: Repo, source: Source) -> int:
    """Return the bytes of shards that the hub's cache does not hold yet."""
    from huggingface_hub import try_to_load_from_cache

    def is_cached(shard: str) -> bool:
        found = try_to_load_from_cache(repo.repo_id, shard, revision=repo.revision)
        return isinstance(found, str)

    return sum(size for shard, size in source.shard_bytes.items() if not is_cached(shard))
