"""A checkpoint on the hub: opened by its headers; its shards come while earlier ones are converted.

The order is that of the units. A few shards are fetched ahead; a unit that needs one waits for
it. With a folder of its own (`--discard-source`), a shard is deleted once every tensor in
it has been written and synced, so that the disk holds the result so far and a handful of shards:
`disk_peak` says how much.
"""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from convert.plan import Plan, Unit
from convert.source import COPIED, Source, check_index, convertible, needed_shards, read_bytes
from mlx_dsv3.checkpoint.format import INDEX
from mlx_dsv3.checkpoint.hub import HEADER_REQUESTS, Repo
from mlx_dsv3.config import read_config
from mlx_dsv3.errors import UserError

AHEAD = 2
WORKERS = 2
SMALL_BYTES = 32 << 20  # journal, index, tokenizer


class Shards:
    """Brings shards here; `path` blocks until one is there.

    Once `start` has said what is needed they are fetched ahead, in the order of need.
    """

    def __init__(self, repo: Repo, headers: dict[str, tuple[bytes, int]]):
        self.repo, self.headers = repo, headers
        self.folder: Path | None = None  # whose shards are ours to delete; None: the hub's cache
        self.source: Source | None = None
        self.changed = threading.Condition()
        self.order: list[str] = []
        self.left: Counter = Counter()  # shard -> units that still need it
        self.paths: dict[str, Path] = {}
        self.wanted: set[str] = set()
        self.num_begun = 0
        self.error: BaseException | None = None
        self.is_closed = False

    def discard_into(self, folder: Path) -> None:
        """Bring the shards into `folder` instead of the hub's cache, and delete them after use."""
        self.folder = folder

    def missing_bytes(self) -> int:
        """Return the bytes of shards that the hub's cache does not hold yet."""
        from huggingface_hub import try_to_load_from_cache

        def is_cached(shard: str) -> bool:
            repo = self.repo
            found = try_to_load_from_cache(repo.repo_id, shard, revision=repo.revision)
            return isinstance(found, str)

        return sum(size for shard, (_, size) in self.headers.items() if not is_cached(shard))

    def fetch(self, shard: str) -> Path:
        """Fetch a shard and refuse it unless it has the header that was planned with."""
        path, (raw, size) = self.repo.fetch(shard, self.folder), self.headers[shard]
        begin = len(raw).to_bytes(8, "little") + raw
        if path.stat().st_size != size or read_bytes(path, 0, len(begin)) != begin:
            path.unlink()
            raise UserError(
                f"`{shard}` is not the file that was planned with",
                "repeat the same command to fetch it again",
            )
        return path

    def start(self, source: Source, todo: list[Unit]) -> None:
        """Begin to fetch what the units `todo` need; discard what an earlier run has finished."""
        self.source = source
        for unit in todo:
            self.left.update(source.shards_of(unit.sources))
        self.order = order_of_need(source, todo)
        if self.folder:
            self.folder.mkdir(exist_ok=True)
            for path in self.folder.iterdir():
                if path.name.removesuffix(".part") not in self.left:
                    path.unlink()
        for _ in range(WORKERS):
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.is_closed or self._may_begin())
                if self.is_closed or self.num_begun == len(self.order):
                    return
                shard = self.order[self.num_begun]
                self.num_begun += 1
            try:
                path = self.fetch(shard)
            except BaseException as error:  # handed to the thread that waits for the shard
                with self.changed:
                    self.error, self.is_closed = error, True
                    self.changed.notify_all()
                return
            with self.changed:
                self.paths[shard] = path
                self.changed.notify_all()

    def _may_begin(self) -> bool:
        """Say whether the next shard may come: it is wanted, or few are ahead of the work."""
        if self.num_begun == len(self.order) or self.order[self.num_begun] in self.wanted:
            return True
        ahead = [shard for shard in self.order[: self.num_begun] if shard not in self.wanted]
        return len(ahead) < AHEAD

    def path(self, shard: str) -> Path:
        """Return where a shard lies, when it does; raise what went wrong with a download."""
        if not self.source:  # a few tensors are wanted, of which nobody knows the order
            return self.fetch(shard)
        with self.changed:
            self.wanted.add(shard)
            self.changed.notify_all()
            self.changed.wait_for(lambda: shard in self.paths or self.error or self.is_closed)
            if shard not in self.paths:
                raise self.error or RuntimeError(f"`{shard}` was asked for after the end")
            return self.paths[shard]

    def finish(self, unit: Unit) -> list[str]:
        """Note a unit as written; return the shards that may go after the next sync."""
        shards = self.source.shards_of(unit.sources)
        self.left.subtract(shards)
        return [shard for shard in shards if self.folder and not self.left[shard]]

    def discard(self, shards: list[str]) -> None:
        for shard in shards:
            self.paths[shard].unlink()

    def close(self) -> None:
        """Let the threads end; a download under way is left where it is."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()


def open_repo(repo: Repo, only_mtp: bool = False) -> tuple[Source, Shards]:
    """Open a checkpoint on the hub by its headers; no shard is downloaded.

    With `only_mtp`, shards that hold nothing of the MTP layer are left alone.
    """
    folder = repo.small_files(("config.json", INDEX, *COPIED))
    config = read_config(folder)
    names = needed_shards(folder, convertible(config), only_mtp)
    missing = [shard for shard in names if shard not in repo.sizes]
    if missing:
        raise UserError(
            f"`{repo.repo_id}` has no `{missing[0]}` ({len(missing)} of {len(names)} shards)",
            "give the repository of a whole checkpoint",
        )
    with ThreadPoolExecutor(HEADER_REQUESTS) as pool:
        headers = dict(zip(names, pool.map(repo.header, names), strict=True))
    shards = Shards(repo, headers)
    source = Source(folder, config, headers, repo=repo, path_of=shards.path)
    check_index(source, names)
    return source, shards


def order_of_need(source: Source, units: list[Unit]) -> list[str]:
    """Return the shards in the order in which units first need them."""
    order: dict[str, None] = {}
    for unit in units:
        order.update(dict.fromkeys(sorted(source.shards_of(unit.sources))))
    return list(order)


def disk_peak(plan: Plan, jobs: int) -> int:
    """Return the most bytes that result and shards take together when shards are discarded.

    At each unit: what is written so far, the shards that it or any unit still in the pipeline or
    still to come needs and that have been fetched, and the shards that are fetched ahead.
    """
    pipeline = 4 * (jobs + 1)
    order = order_of_need(plan.source, plan.units)
    size = plan.source.shard_bytes
    needs = [plan.source.shards_of(unit.sources) for unit in plan.units]
    last = {shard: i for i, shards in enumerate(needs) for shard in shards}
    place = {shard: i for i, shard in enumerate(order)}
    headers = sum(len(file.header) for file in plan.files.values())
    written, fetched, peak = headers, 0, 0
    for i, (unit, shards) in enumerate(zip(plan.units, needs, strict=True)):
        fetched = max(fetched, 1 + max(place[shard] for shard in shards))
        present = [shard for shard in order[:fetched] if last[shard] >= i - pipeline]
        present += order[fetched : fetched + AHEAD]
        written += unit.nbytes
        peak = max(peak, written + sum(size[shard] for shard in present))
    return peak + SMALL_BYTES
