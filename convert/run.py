"""The conversion itself: read, derive, write, note, all at the same time.

Reader threads fetch the next units' bytes; this thread alone builds and evaluates MLX graphs, on
one stream for each job where MLX runs on the CPU and on one stream on a GPU; writer threads hash
and write. A few units are in memory at any moment, whatever the size of the model.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from convert.destination import Destination
from convert.disk import flush_file, is_full_disk, sync_folder
from convert.download import Shards
from convert.identity import changed_shards
from convert.journal import Done, foreign
from convert.manifest import (
    device_kind,
    file_entry,
    make_manifest,
    write_json,
    write_small_files,
)
from convert.pipeline import ahead, evaluate, streams
from convert.plan import Plan, Unit
from convert.progress import Progress
from convert.quantize import Derived, num_sums
from convert.source import stamp
from convert.transform import read_unit
from convert.writer import Writer
from mlx_dsv3.checkpoint.format import MANIFEST
from mlx_dsv3.errors import UserError

SYNC_BYTES = 1 << 30
SYNC_SECONDS = 10.0
CACHE_BYTES = 256 << 20  # Metal would otherwise keep every freed buffer


def run(
    plan: Plan,
    destination: Destination,
    jobs: int,
    progress: Progress,
    small_files: Callable[[Plan, Path], list[str]] = write_small_files,
    shards: Shards | None = None,
) -> None:
    """Carry a plan out; `small_files` writes what is not a tensor and returns the names.

    `shards` brings the source's files while the work continues; None where they are all here.

    Raises `UserError` for a run by somebody else in the same folder, a damaged source, a disk that
    is too small or full. After any interruption the same call ends with the same bytes.
    """
    mx.set_cache_limit(CACHE_BYTES)
    head = {
        "command": destination.command,
        "recipe": plan.recipe.name,
        "source": plan.identity.as_dict(),
        "files": plan.source.stamps,
        "plan": plan.digest,
        "units": len(plan.units),
        "mlx": mx.__version__,
        "device": device_kind(),
    }
    try:
        destination.open(head)
        with awake():
            _Run(plan, destination, jobs, progress, shards).finish(head, small_files)
    except OSError as error:
        if is_full_disk(error):
            raise UserError(
                f"the disk of `{destination.folder}` is full; nothing that was converted is lost",
                "free some space and repeat the same command to continue",
            ) from error
        raise
    except KeyboardInterrupt:
        progress.note("stopped; repeat the same command to continue")
        raise
    finally:
        progress.stop()
        destination.close()


@contextmanager
def awake() -> Iterator[None]:
    """Keep a Mac from going to sleep for the time, by the system's own `caffeinate`."""
    if sys.platform != "darwin":
        yield
        return
    with subprocess.Popen(["caffeinate", "-i", "-w", str(os.getpid())]) as keeper:
        try:
            yield
        finally:
            keeper.terminate()


class _Run:
    """One run over the units that are not done yet."""

    def __init__(
        self,
        plan: Plan,
        destination: Destination,
        jobs: int,
        progress: Progress,
        shards: Shards | None,
    ):
        self.plan, self.destination, self.jobs, self.progress = plan, destination, jobs, progress
        self.shards = shards
        self.journal = destination.journal
        self.writer = Writer(destination.partial, plan.files)
        self.sync: Future | None = None
        self.sync_units: list[int] = []  # what the sync under way covers
        self.sync_s, self.bytes_since_sync = time.monotonic(), 0

    def finish(self, head: dict, small_files: Callable[[Plan, Path], list[str]]) -> None:
        """Do what is left: units, small files, checksums, renames."""
        if not self.journal.is_finishing:
            self.resume(head)
            self.convert()
            self.refuse_changes()
            self.complete_folder(small_files)
            self.journal.mark_finishing()
        self.destination.publish()

    def resume(self, head: dict) -> None:
        """Lay out the files, forget what changed shards gave, read back what no sync confirmed."""
        again = self.read_from(changed_shards(self.journal.head or head, head))
        self.check_units()
        unconfirmed = self.journal.begin(head, again)
        self.writer.lay_out()
        sync_folder(self.destination.partial)
        for index, done in unconfirmed.items():
            if self.writer.digest_on_disk(self.plan.units[index]) == done.sha256:
                self.journal.add(index, done)
        self.sync_now()
        finished = sum(self.plan.units[index].nbytes for index in self.journal.done)
        self.progress.start(sum(unit.nbytes for unit in self.plan.units), finished)

    def check_units(self) -> None:
        """Refuse a journal that notes units which this plan does not have."""
        units, is_fitted = self.plan.units, self.plan.recipe.is_fitted
        count = num_sums(is_fitted, self.plan.importance is not None)
        for index, done in (self.journal.done | self.journal.unsynced).items():
            is_known = 0 <= index < len(units) and len(done.errors) == len(units[index].targets)
            if not is_known or any(sums and len(sums) != count for sums in done.errors):
                raise foreign(self.journal.path, "notes other units than this conversion has")

    def read_from(self, shards: list[str]) -> list[int]:
        """Return the units that read from these shards, and say that they come again."""
        if not shards:
            return []
        source, changed = self.plan.source, set(shards)
        units = [unit for unit in self.plan.units if source.shards_of(unit.sources) & changed]
        if self.journal.done or self.journal.unsynced:
            more = f" and {len(shards) - 1} more were" if shards[1:] else " was"
            self.progress.note(f"`{shards[0]}`{more} changed: what came from there is redone")
        return [unit.index for unit in units]

    def convert(self) -> None:
        """Push every unit that is not done through reading, deriving and writing."""
        todo = [unit for unit in self.plan.units if unit.index not in self.journal.done]
        pools = [
            ThreadPoolExecutor(self.jobs),
            ThreadPoolExecutor(self.jobs),
            ThreadPoolExecutor(1),
        ]
        readers, writers, syncer = pools
        if self.shards:
            self.shards.start(self.plan.source, todo)
        try:
            raws = ahead(lambda unit: read_unit(self.plan.source, unit), todo, readers, self.jobs)
            derived = evaluate(raws, self.plan, streams(self.jobs))
            for (unit, outputs), sha256 in ahead(self.write, derived, writers, self.jobs):
                self.note_done(unit, outputs, sha256, syncer)
            self.sync_now()
        finally:
            if self.shards:
                self.shards.close()  # or a reader would wait for a shard that nobody needs
            for pool in pools:
                pool.shutdown(cancel_futures=True)

    def write(self, item: tuple[Unit, list[Derived]]) -> str:
        unit, outputs = item
        return self.writer.write(unit, [array for output in outputs for array in output.arrays])

    def note_done(self, unit: Unit, outputs: list[Derived], sha256: str, syncer) -> None:
        """Enter a written unit into the journal, and sync now and then."""
        errors = [None if output.errors is None else output.errors.tolist() for output in outputs]
        self.journal.add(unit.index, Done(sha256, errors))
        self.progress.advance(unit.nbytes, unit.file or "MTP copies")
        self.bytes_since_sync += unit.nbytes
        if self.sync and self.sync.done():
            self.end_sync()
        is_due = time.monotonic() - self.sync_s > SYNC_SECONDS or self.bytes_since_sync > SYNC_BYTES
        if is_due and not self.sync:
            self.start_sync(syncer)
        if self.shards and (finished := self.shards.finish(unit)):
            self.sync_now()  # the disk may have no room for the next shard
            self.shards.discard(finished)

    def start_sync(self, syncer: ThreadPoolExecutor) -> None:
        """Bring the files to the disk in the background; `end_sync` makes the journal claim it."""
        self.sync_units = list(self.journal.unsynced)
        self.sync_s, self.bytes_since_sync = time.monotonic(), 0
        self.sync = syncer.submit(self.writer.sync)

    def end_sync(self) -> None:
        """Wait for the sync under way; when it failed, nobody knows what reached the disk."""
        try:
            self.sync.result()
        except OSError:
            self.journal.drop_unsynced()
            raise
        self.sync = None
        self.journal.mark_synced(self.sync_units)

    def sync_now(self) -> None:
        """Bring everything to the disk and wait for it."""
        if self.sync:
            self.end_sync()
        with ThreadPoolExecutor(1) as syncer:
            self.start_sync(syncer)
        self.end_sync()

    def refuse_changes(self) -> None:
        """Refuse shards that were changed while they were read: nobody knows which units saw it."""
        stamps = self.plan.source.stamps
        paths = {shard: self.plan.source.path_of(shard) for shard in stamps}
        now = {shard: stamp(path) if path.exists() else None for shard, path in paths.items()}
        changed = [shard for shard in stamps if now[shard] != stamps[shard]]
        if changed:
            hint = "repeat the same command to convert it again"
            if len(changed) == len(stamps):  # perhaps another model: a resume would refuse it
                hint = f"delete `{self.destination.partial}` and repeat the same command"
            raise UserError(f"`{changed[0]}` was changed while it was converted", hint)

    def complete_folder(self, small_files: Callable[[Plan, Path], list[str]]) -> None:
        """Write everything that is not a tensor, conversion.json last, and bring it to the disk."""
        partial = self.destination.partial
        names = [*self.plan.files, *small_files(self.plan, partial)]
        with ThreadPoolExecutor(self.jobs) as pool:
            entries = pool.map(file_entry, [partial / name for name in names])
            files = dict(sorted(zip(names, entries, strict=True)))
        write_json(partial / MANIFEST, make_manifest(self.plan, self.journal.done, files))
        for name in (*names, MANIFEST):
            flush_file(partial / name)
        sync_folder(partial)
