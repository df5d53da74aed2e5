"""Programs on machines that lack a package: what runs all the same, and what says what to install.

Each child process takes the packages for missing, whatever is installed.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mlx_dsv3.errors import EXTRAS, missing_package

ROOT = Path(__file__).parents[1]
MLX = ("mlx", "mlx_lm", "transformers")


def run_without(packages: tuple[str, ...], code: str) -> subprocess.CompletedProcess:
    """Run `code` where `packages` cannot be imported and there is no GPU."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules |= dict.fromkeys({packages})\n{code}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )


def as_program(module: str, *argv: str) -> str:
    """Return code that runs a module as `python -m` does."""
    return (
        f"import runpy; sys.argv = {[module, *argv]}\n"
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )


def test_the_cuda_lane_needs_no_mlx():
    """tests/conftest.py imported mlx, so the lane could not start on the machine it is for."""
    lane = re.search(r"^CUDA_LANE := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    argv = ["-q", "-p", "no:cacheprovider", *lane]
    done = run_without(MLX, f"import pytest; sys.exit(pytest.main({argv}))")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^[5-9]\d skipped, \d+ deselected", done.stdout, re.M), done.stdout
    assert "PyTorch finds no NVIDIA GPU" in done.stdout


def test_the_reference_needs_no_mlx(tmp_path, checkpoint):
    """A recording is made where MLX does not exist: one import in a corner would stop it."""
    ids, out, source = tmp_path / "ids.json", tmp_path / "out.safetensors", str(checkpoint)
    ids.write_text("[0, 40, 41, 42]")
    on_cpu = ["--device", "cpu", "--arithmetic", "float32"]
    recorded = [source, str(out), "--prompt-file", str(ids), *on_cpu]
    generated = [source, "-p", "Hello", "--max-tokens", "2", *on_cpu]
    done = run_without(
        MLX,
        "from mlx_dsv3.reference import generate, record\n"
        f"sys.exit(record.main({recorded}) or generate.main({generated}))",
    )
    assert done.returncode == 0, done.stderr
    assert "holds 1 prompt, " in done.stdout and "float32 on cpu" in done.stdout and out.is_file()


@pytest.mark.parametrize(
    "module, missing",
    [
        ("mlx_dsv3.reference.record", "torch"),
        ("mlx_dsv3.reference.generate", "torch"),
        ("benchmarks.bench_kernels", "torch"),
        ("demo.train", "torch"),
        ("demo.evaluate", "torch"),
        ("convert", "mlx"),
        ("mlx_dsv3.parity", "mlx"),
        ("mlx_dsv3.importance", "mlx"),
    ],
)
def test_a_program_names_the_package_it_lacks(module, missing):
    """`import torch` stands above `main`, so its absence was a traceback."""
    done = run_without((missing,), as_program(module))
    extra, is_wheel = EXTRAS[missing], missing == "mlx" and sys.platform == "linux"
    package = "'mlx[cpu]'" if is_wheel else missing
    assert done.returncode == 2
    assert done.stderr == (
        f"error: this program needs the package `{missing}`, which is not installed\n\n"
        f"hint: `pip install {package}`, or in a checkout `pip install '.[{extra}]'`\n"
    )


def test_a_program_names_the_package_that_main_imports(converted):
    """chat.py imports the model inside its functions: `run_main` tells those as well."""
    done = run_without(("mlx_lm",), as_program("chat", str(converted("q4")), "-p", "Hello"))
    assert done.returncode == 2
    assert done.stderr == (
        "error: this program needs the package `mlx_lm`, which is not installed\n\n"
        "hint: `pip install mlx_lm`\n"
    )


@pytest.mark.parametrize(
    "program, missing", [("convert", "mlx"), ("parity", "mlx"), ("chat", "mlx_lm")]
)
def test_installed_programs_name_it_too(program, missing, converted):
    """Their modules are imported, not run: the absence was a traceback there."""
    argv = [program, str(converted("q4")), "-p", "Hello"]
    code = f"from mlx_dsv3 import programs; sys.argv = {argv}; programs.{program}()"
    done = run_without((missing,), code)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: this program needs the package `{missing}`, which is")


def test_mlx_without_a_backend():
    """`pip install .` on Linux, without the extra `cpu`: MLX's wheel says `libmlx.so`."""
    error = ImportError("libmlx.so: cannot open shared object file", name="core")
    assert "a backend of `mlx`" in missing_package(error).message
    assert "'mlx[cpu]'" in missing_package(error).hint


@pytest.mark.parametrize(
    "error", [ImportError("cannot import name"), ModuleNotFoundError("no", name="mlx_dsv3.mo")]
)
def test_a_bug_keeps_its_traceback(error):
    """Our own misspelt import is no package that anyone could install."""
    assert missing_package(error) is None


def test_extras_are_those_of_the_package():
    """An extra renamed in pyproject.toml: pip warns, installs nothing, and the hint is a loop."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for package, extra in EXTRAS.items():
        names = [re.match(r"\w+", each)[0] for each in project["optional-dependencies"][extra]]
        assert package in names
