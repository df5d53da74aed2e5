"""Chat templates from outside: refused in a sentence, before the weights load."""

import json
import shutil
import signal
import sys
from unittest import mock

import pytest

import chat
from mlx_dsv3.terminal.repl import answer_line

from .test_chat import QUESTION, refused, run

GOOD = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="no limit of memory here")


@pytest.fixture
def folder_of(demo_q4, tmp_path):
    """Return a function template -> folder of the demo model with it; None is without one."""

    def make(template: str | None):
        folder = shutil.copytree(demo_q4, tmp_path / "model")
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        del settings["chat_template"]
        file.write_text(json.dumps(settings | ({"chat_template": template} if template else {})))
        return folder

    return make


def ask(folder, *options: str):
    """Ask one question; the weights stay where they are."""
    with mock.patch("mlx_dsv3.load.load_model", side_effect=AssertionError("the weights load")):
        return run(folder, "-p", QUESTION, *options)


def test_a_base_model_has_no_template(folder_of):
    """Loaded in minutes, and then a traceback."""
    folder = folder_of(None)
    refused(ask(folder), f"`{folder}` has no chat template", "mlx_lm.generate")


@pytest.mark.parametrize(
    "template, words",
    [
        ("{% for", "fails: TemplateSyntaxError: "),
        ("{{ messages[0].absent.more }}", "fails: UndefinedError: "),
        ("{{ raise_exception('not\ntoday') }}", "refuses: not today"),
        ("{{ 1 // 0 }}", "fails: ZeroDivisionError: "),
        ("{% for i in range(10**12) %}{% endfor %}", "fails: OverflowError: "),
        ("nothing", "writes 7 characters for the question `Hello`, without the question"),
        (GOOD + "{{ 'x' * 2000000 }}", "writes 2,000,0"),
        pytest.param("{{ 'A' * 10**10 }}", "fails: MemoryError: more than", marks=ON_LINUX),
    ],
)
def test_a_template_that_cannot_be_used(folder_of, template, words):
    folder = folder_of(template)
    refused(ask(folder), f"the chat template in `{folder / 'tokenizer_config.json'}` {words}")


@pytest.mark.parametrize("template", [ENDLESS, "{{ 10**(10**10) }}"])
def test_a_template_that_never_ends(folder_of, template, monkeypatch):
    """It hung after the load. A timer that ran before runs on, and its handler is back."""
    monkeypatch.setattr("mlx_dsv3.conversation.template.LONGEST_S", 0.2)
    handler = signal.getsignal(signal.SIGALRM)
    refused(ask(folder_of(template)), "does not end within 0.2 s")
    assert signal.getsignal(signal.SIGALRM) is handler


def test_a_template_without_system_prompts(folder_of):
    """The hint says what to leave out; an empty system prompt is none."""
    rule = "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
    folder = folder_of(rule + GOOD)
    refused(ask(folder, "-s", "Be brief."), "refuses: No system", "hint: leave out `-s`")
    for system in "", "  ":
        assert run(folder, "-p", QUESTION, "-s", system, "--max-tokens", "1").returncode == 0


def test_a_template_that_cannot_be_told_to_think(folder_of):
    """It was said when the weights had loaded."""
    refused(ask(folder_of(GOOD), "--think", "on"), "has no variable for thinking")


def test_a_template_file_of_its_own(folder_of):
    folder = folder_of(GOOD)
    (folder / "chat_template.jinja").write_text("{% for")
    refused(ask(folder), f"the chat template in `{folder / 'chat_template.jinja'}` fails")


def test_a_template_that_fails_later_leaves_the_session(folder_of, capsys):
    """The second turn is refused, and the conversation is as it was."""
    rule = "{% if messages|length > 1 %}{{ raise_exception('too\x1b[2J long') }}{% endif %}"
    options = chat.make_parser().parse_args([str(folder_of(rule + GOOD)), "--max-tokens", "2"])
    talk = chat.open_chat(options)
    for _ in range(2):
        answer_line(talk, QUESTION)
    assert "refuses: too" in capsys.readouterr().err
    assert len(talk.session.conversation.messages) == 2
    answer_line(talk, "/clear")
    answer_line(talk, QUESTION)
    assert capsys.readouterr().out
    talk.session.loaded.store.close()
