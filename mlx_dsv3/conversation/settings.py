"""How a chat samples: by what was given, else by the model's generation_config.json.

Which numbers are good is said in `options.SETTINGS`. Loads no tensor code, so that a refusal is
quick.
"""

from collections.abc import Mapping
from pathlib import Path

from mlx_dsv3.config import read_generation
from mlx_dsv3.errors import UserError
from mlx_dsv3.json_files import brief
from mlx_dsv3.options import SETTINGS

# Greedy, all tokens, no limit but the context's end: where neither a person nor the model says.
DEFAULTS = {"temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
DEFAULTS |= {"seed": 0, "max_tokens": None}
SAMPLING = {"temp": "temperature", "repetition_penalty": "repetition_penalty"}
SAMPLING |= {name: name for name in ("top_p", "top_k", "min_p")}
# What a generation_config.json may carry besides for a filter that is off (mlx-lm's and vLLM's).
OFF = {"top_p": 0, "top_k": -1}


def sampling_defaults(folder: Path) -> dict[str, float]:
    """Return what generation_config.json says of sampling, unchecked; greedy where nothing.

    A repetition penalty counts without `do_sample` too, as it does in transformers.
    """
    config = read_generation(folder)
    samples = config.get("do_sample")
    if samples not in (None, False, True):
        raise UserError(
            f"`do_sample` in `{folder / 'generation_config.json'}` is `{brief(samples)}`; it takes "
            "true or false",
            "fetch generation_config.json again",
        )
    defaults = {"temp": float(samples or 0)}  # temperature 1 is transformers' own default
    for name, key in SAMPLING.items():
        value = config.get(key) if samples or key == "repetition_penalty" else None
        if value is not None and (isinstance(value, bool) or value != OFF.get(name)):
            defaults[name] = value
    return defaults


def chat_settings(folder: Path, given: Mapping[str, object]) -> dict[str, object]:
    """Return a chat's settings by what was given, else by generation_config.json, else `DEFAULTS`.

    `given` holds checked values by the names of `SETTINGS`; None and what it lacks are not given.
    """
    path, values = folder / "generation_config.json", DEFAULTS | sampling_defaults(folder)
    for name in DEFAULTS:
        if given.get(name) is not None:
            values[name] = given[name]
        elif name in SAMPLING:
            SETTINGS[name].check(values[name], f"`{SAMPLING[name]}` in `{path}`")
    return values


def make_sampler(settings: Mapping[str, object]):
    """Return the sampler of a chat's settings."""
    from mlx_dsv3.decoding.sampler import Sampler, repetition_penalties

    filters = {name: settings[name] for name in ("temp", "top_p", "top_k", "min_p", "seed")}
    return Sampler(**filters, penalties=repetition_penalties(settings["repetition_penalty"]))
