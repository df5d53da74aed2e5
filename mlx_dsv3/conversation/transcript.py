"""A chat as a file: what was said, and with what settings, so that it may go on another day.

JSON, and beside it, where it is asked for, what the model has computed for it, which only that
model can use. What is read comes from outside, whoever wrote it. Knows no terminal.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mlx_dsv3.conversation.messages import clean
from mlx_dsv3.conversation.settings import DEFAULTS
from mlx_dsv3.decoding.draft_control import fixed_drafts
from mlx_dsv3.errors import UserError, unusable
from mlx_dsv3.json_files import brief, read_json
from mlx_dsv3.options import SETTINGS

FORMAT = "mlx_dsv3 chat 1"
FIELDS = {"model": str, "system": str | None, "thinking": bool | None, "settings": dict}
FIELDS |= {"drafts": str | int, "messages": list}
MOST_BYTES = 64 << 20  # a context of 163,840 tokens takes about 1 MB
MOST_VALUES = 16 << 20  # every comma of the text counts for one
HINT = "`/save FILE` writes what can be loaded"


@dataclass
class Transcript:
    """A saved chat, checked; `model` is the name by which it was loaded."""

    model: str = ""
    system: str | None = None
    thinking: bool | None = None
    settings: dict[str, object] = field(default_factory=lambda: dict(DEFAULTS))
    drafts: str | int = "auto"
    messages: list[dict[str, str]] = field(default_factory=list)


def cache_of(path: str | Path) -> Path:
    """Return the file beside a saved chat that holds what was computed for it."""
    return Path(f"{os.path.realpath(path)}.cache.safetensors")


def text_of(session, model: str = "") -> str:
    """Return a session as the text of a file; a reply that comes is as if it were stopped now."""
    values = {"format": FORMAT, "model": model, "system": session.conversation.system}
    values |= {"thinking": session.thinking, "settings": session.settings}
    values |= {"drafts": session.drafts, "messages": session.messages}
    return clean(json.dumps(values, ensure_ascii=False, indent=1, allow_nan=False))


def save(session, path: str | Path, with_cache: bool = False, model: str = "") -> None:
    """Write a session to a file that its owner alone may read, whole or not at all.

    `with_cache` writes, beside the file, what `Session.restore` need not compute again. Another
    file than a saved chat is never written over.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    text = text_of(session, model)
    try:
        check_target(path)
        with private():
            write(path, text)
            if with_cache:
                session.state.save(cache_of(path), session.loaded.model)
    except OSError as error:
        raise unusable(error) from None
    except RuntimeError:  # MLX's; it names no reason
        raise UserError(
            f"`{path}` is saved, but `{cache_of(path)}` cannot be written",
            "make room on that disk, or save without the cache",
        ) from None


def check_target(path: Path) -> None:
    """Refuse to replace a file that holds something else."""
    if not path.exists():
        return
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(100)
        if not start or FORMAT.encode() in start:
            return
    raise UserError(f"`{path}` exists and is not a saved chat", "choose another name")


@contextmanager
def private() -> Iterator[None]:
    """Give new files to their owner alone: they hold what a person said."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def write(path: Path, text: str) -> None:
    """Replace a file by a text, or leave it as it is."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)  # it may be a link that others put there
    try:
        with open(partial, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | Path) -> Transcript:
    """Return the chat that a file holds; raise `UserError` with its name where it holds none."""
    values = read_json(Path(path), MOST_BYTES, HINT, MOST_VALUES)
    fault = "is not a saved chat" if values.pop("format", None) != FORMAT else fault_of(values)
    if fault:
        raise UserError(f"`{path}` {fault}", HINT)
    transcript = Transcript(**values)
    for name, value in transcript.settings.items():
        if value is not None or name != "max_tokens":
            SETTINGS[name].check(value, f"`{name}` in `{path}`")
    return transcript


def fault_of(values: dict) -> str | None:
    """Return what is wrong with the values of a file, None for nothing."""
    for name, value in values.items():
        if name not in FIELDS:
            return f"holds `{brief(name)}`, which no saved chat has"
        if not isinstance(value, FIELDS[name]):
            return f"holds `{name}` of the kind {type(value).__name__}"
    for name in values.get("settings", ()):
        if name not in DEFAULTS:
            return f"holds the setting `{brief(name)}`, which no chat has"
    try:
        fixed_drafts(values.get("drafts", "auto"))
    except UserError:
        return f"holds `{brief(values['drafts'])}` for the number of drafts"
    for i, message in enumerate(values.get("messages", ())):
        role = "assistant" if i % 2 else "user"
        is_good = isinstance(message, dict) and message.keys() == {"role", "content"}
        if not is_good or message["role"] != role or not isinstance(message["content"], str):
            return f"holds a message {i + 1} that is not a text of the {role}"
    return None
