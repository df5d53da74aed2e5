"""Fixtures: the demo model in 4 bits, and prompts for it."""

from pathlib import Path

import pytest
from pseudo_terminal import Terminal

from mlx_dsv3.conversation.messages import Conversation
from mlx_dsv3.load import load


@pytest.fixture(scope="session")
def demo_q4(converted) -> Path:
    return converted("q4")


@pytest.fixture(scope="session")
def loaded(demo_q4):
    """Return the demo model in 4 bits, loaded once; tests make their own states."""
    return load(demo_q4)


@pytest.fixture(scope="session")
def ask(loaded):
    """Return a function question -> prompt ids, asked alone."""

    def ids(*turns: str, system: str | None = None) -> list[int]:
        conversation = Conversation(loaded.tokenizer, system)
        for i, text in enumerate(turns):
            (conversation.add_assistant if i % 2 else conversation.add_user)(text)
        return conversation.prompt_ids()

    return ids


@pytest.fixture
def open_terminal(demo_q4):
    """Return a function (options) -> the demo model's chat on a terminal, which ends at the end."""
    terminals = []

    def start(*arguments, **options) -> Terminal:
        terminals.append(Terminal(demo_q4, *arguments, **options))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()
