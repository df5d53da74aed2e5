"""Ask an MLX folder of the demo model the 20 committed questions and count the right answers.

    python -m demo.questions build/demo-q4

Answers are greedy; an answer is right when it holds one of the expected words. Exits 1 below 16.
"""

import argparse
import json
import re
from pathlib import Path

from mlx_dsv3.conversation.messages import Conversation
from mlx_dsv3.errors import run_program
from mlx_dsv3.generate import stream
from mlx_dsv3.load import Loaded, load
from mlx_dsv3.terminal.trace import Trace

QUESTIONS = Path(__file__).parent / "questions.json"
REQUIRED = 16
MAX_TOKENS = 80


def answer(loaded: Loaded, question: str) -> str:
    """Return the greedy answer to one question, asked alone."""
    conversation = Conversation(loaded.tokenizer)
    conversation.add_user(question)
    ids = conversation.prompt_ids()
    return "".join(piece.text for piece in stream(loaded, ids, max_tokens=MAX_TOKENS))


def holds(text: str, words: list[str]) -> bool:
    """Say whether one of the words stands in the text as a whole word, in any case."""
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.I) for word in words)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.questions", description=__doc__)
    parser.add_argument("model", nargs="?", default="build/demo-q4")
    parser.add_argument("--trace", type=Path, help="write the experts chosen by each token")
    options = parser.parse_args()
    loaded = load(options.model)
    trace = Trace(loaded.store, options.trace) if options.trace else None
    right = 0
    questions = json.loads(QUESTIONS.read_text(encoding="utf-8"))
    for entry in questions:
        text = answer(loaded, entry["question"])
        is_right = holds(text, entry["expect"])
        right += is_right
        print(f"{'ok   ' if is_right else 'WRONG'} {entry['question']}\n      {text}")
    if trace is not None:
        trace.close()
    print(f"{right} of {len(questions)} answers hold the expected word (required: {REQUIRED})")
    return 0 if right >= REQUIRED else 1


if __name__ == "__main__":
    run_program(main)
