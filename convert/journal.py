"""Which units are written, so that a killed conversion continues where it stopped.

One line a unit, with the sha256 of what was written and the unit's error sums. A `synced` line
names the units that are on the disk for certain; the others may have been lost with the power, so
a resume asks the caller to read them back. A torn or zeroed end fails its checksum and counts as
not written. Knows neither the plan nor the output files.
"""

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from convert.disk import flush, write_at


class Done(NamedTuple):
    """A finished unit: digest of its bytes, and [squared errors, squares] for each target."""

    sha256: str
    errors: list[list[float] | None]


class Journal:
    """The journal of one destination; `done` maps a unit's index to what is known of it."""

    def __init__(self, path: Path):
        """Read what an earlier run left; `head` is None for a new or unreadable journal."""
        self.path = path
        self.head: dict | None = None
        self.is_finishing = False
        self.done: dict[int, Done] = {}
        self.unsynced: dict[int, Done] = {}
        self._synced_bytes = 0
        if path.exists():
            self._read(path.read_bytes())
        self._file = None

    def _read(self, data: bytes) -> None:
        place = 0
        for raw in data.splitlines(keepends=True):
            place += len(raw)
            entry = _parse(raw)
            if entry is None:
                return
            if "unit" in entry:
                self.unsynced[entry["unit"]] = Done(entry["sha256"], entry["errors"])
                continue
            if "head" in entry:
                self.head = entry["head"]
                self._forget(entry.get("again", ()))
            self.is_finishing = self.is_finishing or "finishing" in entry
            for index in entry.get("synced", ()):
                self.done[index] = self.unsynced.pop(index)
            self._synced_bytes = place

    def begin(self, head: dict, again: Iterable[int] = ()) -> dict[int, Done]:
        """Open for appending and return the units that must be read back before they count.

        What follows the last synced line is cut off; the caller adds again what it confirms. The
        units `again` are forgotten, in the line that makes `head` the journal's.
        """
        again = list(again)
        self._forget(again)
        unconfirmed, self.unsynced = self.unsynced, {}
        self._file = open(self.path, "r+b" if self.path.exists() else "w+b", buffering=0)
        self._cut()
        if self.head != head:
            self.head = head
            self._append({"head": head, "again": again} if again else {"head": head})
            self._commit()
        return unconfirmed

    def add(self, index: int, done: Done) -> None:
        """Note a unit whose bytes were handed to the operating system."""
        self.done[index] = self.unsynced[index] = done
        self._append({"unit": index, "sha256": done.sha256, "errors": done.errors})

    def mark_synced(self, units: list[int]) -> None:
        """Note that these units, each added before, are on the disk."""
        for index in units:
            del self.unsynced[index]
        self._append({"synced": units})
        self._commit()

    def mark_finishing(self) -> None:
        """Note that everything is written and only renaming is left."""
        self._append({"finishing": True})
        self._commit()

    def drop_unsynced(self) -> None:
        """Forget what no mark covers: after a failed sync nobody knows what reached the disk."""
        self.unsynced.clear()
        self._cut()

    def _forget(self, units: Iterable[int]) -> None:
        for index in units:
            self.done.pop(index, None)
            self.unsynced.pop(index, None)

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _cut(self) -> None:
        self._file.truncate(self._synced_bytes)
        self._file.seek(self._synced_bytes)

    def _append(self, entry: dict) -> None:
        text = json.dumps(entry, separators=(",", ":")).encode()
        write_at(self._file.fileno(), b"%08x %s\n" % (zlib.crc32(text), text), self._file.tell())
        self._file.seek(0, os.SEEK_END)

    def _commit(self) -> None:
        flush(self._file.fileno())
        self._synced_bytes = self._file.tell()


def _parse(raw: bytes) -> dict | None:
    """Return a line's entry, or None where the line is torn."""
    checksum, _, text = raw.rstrip(b"\n").partition(b" ")
    if not raw.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    return json.loads(text)
