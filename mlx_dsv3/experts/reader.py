"""Threads that read byte ranges into buffers: jobs go in, a batch to wait for comes out.

Knows files and buffers; no bank, no slot, no dtype and no MLX. A plain queue, not an executor:
8 cached reads of 200 KB take 195 us through the queue and 317 us as futures, 24 take 387 and
676 us (Linux, 2 cores). A small model's experts are such reads, several in each layer.
"""

import fcntl
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mlx_dsv3.errors import UserError

NUM_READERS = 12
LOAD_AGAIN = "load it again"


class Job(NamedTuple):
    """One read of adjacent bytes.

    `place` is called when the read begins, on its thread. It returns the buffers that the bytes
    fill in turn, and what is called then, or None.
    """

    path: Path
    offset: int
    nbytes: int
    place: Callable[[], tuple[list, Callable[[], None] | None]]


class Batch:
    """Jobs given to the threads together."""

    def __init__(self, count: int):
        self.left = count  # jobs that have not ended
        self.error: BaseException | None = None  # once set, jobs that have not begun are skipped
        self.begun = self.ended = time.perf_counter()
        self._lock = threading.Lock()  # of the threads
        self._all_ended = threading.Lock()  # held until nothing is left
        self._all_ended.acquire()

    def run(self, read: Callable[[Job], None], job: Job) -> None:
        """Do a job, on one of several threads."""
        error = None
        try:
            if self.error is None:
                read(job)
        except BaseException as caught:  # for the thread that waits
            error = caught
        with self._lock:
            if error is not None:  # never written over: the batch may be abandoned meanwhile
                self.error = error
            self.left -= 1
            if not self.left:
                self.ended = time.perf_counter()
                self._all_ended.release()

    def is_done(self, timeout_s: float) -> bool:
        """Wait at most so long; say whether every job has ended."""
        if self.left:  # one call of C, so that Ctrl-C finds no lock half taken, as in an Event
            self._all_ended.acquire(timeout=timeout_s)
        return not self.left

    def abandon(self) -> None:
        """Skip the jobs that have not begun; those under way must still be waited for."""
        if self.left:
            self.error = self.error or InterruptedError("the reads were abandoned")


@dataclass
class Files:
    """Descriptors by path, opened once. On macOS reads bypass the page cache (`F_NOCACHE`):
    the bank is the cache, and holding the same bytes twice is the commonest self-made loss."""

    descriptors: dict[Path, int] = field(default_factory=dict)

    def open(self, path: Path) -> int:
        if path not in self.descriptors:
            fd = os.open(path, os.O_RDONLY)
            if hasattr(fcntl, "F_NOCACHE"):
                fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
            self.descriptors[path] = fd
        return self.descriptors[path]

    def close(self) -> None:
        for fd in self.descriptors.values():
            os.close(fd)
        self.descriptors.clear()

    __del__ = close


class Reader:
    """The threads, and the files that they read.

    A thread holds the queue alone, so a reader that is dropped ends its threads as `close` does.
    """

    def __init__(self):
        self.files = Files()
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [
            threading.Thread(
                target=serve, args=(self._queue,), daemon=True, name=f"expert-reader-{i}"
            )
            for i in range(NUM_READERS)
        ]
        for thread in self._threads:
            thread.start()
        weakref.finalize(self, stop, self._queue).atexit = False

    def begin(self, jobs: list[Job]) -> Batch:
        """Give jobs to the threads; their files were opened before."""
        if not self._threads:
            raise UserError("the model was closed and its experts are no longer read", LOAD_AGAIN)
        batch = Batch(len(jobs))
        for job in jobs:
            self._queue.put((batch, job, self.read))
        return batch

    def read(self, job: Job) -> None:
        buffers, finish = job.place()
        read_exactly(self.files.open(job.path), buffers, job.offset, job.path)
        if finish is not None:
            finish()

    def close(self) -> None:
        """Stop the threads once they have done what they were given; close the files."""
        stop(self._queue)
        for thread in self._threads:
            thread.join()
        self._threads = []
        self.files.close()


def serve(jobs: queue.SimpleQueue) -> None:
    """Do jobs until there are no more, on one of several threads."""
    while (work := jobs.get()) is not None:
        batch, job, read = work
        batch.run(read, job)
        del work, batch, job, read  # or the bank would stay in memory while this thread waits


def stop(jobs: queue.SimpleQueue) -> None:
    """End the threads behind a queue."""
    for _ in range(NUM_READERS):
        jobs.put(None)


def read_exactly(fd: int, buffers: list, offset: int, path: Path) -> None:
    """Fill the buffers from `offset` on; raise `UserError` at a short file or a read error."""
    wanted, done = sum(len(buffer) for buffer in buffers), 0
    while done < wanted:
        try:
            count = os.preadv(fd, buffers, offset + done)
        except OSError as error:
            raise UserError(
                f"reading `{path}` at byte {offset + done} failed: {error.strerror}",
                "check the disk; the session continues",
            ) from None
        if count == 0:
            raise UserError(
                f"`{path}` ends at byte {offset + done}, inside an expert",
                "the file was cut; convert or download it again",
            )
        done += count
        while buffers and count >= len(buffers[0]):
            count -= len(buffers[0])
            buffers = buffers[1:]
        if buffers and count:
            buffers = [memoryview(buffers[0])[count:], *buffers[1:]]
