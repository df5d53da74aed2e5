"""Who may import whom (design section 2), read from the sources and checked in a fresh process."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A module of mlx_dsv3 may import those of earlier rows. A new module must be given a row.
ROWS = [
    {"errors", "sizes"},
    {"config", "headers", "conversation", "linear", "cache", "sampler", "gate", "differences"},
    {"rope", "expert_files", "hub", "golden"},
    {"mla", "moe", "expert_store"},
    {"model", "memory"},
    {"mtp", "folder", "state"},
    {"load", "speculative", "replay"},
    {"generate", "bounds"},
    {"parity", "programs"},
]
NO_TENSORS = {"errors", "sizes", "config", "headers", "conversation"}
REFERENCE_MAY = {"torch", "safetensors", "tokenizers", "huggingface_hub", "triton"}
CONVERT_MAY = {"mlx", "numpy", "rich", "huggingface_hub"}


def imports(path: Path) -> set[str]:
    """Return the absolute names a file imports, at the top and inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_modules(path: Path) -> set[str]:
    """Return the modules of mlx_dsv3 that a file imports, by their first name below it."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("mlx_dsv3.")}


def third_party(path: Path) -> set[str]:
    own = {"mlx_dsv3", "convert", "chat"}
    return {name.split(".")[0] for name in imports(path)} - own - sys.stdlib_module_names


MODULES = sorted(path for path in (ROOT / "mlx_dsv3").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_go_one_way(path):
    """A leaf that imports the loader: after that no part can be read, or tested, alone."""
    row = next((i for i, names in enumerate(ROWS) if path.stem in names), None)
    assert row is not None, f"give `{path.stem}` a row in {Path(__file__).name}"
    allowed = set().union(*ROWS[:row])
    assert own_modules(path) <= allowed
    if path.stem in NO_TENSORS:
        assert not third_party(path)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "mlx_dsv3" / "reference").glob("*.py")), ids=lambda path: path.stem
)
def test_reference_shares_nothing(path):
    """A helper shared by both sides hides its own error from every parity test."""
    assert own_modules(path) <= {"errors", "reference"}
    assert third_party(path) <= REFERENCE_MAY


@pytest.mark.parametrize(
    "path", sorted((ROOT / "convert").glob("*.py")), ids=lambda path: path.stem
)
def test_convert_knows_no_model(path):
    """Converting 671B must not need the model, mlx-lm or torch; `verify` may load the model."""
    allowed = {"config", "errors", "headers", "hub"}
    if path.stem == "verify":
        allowed |= {"load", "expert_store", "model", "mtp"}
    assert own_modules(path) <= allowed
    assert third_party(path) <= CONVERT_MAY


def test_chat_holds_no_tensor_code():
    """The REPL sees text and statistics; whoever changes the model need not read it."""
    assert not third_party(ROOT / "chat.py") & {"mlx", "mlx_lm", "torch", "numpy"}
    assert "convert" not in {name.split(".")[0] for name in imports(ROOT / "chat.py")}


@pytest.mark.parametrize("module", ["mlx_dsv3.config", "mlx_dsv3.headers", "mlx_dsv3.reference"])
def test_light_modules_load_no_framework(module):
    """`import mlx_dsv3.config` on a machine without MLX; 3 s of imports before a usage message."""
    names = ("mlx", "mlx_lm", "torch", "transformers")
    code = f"import sys, {module}; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("command", ["chat", "convert.__main__"])
def test_command_lines_load_no_model_code(command):
    """Help and usage errors within a second: chat.py imports the model inside its functions."""
    names = ("mlx_lm", "torch", "transformers")
    code = f"import sys, {command}; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
