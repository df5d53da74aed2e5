"""The command lines that the project shows: in pages, docstrings, help texts and hints.

Extraction alone; `test_documented_commands.py` runs them. A command begins with a word of COMMAND,
after variables that are set for it. It stands in a fenced or indented block, or in inline code.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
PAGES += [
    ROOT / "demo/README.md",
    ROOT / "demo/judge/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
SOURCES = [ROOT / "chat.py", ROOT / "tests/demo_model/identical.py"]
SOURCES += [
    path
    for folder in ("mlx_dsv3", "convert", "benchmarks", "demo")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

COMMAND = re.compile(
    r"(?:[A-Z_]+=\S* )*"
    r"(?:(?:python(?: -m)?|make|pip|git|hf|source|torchrun|pytest) (?!-m$)[^ ]|"
    r"(?:\.ci/|mlx-dsv3-|mlx_lm\.)\w)"
)
FENCE, INDENTED = r"^```(\w*)\n(.*?)^```", r"^    (\S[^\n]*)$"
INLINE = r"`([^`\n]+(?:\n[^`\n]+)?)`"  # may go over the end of a line
SHOWN = re.compile(f"{FENCE}|{INDENTED}|{INLINE}", flags=re.M | re.S)

# Names that stand for a number or a word.
VALUES = {"N": "8", "L": "2", "R": "q3", "GB/s": "6", "DIR": "."}
# What hints fill in, by what stands before it.
FILLED = {
    "'.[": "cpu",
    "SOURCE": "DEST",
    "install": "mlx",
    "plan": "SOURCE",
    "python": "-m convert",
    "run": "SOURCE",
    "verify": "MODEL",
}


def in_text(text: str) -> Iterator[str]:
    """Yield the commands of a page or a docstring, in the order in which they stand there."""
    for language, block, line, inline in SHOWN.findall(text):
        if block and not language:
            yield from in_block(block.splitlines())
        elif COMMAND.match(words := " ".join(inline.split())):
            yield words
        elif COMMAND.match(line):
            yield from in_block([line])


def in_block(lines: list[str]) -> Iterator[str]:
    """Yield the commands of a block, and the inline code of its comments.

    Where lines begin with `$ `, the others are what the programs answer. Elsewhere a block whose
    first line is a command is commands throughout; lines that are set in go on with a comment.
    """
    if prompted := [line[2:] for line in lines if line.startswith("$ ")]:
        lines = prompted
    elif not COMMAND.match(lines[0]):
        return
    for line in lines:
        command, _, comment = line.partition(" #")
        if command.strip() and not line.startswith((" ", "#")):
            yield " ".join(command.split())
        yield from in_text(comment)


def in_code(source: str) -> Iterator[str]:
    """Yield the commands of a module's strings: docstrings, help texts, hints.

    What an f-string or `format` fills in is left as `{expression}`.
    """
    tree = ast.parse(source)
    yield from in_text(ast.get_docstring(tree) or "")
    parts = {id(part) for node in ast.walk(tree) for part in getattr(node, "values", ())}
    for node in ast.walk(tree):
        text = None
        if isinstance(node, ast.JoinedStr):
            text = ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value if id(node) not in parts else None
        for inline in re.findall(INLINE, text or ""):
            if COMMAND.match(words := " ".join(inline.split())):
                yield words


def spelled_out(command: str) -> list[str]:
    """Return a command without what it shows in brackets, and with all of that.

    The brackets of `pip install '.[cpu]'` are pip's.
    """
    command = re.sub(r" \.\.\.(?= |\]|$)", "", command)
    command = re.sub(r"(?<=\w)(?:\|\w+)+", "", command)  # a|b|c: the first will do
    command = re.sub(r"(?<= )(\S+?)(?=\]| |$)", lambda word: VALUES.get(word[1], word[1]), command)
    command = re.sub(r"(\S+?)( ?){.*?}", lambda got: got[1] + got[2] + FILLED[got[1]], command)
    without = re.sub(r" \[[^]]*\]", "", command)
    return list(dict.fromkeys([without, re.sub(r" \[([^]]*)\]", r" \1", command)]))
