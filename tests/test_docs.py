"""The pages say what is so: references, paths, links, flags, examples and the recorded session."""

import io
import math
import re
import runpy
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("mlx")
import which_mac

from convert.inventory import main_tensors
from convert.planner import build
from convert.recipe import RECIPES
from convert.report import memory_needs
from mlx_dsv3.config import ModelArgs
from mlx_dsv3.conversation.messages import Conversation
from mlx_dsv3.generate import stream
from mlx_dsv3.load import load

ROOT = Path(__file__).parents[1]
PAGES = {"spec": ROOT / "docs/model.md", "design": ROOT / "docs/design.md"}
READ = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
READ += [ROOT / "benchmarks/README.md", ROOT / "demo/README.md"]
# `spec 4.3`, `spec section 8`, `spec 2.3, 7.3`; `spec 7.2.3` and `spec 7.2, item 3` are an item of
# the section's numbered list.
PLACE = r"\d+(?:\.\d+)*"
REFERENCE = re.compile(
    rf"\b(spec|design) (?:section )?({PLACE}(?:, {PLACE})*)(?:, (?:item|step)s? ({PLACE}))?"
)


def places(page: Path) -> set[str]:
    """Return the numbers that a page has: of headings, and of the items of their lists."""
    found, section = set(), ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if heading := re.match(rf"#+ ({PLACE})\.? ", line):
            section = heading[1]
            found.add(section)
        elif item := re.match(r"(\d+)\. ", line):
            found.add(f"{section}.{item[1]}")
    return found


def unresolved(text: str, known: dict[str, set[str]]) -> list[str]:
    """Return the references of a text that lead nowhere."""
    text = re.sub(r"\s+#?\s*", " ", text)  # a reference may go over the end of a line
    lost = []
    for page, numbers, item in REFERENCE.findall(text):
        wanted = numbers.split(", ")
        wanted += [f"{wanted[-1]}.{item}"] if item else []
        lost += [f"{page} {number}" for number in wanted if number not in known[page]]
    return lost


@pytest.fixture(scope="module")
def known():
    return {name: places(page) for name, page in PAGES.items()}


def test_references_resolve(known):
    """Every "spec x.y" and "design x" is a heading of docs/model.md or docs/design.md."""
    sources = [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    sources = [path for path in sources if "build" not in path.parts and path != Path(__file__)]
    lost = {}
    for path in [*sources, *READ]:
        text = path.read_text(encoding="utf-8")
        found = unresolved(text, known)
        found += re.findall(r"the specification", text)  # which one? "docs/model.md, 5.3"
        if found:
            lost[str(path.relative_to(ROOT))] = found
    assert not lost
    assert sum(len(REFERENCE.findall(path.read_text(encoding="utf-8"))) for path in sources) > 40


def test_a_reference_that_leads_nowhere_is_found(known):
    """The rule above sees sections, lists of them, items, and lines that break in between."""
    good = "spec 3.5; design section 2; spec 2.3, 7.3; spec 4.3, step 3; spec 7.2.3; spec section 8"
    assert not unresolved(good, known)
    bad = "spec 3.9; design 99; spec 2.3, 7.9; spec 4.3, step\n# 30; spec\n    12; spec 7.2.30"
    wanted = ["spec 3.9", "design 99", "spec 7.9", "spec 4.3.30", "spec 12", "spec 7.2.30"]
    assert unresolved(bad, known) == wanted


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Return the names that a page's headings have in links."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", READ, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    """A link inside the tree leads to a file, and to a heading where it names one."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def is_there(name: str) -> bool:
    """Say whether a file or folder of the tree has this path, from the root or from mlx_dsv3/.

    A name alone may be any file's: `bounds.py`.
    """
    if "/" not in name:
        return any(".venv" not in path.parts for path in ROOT.rglob(name))
    return any((place / name).exists() for place in (ROOT, ROOT / "mlx_dsv3"))


# The log names files as they were, and docs/model.md names other people's.
NAMING = [page for page in READ if page.name not in ("log.md", "model.md")]


@pytest.mark.parametrize("page", NAMING, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist(page):
    """A program, page or folder that a page names exists; `OUT/x.py` would be a placeholder."""
    text = page.read_text(encoding="utf-8")
    names = re.findall(r"(?<![\w./{…-])([a-z][\w/]*\.(?:py|md|toml))\b", text)
    names += re.findall(
        r"(?<![\w./-])((?:mlx_dsv3|convert|tests|benchmarks|docs|demo)/[\w/.-]*)", text
    )
    missing = sorted({name.rstrip(".") for name in names if not is_there(name.rstrip("."))})
    assert not missing


def test_rooms_and_benchmarks_are_named():
    """The README's tree has every room; benchmarks/README.md has every program beside it."""
    tree = (ROOT / "README.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (ROOT / "mlx_dsv3").glob("*/__init__.py")}
    assert not {room for room in rooms if f"\n  {room}/ " not in tree}
    programs = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    assert not {name for name in programs if f"`{name}" not in page}


def test_names_are_where_the_readme_says():
    """`Bank` had moved to another file: the first hop of a newcomer led past it."""
    rows = re.findall(r"^\| .* \| (.*`) in \[[^]]+\]\((\S+)\)", prose(ROOT / "README.md"), re.M)
    lost, found = [], 0
    for words, path in rows:
        text = (ROOT / path).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", words):
            found += 1
            if not re.search(rf"^ *(?:class|def) {name}\b", text, flags=re.M):
                lost.append((name, path))
    assert not lost
    assert found >= 4


def blocks(page: Path, language: str = "") -> list[str]:
    """Return the fenced blocks of a page in a language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


EXAMPLES = [(page, code) for page in READ for code in blocks(page, "python")]


@pytest.mark.parametrize("page, code", EXAMPLES, ids=lambda x: getattr(x, "name", ""))
def test_python_examples_run(page, code, converted, tmp_path, monkeypatch, capsys):
    """Every Python example of every page runs, on the demo model that `make demo` makes."""
    monkeypatch.chdir(tmp_path)
    Path("build").mkdir()
    Path("build/demo-q4").symlink_to(converted("q4"))
    exec(compile(code, str(page), "exec"), {"__name__": "example"})
    if page.name == "README.md":
        assert capsys.readouterr().out == "The capital of France is Paris."


def test_there_is_an_example_of_load_and_stream():
    assert any("load(" in code and "stream(" in code for _, code in EXAMPLES)


def recorded_session() -> list[tuple[str, str]]:
    """Return the turns of the README's session: questions behind `>>> `, and replies."""
    session = next(block for block in blocks(ROOT / "README.md") if ">>> " in block)
    turns = session.split(">>> ")[1:]
    return [tuple(turn.strip().split("\n", 1)) for turn in turns]


def test_recorded_session_is_what_the_demo_model_says(converted):
    """Greedily, in 4 bits, as `make demo` opens it; the second answer needs the first turn."""
    loaded = load(converted("q4"), context=1024)
    conversation, turns = Conversation(loaded.tokenizer), recorded_session()
    assert len(turns) >= 3
    for question, reply in turns:
        conversation.add_user(question)
        text = "".join(piece.text for piece in stream(loaded, conversation.prompt_ids()))
        assert text == reply
        conversation.add_assistant(text)
    loaded.store.close()


@pytest.mark.parametrize(
    "column", [0, 1, *(pytest.param(i, marks=pytest.mark.slow) for i in (2, 3))]
)
def test_which_mac_runs_what(column, monkeypatch):
    """A column of the README's table is what the memory plan says today."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if " GB | " in line]
    table = {row[0]: row[1 + column] for row in rows if len(row) == 1 + len(which_mac.COLUMNS)}
    monkeypatch.setattr(which_mac, "COLUMNS", which_mac.COLUMNS[column : column + 1])
    assert table == dict(which_mac.table())


def test_share_of_the_routed_experts():
    """The README said 94 %: a number that nothing counts is copied for ever."""
    sizes = {True: 0, False: 0}
    for tensor in main_tensors(ModelArgs.from_dict(which_mac.V3)):
        sizes[".experts." in tensor.name] += math.prod(tensor.shape)
    share = f"{sizes[True] / sum(sizes.values()):.0%}".replace("%", " %")
    assert f"Routed experts are {share} of the weights" in prose(ROOT / "README.md")


RECIPE_ROWS = re.findall(
    r"^\| `([\w-]+)`[^|]*\| 688\.6 GB \|(.*) \|$",
    (ROOT / "README.md").read_text(encoding="utf-8"),
    flags=re.M,
)


def test_the_recipes_of_the_readme_are_found():
    assert len(RECIPE_ROWS) == 5


@pytest.mark.parametrize(
    "recipe, row",
    [RECIPE_ROWS[0], *(pytest.param(*r, marks=pytest.mark.slow) for r in RECIPE_ROWS[1:])],
)
def test_recipes_of_the_readme(recipe, row):
    """A row of the README's table of sizes is what the converter's plan says today."""
    plan = build(which_mac.source_of(which_mac.V3), RECIPES[recipe])
    needs = memory_needs(plan)
    names = ("resident_bytes", "streamed_bytes", "quarter_bytes")
    sizes = [plan.nbytes, *(needs[name] for name in names)]
    assert row.strip().split(" | ") == [f"{nbytes / 1e9:.1f} GB" for nbytes in sizes]


RUN_TWICE = pytest.mark.filterwarnings("ignore:.*found in sys.modules")


@cache
def help_of(program: tuple[str, ...]) -> str:
    """Return the help of a program."""
    if program[0] == "-m":
        run, name, *more = runpy.run_module, *program[1:]
    else:
        run, name, *more = runpy.run_path, *program
    out = io.StringIO()
    with mock.patch.object(sys, "argv", [name, *more, "--help"]), redirect_stdout(out):
        with pytest.raises(SystemExit, match="0"):
            run(name if program[0] == "-m" else str(ROOT / name), run_name="__main__")
    return out.getvalue()


@RUN_TWICE
def test_flags_of_the_readme_are_in_a_help():
    """A flag that stands alone, as `--context N` does, is one of the chat's or the converter's."""
    programs = [("chat.py",), *(("-m", "convert", name) for name in ("plan", "run", "verify"))]
    known = "".join(map(help_of, programs))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    assert len(flags) > 10
    assert not {flag for flag in flags if not re.search(rf"{flag}\b", known)}


HELPS = [("chat.py",), *(("-m", "convert", name) for name in ("plan", "run", "verify", "mtp"))]
HELPS += [("-m", f"mlx_dsv3.reference.{name}") for name in ("record", "generate")]
PARITY = ((), ("perplexity",), ("compare",), ("capacities",))
HELPS += [("-m", "mlx_dsv3.parity", *name) for name in PARITY]
HELPS += [("-m", "mlx_dsv3.importance")]
OTHERS = {"--model", "--nproc-per-node", "--rows"}  # of mlx_lm.chat, torchrun, a benchmark


@RUN_TWICE
def test_flags_of_the_hints_are_in_a_help():
    """A hint that names a flag of another time sends its reader to the next error."""
    known, named = "".join(map(help_of, HELPS)), set()
    for path in [ROOT / "chat.py", *(ROOT / "mlx_dsv3").rglob("*.py"), *ROOT.glob("convert/*.py")]:
        for words in re.findall(r"`[^`\n]*`", path.read_text(encoding="utf-8")):
            named.update(re.findall(r"(?<![\w-])--[a-z][a-z-]+\w", words))
    assert len(named) > 20
    assert not {flag for flag in named - OTHERS if not re.search(rf"{flag}\b", known)}


def test_the_first_command_of_the_readme_comes_early():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text[: text.index("```")].count("\n") < 20
