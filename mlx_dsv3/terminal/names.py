"""Names of files and numbers as they are typed after a command, and as Tab completes them."""

import os
import re
from pathlib import Path

from mlx_dsv3.errors import UserError

# A word; a file's name may be quoted, or hold spaces after backslashes, as a dropped file's does.
WORD = re.compile(r"\"([^\"]*)\"|'([^']*)'|((?:\\.|\S)+)")
# The word before the cursor. Each character can be taken in one way only, or Tab takes for ever.
LAST = re.compile(r"(?<!\S)(?:\\.|[^\s\\])*\\?\Z")


def first_word(text: str) -> tuple[str, str]:
    """Return a file's name and what follows it."""
    found = WORD.match(text)
    if found is None:
        return "", ""
    quoted, other, plain = found.groups()
    name = re.sub(r"\\(.)", r"\1", plain) if plain else quoted or other or ""
    return name, text[found.end() :].strip()


def path_of(name: str) -> Path:
    """Return the file of a name, which may begin with `~`."""
    if "\0" in name:
        raise UserError("a file's name holds no zero byte", "check the spelling")
    return Path(os.path.expanduser(name))


def file_of(text: str, usage: str) -> Path:
    """Return the file that a whole text names; one that is there needs no quotes."""
    name, rest = first_word(text)
    if not name:
        raise UserError(f"`{usage}` lacks the name of a file", "give one")
    whole = path_of(text)
    if rest and not whole.exists():
        raise UserError(
            f"`{usage}` takes one name, and `{rest}` follows", "quote a name that holds spaces"
        )
    return whole if rest else path_of(name)


def number_of(text: str, usage: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        fault = f"takes a number, not `{text}`" if text else "lacks a number"
        raise UserError(f"`{usage}` {fault}", f"`{usage.replace('N', '1')}` takes the first")
    return int(text)


def files(text: str) -> list[str]:
    """Return the files whose name begins with the last word, written so that `WORD` takes them."""
    name = re.sub(r"\\(.)", r"\1", LAST.search(text)[0])
    folder, _, start = name.rpartition("/")
    try:
        place = path_of(f"{folder}/" if "/" in name else ".")
        found = sorted(path for path in place.iterdir() if path.name.startswith(start))
    except (OSError, UserError):
        return []
    shown = [p for p in found if start or not p.name.startswith(".")]
    prefix = f"{folder}/" if "/" in name else ""
    return [re.sub(r"([\s\\\"'])", r"\\\1", f"{prefix}{p.name}") + "/" * p.is_dir() for p in shown]
