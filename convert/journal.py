"""Which units are written, so that a killed conversion continues where it stopped.

One line a unit, with the sha256 of what was written and the unit's error sums. A `synced` line
names the units that are on the disk for certain; the others may have been lost with the power, so
a resume asks the caller to read them back. A torn or zeroed end fails its checksum and counts as
not written. A whole line that says what this version does not write is refused: to count it as
not written would overwrite what another version has converted. Knows neither the plan nor the
output files.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from convert.disk import flush, naming, write_at
from mlx_dsv3.checkpoint.unfinished import (
    MOST_LINE_BYTES,
    command_in,
    journal_line,
    journal_lines,
    parse_line,
)
from mlx_dsv3.errors import UserError

KINDS = {"head", "unit", "synced", "finishing"}
HEAD = {"recipe": str, "plan": str, "units": int, "mlx": str, "device": str}


class Done(NamedTuple):
    """A finished unit: digest of its bytes, and the sums of `error_sums` for each target."""

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
            if not path.is_file():  # a pipe would wait for ever
                raise foreign(path, "is not a file")
            self._read()
        self._file = None

    def _read(self) -> None:
        place = 0
        for raw in journal_lines(self.path):
            place += len(raw)
            if len(raw) == MOST_LINE_BYTES:
                raise foreign(self.path, f"has a line of {MOST_LINE_BYTES:,} bytes or more")
            text = parse_line(raw)
            if text is None:
                return
            entry = _entry(text)
            if entry is None or not set(entry.get("synced", ())) <= set(self.unsynced):
                raise foreign(self.path, "was written by another version, or by something else")
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

    @property
    def command(self) -> list[str]:
        """Return the command line that began, empty where nothing or an earlier version did."""
        return command_in(self.head)

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
        with naming(self.path):
            self._file.truncate(self._synced_bytes)
        self._file.seek(self._synced_bytes)

    def _append(self, entry: dict) -> None:
        with naming(self.path):
            write_at(self._file.fileno(), journal_line(entry), self._file.tell())
        self._file.seek(0, os.SEEK_END)

    def _commit(self) -> None:
        with naming(self.path):
            flush(self._file.fileno())
        self._synced_bytes = self._file.tell()


def foreign(path: Path, what: str) -> UserError:
    """Return the refusal of a journal that cannot be gone on with."""
    return UserError(
        f"`{path}` {what}",
        f"delete `{path.parent}` to begin anew, or choose another folder",
    )


def _entry(text: bytes) -> dict | None:
    """Return what a line says, or None unless it is what `Journal` writes."""
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or len(entry.keys() & KINDS) != 1:
        return None
    match entry:
        case {"unit": int(), "sha256": str(), "errors": list(errors)}:
            is_ours = all(pair is None or _are_sums(pair) for pair in errors)
        case {"head": dict(head)}:
            is_ours = _is_head(head) and _are_indexes(entry.get("again", []))
        case {"synced": units}:
            is_ours = _are_indexes(units)
        case {"finishing": True}:
            is_ours = True
        case _:
            is_ours = False
    return entry if is_ours else None


def _is_head(head: dict) -> bool:
    """Say whether `head` is one of `run`; what earlier versions did not write may lack."""
    source = head.get("source")
    files = head.get("files", {} if source is None else None)
    return (
        all(isinstance(head.get(key), kind) for key, kind in HEAD.items())
        and isinstance(source, dict | None)
        and all(isinstance(value, str | None) for value in (source or {}).values())
        and isinstance(files, dict)
    )


def _are_indexes(units: object) -> bool:
    """Say whether these are numbers of units, each once."""
    are_numbers = isinstance(units, list) and all(type(index) is int for index in units)
    return are_numbers and len(set(units)) == len(units)


def _are_sums(sums: object) -> bool:
    """Say whether these are sums of squared errors and of squares, as `error_sums` gives them."""
    is_pair = isinstance(sums, list) and len(sums) in (2, 3, 6)
    return is_pair and all(isinstance(n, int | float) and 0 <= n < math.inf for n in sums)
