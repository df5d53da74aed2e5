"""chat.py as a person meets it: one question, a pipe, a terminal, and what goes wrong."""

import contextlib
import io
import json
import os
import pwd
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from pseudo_terminal import CHAT, CTRL_C, CTRL_D, ENTER, ROOT

import chat
from mlx_dsv3.errors import run_main
from mlx_dsv3.model.decoder import Model

QUESTION = "What is the capital of France?"


def start(*arguments, stdin: str | bytes = "") -> subprocess.CompletedProcess:
    """Run chat.py as a process: 2 s of imports before it says anything."""
    command = [sys.executable, str(CHAT), *map(as_text, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, input=as_bytes(stdin), capture_output=True, timeout=120, env=environment
    )
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def run(*arguments, stdin: str | bytes = "", cwd=ROOT) -> subprocess.CompletedProcess:
    """Run chat.py's `main` in this process, with streams of its own."""
    argv, out, err = list(map(as_text, arguments)), io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(cwd))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(as_bytes(stdin)))))
        status = run_main(lambda: chat.main(argv))
    return subprocess.CompletedProcess(argv, status, out.getvalue(), err.getvalue())


def as_bytes(value) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def as_text(value) -> str:
    """Return an argument as the system hands it over."""
    return os.fsdecode(as_bytes(value))


def test_one_shot_prints_the_answer_alone_on_stdout(demo_q4):
    done = start(demo_q4, "-p", QUESTION)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout and done.stdout.count("\n") == 1
    assert re.search(r"prompt \d+ .*first token .* reply \d+", done.stderr)


def test_stdin_is_the_question_or_is_appended(demo_q4):
    assert "Paris" in start(demo_q4, stdin=QUESTION).stdout
    assert "Paris" in run(demo_q4, "-p", "What is the capital", stdin="of France?").stdout


def test_bytes_that_are_not_utf8(demo_q4):
    """A pasted byte of another encoding ended every way in with a traceback."""
    done = start(demo_q4, "-p", QUESTION.encode() + b"\xff", "-s", b"\xfe", stdin=b"\xff")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_stats_as_json_and_off(demo_q4):
    stats = json.loads(run(demo_q4, "-p", QUESTION, "--stats", "json").stderr)
    assert stats["reply_tokens"] > 3 and stats["prompt_s"] > 0
    assert run(demo_q4, "-p", QUESTION, "--stats", "off").stderr == ""


def test_terminal_session(open_terminal):
    """A whole session: help, a question, a follow-up that reuses it, clear, unknown, Ctrl-D."""
    terminal = open_terminal()
    terminal.until_prompt()
    assert "/clear" in terminal.ask("/help")
    said = terminal.ask(QUESTION)
    assert said.startswith("The capital of France is Paris.\n") and "(0 reused)" in said
    assert re.search(r"\([1-9]\d* reused\)", terminal.ask("And what is the capital of Italy?"))
    assert "reused" in terminal.ask(b"hi \xff\xfe there")  # ended the session in a traceback
    assert terminal.ask("/clear") == "(cleared)"
    assert "unknown command `/frobnicate`" in terminal.ask("/frobnicate")
    terminal.type(CTRL_C)
    terminal.until(r"Ctrl-D leaves\)\n>>>\Z")
    terminal.type(CTRL_D)
    assert terminal.end() == 0 and terminal.is_restored()


def test_ctrl_c_stops_the_reply_and_keeps_the_session(open_terminal):
    """At a high temperature the demo model rambles on until it is stopped."""
    terminal = open_terminal("--temp", "30", "--seed", "4")
    terminal.until_prompt()
    terminal.type("Tell me something long." + ENTER)
    terminal.until(r"long\.\n(.*\n){10,}")
    terminal.type(CTRL_C)
    assert "(stopped)" in terminal.until_prompt()
    terminal.type("/exit" + ENTER)
    assert terminal.end() == 0 and terminal.is_restored()


def test_an_interrupted_question_prints_what_was_said_and_ends_with_130(demo_q4, monkeypatch):
    """`chat.py -p ... > file && next` went on with half an answer: the status was 0."""
    original, calls = Model.hidden, []

    def hidden(self, *arguments):
        calls.append(arguments)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    whole = run(demo_q4, "-p", QUESTION, "--drafts", "0").stdout
    monkeypatch.setattr(Model, "hidden", hidden)
    for arguments, stdin in ((["-p", QUESTION], ""), ([], QUESTION)):
        calls.clear()
        done = run(demo_q4, *arguments, "--drafts", "0", stdin=stdin)
        said = done.stdout.removesuffix("\n")
        assert done.returncode == 130 and said and said != whole and whole.startswith(said)
        assert done.stderr.startswith("(stopped)\n[prompt")


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """Check the form of a refusal: exit 2, one `error:` sentence that holds the words, a hint."""
    assert done.returncode == 2 and done.stdout == "", done
    match = re.fullmatch(r"error: ([^\n]+)\n\nhint: ([^\n]+)\n", done.stderr)
    assert match, done.stderr
    for word in words:
        assert word in done.stderr


def test_without_a_model_the_hint_is_make_demo(tmp_path):
    refused(run("-p", "Hi", cwd=tmp_path), "make demo")


def test_model_that_is_no_folder(tmp_path):
    refused(run(tmp_path / "absent", "-p", "Hi"), str(tmp_path / "absent"), "is not a folder")


def test_model_without_weights(tmp_path, demo_q4):
    (tmp_path / "config.json").write_text((demo_q4 / "config.json").read_text())
    refused(run(tmp_path, "-p", "Hi"), "no weights")


def test_model_that_is_the_hub_checkpoint(checkpoint):
    refused(run(checkpoint, "-p", "Hi"), "hub checkpoint", "python -m convert run")


def test_model_in_conversion(tmp_path, demo_q4):
    (tmp_path / ".partial").mkdir()
    refused(run(tmp_path, "-p", "Hi"), "still in conversion")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["-p", "Hi", "--max-tokens", "0"], "--max-tokens"),
        (["-p", "Hi", "--temp", "-1"], "--temp"),
        ([], "there is no question: stdin is empty"),
        (["-p", ""], "there is no question: `-p` is empty"),
        (["-p", " \t\n"], "there is no question: `-p` is empty"),
    ],
)
def test_bad_arguments(demo_q4, arguments, word):
    refused(run(demo_q4, *arguments), word)


def test_tests_have_a_home_of_their_own():
    """What a chat keeps would go into the history of the person who runs the tests."""
    assert Path.home() != Path(pwd.getpwuid(os.getuid()).pw_dir)
