"""Markdown on a terminal adds attributes and nothing else, however a reply is cut into pieces."""

import random
import re
import time

import pyte
import pytest

from mlx_dsv3.conversation.messages import clean
from mlx_dsv3.errors import visible
from mlx_dsv3.terminal.markdown import HELD, Markdown

CODES = re.compile("\x1b\\[[0-9;]*m")
MARKS = "* ** *** _ __ ` `` ``` ```` ~~~ # ## - + 1. 12) 1234. > | [ ]( ( ) \\".split()
WORDS = ["a", "word", "重点", "é", "e\u0301", "👩\u200d👧", "שלום", "https://a_b_c", "\ufffd"]
PARTS = [*MARKS, *WORDS, "\n", "\n\n", " ", " ", "\t", "\x1b[2J", "\r", "\x9b", "\u202e"]


def pieces(text: str, rng: random.Random) -> list[str]:
    """Cut a text at random places."""
    cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(12)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def shown(*texts: str) -> str:
    marks = Markdown()
    return "".join(map(marks.feed, texts)) + marks.end()


def random_text(rng: random.Random) -> str:
    if rng.random() < 0.2:
        codes = (rng.choice((0x80, 0xD800, 0x11_0000)) for _ in range(60))
        return clean("".join(chr(rng.randrange(most)) for most in codes))
    return "".join(rng.choices(PARTS, k=rng.randrange(1, 40)))


def test_nothing_is_dropped_moved_or_added():
    """rich's Markdown drops the marks and joins lines: a code block was no longer the model's."""
    rng = random.Random(13)
    for _ in range(3000):
        text = visible(random_text(rng))
        whole = shown(text)
        assert CODES.sub("", whole) == text
        assert shown(*pieces(text, rng)) == whole


def test_the_screen_is_clean_at_the_end_of_each_line_and_reply():
    """A mark that is never closed coloured the prompt, and what a person typed."""
    rng = random.Random(14)
    for _ in range(1000):
        for line in shown(visible(random_text(rng))).split("\n"):
            codes = CODES.findall(line)
            assert not codes or codes[-1] == "\x1b[0m"


def test_few_characters_wait():
    """A reply whose first line is all one mark must not look like a model that hangs."""
    rng = random.Random(15)
    for _ in range(1000):
        text, marks, seen = visible(random_text(rng)) + "#" * 9 + "*" * 9, Markdown(), 0
        for count, character in enumerate(text, 1):
            seen += len(CODES.sub("", marks.feed(character)))
            assert count - HELD <= seen <= count


def attributes(text: str) -> dict[str, set[str]]:
    """Return the words of a text on a terminal -> their attributes there."""
    screen = pyte.Screen(78, 24)
    pyte.Stream(screen).feed(shown(text).replace("\n", "\r\n"))
    words = {}
    for row in screen.buffer.values():
        for found in re.finditer(r"[^\W_]+", "".join(row[x].data for x in range(78))):
            cells = [row[x] for x in range(*found.span())]
            kinds = {n for n in ("bold", "italics", "underscore") for c in cells if getattr(c, n)}
            words[found[0]] = kinds | {c.fg for c in cells if c.fg != "default"}
    return words


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a **b** c", {"b": {"bold"}, "c": set()}),
        ("a *b* c", {"b": {"italics"}, "c": set()}),
        ("_a_ ***b*** c", {"a": {"italics"}, "b": {"bold", "italics"}, "c": set()}),
        ("**a *b* c** d", {"b": {"bold", "italics"}, "c": {"bold"}, "d": set()}),
        ("**Note:** text", {"Note": {"bold"}, "text": set()}),
        ("重**é**点 «**a**» b", {"重": set(), "é": {"bold"}, "a": {"bold"}, "b": set()}),
        ("ω_i π*r* x_重_y", {"i": set(), "r": set(), "y": set()}),
        ("2 * 3 * 4, 5*6*7, 2**3", dict.fromkeys("234567", set())),
        ("a_b_c __init__.py snake_case_ d", dict.fromkeys(("b", "py", "case", "d"), set())),
        (r"\*a\* \`b\`", {"a": set(), "b": set()}),
        ("****a**** *****b*", {"a": set(), "b": set()}),
        ("_a_b c_ d", {"b": {"italics"}, "c": {"italics"}, "d": set()}),
        ("*a *b* c", {"a": {"italics"}, "b": {"italics"}, "c": set()}),
        ("**a\nb", {"a": {"bold"}, "b": set()}),
        ("## a\nb #c", {"a": {"bold", "magenta"}, "b": set(), "c": set()}),
        ("#a", {"a": set()}),
        ("`a ** b` c", {"a": {"cyan"}, "b": {"cyan"}, "c": set()}),
        ("``a`b`` c ```d``` e", {"b": {"cyan"}, "c": set(), "d": {"cyan"}, "e": set()}),
        ("```py\n**a**\n``\n```\nb", {"py": {"cyan"}, "a": {"cyan"}, "b": set()}),
        ("~~~ ~~~\na\n~~~\nb", {"a": {"cyan"}, "b": set()}),
        ("  - x\n    ```\n    a\n    ```\n    b", {"x": set(), "a": {"cyan"}, "b": set()}),
        ("```a``` b\nc", {"a": {"cyan"}, "b": set(), "c": set()}),
        ("```\n```a\nb\n```\nc", {"a": {"cyan"}, "b": {"cyan"}, "c": set()}),
        ("````\n```\na\n````\nb", {"a": {"cyan"}, "b": set()}),
        ("1. a **b**\n12) c", {"1": {"magenta"}, "a": set(), "b": {"bold"}, "12": {"magenta"}}),
        ("2024. a\n-b", {"2024": set(), "a": set(), "b": set()}),
        ("| **a** | `b` |", {"a": set(), "b": set()}),
        ("[a](b c) d", {"a": set(), "b": {"underscore"}, "c": set(), "d": set()}),
        ("[a](b_(c)_d) e (f)", {"a": set(), "d": {"underscore"}, "e": set(), "f": set()}),
    ],
)
def test_attributes(text, expected):
    found = attributes(text)
    assert {word: found.get(word) for word in expected} == expected


def test_a_long_line_takes_no_longer_than_its_length():
    """Searching a line anew for each character of it would take a minute."""
    began = time.process_time()
    for part in ("*", "`", "#", "1", "```x", "**a ", "[", "> ", "| ", "~", "\\"):
        text = part * (20_000 // len(part))
        assert CODES.sub("", shown("```\n" + text, text)) == "```\n" + text + text
        assert CODES.sub("", shown(text)) == text
    assert time.process_time() - began < 10
