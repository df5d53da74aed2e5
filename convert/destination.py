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

from convert.agreement import place, refuse_disagreement
from convert.disk import naming, sync_folder
from convert.identity import Identity
from convert.journal import Journal, foreign
from mlx_dsv3.checkpoint.format import MANIFEST, PARTIAL, read_manifest
from mlx_dsv3.checkpoint.unfinished import JOURNAL, command_line
from mlx_dsv3.errors import UserError
from mlx_dsv3.sizes import size

LOCK = "lock"
SHARDS = "source"


class Destination:
    """DEST with its `.partial`; `open` takes the lock and the journal, `publish` ends it all.

    `command` is the command line at work, which the journal's head notes.
    """

    def __init__(self, folder: Path, command: Iterable[str] = ()):
        self.folder, self.partial, self.command = folder, folder / PARTIAL, list(command)
        self.journal: Journal | None = None
        self._lock = None

    def check_command(self) -> None:
        """Refuse a folder in which `convert run` has begun to `convert mtp`, and the reverse."""
        begun = self.unfinished().command
        if begun and begun[0] != self.command[0]:
            raise UserError(
                f"`{self.folder}` holds an unfinished `convert {begun[0]}`, and this is "
                f"`convert {self.command[0]}`",
                f"`{command_line(begun)}` finishes it",
            )

    def check_place(self) -> None:
        """Refuse before any work what cannot be a folder, or one that takes no files."""
        paths = (self.folder, *self.folder.absolute().parents)
        nearest = next(path for path in paths if os.path.lexists(path))
        why = None
        if not nearest.exists():
            why = "is a link to what is not there"
        elif not nearest.is_dir():
            why = "is not a folder"
        elif not os.access(nearest, os.W_OK | os.X_OK) and not (self.folder / MANIFEST).exists():
            why = "takes no new files"  # nor needs them, where a conversion has finished
        if why:
            raise UserError(f"`{nearest}` {why}", "choose another destination")

    def check_apart_from(self, source: Path) -> None:
        """Refuse a result in its source: it would be deleted with it, and uploaded with it."""
        # Not `resolve`, which raises at a loop of links.
        here, source = Path(os.path.realpath(self.folder)), Path(os.path.realpath(source))
        if here.is_relative_to(source) and self.unfinished().head is None:
            where = "is the source" if here == source else "lies in the source"
            raise UserError(f"`{self.folder}` {where}", "choose a folder elsewhere as DEST")

    def unfinished(self) -> Journal:
        """Return the journal as it stands, empty where none is; takes no lock."""
        return Journal(self.partial / JOURNAL)

    def is_complete(self, digest: str, identity: Identity) -> bool:
        """Say whether a conversion with this plan's digest and this source is finished here.

        Raises `UserError` when the folder holds anything but our own unfinished work.
        """
        if not self.folder.exists():
            return False
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
        recipe = manifest["recipe"]["name"]
        finished = f"`{self.folder}` holds a finished conversion (recipe `{recipe}`) "
        if manifest["plan"] != digest:
            raise UserError(
                finished + "of another source, recipe or layout", "choose another folder"
            )
        source = manifest["source"]
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
        lock = self.partial / LOCK
        if lock.exists() and not lock.is_file():  # a pipe would wait for ever
            raise foreign(lock, "is not a file")
        self._lock = open(lock, "a")  # not "w": a link may lead to what has contents
        try:
            with naming(lock):
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

    def publish(self) -> None:
        """Rename what conversion.json lists into place, config.json last, and remove `.partial`.

        May be repeated after a kill: what was renamed already is skipped.
        """
        is_moved = not (self.partial / MANIFEST).exists()
        manifest = read_manifest(self.folder if is_moved else self.partial)
        for name in sorted({*manifest["files"], MANIFEST} - {"config.json"}):
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
        elif not (self.folder / name).exists():
            raise foreign(self.journal.path, f"ends a conversion of which `{name}` is not there")

    def _remove_partial(self) -> None:
        shutil.rmtree(self.partial)

    def close(self) -> None:
        """Give the lock back; the work stays for the next run."""
        if self.journal:
            self.journal.close()
        if self._lock:
            self._lock.close()
