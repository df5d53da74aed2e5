"""docs/chat.md and docs/chat.svg say what the chat does today."""

import html
import re

import pytest

pytest.importorskip("mlx")
from test_docs import ROOT, recorded_session

from mlx_dsv3.terminal.adjust import ADJUSTABLE
from mlx_dsv3.terminal.commands import ALIASES, COMMANDS
from mlx_dsv3.terminal.kept import LONGEST_LINE, MOST_CHATS

PAGE = (ROOT / "docs/chat.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_table_of_commands():
    """Usage and help are those of `/help`, in its order."""
    rows = re.findall(r"^\| `(/.*?)` \| (.*) \|$", section("Commands"), re.M)
    rows = [(usage.replace(r"\|", "|"), words) for usage, words in rows]
    assert rows == [(command.usage, command.help) for command in COMMANDS.values()]
    for alias, name in ALIASES.items():
        assert f"`{alias}` is `{name}`" in PAGE


def test_the_table_of_settings():
    rows = re.findall(r"^\| (`.*?`) \|", section("Settings"), re.M)
    assert re.findall("`(.*?)`", " ".join(rows)) == list(ADJUSTABLE)


def test_the_numbers_of_what_is_kept():
    kept = section("What is kept, and where")
    assert f"newest {MOST_CHATS} stay" in kept and f"more than {LONGEST_LINE:,} characters" in kept


def picture() -> str:
    """Return the text of the picture."""
    text = (ROOT / "docs/chat.svg").read_text(encoding="utf-8")
    return html.unescape(re.sub("<[^>]*>", "", text)).replace("\xa0", " ")


def test_the_picture_shows_the_session_of_the_readme():
    """What the demo model says there is tested in test_docs.py."""
    shown = picture()
    for question, answer in recorded_session():
        assert f">>> {question}" in shown and answer in shown
    assert "first token" in shown and "/context" in shown
