"""Fixtures: the demo model in 4 bits, and prompts for it."""

from pathlib import Path

import pytest

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
