"""Fixtures: the committed demo checkpoint, converted by the real converter once a session."""

from pathlib import Path

import pytest

from convert.__main__ import main as convert
from mlx_dsv3.conversation import Conversation
from mlx_dsv3.load import load

CHECKPOINT = Path(__file__).parents[2] / "demo" / "checkpoint"


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return CHECKPOINT


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """Return a function recipe -> folder, converted once each."""
    made = {}

    def run(recipe: str) -> Path:
        if recipe not in made:
            folder = tmp_path_factory.mktemp("demo") / recipe
            assert not convert(["run", str(CHECKPOINT), str(folder), "--recipe", recipe])
            made[recipe] = folder
        return made[recipe]

    return run


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
