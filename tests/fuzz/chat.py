"""Chats on pseudo-terminals against random keys: `python -m fuzz.chat --seed S --count N`.

A day is a home folder and the chats of DAY sequences, one after another, each ended in another way
and mostly taken up again with --continue. After every sequence the chat must come back to its
prompt, answer a question, show it in `/show messages`, and have it in the file that it keeps.
`--only NUMBER` repeats the day of a sequence up to there. Sequences are the same each time; what
the clock does to them is not.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle
from pathlib import Path

from pseudo_terminal import CTRL_C, CTRL_D, ENTER, PROMPT, Terminal

from fuzz import keys

DAY, CHAT = 60, 30  # sequences
ROOT, KEPT = Path(__file__).parents[2], Path("build/fuzz")
STATUSES = {"SIGTERM": (-15, 143), "SIGHUP": (-1, 129), "closed window": (-1, 129, 0)}
STATUSES |= {"SIGKILL": (-9,), "the keys": (0, -2, 130)}  # as Ctrl-C ends a chat that leaves
PATIENCE_S, LONG_REPLY_S, AGAIN_S = 40, 0.6, 10
LONG_CHAT = 1500  # characters; a long one takes long to compute, and is begun anew
BROKEN = ("Traceback (most", "Exception ignored", "Fatal Python error", "Unhandled exception")
BROKEN += ("the turn failed at", "Exception in thread", "WARNING: your terminal")
# An unfinished paste swallows Ctrl-C, Ctrl-S stops a terminal, and Ctrl-Q quotes the next key.
TO_PROMPT = ("\x1b[201~\x03", "\x03", "\x1b[201~\x03", "\x11\x03\x03")


class Find(AssertionError):
    """What a chat must not do."""


class Day:
    """A home folder, the chats in it, and what was said last."""

    def __init__(self, model: Path, seed: int, log):
        self.model, self.seed, self.log = model, seed, log
        self.folder = Path(tempfile.mkdtemp(prefix="fuzz-chat-"))
        self.home, self.cwd = self.folder / "home", self.folder / "work"
        self.home.mkdir(), self.cwd.mkdir(), (self.folder / "bin").mkdir()
        keys.furnish(self.cwd)
        self.terminal: Terminal | None = None
        self.said, self.checked = "", 0  # the last question that must be kept
        self.may_leave = False
        self.endings, self.peak_bytes = Counter(), 0

    def open(self, goes_on: bool) -> None:
        """Start a chat; one that goes on must hold what was said last."""
        environment = {"EDITOR": str(self.cwd / "editor"), "PATH": str(self.folder / "bin")}
        words = ["--continue"] if goes_on and self.kept() else []
        self.terminal = Terminal(self.model, *words, home=self.home, cwd=self.cwd, **environment)
        self.checked = 0
        self.wait(self.is_at_prompt, "no first prompt")
        self.enter("/show messages", PATIENCE_S)  # it waits until the model is loaded
        if words and self.said not in self.terminal.text():
            raise Find(f"--continue lost {self.said}")

    def is_at_prompt(self) -> bool:
        display = self.terminal.display
        row = display.buffer[display.cursor.y]
        line = "".join(row[x].data for x in range(len(PROMPT) + 2))
        return line.rstrip() == PROMPT and display.cursor.x == len(PROMPT) + 1

    def wait(self, is_so, complaint: str, seconds: float = PATIENCE_S) -> bool:
        """Wait until something is so; False says that the chat has left instead."""
        deadline = time.monotonic() + seconds
        while not is_so():
            if not self.terminal.pump(0.02) and self.terminal.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise Find(f"hang: {complaint}")
        return True

    def play(self, number: int) -> bool:
        """Type a sequence; False says that the chat has left."""
        self.terminal.resize(100, 40)
        sequence = keys.steps(self.seed, number)
        self.may_leave = keys.may_leave(sequence)
        for kind, value in sequence:
            if self.terminal.process.poll() is not None:
                return False
            if kind == "type":
                self.terminal.type(value)
            elif kind == "resize":
                self.terminal.resize(*value)
            elif kind == "signal":
                self.terminal.send(value)
            end = time.monotonic() + (value if kind == "wait" else 0)
            while self.terminal.pump(max(0, end - time.monotonic())):
                pass
        return self.to_prompt()

    def to_prompt(self) -> bool:
        """Come back from anywhere to an empty prompt, which answers to Ctrl-C with another one."""
        self.terminal.resize(100, 40)
        deadline = time.monotonic() + PATIENCE_S
        for text in cycle(TO_PROMPT):
            was, row = self.is_at_prompt(), self.terminal.display.cursor_row
            self.terminal.type(text)
            end = time.monotonic() + 1
            while self.terminal.pump(0.06) and time.monotonic() < end:
                pass
            if self.terminal.process.poll() is not None:
                return False
            if was and self.is_at_prompt() and self.terminal.display.cursor_row > row:
                return True
            if time.monotonic() > deadline:
                raise Find("hang: no prompt after Ctrl-C")

    def enter(self, line: str, seconds: float = LONG_REPLY_S) -> bool:
        """Type a line and wait for the next prompt; after some seconds a reply is stopped."""
        row, stop_at = self.terminal.display.cursor_row, time.monotonic() + seconds
        self.terminal.seen = row
        self.terminal.type(line + ENTER)

        def is_done() -> bool:
            nonlocal stop_at
            if self.terminal.display.cursor_row > row and self.is_at_prompt():
                return True
            if time.monotonic() > stop_at:
                self.terminal.type(CTRL_C)
                stop_at += AGAIN_S
            return False

        return self.wait(is_done, f"no answer to {line!r}")

    def question(self, mark: str) -> None:
        """Ask something that is found again; a full context is emptied first."""
        line = f"{mark} What colour is a banana?"
        self.said = mark
        if self.enter(line) and "error:" in self.terminal.text() and self.enter("/clear"):
            self.enter(line)
        self.check_screen()

    def check(self, number: int) -> None:
        """The chat answers, shows what was said, and has kept it."""
        self.question(f"m{number}m")
        self.check_shown("/show messages lacks it")
        self.check_kept()
        if len(self.terminal.text()) > LONG_CHAT:
            self.enter("/clear")

    def check_shown(self, complaint: str) -> None:
        if not self.enter("/show messages") or self.said not in self.terminal.text():
            raise Find(f"{complaint}: {self.said}")

    def check_screen(self) -> None:
        """Nothing typed ends in a traceback or drives the terminal."""
        new = bytes(self.terminal.raw[self.checked :]).decode("utf-8", "replace")
        self.checked = max(0, len(self.terminal.raw) - 100)
        for words in BROKEN:
            if words in new:
                raise Find(f"{words}: {new[new.index(words) :][:2000]}")
        if "owned" in self.terminal.display.title + self.terminal.display.icon_name:
            raise Find("a text has set the terminal's title")

    def kept(self) -> list[Path]:
        files = (self.home / ".mlx_dsv3/sessions").glob("*.json")
        return sorted(files, key=lambda path: path.stat().st_mtime_ns)

    def check_kept(self) -> None:
        """The newest file holds the last question, whole."""
        files = sorted(
            (self.home / ".mlx_dsv3/sessions").glob("*.json"), key=lambda p: p.stat().st_mtime_ns
        )
        if not files:
            raise Find("lost: no session is kept")
        try:
            messages = json.loads(files[-1].read_text())["messages"]
        except (ValueError, KeyError) as error:
            raise Find(f"lost: {files[-1].name} is damaged: {error}") from error
        if not any(self.said in message["content"] for message in messages):
            raise Find(f"lost: {self.said} is not in {files[-1].name}")

    def leave(self, way: str, is_replying: bool) -> None:
        """End the chat, in a reply or at the prompt."""
        terminal = self.terminal
        if is_replying:
            self.enter("/set temp 30")
            self.said += "r"
            terminal.type(f"{self.said} Tell me something long.{ENTER}")
            row = terminal.display.cursor_row
            self.wait(lambda: terminal.display.cursor_row > row + 1, "no reply")
        if way in ("/exit", "Ctrl-D"):
            if is_replying and not self.to_prompt():
                raise Find("Ctrl-C in a reply ended the chat")
            terminal.type("/exit" + ENTER if way == "/exit" else CTRL_D)
        elif way == "closed window":
            self.close_window()
        else:
            terminal.send(getattr(signal, way))
        self.left(way)

    def close_window(self) -> None:
        """Close the terminal, as a window does: SIGHUP, and every read and write fails."""
        self.terminal.hang_up()

    def left(self, way: str) -> None:
        """Judge a chat that has left or is leaving."""
        try:
            status = self.terminal.end()
        except AssertionError as error:
            raise Find(f"hang: it does not leave by {way}") from error
        self.endings[f"{way}: {status}"] += 1
        if way == "the keys" and not self.may_leave:
            raise Find(f"it left by itself, with status {status}")
        if status not in STATUSES.get(way, (0,)):
            raise Find(f"status {status} after {way}")
        self.check_screen()
        if way not in ("SIGKILL", "closed window") and not self.terminal.is_restored():
            raise Find(f"the terminal is not restored after {way}")
        self.terminal.close()
        if way == "the keys":
            self.said = ""  # they may have taken it back
        if self.kept():
            self.check_kept()

    def measure(self) -> None:
        """Note the chat's size."""
        words = Path(f"/proc/{self.terminal.process.pid}/status")
        if words.exists() and (found := re.search(r"VmHWM:\s+(\d+)", words.read_text())):
            self.peak_bytes = max(self.peak_bytes, int(found[1]) * 1024)

    def run(self, numbers: range) -> None:
        """Play sequences, in chats of CHAT each."""
        for number in numbers:
            if self.terminal is None:
                self.open(goes_on=keys.goes_on(self.seed, number))
            self.log(number)
            if not self.play(number):
                self.left("the keys")
                self.terminal = None
                continue
            self.check(number)
            if (number + 1) % CHAT == 0 or number == numbers[-1]:
                self.measure()
                self.leave(*keys.ending(self.seed, number))
                self.terminal = None

    def close(self) -> None:
        if self.terminal:
            self.terminal.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def run_day(model: Path, seed: int, numbers: range) -> dict:
    """Run the sequences of a day; return what was found and what it took."""
    played = []
    day = Day(model, seed, played.append)
    try:
        day.run(numbers)
        found = None
    except Find as error:
        found = str(error)
        keep(day, seed, played[-1] if played else numbers[0], found)
    finally:
        day.close()
    number = played[-1] if played else numbers[0]
    return {
        "ran": len(played),
        "number": number,
        "found": found,
        "endings": day.endings,
        "peak": day.peak_bytes,
    }


def keep(day: Day, seed: int, number: int, found: str) -> None:
    """Keep what helps to understand a find: the keys, what the chat wrote, its screen."""
    folder = KEPT / f"chat-{seed}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "fault").write_text(found + "\n", errors="replace")
    (folder / "keys").write_text("\n".join(map(repr, keys.steps(seed, number))) + "\n")
    if day.terminal:
        (folder / "raw").write_bytes(day.terminal.raw)
        (folder / "screen").write_text("\n".join(day.terminal.display.rows_from(0)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fuzz.chat", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the clock")
    parser.add_argument("--count", type=int, default=2000, help="sequences of keys")
    parser.add_argument("--only", type=int, help="the day of one sequence, up to it")
    parser.add_argument("--model", type=Path, default=ROOT / "build/demo-q4")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def days(count: int, only: int | None) -> list[range]:
    if only is not None:
        return [range(only - only % DAY, only + 1)]
    return [range(first, min(first + DAY, count)) for first in range(0, count, DAY)]


def main() -> int:
    args, began = parse(), time.monotonic()
    total, endings, found, peak = 0, Counter(), 0, 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        jobs = [
            pool.submit(run_day, args.model, args.seed, each)
            for each in days(args.count, args.only)
        ]
        for job in jobs:
            result = job.result()
            total, endings = total + result["ran"], endings + result["endings"]
            peak = max(peak, result["peak"])
            if result["found"]:
                found += 1
                print(f"{args.seed} {result['number']}: {ascii(result['found'])[1:-1]}", flush=True)
    print(
        f"seed {args.seed}: {total:,} sequences in {time.monotonic() - began:.0f} s, {found} found"
    )
    print("endings:", ", ".join(f"{way} {n} times" for way, n in sorted(endings.items())))
    print(f"largest process {peak / 1e6:.0f} MB")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
