"""The settings of a chat: which numbers are good, and where sampling's defaults come from.

A number is refused in the same words wherever it was given: by an option, by a
generation_config.json, later by a command or a request. `--drafts` is judged by
`decoding/draft_control.py`, whose number it is. Loads no tensor code, so that a refusal is quick.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_dsv3.errors import UserError
from mlx_dsv3.json_files import read_json


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
    "context": Setting(
        int, lambda n: n >= 1, "a number of tokens from 1", "`--plan` shows what a length takes"
    ),
}
SAMPLING = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
# What a generation_config.json may carry besides for a filter that is off (mlx-lm's and vLLM's).
OFF = {"top_p": 0, "top_k": -1}


def sampling_defaults(path: Path) -> dict[str, float]:
    """Return what generation_config.json says of sampling, unchecked; greedy where nothing."""
    config = read_json(path) if path.is_file() else {}
    samples = bool(config.get("do_sample"))  # temperature 1 is then transformers' own default
    defaults = {"temp": float(samples), "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    for name, key in SAMPLING.items():
        value = config.get(key) if samples else None
        if value is not None and (isinstance(value, bool) or value != OFF.get(name)):
            defaults[name] = value
    return defaults


def make_sampler(folder: Path, given: Mapping[str, object]):
    """Return a sampler by what was given, else by generation_config.json, else a greedy one.

    `given` holds checked values by the names of `SETTINGS`; None and what it lacks are not given.
    """
    from mlx_dsv3.decoding.sampler import Sampler, repetition_penalties

    path = folder / "generation_config.json"
    values = sampling_defaults(path)
    for name, key in SAMPLING.items():
        if given.get(name) is not None:
            values[name] = given[name]
        else:
            SETTINGS[name].check(values[name], f"`{key}` in `{path}`")
    penalties = repetition_penalties(given.get("repetition_penalty"))
    return Sampler(**values, seed=given.get("seed") or 0, penalties=penalties)
