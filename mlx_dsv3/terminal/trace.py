"""The file of `--trace`: which experts each token chose, one JSON list per MoE layer and call.

Each line is [layer, [[ids of the first token], ...]]; `benchmarks/bench_routing.py` replays it.
Layers whose experts are all in memory then read their ids back too, which costs the synchronisation
that they otherwise save.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

from mlx_dsv3.errors import UserError, check_writable, visible


def open_now(path: str, flags: int) -> int:
    """Open a file, or a pipe that somebody reads; another one would wait for ever."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def check_trace(path: Path) -> None:
    """Refuse, before minutes of loading, what takes no writing or holds something else."""
    check_writable(path)
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(1) not in (b"", b"["):
                raise UserError(f"`{path}` exists and is not a trace", "choose another name")


class Trace:
    """Writes what a store's layers choose until it is closed, or the file takes no more."""

    def __init__(self, store, path: Path):
        self.file = open(path, "w", encoding="utf-8", buffering=1, opener=open_now)
        os.set_blocking(self.file.fileno(), True)
        self.store, store.on_route = store, self.write

    def write(self, layer: int, experts) -> None:
        """Append one call's experts (T, K), a NumPy array."""
        try:
            self.file.write(f"[{layer}, {experts.tolist()}]\n")
        except OSError as error:  # a full disk must not end the reply
            name = visible(str(self.file.name))
            print(f"warning: the trace `{name}` ends: {error}", file=sys.stderr)
            self.close()

    def close(self) -> None:
        self.store.on_route = None
        with suppress(OSError):
            self.file.close()
