"""The wheel holds every module and runs where no checkout is: what an editable install hides.

Built and installed without the network. The environment is empty at first; then a .pth file shows
it the packages of this one, but not this checkout, whose own .pth file Python does not follow.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

for package in ("mlx", "setuptools"):
    pytest.importorskip(package)
ROOT = Path(__file__).parents[1]
BUILT = ("mlx_dsv3", "convert", "chat.py", "pyproject.toml", "README.md", "LICENSE")
PURELIB = "import sysconfig; print(sysconfig.get_path('purelib'))"
# One process for all of it: the frameworks take seconds to import.
IMPORT_ALL_AND_HELP = """
import importlib, sys
for name in sys.argv[1:]:
    file = importlib.import_module(name).__file__
    assert file.startswith(sys.prefix), f"{name} is {file}"
sys.argv[1:] = ["--help"]
sys.modules["mlx_dsv3.programs"].parity()
"""


def run(*argv: str | Path, cwd: Path, status: int = 0) -> subprocess.CompletedProcess:
    """Run a program away from the checkout, and without what points to it."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy, in which no earlier build left anything."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in BUILT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree)
    build = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    run(sys.executable, "-c", build, out, cwd=tree)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def modules(wheel) -> list[str]:
    """Return the files of the wheel that are code."""
    return sorted(name for name in ZipFile(wheel).namelist() if name.endswith(".py"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """Return an environment that holds the wheel and no other package."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder)
    pip = (sys.executable, "-m", "pip", "--python", folder, "install")
    run(*pip, "--no-deps", "--no-index", "--quiet", wheel, cwd=folder)
    return folder


def test_the_wheel_holds_every_module(modules):
    """A list of packages in pyproject.toml forgets the next room; tests stay out."""
    here = [ROOT / "chat.py"]
    for package in ("mlx_dsv3", "convert"):
        here += (ROOT / package).rglob("*.py")
    assert modules == sorted(path.relative_to(ROOT).as_posix() for path in here)


def test_programs_in_an_empty_environment(environment):
    """`--version` needs no package; what needs one says which, in words."""
    done = run(environment / "bin/mlx-dsv3-chat", "--version", cwd=environment)
    assert done.stdout[0].isdigit(), "not that of a checkout"
    for program in ("convert", "parity"):
        done = run(environment / f"bin/mlx-dsv3-{program}", "--help", cwd=environment, status=2)
        assert done.stderr.startswith("error: this program needs the package `")


def test_programs_beside_their_dependencies(environment, modules, checkpoint):
    """Each module is imported from the wheel, and each program starts."""
    paths = sysconfig.get_paths()
    inside = Path(run(environment / "bin/python", "-c", PURELIB, cwd=environment).stdout.strip())
    (inside / "others.pth").write_text(f"{paths['purelib']}\n{paths['platlib']}\n")
    names = [
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in modules
    ]
    if importlib.util.find_spec("triton") is None:  # an extra
        names.remove("mlx_dsv3.reference.kernels")
    done = run(environment / "bin/python", "-c", IMPORT_ALL_AND_HELP, *names, cwd=environment)
    assert done.stdout.startswith("usage: python -m mlx_dsv3.parity ")
    done = run(environment / "bin/mlx-dsv3-chat", "--help", cwd=environment)
    assert done.stdout.startswith("usage: chat.py ")
    done = run(environment / "bin/mlx-dsv3-convert", "plan", checkpoint, cwd=environment)
    assert "885 tensors in 4 shards" in done.stdout
