"""Fixtures with MLX: random models on both sides, and the demo checkpoint, converted once."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from mlx_folder import write_mlx
from parity.pairs import Pair, load_reference

from convert.__main__ import main as convert
from mlx_dsv3.errors import run_main
from mlx_dsv3.load import load_model
from mlx_dsv3.model import cpu

# Every test but those of the `metal` lane runs on the CPU backend, also on a Mac: the bits that
# they compare, and bounds near a float32 rounding error, are promised there. Programs that they
# start choose for themselves, and use a Mac's GPU unless they are told.
mx.set_default_device(mx.cpu)


@pytest.fixture(autouse=True)
def fixed_mlx_seed():
    """Give every test the same random state of MLX, whatever ran before it."""
    mx.random.seed(0)


@pytest.fixture
def all_in_mlx(monkeypatch):
    """Leave every product to MLX, as on a GPU."""
    monkeypatch.setattr(cpu, "takes", lambda *call: False)


@pytest.fixture(params=["numpy", "mlx"])
def both_ways(request):
    """Run a test twice: with `model/cpu.py`, and without it, which is the code that a Mac runs."""
    if request.param == "mlx":
        request.getfixturevalue("all_in_mlx")


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory):
    """Return a function (config, bias mean, ...) -> (folder, tensors it means), made once each."""
    made = {}

    def write(config: dict, bias_mean=2.0, seed=0, **options) -> tuple[Path, dict]:
        key = repr((config, bias_mean, seed, options))
        if key not in made:
            tensors = tiny.random_tensors(config, seed, bias_mean)
            folder = tmp_path_factory.mktemp("mlx")
            made[key] = folder, write_mlx(folder, config, tensors, **options)
        return made[key]

    return write


@pytest.fixture(scope="session")
def random_pair(random_folder):
    """Return a function (config, bias mean, ...) -> Pair; the MLX side is loaded each time."""
    references = {}

    def load(config: dict, bias_mean=2.0, seed=0, dtype=mx.float32, **options) -> Pair:
        folder, tensors = random_folder(config, bias_mean, seed, **options)
        if folder not in references:
            references[folder] = load_reference(config, tensors)
        loaded = load_model(folder, dtype=dtype)
        model, mtp, store, args = loaded.model, loaded.mtp, loaded.store, loaded.args
        store.close()
        return Pair(model, mtp, args, references[folder], tensors, config)

    return load


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    """Return a function (config, bias mean) -> transformers' model with the same tensors."""
    from parity.oracle import Oracle  # transformers takes 3 s to import: only where it is used

    made = {}

    def load(config: dict, bias_mean=2.0, seed=0) -> Oracle:
        key = repr((config, bias_mean, seed))
        if key not in made:
            folder = tmp_path_factory.mktemp("hub")
            tiny.write_hub(folder, config, seed=seed, bias_mean=bias_mean, storage="bf16")
            made[key] = Oracle(folder, config["num_hidden_layers"])
        return made[key]

    return load


@pytest.fixture(scope="session")
def converted(tmp_path_factory, checkpoint):
    """Return a function recipe -> folder, converted once each."""
    made = {}

    def run(recipe: str) -> Path:
        if recipe not in made:
            folder = tmp_path_factory.mktemp("demo") / recipe
            assert not convert(["run", str(checkpoint), str(folder), "--recipe", recipe])
            made[recipe] = folder
        return made[recipe]

    return run


@pytest.fixture
def replay(capsys):
    """Return a function (folder, golden, flags) -> (exit status, report, error text)."""
    from mlx_dsv3.parity.__main__ import main

    def run(folder: Path, golden: Path, *flags: str) -> tuple[int, dict, str]:
        capsys.readouterr()
        status = run_main(lambda: main([str(folder), str(golden), "--json", *flags]))
        out, err = capsys.readouterr()
        return status, json.loads(out, parse_constant=pytest.fail) if out else {}, err

    return run


@pytest.fixture
def no_loading(monkeypatch):
    """Fail where parity loads weights: what can be refused is refused before."""
    name = "mlx_dsv3.parity.__main__.load_model"
    monkeypatch.setattr(name, lambda *_, **__: pytest.fail("it loads"))


@pytest.fixture(scope="session")
def good_folders(tmp_path_factory) -> Path:
    """Return a checkpoint and its conversion, an MLX folder, and an older one that is packed."""
    packing = {"bits": 4, "group_size": 32, "mode": "affine"}
    folder = tmp_path_factory.mktemp("made")
    tiny.write_hub(folder / "hub", tiny.A)
    write_mlx(folder / "mlx", tiny.A, tiny.random_tensors(tiny.A))
    write_mlx(
        folder / "packed", tiny.D, tiny.random_tensors(tiny.D), packing=packing, split_kv_b=False
    )
    assert convert(["run", str(folder / "hub"), str(folder / "out")]) == 0
    return folder


@pytest.fixture
def folders(good_folders, tmp_path) -> Path:
    """Return a copy of those, to be damaged."""
    return shutil.copytree(good_folders, tmp_path / "made")
