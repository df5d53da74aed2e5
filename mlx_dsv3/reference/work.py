"""`GOLDEN.partial`: settings, one file for each finished layer, and the latest states.

A layer's file is renamed into place before the states that follow it, so what is found after an
interruption is always a state and every layer before it. All is removed when the golden file is
there, settings last: a folder without settings holds nothing that anyone waits for. A lock keeps a
second recording out.
"""

import fcntl
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from mlx_dsv3.errors import UserError
from mlx_dsv3.json_files import read_json
from mlx_dsv3.reference import golden
from mlx_dsv3.reference.files import (
    Header,
    read_bytes,
    read_header,
    sync_folder,
    without_waiting,
    written,
)

SETTINGS, STATES, LOCK, JOINED = "settings.json", "states.safetensors", "lock", "joined"
OURS = (f"{STATES}*", "step-*.safetensors*", JOINED, f"{SETTINGS}.tmp", SETTINGS)


class WorkFolder:
    """The work of one recording, by one process: `lock`, `begin`, and `close` whatever happens."""

    def __init__(self, out: Path):
        if not out.name:
            raise UserError(f"`{out}` is a folder", "give the name of a file to write")
        self.out, self.path = out, out.with_name(out.name + ".partial")
        self.steps: list[Path] = []
        self._lock = None

    def lock(self) -> None:
        """Create the folder where there is none, and keep others out of it.

        Raises `UserError` when another recording is at work, or its result is there.
        """
        if os.path.lexists(self.out) and not self.path.exists():
            raise self._exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / LOCK, "w", opener=without_waiting)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            self._lock = None
            raise UserError(
                f"another recording into `{self.out}` is running",
                "wait for it, or stop it and repeat this command",
            ) from None

    def begin(self, settings: dict, num_steps: int) -> None:
        """Go on with a recording of these settings, or begin one.

        Raises `UserError` when what is there was begun with others.
        """
        names = [f"step-{step:05d}.safetensors" for step in range(num_steps)]
        self.steps = [self.path / name for name in (*names, "step-head.safetensors")]
        found = self._settings()
        if found is None:
            with written(self.path / SETTINGS) as file:
                file.write(json.dumps(settings, indent=2).encode())
            sync_folder(self.path.parent)
        elif found != settings:
            key = next(key for key in (*settings, *found) if found.get(key) != settings.get(key))
            raise UserError(
                f"`{self.path}` holds a recording with another `{key}`: "
                f"`{found.get(key)}`; this run asks for `{settings.get(key)}`",
                "repeat the first command to resume it, or remove that folder",
            )

    def _settings(self) -> dict | None:
        """Return the settings of what is there; None for nothing, or nothing of worth."""
        try:
            return read_json(self.path / SETTINGS)
        except UserError:  # absent, or cut short by a power cut under a version that did not sync
            if (self.path / STATES).exists():
                raise self.damaged(SETTINGS) from None
            return None

    def check_space(self, nbytes: int) -> None:
        """Refuse a disk that cannot hold `nbytes`, counting what is written here already."""
        there = sum(file.stat().st_blocks * 512 for file in self.path.iterdir())
        free = shutil.disk_usage(self.path).free
        if nbytes - there > free:
            raise UserError(
                f"the recording needs {(nbytes - there) / 1e6:,.1f} MB on the disk of "
                f"`{self.out}`, which has {free / 1e6:,.1f} MB free",
                "make room there, or choose another disk, a shorter text or `--states sampled`",
            )

    def save(self, step: int, entries: dict[str, Tensor], states: dict[str, Tensor]) -> None:
        """Keep what step `step` recorded, and the states that step + 1 needs."""
        golden.save_atomically(entries, self.steps[step], {"format": "pt"})
        whole = {name: state.cpu().contiguous() for name, state in states.items()}
        golden.save_atomically(whole, self.path / STATES, {"next": str(step + 1)})

    def save_head(self, entries: dict[str, Tensor]) -> None:
        """Keep what the head recorded, the last step."""
        golden.save_atomically(entries, self.steps[-1], {"format": "pt"})

    def resume(self) -> tuple[int, dict[str, Tensor]]:
        """Return the next step and its states; step 0 has none."""
        if not (self.path / STATES).exists():
            return 0, {}
        header = self._header(STATES)
        step = header.metadata.get("next")
        if not isinstance(step, str) or step not in map(str, range(1, len(self.steps))):
            raise self.damaged(STATES)
        for done in self.steps[: int(step)]:
            self._header(done.name)
        return int(step), {
            name: read_bytes(entry, 0, entry.nbytes).view(entry.shape)
            for name, entry in header.entries.items()
        }

    def _header(self, name: str) -> Header:
        try:
            return read_header(self.path / name)
        except UserError:
            raise self.damaged(name) from None

    def damaged(self, name: str) -> UserError:
        """Return the error that says which file of the folder is not what was written."""
        return UserError(
            f"`{self.path / name}` is damaged; the recording that it belongs to cannot go on",
            f"remove `{self.path}` to begin it anew",
        )

    def _exists(self) -> UserError:
        return UserError(f"`{self.out}` exists", "remove it, or choose another name")

    def finish(self, metadata: dict[str, str]) -> None:
        """Write the golden file and remove the folder."""
        golden.join_files(self.steps, self.out, metadata, self.path / JOINED)
        self.remove()

    def is_finished(self, settings: dict) -> bool:
        """Say whether the golden file is there, and only the removal of the folder was cut off.

        Raises `UserError` when the file there is not the one that these settings give.
        """
        if not os.path.lexists(self.out):
            return False
        try:
            found = read_header(self.out).metadata
        except UserError:
            raise self._exists() from None
        if any(found.get(key) != value for key, value in settings.items()):
            raise self._exists()
        return True

    def remove(self) -> None:
        """Remove what recordings write here, the states first and the settings last."""
        for pattern in OURS:
            for file in self.path.glob(pattern):
                file.unlink()
        self._remove_lock()

    def _remove_lock(self) -> None:
        (self.path / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # something of others, or a recording that waits at the door
            self.path.rmdir()

    def close(self) -> None:
        """Give the lock back; the work stays for the next run."""
        if self._lock is None:
            return
        try:
            if self.path.exists() and not (self.path / SETTINGS).exists():
                self._remove_lock()
        finally:
            self._lock.close()
