"""Run a program on bad input in this process: one sentence and a hint, status 2, at once."""

import json
import time
from pathlib import Path

from mlx_dsv3.errors import run_main


def refusal(capsys, main, *argv) -> str:
    """Run a program; return the one sentence that it says, with its hint."""
    capsys.readouterr()
    began = time.monotonic()
    assert run_main(lambda: main([*map(str, argv)])) == 2
    error, _, hint = capsys.readouterr().err.partition("\n\nhint: ")
    assert error.startswith("error: ") and "\n" not in error.strip() and hint.strip()
    assert time.monotonic() - began < 5
    return error


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
