"""Who may import whom (design 2), read from the sources and checked in a fresh process."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The rooms of mlx_dsv3, and the files beside them. Each may import those of earlier rows.
ROWS = [
    {"errors", "sizes"},
    {"options", "json_files"},
    {"fields"},
    {"config", "device"},
    {"checkpoint"},
    {"model"},
    {"experts", "decoding"},
    {"transients", "tokenizer", "detokenizer"},
    {"memory"},
    {"load"},
    {"generate", "parity"},
    {"conversation"},
    {"terminal"},
    {"importance"},
    {"programs"},
]
# The second opinion shares no code with the others.
ALONE = {"reference": {"errors", "options", "json_files"}}
NO_TENSORS = {"errors", "sizes", "options", "json_files", "fields", "config", "checkpoint"}
NO_TENSORS |= {"conversation"}
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


MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "mlx_dsv3").rglob("*.py"))
ROOMS = sorted(path.parent.name for path in MODULES if path.stem == "__init__" and path.parts[2:])


def room_of(path: Path) -> str:
    """Return the room of a file of mlx_dsv3, or its own name where it has none."""
    return path.with_suffix("").parts[1]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_one_way(path):
    """A leaf that imports the loader: after that no part can be read, or tested, alone."""
    room = room_of(path)
    if room == "__init__":
        assert not own_modules(ROOT / path)
        return
    row = next((i for i, names in enumerate(ROWS) if room in names), None)
    assert row is not None or room in ALONE, f"give `{room}` a row in {Path(__file__).name}"
    earlier = ALONE.get(room) or set().union(*ROWS[:row])
    assert own_modules(ROOT / path) <= earlier | {room}
    if room in NO_TENSORS:
        may = {"numpy"} if path.name == "importance.py" else {"huggingface_hub"}
        assert not third_party(ROOT / path) - may
    if room == "reference":
        assert third_party(ROOT / path) <= REFERENCE_MAY


def test_the_model_is_one_sitting():
    """A rule that is read in three rooms is checked against the paper in none."""
    paths = list((ROOT / "mlx_dsv3" / "model").glob("*.py"))
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths) <= 660
    assert set().union(*map(own_modules, paths)) <= {"model", "config", "device", "errors"}


@pytest.mark.parametrize("room", ["convert", *ROOMS])
def test_no_cycles_inside_a_room(room):
    """Two files that import each other are one file, read in two places."""
    folder = ROOT / room if room == "convert" else ROOT / "mlx_dsv3" / room
    package = ".".join(folder.relative_to(ROOT).parts)
    graph = {
        path.stem: {
            name.removeprefix(f"{package}.").split(".")[0]
            for name in imports(path)
            if name.startswith(f"{package}.")
        }
        for path in folder.glob("*.py")
    }
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("room", ["convert", *ROOMS])
def test_a_room_says_how_to_read_it(room):
    """A file that its room's docstring does not name is found by nobody."""
    folder = ROOT / room if room == "convert" else ROOT / "mlx_dsv3" / room
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    assert [type(node) for node in tree.body] == [ast.Expr], "a docstring and nothing else"
    words = ast.get_docstring(tree)
    for path in folder.glob("*.py"):
        assert path.stem == "__init__" or f"`{path.stem}`" in words, path


@pytest.mark.parametrize(
    "path", sorted((ROOT / "convert").glob("*.py")), ids=lambda path: path.stem
)
def test_convert_knows_no_model(path):
    """Converting 671B must not need the model, mlx-lm or torch."""
    may = {"errors", "sizes", "options", "json_files", "config", "checkpoint"}
    may |= {"memory"} if path.stem == "fit_memory" else set()  # a plan is made from headers alone
    assert own_modules(path) <= may
    assert third_party(path) <= CONVERT_MAY


@pytest.mark.parametrize(
    "path", [Path("chat.py"), *(path for path in MODULES if room_of(path) == "terminal")], ids=str
)
def test_chat_holds_no_tensor_code(path):
    """The REPL sees text and statistics; whoever changes the model need not read it."""
    assert third_party(ROOT / path) <= {"prompt_toolkit"}
    assert "convert" not in {name.split(".")[0] for name in imports(ROOT / path)}


def test_a_session_prints_nothing():
    """An endpoint stands on it as well, and its stdout belongs to nobody."""
    for path in (ROOT / "mlx_dsv3" / "conversation").glob("*.py"):
        assert "print" not in {
            getattr(node.func, "id", "")
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
        }, path


@pytest.mark.parametrize(
    "module", ["mlx_dsv3.config", "mlx_dsv3.checkpoint.headers", "mlx_dsv3.reference"]
)
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
