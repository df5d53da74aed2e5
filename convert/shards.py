"""Shards that come while earlier ones are converted, and go when nothing needs them any more.

The order is that of the units. A few shards are fetched ahead; a unit that needs one waits for
it. With a folder of its own (`--discard-source`), a shard is deleted once every tensor in
it has been written and synced, so that the disk holds the result so far and a handful of shards:
`disk_peak` says how much.
"""

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from convert.outputs import Unit
from convert.plan import Plan, shards_of

DEFAULT_JOBS = 2  # each holds about 0.3 GB at V3's shapes; two keep a disk and two cores busy
AHEAD = 2
WORKERS = 2
SMALL_BYTES = 32 << 20  # journal, index, tokenizer


class Shards:
    """Fetches shards in the order of need; `path` blocks until one is there."""

    def __init__(self, plan: Plan, fetch: Callable[[str], Path], folder: Path | None):
        """Take what fetches one shard, and the folder whose shards are ours to discard."""
        self.plan, self.fetch, self.folder = plan, fetch, folder
        self.changed = threading.Condition()
        self.order: list[str] = []
        self.left: Counter = Counter()  # shard -> units that still need it
        self.paths: dict[str, Path] = {}
        self.wanted: set[str] = set()
        self.num_begun = 0
        self.error: BaseException | None = None
        self.is_closed = False

    def start(self, todo: list[Unit]) -> None:
        """Begin to fetch what the units `todo` need; discard what an earlier run has finished."""
        for unit in todo:
            self.left.update(shards_of(self.plan.source, unit))
        self.order = order_of_need(self.plan, todo)
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
        with self.changed:
            self.wanted.add(shard)
            self.changed.notify_all()
            self.changed.wait_for(lambda: shard in self.paths or self.error or self.is_closed)
            if shard not in self.paths:
                raise self.error or RuntimeError(f"`{shard}` was asked for after the end")
            return self.paths[shard]

    def finish(self, unit: Unit) -> list[str]:
        """Note a unit as written; return the shards that may go after the next sync."""
        shards = shards_of(self.plan.source, unit)
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


def order_of_need(plan: Plan, units: list[Unit]) -> list[str]:
    """Return the shards in the order in which units first need them."""
    order: dict[str, None] = {}
    for unit in units:
        order.update(dict.fromkeys(sorted(shards_of(plan.source, unit))))
    return list(order)


def disk_peak(plan: Plan, jobs: int) -> int:
    """Return the most bytes that result and shards take together when shards are discarded.

    At each unit: what is written so far, the shards that it or any unit still in the pipeline or
    still to come needs and that have been fetched, and the shards that are fetched ahead.
    """
    pipeline = 4 * (jobs + 1)
    order = order_of_need(plan, plan.units)
    size = plan.source.shard_bytes
    needs = [shards_of(plan.source, unit) for unit in plan.units]
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
