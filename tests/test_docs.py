"""The pages say what is so: references, paths, links, flags, examples and the recorded session."""

import re
from pathlib import Path

import pytest

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
