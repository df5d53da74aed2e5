"""What stands in `.partial` of a folder: work of `convert run` or `convert mtp` that has not ended.

The converter's journal lies there, one entry a line: CRC-32 of its text, a space, the text. Its
head notes the command line that began, so that every program can say how to finish. Nothing else
of the journal is known here.

config.json is the last file that a conversion moves into place. So a folder that has one is whole
but for its sidecar: `convert mtp` is at work there, or nothing but `.partial` is left to remove.
"""

import json
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path

from mlx_dsv3.checkpoint.format import PARTIAL, SIDECAR

JOURNAL = "journal"
MOST_LINE_BYTES = 1 << 20  # of V3's: some 20 KB for the names of its shards
MOST_LETTERS = 10_000  # of a command line: a folder from elsewhere may hold a journal


def journal_line(entry: dict) -> bytes:
    """Return an entry as it stands in a journal."""
    text = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def parse_line(raw: bytes) -> bytes | None:
    """Return the text of a line, or None where the line is torn."""
    checksum, _, text = raw.rstrip(b"\n").partition(b" ")
    return text if raw.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(text) else None


def journal_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a journal; of one that is too long, its first bytes as a torn one."""
    with open(path, "rb") as file:
        yield from iter(lambda: file.readline(MOST_LINE_BYTES), b"")


def command_in(head: object) -> list[str]:
    """Return the command line that a journal's head notes; empty for those of earlier versions."""
    words = head.get("command") if isinstance(head, dict) else None
    are_words = isinstance(words, list) and all(isinstance(word, str) for word in words)
    is_ours = are_words and words[:1] in (["run"], ["mtp"]) and sum(map(len, words)) < MOST_LETTERS
    return words if is_ours else []


def command_line(words: list[str]) -> str:
    return f"python -m convert {shlex.join(words)}"


def how_to_finish(folder: Path, name: str) -> str:
    """Return the command that finishes what `.partial` of `folder` holds.

    As it was begun where the journal says so; `name` is what the user calls the folder.
    """
    words, path = [], folder / PARTIAL / JOURNAL
    for raw in journal_lines(path) if path.is_file() else ():
        text = parse_line(raw)
        if text and text.startswith(b'{"head":'):
            words = command_in(_head(text)) or words
    kind = "mtp" if (folder / "config.json").exists() else "run"
    return command_line(words) if words else f"python -m convert {kind} SOURCE {shlex.quote(name)}"


def _head(text: bytes) -> object:
    try:
        return json.loads(text)["head"]
    except (ValueError, RecursionError):
        return None


def lacks_sidecar(folder: Path) -> bool:
    """Say whether a folder with a config.json waits for the sidecar that is in `.partial`.

    Once that is in place, config.json follows, which names its modules.
    """
    return any((folder / PARTIAL / name).exists() for name in (SIDECAR, "config.json"))
