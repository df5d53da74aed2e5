"""constraints.txt, which `make pins` writes."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_requirement_is_pinned():
    """transformers 5.24 came out and a clone that was green the day before had 50 failures."""
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    # No address, no local version such as `+cpu`, which no other machine could install.
    assert not [line for line in lines if not re.fullmatch(r"[\w-]+==[\w.]+( ; [^@/]+)?", line)]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["cpu"] + extras["reference"] + extras["test"]
    names = {re.match(r"[\w-]+", each)[0].replace("_", "-") for each in wanted}
    pinned = {line.split("==")[0] for line in lines}
    assert names | {"mlx-cpu", "mlx-metal", "setuptools"} <= pinned
