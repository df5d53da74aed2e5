"""What the converter says while it works: lines, JSON events, a bar; and that a Mac stays awake."""

import json
import os
import sys

import pytest

from convert import progress, run
from convert.__main__ import main
from mlx_dsv3.errors import run_main
from tests.tiny import A, write_hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write_hub(tmp_path_factory.mktemp("cli") / "hub", A)


def test_json_events(hub, tmp_path, monkeypatch, capsys):
    """Every line on stdout is an object; bytes only grow, up to the total."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    assert main(["run", str(hub), str(tmp_path / "out"), "--json"]) == 0
    output, errors = capsys.readouterr()
    events = [json.loads(line) for line in output.splitlines()]
    assert errors == "" and events[0]["event"] == "start"
    done = [event["bytes_done"] for event in events if event["event"] == "progress"]
    assert done == sorted(done) and done[-1] == events[0]["bytes_total"]
    assert events[-1]["event"] == "note" and "converted" in events[-1]["text"]


def test_plain_lines(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    assert main(["run", str(hub), str(tmp_path / "out")]) == 0
    output, errors = capsys.readouterr()
    lines = errors.splitlines()
    assert output == "" and "MB of 0.8 MB, " in lines[2] and "min left, m" in lines[2]
    assert lines[-1] == f"`{tmp_path / 'out'}` converted: 0.9 MB, `q4`"


def test_bar_in_a_terminal(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("convert.__main__.choose_style", lambda as_json: "bar")
    assert main(["run", str(hub), str(tmp_path / "out")]) == 0
    assert "0.9 MB, `q4`" in capsys.readouterr().err


def test_plan_prints_a_table(hub, capsys):
    """Sizes, disk, memory and time; eighty columns hold the table."""
    assert main(["plan", str(hub), "--recipe", "q4-mixed"]) == 0
    text = capsys.readouterr().out
    for words in (
        "experts_gate_up",
        "8 bits/64",
        "with MTP layer",
        "`q4-mixed`",
        "to run resident",
    ):
        assert words in text
    table = text.split("\nsource")[0]
    assert all(len(line) <= 80 for line in table.splitlines())


def test_a_mac_is_kept_awake(hub, tmp_path, monkeypatch):
    """`caffeinate` runs beside the conversion and ends with it."""
    fake = tmp_path / "caffeinate"
    fake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\nexec sleep 60\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "platform", "darwin")
    with run.awake():
        while not (tmp_path / "words").exists() or not (tmp_path / "words").read_text():
            pass
    assert (tmp_path / "words").read_text() == f"-i -w {os.getpid()}\n"


def test_flags_for_repositories_only(hub, tmp_path, capsys):
    """A folder's files are never deleted."""
    argv = ["run", str(hub), str(tmp_path / "out"), "--discard-source"]
    assert run_main(lambda: main(argv)) == 2
    assert "never deleted" in capsys.readouterr().err


def test_a_low_mtp_override_is_warned_of(hub, tmp_path, capsys):
    """Eight bits are not forced, but nobody goes below without having read why."""
    recipe = tmp_path / "low.json"
    recipe.write_text(json.dumps({"default": 4, "mtp": {"bits": 4, "group_size": 32}}))
    assert main(["run", str(hub), str(tmp_path / "out"), "--recipe", str(recipe)]) == 0
    assert "the recipe gives the MTP layer 4 bits" in capsys.readouterr().err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["model.layers.4.eh_proj"]["bits"] == 4


@pytest.mark.parametrize(
    ("argv", "message", "command"),
    [
        (["run", "a", "b", "--q-bits", "x"], "`--q-bits`: invalid int value: 'x'", " run"),
        (["run", "a"], "the following arguments are required: DEST", " run"),
        (["verify", "a", "--fast"], "unrecognized arguments: --fast", ""),
        (["plan", "a", "--q-mode", "z"], "`--q-mode`: invalid choice: 'z'", " plan"),
        (["convert"], "`COMMAND`: invalid choice: 'convert'", ""),
        ([], "the following arguments are required: COMMAND", ""),
    ],
)
def test_a_wrong_command_line_is_one_sentence(argv, message, command, capsys):
    """It was argparse's usage in four lines, without a hint."""
    assert run_main(lambda: main(argv)) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith(f"error: {message}") and "usage" not in errors
    assert errors.endswith(f"\n\nhint: `python -m convert{command} --help` lists the options\n")
