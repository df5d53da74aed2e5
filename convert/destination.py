"""The folder that a conversion goes into: who may write there, and how it becomes final.

Everything lies in `DEST/.partial/` until it is complete; then the files are renamed into DEST, and
config.json last, so that a folder with a config.json and without `.partial` is whole. A lock file
keeps a second run out. Knows nothing of tensors.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from convert.journal import Journal
from convert.progress import size
from convert.writer import sync_folder
from mlx_dsv3.config import read_json
from mlx_dsv3.errors import UserError

PARTIAL = ".partial"
JOURNAL = "journal"
LOCK = "lock"
SHARDS = "source"
RECORD_FILE = "conversion.json"


class Destination:
    """DEST with its `.partial`; `open` takes the lock and the journal, `publish` ends it all."""

    def __init__(self, folder: Path):
        self.folder, self.partial = folder, folder / PARTIAL
        self.journal: Journal | None = None
        self._lock = None

    def is_complete(self, digest: str) -> bool:
        """Say whether a conversion with this plan's digest is finished here.

        Raises `UserError` when the folder holds anything but our own unfinished work.
        """
        if not self.folder.exists():
            return False
        if not self.folder.is_dir():
            raise UserError(f"`{self.folder}` is no folder", "choose another destination")
        names = {path.name for path in self.folder.iterdir()}
        if PARTIAL in names and (self.partial / JOURNAL).exists():
            return False
        if {RECORD_FILE, "config.json"} <= names:
            return self._is_ours(digest, names)
        if names - {PARTIAL}:
            raise UserError(
                f"`{self.folder}` holds something else (`{min(names - {PARTIAL})}`)",
                "choose a new or an empty folder",
            )
        return False

    def _is_ours(self, digest: str, names: set[str]) -> bool:
        record = read_json(self.folder / RECORD_FILE)
        if record.get("plan") != digest:
            recipe = (record.get("recipe") or {}).get("name")
            raise UserError(
                f"`{self.folder}` holds a finished conversion (recipe `{recipe}`) "
                "of another source, recipe or layout",
                "choose another folder",
            )
        if PARTIAL in names:  # killed after the journal went and before the folder did
            self._remove_partial()
        return True

    def open(self, head: dict) -> None:
        """Create `.partial`, take its lock and read its journal.

        `head` says what this run is (recipe, plan, MLX version, device) and must be that of the
        run which began here. Raises `UserError` when it is not, or when that run is still alive.
        """
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.partial / LOCK, "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another conversion is at work in `{self.folder}`",
                "wait for it, or stop it and repeat this command",
            ) from None
        self.journal = Journal(self.partial / JOURNAL)
        begun = self.journal.head
        if begun is not None and begun != head:
            raise UserError(*_disagreement(self.folder, begun, head, self.journal))

    def check_space(self, nbytes: int) -> None:
        """Refuse a disk that cannot hold `nbytes`, counting what is written here already."""
        parent = next(
            path for path in (self.folder, *self.folder.absolute().parents) if path.exists()
        )
        written = 0
        if self.partial.exists():
            written = sum(path.stat().st_blocks * 512 for path in self.partial.rglob("*"))
        free = shutil.disk_usage(parent).free
        if nbytes - written > free:
            raise UserError(
                f"the conversion needs {size(nbytes - written)} on the disk of `{self.folder}`, "
                f"which has {size(free)} free",
                "free some space, or choose a recipe with fewer bits or another disk",
            )

    def publish(self, names: Iterable[str]) -> None:
        """Rename everything into place, config.json last, and remove `.partial`.

        May be repeated after a kill: what was renamed already is skipped.
        """
        names = [name for name in names if name != "config.json"]
        for name in names:
            self._move(name)
        sync_folder(self.folder)
        self._move("config.json")
        sync_folder(self.folder)
        self.journal.close()
        self._remove_partial()
        sync_folder(self.folder)

    def _move(self, name: str) -> None:
        if (self.partial / name).exists():
            os.replace(self.partial / name, self.folder / name)
        assert (self.folder / name).exists(), name

    def _remove_partial(self) -> None:
        shutil.rmtree(self.partial / SHARDS, ignore_errors=True)
        for name in (JOURNAL, LOCK):
            (self.partial / name).unlink(missing_ok=True)
        self.partial.rmdir()

    def close(self) -> None:
        """Give the lock back; the work stays for the next run."""
        if self.journal:
            self.journal.close()
        if self._lock:
            self._lock.close()


def _disagreement(folder: Path, begun: dict, head: dict, journal: Journal) -> tuple[str, str]:
    """Say in what this run differs from the one that began in the folder."""
    if begun["recipe"] != head["recipe"]:
        num_done = len(journal.done) + len(journal.unsynced)
        return (
            f"`{folder}` holds a conversion begun with recipe `{begun['recipe']}` "
            f"({num_done:,} of {begun['units']:,} pieces done); this run asks for "
            f"`{head['recipe']}`",
            f"repeat with `--recipe {begun['recipe']}` to resume, or choose another folder",
        )
    for key, word in (("revision", "revision"), ("mlx", "MLX"), ("device", "device")):
        if begun[key] != head[key]:
            return (
                f"`{folder}` holds a conversion begun with {word} `{begun[key]}`; "
                f"this run has `{head[key]}`",
                "go on as it was begun, or choose another folder",
            )
    return (
        f"`{folder}` holds a conversion begun from another source, recipe or layout",
        "repeat the command as it was begun, or choose another folder",
    )
