"""Command lines: one parser, and the numbers that a user may give, each judged in one place.

A number is refused in the same words wherever it was given: by an option, by a
generation_config.json, later by a command or a request. Loads no tensor code, so that a refusal is
quick.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass

from mlx_dsv3.errors import UserError

MOST_WHOLE = 10**100 - 1  # a kept chat is JSON, where longer numbers are refused


class Parser(argparse.ArgumentParser):
    """Tells a wrong command line as every other mistake: one sentence and a hint."""

    def error(self, message: str):
        message = re.sub(r"^argument (\S+): ", r"`\1`: ", " ".join(message.split()))
        command = self.prog.removeprefix("python ")
        raise UserError(message, f"`python {command} --help` lists the options")


@dataclass(frozen=True)
class Setting:
    """A number that a setting takes: which are good, the same in words, and a hint."""

    kind: type
    is_good: Callable[[float], bool]
    words: str
    hint: str

    def check(self, value: object, where: str, text: str | None = None) -> float:
        """Return the value, or raise `UserError` with where it was given, and as what text."""
        kinds = (int,) if self.kind is int else (int, float)
        if type(value) not in kinds or not self.is_good(value):
            given = value if text is None else text
            raise UserError(f"{where} is `{given}`; it takes {self.words}", self.hint)
        if self.kind is int and abs(value) > MOST_WHOLE:
            raise UserError(f"{where} has more than 100 digits", self.hint)
        return value

    def parse(self, text: str, where: str) -> float:
        """Return the value of a text, checked."""
        try:
            value = self.kind(text)
        except ValueError:
            value = text
        return self.check(value, where, text)


SETTINGS = {
    "max_tokens": Setting(
        int, lambda n: n >= 1, "a whole number from 1", "leave it out for no limit"
    ),
    # Beyond 1000 all tokens are alike; float32 makes the largest numbers infinite.
    "temp": Setting(
        float,
        lambda x: 0 <= x <= 1000,
        "a number from 0 to 1000",
        "`--temp 0` is greedy, `--temp 0.6` is usual for R1",
    ),
    "top_p": Setting(
        float,
        lambda x: 0 < x <= 1,
        "a number above 0, at most 1",
        "`--top-p 1` keeps every token, `--top-p 0.95` is usual",
    ),
    "top_k": Setting(
        int, lambda n: n >= 0, "a whole number from 0", "`--top-k 0` keeps every token"
    ),
    "min_p": Setting(
        float,
        lambda x: 0 <= x <= 1,
        "a number from 0 to 1",
        "`--min-p 0` keeps every token, `--min-p 0.05` is usual",
    ),
    "repetition_penalty": Setting(
        float, lambda x: 0 < x < float("inf"), "a number above 0", "1 is none, 1.1 is usual"
    ),
    "seed": Setting(int, lambda n: True, "a whole number", "leave it out for seed 0"),
    "expert_memory": Setting(
        float, lambda x: 0 <= x <= 1e6, "GB, a number from 0", "`--plan` shows what experts take"
    ),
    "fit_memory": Setting(
        float, lambda x: 0 < x <= 1e6, "GB, a number above 0", "a Mac with 192 GB takes 192"
    ),
    "context": Setting(
        int, lambda n: n >= 1, "a number of tokens from 1", "`--plan` shows what a length takes"
    ),
}


def first_line(docstring: str | None) -> str:
    """Return what a program's `--help` begins with; the flag `-OO` leaves no docstrings."""
    return (docstring or "").partition("\n")[0]


def number(name: str) -> Callable[[str], float]:
    """Return the parser of the option that gives a setting."""
    return lambda text: SETTINGS[name].parse(text, f"`--{name.replace('_', '-')}`")


def whole(flag: str, least: int, most: int | None = None) -> Callable[[str], int]:
    """Return the parser of an option that takes a whole number from `least` up, or to `most`."""
    words = f"a whole number from {least}" + (f" to {most}" if most else "")
    hint = f"`{flag} {least}` is the least"
    setting = Setting(int, lambda n: least <= n <= (most or n), words, hint)
    return lambda text: setting.parse(text, f"`{flag}`")
