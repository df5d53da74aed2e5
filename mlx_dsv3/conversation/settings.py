"""How a chat samples: by what was given, else by the model's generation_config.json.

Which numbers are good is said in `options.SETTINGS`. Loads no tensor code, so that a refusal is
quick.
"""

from collections.abc import Mapping
from pathlib import Path

from mlx_dsv3.json_files import read_json
from mlx_dsv3.options import SETTINGS

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
