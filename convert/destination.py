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

from convert.disk import sync_folder
from convert.identity import Identity, changed_shards
from convert.journal import Journal
from mlx_dsv3.checkpoint.format import MANIFEST, PARTIAL, read_manifest
from mlx_dsv3.errors import UserError
from mlx_dsv3.sizes import size

JOURNAL = "journal"
LOCK = "lock"
SHARDS = "source"


class Destination:
    """DEST with its `.partial`; `open` takes the lock and the journal, `publish` ends it all."""

    def __init__(self, folder: Path):
        self.folder, self.partial = folder, folder / PARTIAL
        self.journal: Journal | None = None
        self._lock = None

    def unfinished(self) -> Journal:
        """Return the journal as it stands, empty where none is; takes no lock."""
        return Journal(self.partial / JOURNAL)

    def is_complete(self, digest: str, identity: Identity) -> bool:
        """Say whether a conversion with this plan's digest and this source is finished here.

        Raises `UserError` when the folder holds anything but our own unfinished work.
        """
        if not self.folder.exists():
            return False
        if not self.folder.is_dir():
            raise UserError(f"`{self.folder}` is not a folder", "choose another destination")
        names = {path.name for path in self.folder.iterdir()}
        if PARTIAL in names and (self.partial / JOURNAL).exists():
            return False
        if {MANIFEST, "config.json"} <= names:
            return self._is_ours(digest, identity, names)
        if names - {PARTIAL}:
            raise UserError(
                f"`{self.folder}` holds something else (`{min(names - {PARTIAL})}`)",
                "choose a new or an empty folder",
            )
        return False

    def _is_ours(self, digest: str, identity: Identity, names: set[str]) -> bool:
        manifest = read_manifest(self.folder)
        recipe = (manifest.get("recipe") or {}).get("name")
        finished = f"`{self.folder}` holds a finished conversion (recipe `{recipe}`) "
        if manifest.get("plan") != digest:
            raise UserError(
                finished + "of another source, recipe or layout", "choose another folder"
            )
        source = manifest.get("source") or {}
        is_same = identity.is_that_of(source)
        if is_same is None:
            raise UserError(
                finished + "by an earlier version, which did not note whose weights they are",
                f"`python -m convert verify {self.folder} --source SOURCE` compares them",
            )
        if not is_same:
            raise UserError(
                finished + f"of another source ({place(source)}): "
                "its headers are these, its weights are not",
                "choose another folder",
            )
        if PARTIAL in names:  # killed after the journal went and before the folder did
            self._remove_partial()
        return True

    def open(self, head: dict) -> None:
        """Create `.partial`, take its lock and read its journal.

        `head` says what this run is (recipe, plan, source, MLX version, device) and must be that
        of the run which began here, but for some shards that were changed since. Raises
        `UserError` when it is not, or when that run is still alive.
        """
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.partial / LOCK, "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another conversion is running in `{self.folder}`",
                "wait for it, or stop it and repeat this command",
            ) from None
        self.journal = Journal(self.partial / JOURNAL)
        if self.journal.head not in (None, head):
            refuse_disagreement(self.folder, head, self.journal)

    def check_space(self, nbytes: int) -> None:
        """Refuse a disk that cannot hold `nbytes`, counting what is written here already.

        A conversion killed while it renamed its files has written everything.
        """
        if self.unfinished().is_finishing:
            return
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


def place(source: dict) -> str:
    """Say in words where a recorded source lay."""
    if source.get("id"):
        return f"`{source['id']}` at revision `{source['revision']}`"
    return "a folder"


def refuse_disagreement(folder: Path, head: dict, journal: Journal) -> None:
    """Refuse a run that differs from the one that began, and say in what it differs.

    Shards of a folder may be other files than at the beginning as long as nothing, or not
    everything, that is done came from such: the run converts again what they gave.
    """
    begun, num_done = journal.head, len(journal.done) + len(journal.unsynced)
    conversion, other_folder = f"`{folder}` holds a conversion begun ", "choose another folder"
    if begun["recipe"] != head["recipe"]:
        raise UserError(
            conversion + f"with recipe `{begun['recipe']}` "
            f"({num_done:,} of {begun['units']:,} units done); this run asks for "
            f"`{head['recipe']}`",
            f"repeat with `--recipe {begun['recipe']}` to resume, or {other_folder}",
        )
    for key, word in (("mlx", "MLX"), ("device", "device")):
        if begun[key] != head[key]:
            raise UserError(
                conversion + f"with {word} `{begun[key]}`; this run has `{head[key]}`",
                f"continue as it was begun, or {other_folder}",
            )
    if begun["plan"] != head["plan"]:
        raise UserError(
            conversion + "from another source, recipe or layout",
            f"repeat the command as it was begun, or {other_folder}",
        )
    refuse_other_source(folder, head, journal, num_done)


def refuse_other_source(folder: Path, head: dict, journal: Journal, num_done: int) -> None:
    """Refuse weights that cannot be those which the conversion in `folder` has read so far."""
    conversion, other_folder = f"`{folder}` holds a conversion begun ", "choose another folder"
    begin_anew = f"delete `{folder / PARTIAL}` to begin anew, or {other_folder}"
    if journal.is_finishing:  # some files have their final names already
        begin_anew = other_folder
    theirs, ours = journal.head.get("source"), head["source"]
    if theirs is None:
        raise UserError(
            conversion + "by an earlier version, which did not note whose weights it read",
            begin_anew,
        )
    if place(theirs) != place(ours):
        flags = f" with `--revision {theirs['revision']}`" if theirs["revision"] else ""
        raise UserError(
            conversion + f"from {place(theirs)}; this run reads {place(ours)}",
            f"repeat the command as it was begun{flags} to resume, or {other_folder}",
        )
    changed = changed_shards(journal.head, head)
    if theirs == ours and (journal.is_finishing or not changed):  # no shard is read any more
        return
    if not journal.is_finishing and (not num_done or 0 < len(changed) < len(head["files"])):
        return
    if theirs != ours:
        raise UserError(
            conversion + "from another source: its headers are these, its weights are not",
            f"repeat with that source, or {begin_anew}",
        )
    raise UserError(
        f"`{changed[0]}` is not the file that the conversion in `{folder}` has read: "
        "its size or time differs",
        f"put that one back with its time (`cp -p`), or {begin_anew}",
    )
