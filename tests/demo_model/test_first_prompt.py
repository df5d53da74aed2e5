"""The prompt that is there before the model: what is typed meanwhile, and every way to leave it."""

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest
from pseudo_terminal import CTRL_C, CTRL_D, ENTER, ROOT, Terminal

HEAVY = ("mlx_lm", "transformers", "tokenizers", "torch", "rich", "jinja2", "huggingface_hub")
QUESTION = "What is the capital of France?"


def test_the_first_screen_imports_neither_transformers_nor_torch(demo_q4):
    """They took 2.4 of 2.7 s before the prompt."""
    code = f"""if True:
        import sys, chat
        from mlx_dsv3.terminal.first import FirstPrompt
        def show(self):
            print([name for name in {HEAVY} if name in sys.modules])
            sys.exit()
        FirstPrompt.__enter__ = show
        chat.open_chat(chat.make_parser().parse_args([{str(demo_q4)!r}]), FirstPrompt(True))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_what_is_typed_while_it_loads(open_terminal):
    """Commands that need no model answer; no key is lost where one prompt follows the other."""
    terminal = open_terminal()
    terminal.until(">>>")
    terminal.type("/help\r")
    assert "/regen" in terminal.until(r"Ctrl-D .*leaves\n>>>")
    terminal.type(CTRL_C)
    terminal.until(r"\(/exit or Ctrl-D leaves\)\n>>>")
    typed = "abcdefghijklmnopqrstuvwxyz" * 3
    for key in typed:
        terminal.type(key)
        time.sleep(0.02)
    shown = terminal.until(r"z\Z")  # no bar below: the model is there
    assert shown == f">>> {typed}"
    terminal.type("\x15")
    assert "Paris" in terminal.ask(QUESTION)
    terminal.type(CTRL_D)
    assert terminal.end() == 0 and terminal.is_restored()


def test_a_question_sent_early_waits_for_the_model(open_terminal):
    terminal = open_terminal("--stats", "off")
    terminal.until(">>>")
    terminal.type(QUESTION + ENTER)
    time.sleep(0.2)
    terminal.type("/bye" + ENTER)  # for the next prompt, which alone shows it
    assert terminal.end() == 0 and terminal.is_restored()
    said = [f">>> {QUESTION}", "The capital of France is Paris.", ">>> /bye"]
    assert "\n".join(terminal.display.rows_from(1)).strip().split("\n") == said


@pytest.mark.parametrize(
    ("way", "status"),
    [
        (CTRL_D, 0),
        ("/exit\r", 0),
        (signal.SIGINT, 130),
        (signal.SIGTERM, -signal.SIGTERM),
        (signal.SIGHUP, -signal.SIGHUP),
        (signal.SIGQUIT, -signal.SIGQUIT),  # Ctrl-\\ while a first question waits
    ],
    ids=str,
)
def test_leaving_before_the_model_is_there(open_terminal, way, status):
    """At once, and the terminal is given back: a raw one has no echo and no Ctrl-C."""
    terminal = open_terminal()
    terminal.until(">>>")
    terminal.type(way) if isinstance(way, str) else terminal.send(way)
    assert terminal.end() == status and terminal.is_restored()
    assert "loading" not in terminal.text()


def test_a_load_that_fails_ends_the_prompt(demo_q4, tmp_path):
    """What only the tokenizer shows comes when somebody types already."""
    folder = tmp_path / "model"
    shutil.copytree(demo_q4, folder)
    words = json.loads((folder / "tokenizer.json").read_text())
    words["model"] = {}
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with closing(Terminal(folder, columns=300)) as terminal:
        terminal.until(">>>")
        terminal.type("What is")
        assert terminal.end() == 2 and terminal.is_restored()
        error, blank, hint = terminal.text().split("\n")
        assert error.startswith("error: the tokenizer of") and hint.startswith("hint: ") > len(
            blank
        )
