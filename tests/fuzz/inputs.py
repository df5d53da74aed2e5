"""Inputs by number: a program, its command line, the files that it reads, and what is wrong there.

The first numbers are the good files, which no program may refuse. Half of the inputs to `verify`
are sealed again after the change, as by somebody who knows how: the checksums of conversion.json
are then right. Those of a journal are, too.
"""

import argparse
import json
import os
import random
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

import chat
from convert import __main__ as convert
from convert.manifest import file_entry, json_text, manifest_digest
from fuzz import changes
from mlx_dsv3.checkpoint.format import MANIFEST
from mlx_dsv3.decoding.state import load_state
from mlx_dsv3.load import load_model
from mlx_dsv3.parity import __main__ as parity
from mlx_dsv3.reference import generate, record


def resume_chat(argv: list[str]) -> None:
    """Read a saved conversation and go on with it; no program does yet."""
    loaded = load_model(argv[0])
    state = load_state(argv[1], loaded.model)
    mx.eval(loaded.model(mx.array([[*state.ids, 3]]), state.cache))
    loaded.store.close()


MAINS = {
    "chat": chat.main,
    "convert": convert.main,
    "parity": parity.main,
    "record": record.main,
    "generate": generate.main,
    "state": resume_chat,
}
ASK, FEW = ["-p", "w1 w2 w3"], ["--max-tokens", "2"]
RECORD = ["--device", "cpu", "--states", "all", "--prompt-file"]
HUB, MLX, GOLDEN, TEXT, IDS = "hub", "mlx", "golden.safetensors", "prompt.txt", "prompt.json"
CUT = "cut.safetensors.partial"
# Name -> command line, and the files and folders that are damaged: those twice that matter most.
JOBS = {
    "chat": (["chat", MLX, "-s", "w4", *ASK, *FEW], [MLX]),
    "chat piped": (["chat", MLX, *FEW], [TEXT, MLX]),
    "chat stacked": (["chat", "stacked", *ASK, *FEW], ["stacked"]),
    "chat streamed": (["chat", MLX, *ASK, *FEW, "--expert-memory", "0.00005"], [MLX]),
    "chat --plan": (["chat", MLX, "--plan"], [MLX]),
    "convert plan": (["convert", "plan", HUB, "--recipe", "recipe.json"], [HUB, "recipe.json"]),
    "convert run": (["convert", "run", HUB, "new"], [HUB]),
    "convert resume": (["convert", "run", HUB, "half"], ["half", "half", HUB]),
    "convert again": (["convert", "run", HUB, MLX], [MLX, HUB]),
    "convert mtp": (["convert", "mtp", HUB, "stacked"], [HUB, "stacked"]),
    "verify": (["convert", "verify", MLX], [MLX]),
    "verify --source": (["convert", "verify", MLX, "--source", HUB, "--full"], [MLX, HUB]),
    "parity": (["parity", MLX, GOLDEN], [GOLDEN, GOLDEN, MLX]),
    "parity --json": (["parity", MLX, GOLDEN, "--teacher-forced", "--json"], [GOLDEN, MLX]),
    "perplexity": (["parity", "perplexity", MLX, TEXT], [TEXT, MLX]),
    "capacities": (["parity", "capacities", MLX, "--tokens", "8"], [MLX]),
    "record": (["record", HUB, "new.golden", *RECORD, IDS], [HUB, IDS]),
    "record text": (["record", HUB, "new.golden", *RECORD, TEXT], [HUB, TEXT]),
    "record resume": (["record", HUB, "cut.safetensors", *RECORD, IDS], [CUT, CUT, HUB]),
    "generate": (["generate", HUB, *ASK, *FEW, "--device", "cpu"], [HUB]),
    "state": (["state", MLX, "state.safetensors"], ["state.safetensors", MLX]),
}
LINE = "command line"
MOST_BYTES = 4 << 20  # of what is parsed here: a bomb would be this program's memory, not theirs
SEEDS = [HUB, MLX, "stacked", "half", GOLDEN, CUT, "state.safetensors", TEXT, IDS, "recipe.json"]
NUMBERS = [
    *("0", "1", "2", "-1", "1.5", "nan", "inf", "-inf", "1e400", "1e-400", "0x10", "1_000", " 4"),
    *("9" * 20, "9" * 5000, "4.0", "true", "١٢", "+3", "-0", "1e3", "64"),
]
WORDS = [
    *("", " ", "x", "auto", "\x1b]0;PWNED\x07", "\udcff", "--", "-", "[/x]", "%s", "a\nb"),
    "a" * 300,
]
PATHS = [
    *("none", HUB, MLX, "half", TEXT, GOLDEN, "/", ".", "..", "/dev/null", "/dev/full"),
    *("/proc/self/mem", "someone/something", "a/b/c", "~", "pipe", "dangling", "none/x"),
]


@dataclass
class Input:
    """A command line for a program, run in a folder of its own; `what` says what is wrong."""

    job: str
    argv: list[str]
    what: str
    is_good: bool = False

    def run(self) -> int | None:
        if self.job == "chat piped" and Path(TEXT).is_file():
            os.dup2(os.open(TEXT, os.O_RDONLY), 0)
        return MAINS[self.argv[0]](self.argv[1:])


def make(
    seed: int,
    number: int,
    seeds: Path,
    jobs: list[str] | None = None,
    places: list[str] | None = None,
) -> Input:
    """Write the files of one input into the working directory and return it.

    `jobs` and `places` (files) narrow what is run and what is damaged.
    """
    rng = random.Random(f"{seed} {number}")
    if not jobs and number < len(JOBS):
        copy(seeds, SEEDS)
        job = list(JOBS)[number]
        return Input(job, JOBS[job][0], "nothing", is_good=True)
    job = rng.choice(jobs or [*JOBS, *[LINE] * 4])
    if job == LINE:
        copy(seeds, SEEDS)
        argv = change_line(rng, rng.choice(list(JOBS.values()))[0])
        return Input(job, argv, "")
    argv, damaged = JOBS[job]
    copy(seeds, [name for name in SEEDS if name in argv or name in damaged])
    what = [
        change_one(rng, Path(rng.choice(places or damaged)))
        for _ in range(rng.choice((1, 1, 1, 2)))
    ]
    if job.startswith("verify") and rng.random() < 0.6:
        what.append(seal(Path("mlx")))
    return Input(job, argv, "; ".join(what))


def copy(seeds: Path, names: list[str]) -> None:
    for name in names:
        if (seeds / name).is_dir():
            shutil.copytree(seeds / name, name, dirs_exist_ok=True)
        else:
            shutil.copyfile(seeds / name, name)


def change_one(rng: random.Random, place: Path) -> str:
    """Damage a file, or one of a folder's, as befits it."""
    files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
    small = [p for p in files if p.suffix != ".safetensors"]
    if small and rng.random() < 0.6:
        files = small
    if not files:
        return "nothing"
    path = rng.choice(files)
    if rng.random() < 0.1 or not path.is_file():
        return f"{path}: {changes.change_file(rng, path) if path.exists() else 'gone'}"
    data = path.read_bytes()
    try:
        data, what = change_content(rng, path, data)
    except (ValueError, RecursionError, IndexError, KeyError, TypeError, AttributeError):
        data, what = changes.change_bytes(rng, data)  # the second change, after one too deep
    path.write_bytes(data)
    return f"{path}: {what}"


def change_content(rng: random.Random, path: Path, data: bytes) -> tuple[bytes, str]:
    if rng.random() < 0.15 or len(data) > MOST_BYTES:
        return changes.change_bytes(rng, data)
    if path.suffix == ".safetensors":
        way = rng.choice((changes.change_header, changes.change_tensors))
        return way(rng, data)
    if path.suffix == ".json":
        text, what = changes.change_json(rng, data.decode())
        return text.encode("utf-8", "surrogatepass"), what
    if path.name == "journal":
        return change_journal(rng, data)
    return changes.change_bytes(rng, data)


def change_journal(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Change a line of a journal, whose checksum is then right."""
    lines = data.splitlines(keepends=True)
    i = rng.randrange(len(lines)) if rng.random() < 0.7 else 0
    text, what = changes.change_json(rng, lines[i].partition(b" ")[2].decode())
    raw = text.encode("utf-8", "surrogatepass")
    lines[i] = b"%08x %s\n" % (zlib.crc32(raw), raw)
    return b"".join(lines), f"line {i}: {what}"


def seal(folder: Path) -> str:
    """Make the checksums of conversion.json right for what lies in the folder."""
    file = folder / MANIFEST
    if not file.is_file() or file.stat().st_size > MOST_BYTES:
        return "not to be sealed"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name in manifest["files"]:
            if (folder / name).is_file():
                manifest["files"][name] = file_entry(folder / name)
        manifest["digest"] = manifest_digest(manifest)
        (folder / MANIFEST).write_text(json_text(manifest))
    except Exception:
        return "not to be sealed"
    return "sealed"


class Found(Exception):
    """Carries a program's parser out of it."""


def parser_of(argv: list[str]) -> argparse.ArgumentParser:
    """Return the parser that a program reads this command line with."""

    def caught(self, *_):
        raise Found(self)

    kept, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, caught
    try:
        MAINS[argv[0]](argv[1:])
    except Found as found:
        parser = found.args[0]
    finally:
        argparse.ArgumentParser.parse_args = kept
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices.get(argv[1], parser)
    return parser


def change_line(rng: random.Random, argv: list[str]) -> list[str]:
    """Return a command line with options that the program knows, good and bad values, and holes."""
    if argv[0] == "state":
        argv = JOBS["chat"][0]
    actions = [a for a in parser_of(argv)._actions if a.option_strings]
    argv = list(argv)
    os.mkfifo("pipe")
    os.symlink("nowhere", "dangling")
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.choices(("option", "replace", "drop", "more"), (10, 3, 2, 1))[0]
        if kind == "option":
            action = rng.choice(actions)
            argv.append(rng.choice(action.option_strings))
            if action.nargs != 0:
                argv.append(value_for(rng, action))
        elif kind == "replace" and len(argv) > 1:
            argv[rng.randrange(1, len(argv))] = any_word(rng)
        elif kind == "drop" and len(argv) > 1:
            argv.pop(rng.randrange(1, len(argv)))
        else:
            argv.insert(rng.randrange(1, len(argv) + 1), any_word(rng))
    return argv


def value_for(rng: random.Random, action: argparse.Action) -> str:
    if action.choices and rng.random() < 0.6:
        return rng.choice(list(action.choices))
    return any_word(rng)


def any_word(rng: random.Random) -> str:
    return rng.choice(rng.choice((NUMBERS, NUMBERS, WORDS, PATHS)))
