"""What stays between runs, in `~/.mlx_dsv3`: the lines typed, and every chat.

The folder and its files are for their user alone. Where they cannot be used, that is said once,
nothing is kept, and the chat goes on. Each chat has a file of its own, so that two at once never
mix; a chat that is taken up again goes on in a new one.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from mlx_dsv3.conversation.transcript import read, save, text_of
from mlx_dsv3.errors import UserError, in_line, unusable

FOLDER = "~/.mlx_dsv3"
MOST_CHATS = 50
MOST_READ = 1 << 20  # bytes of the history, its last: years of lines
LONGEST_LINE = 1 << 16  # characters: a pasted book is no line to come back to
PRIVATE = os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def private_folder(name: str = "") -> Path:
    """Return a folder that only its user can use, made where it is not there."""
    home = Path(os.path.expanduser(FOLDER))
    if not home.is_absolute():
        raise UserError(f"there is no folder for `{FOLDER}`", "set HOME to your home folder")
    for folder in dict.fromkeys((home, home / name)):
        folder.mkdir(mode=0o700, exist_ok=True)
        owned(folder, os.lstat(folder))
        folder.chmod(0o700)
    return home / name


def owned(path: Path, found: os.stat_result) -> None:
    """Refuse what another user has put there."""
    if found.st_uid != os.getuid():
        raise UserError(f"`{path}` belongs to another user", "remove it")


def open_history(flags: int) -> int:
    """Open the file of the lines typed; never what another name leads to."""
    path = private_folder() / "history"
    file = os.open(path, flags | PRIVATE, 0o600)
    try:
        owned(path, os.fstat(file))
        os.fchmod(file, 0o600)
    except BaseException:
        os.close(file)
        raise
    return file


def read_history() -> list[str]:
    """Return the last lines typed, in the format of prompt_toolkit's `FileHistory`."""
    with open(open_history(os.O_RDONLY), "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - MOST_READ))
        blocks = file.read().decode("utf-8", "replace").split("\n\n# ")
    lines = [[line[1:] for line in block.split("\n") if line.startswith("+")] for block in blocks]
    return ["\n".join(each) for each in lines if each]


def append_history(text: str) -> None:
    """Add a line typed; one write, so that two chats never mix."""
    block = f"\n# {datetime.now()}\n" + "".join(f"+{line}\n" for line in text.split("\n"))
    with open(open_history(os.O_WRONLY | os.O_APPEND), "wb", buffering=0) as file:
        file.write(block.encode("utf-8", "replace"))


def chats() -> list[Path]:
    """Return the chats that are kept, the newest first."""
    folder = private_folder("sessions")
    times = {}
    for path in folder.glob("*.json"):
        with suppress(FileNotFoundError):  # another chat has just dropped it
            times[path] = path.lstat().st_mtime_ns
    return sorted(times, key=times.get, reverse=True)


def newest(model: str | None = None) -> Path:
    """Return the chat that was kept last, of one model if it is given."""
    for path in chats():
        with suppress(UserError):  # a damaged one is none
            if model in (None, read(path).model):
                return path
    of_model = f" of `{model}`" if model else ""
    raise UserError(f"no chat{of_model} is kept in `{FOLDER}/sessions`", "leave out `--continue`")


def drop_old() -> None:
    """Keep the newest chats alone."""
    for path in chats()[MOST_CHATS:]:
        path.unlink(missing_ok=True)


class Kept:
    """Keeps lines and a chat as long as that works."""

    def __init__(self):
        self.told: set[str] = set()
        self.path: Path | None = None  # of this chat, once there is something to keep
        self.taken_up = ""  # what it was, while it stands in another file

    def attempt(self, what: str, step: Callable, *arguments):
        """Return what a step does, None where it cannot; say so the first time."""
        try:
            return step(*arguments)
        except (OSError, UserError) as error:
            reason = (unusable(error) if isinstance(error, OSError) else error).message
            if not self.told & {what, reason}:
                print(f"warning: {what} is not kept: {in_line(reason)}", file=sys.stderr)
            self.told |= {what, reason}

    def history(self) -> list[str]:
        return self.attempt("what is typed", read_history) or []

    def remember(self, text: str) -> None:
        """Keep a line; one that begins with a space may hold a secret."""
        if text.strip() and text[0] != " " and len(text) <= LONGEST_LINE:
            self.attempt("what is typed", append_history, text)

    def save(self, session, model: str) -> None:
        """Keep a chat as it stands, from its first message on."""
        is_new = session.conversation.messages and text_of(session, model) != self.taken_up
        if self.path or is_new:
            self.attempt("this chat", self._save, session, model)

    def _save(self, session, model: str) -> None:
        if self.path is not None:
            save(session, self.path, model=model)
            return
        name = f"{datetime.now():%Y-%m-%d-%H%M%S-%f}-{os.getpid()}.json"
        path = private_folder("sessions") / name
        save(session, path, model=model)
        self.path = path
        drop_old()

    def begin_anew(self) -> None:
        """Leave this chat as it was last kept; the next one has a file of its own."""
        self.path = None
