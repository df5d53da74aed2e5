"""A folder in which documented commands run as written: a checkout, and what their names stand for.

The checkout is links to this one. MODEL, SOURCE, `models/r1-q4`, ... are made when a command wants
to read them: links to the demo model, converted and as it came, or copies where it is written to.
"""

import contextlib
import importlib
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from mlx_dsv3.errors import run_main

ROOT = Path(__file__).parents[1]
CHECKOUT = ["Makefile", "constraints.txt", "pyproject.toml", "README.md", "chat.py", ".ci"]
CHECKOUT += ["benchmarks", "convert", "demo", "docs", "mlx_dsv3", "tests"]
STAMPS = (".demo", ".test")  # newer than the pins: `make` installs nothing
# What is typed where a person sits, or comes by a pipe.
TYPED = "What is the capital of France?"
KNOWN = ("benchmarks", "chat", "convert", "demo", "mlx_dsv3", "mlx_lm", "tests")
MOST_SECONDS = 300  # on a machine that does other work too
MODELS = ("MODEL", "build/demo-q4", "models/r1-q4")
SHELL = ("|", ">", "<", "&&", ";", "&")
# Programs that reach beyond the folder, the environment of these tests included: asked for their
# help at most.
BEYOND = {"pip", "pip3", "uv", "hf", "git", "brew", "sudo", "rm", "curl"}


class Parsed(Exception):
    """The options of a program were parsed: the point at which a long one is left."""


class Sandbox:
    """One folder. `converted` is the demo model in 4 bits, which is not written to.

    `environment` is that of the programs that are started. `is_shell`: every command is.
    """

    def __init__(self, folder: Path, converted: Path, environment: dict[str, str]):
        self.folder, self.converted, self.is_shell = folder, converted, False
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        # Whatever the stamps say, and whatever a recipe calls, nothing is installed.
        nothing = {"MAKEFLAGS": "PIP=false", "PIP_DRY_RUN": "1"}
        here = {"PATH": path, "PYTHONPATH": str(ROOT)}  # as installed from this very checkout
        self.environment = environment | nothing | here
        self.checkpoint = ROOT / "demo/checkpoint"
        for name in CHECKOUT:
            (folder / name).symlink_to(ROOT / name)
        (folder / ".venv").mkdir()
        for entry in Path(sys.prefix).iterdir():
            if entry.name not in STAMPS:
                (folder / ".venv" / entry.name).symlink_to(entry)
        for stamp in STAMPS:
            (folder / ".venv" / stamp).touch()
        (folder / "build").mkdir()
        for pins in ("oldest.txt", "pins.txt"):  # which `make -n` only says that it would write
            (folder / "build" / pins).touch()

    def provide(self, words: list[str]) -> None:
        """Make what a command reads; not what it writes, which is gone if it was a link."""
        written = outputs(words)
        for word in words:
            path = self.folder / word
            if word in written and (path.is_symlink() or path.is_file()):
                path.unlink()
            elif word not in written and not path.exists():
                self.make(word, path)

    def make(self, word: str, path: Path) -> None:
        """Make one file or folder, if the word is the name of one."""
        links = dict.fromkeys(MODELS, self.converted) | {"SOURCE": self.checkpoint}
        links["GOLDEN"] = ROOT / "tests/golden/demo-fp8.safetensors"
        if word in links:
            path.parent.mkdir(exist_ok=True)
            path.symlink_to(links[word])
        elif word == "TRACE":
            path.write_text("[1, [[0, 1], [1, 2]]]\n[2, [[3, 4], [4, 5]]]\n", encoding="utf-8")
        elif word in ("FILE", "TEXT", "text.txt"):
            path.symlink_to(ROOT / "tests/golden/chat.txt")
        elif word == "FOLDER":  # converted elsewhere, without the MTP module
            elsewhere = shutil.ignore_patterns("mtp.safetensors", "conversion.json")
            shutil.copytree(self.converted, path, ignore=elsewhere)

    def run(self, command: str) -> tuple[int, str]:
        """Run a command, in this process if it is Python; return its status and what it says."""
        words = shlex.split(command)
        self.provide(words)
        is_shell = self.is_shell or any(word in SHELL for word in words)
        main = None if is_shell else main_of(words)
        return self.here(words, main) if main else self.in_shell(command)

    def in_shell(self, command: str) -> tuple[int, str]:
        """Run a command with bash; refuse one that reaches beyond the folder."""
        if BEYOND.intersection(shlex.split(command)) and not command.endswith(" --help"):
            return 1, "it reaches beyond the sandbox: say in LIMITS how far it is taken"
        with subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                said, _ = process.communicate(TYPED, timeout=MOST_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return 1, "it takes too long: say in LIMITS how far it is taken"
        return process.returncode, said

    def here(self, words: list[str], main: Callable[[], int | None]) -> tuple[int, str]:
        told, typed = io.StringIO(), io.TextIOWrapper(io.BytesIO(TYPED.encode()))
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.chdir(self.folder))
            stack.enter_context(contextlib.redirect_stdout(told))
            stack.enter_context(contextlib.redirect_stderr(told))
            stack.enter_context(mock.patch("sys.stdin", typed))
            stack.enter_context(mock.patch("sys.argv", arguments(words)))
            status = run_main(main)
        return status, told.getvalue()


def program(words: list[str]) -> list[str]:
    """Return a command from its program on, without what is set for it and what starts it."""
    while "=" in words[0]:
        words = words[1:]
    return words[words.index("-m") :] if words[0] == "torchrun" and "-m" in words else words


def outputs(words: list[str]) -> set[str]:
    """Return the words of a command that name what it writes."""
    written = {value for flag, value in zip(words, words[1:], strict=False) if flag == "--plot"}
    for name in ("run", "mlx_dsv3.reference.record"):
        if name in words:
            written.update(words[words.index(name) + 2 :][:1])
    return written


def arguments(words: list[str]) -> list[str]:
    """Return `sys.argv` of a program that is Python."""
    words = program(words)
    start = {"-m": 1, "python": 1}.get(words[0], 0)
    return words[start + (words[start] == "-m") :]


def main_of(words: list[str]) -> Callable[[], int | None] | None:
    """Return `main` of a program that this process can run, None of any other."""
    words = program(words)
    name = words[0]  # as in `mlx_lm.convert`
    if name in ("python", "-m"):
        name = arguments(words)[0].removesuffix(".py").replace("/", ".")
    if name.split(".")[0] not in KNOWN:
        return None
    module = importlib.import_module(name.removeprefix("benchmarks."))
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    return module.main
