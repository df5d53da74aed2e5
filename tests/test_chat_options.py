"""Options of chat.py: what is refused before anything is loaded, and in which words."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

import chat
from mlx_dsv3.conversation.settings import chat_settings, make_sampler
from mlx_dsv3.decoding.draft_control import fixed_drafts
from mlx_dsv3.decoding.sampler import Sampler
from mlx_dsv3.errors import UserError, check_writable, unusable
from mlx_dsv3.generate import make_control
from mlx_dsv3.terminal.trace import Trace

ROOT = Path(__file__).parents[1]
BAD = {
    "--temp": ["nan", "inf", "-1", "x", "1001", ""],
    "--top-p": ["0", "-0.1", "1.01", "nan", "x"],
    "--top-k": ["-1", "1.5", "x"],
    "--min-p": ["-0.1", "1.1", "nan"],
    "--max-tokens": ["0", "-3", "1.5", "nan"],
    "--repetition-penalty": ["0", "-1", "nan", "inf"],
    "--seed": ["x", "1.5", "9" * 5000],
    "--expert-memory": ["nan", "inf", "-1", "abc", "1e300"],
    "--context": ["0", "-1", "x", "1e3"],
    "--drafts": ["²", "5", "-1", "many", "", "01"],
}
GOOD = {
    "--temp": ["0", "1e-40", "1000"],
    "--top-p": ["1e-50", "1"],
    "--top-k": ["0", "50"],
    "--min-p": ["0", "1"],
    "--seed": ["-1", str(2**40)],
    "--expert-memory": ["0.5", "70"],
    "--context": ["1", str(10**30)],
    "--drafts": ["auto", "0", "4"],
}


def pairs(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(flag, value) for flag, values in table.items() for value in values]


def parse(*arguments: str) -> argparse.Namespace:
    return chat.make_parser().parse_args([str(argument) for argument in arguments])


@pytest.mark.parametrize(("flag", "value"), pairs(BAD), ids=lambda text: text[:20])
def test_bad_values_are_refused_by_name(flag, value):
    """`--drafts ²` passed isdigit() and failed after the load; `--top-p 2` was taken as off."""
    with pytest.raises(UserError) as error:
        parse(f"{flag}={value}")
    assert error.value.message.startswith(f"`{flag}` is `{value}`") and error.value.hint


@pytest.mark.parametrize(("flag", "value"), pairs(GOOD))
def test_good_values_pass(flag, value):
    given = getattr(parse(f"{flag}={value}"), flag[2:].replace("-", "_"))
    assert str(given) == value or given == float(value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["folder", "other"], "unrecognized arguments: other"),
        (["-p"], "`-p/--prompt`: expected one argument"),
        (["--ex", "2"], "ambiguous option"),
        (["--experts", ""], "`--experts`: invalid choice: ''"),
        (["--stats", "foo"], "`--stats`: invalid choice: 'foo'"),
        (["--temp", "hot"], "`--temp` is `hot`"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(arguments, words):
    """Argparse printed ten lines of usage around its sentence."""
    command = [sys.executable, ROOT / "chat.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    error, blank, hint = done.stderr.splitlines()
    assert (done.returncode, done.stdout, blank) == (2, "", "")
    assert error.startswith("error: ") and words in error and hint.startswith("hint: ")


def sampler_of(folder: Path, *arguments: str, **config) -> Sampler:
    (folder / "generation_config.json").write_text(json.dumps(config))
    return make_sampler(chat_settings(folder, vars(parse(*arguments))))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.5),
        ("temperature", "0.6"),
        ("temperature", True),
        ("top_p", 1.5),
        ("top_p", False),
        ("top_k", -2),
        ("top_k", 2.5),
        ("min_p", 2),
    ],
)
def test_generation_config_is_checked_where_it_counts(tmp_path, key, value):
    """The file is named; a flag in its place, or `do_sample` off, leaves its value unused."""
    with pytest.raises(UserError) as error:
        sampler_of(tmp_path, do_sample=True, **{key: value})
    assert f"`{key}` in `{tmp_path / 'generation_config.json'}` is" in error.value.message
    flag = "--temp" if key == "temperature" else f"--{key.replace('_', '-')}"
    assert flag in error.value.hint
    sampler_of(tmp_path, flag, "1", do_sample=True, **{key: value})
    sampler_of(tmp_path, do_sample=False, **{key: value})


def test_generation_config_may_say_off(tmp_path):
    """0, -1 and null are how other writers leave a filter out."""
    sampler = sampler_of(tmp_path, do_sample=True, temperature=0.6, top_p=0, top_k=-1, min_p=None)
    assert (sampler.temp, sampler.top_p, sampler.top_k, sampler.min_p) == (0.6, 1.0, 0, 0.0)


@pytest.mark.parametrize("samples", [True, False])
def test_repetition_penalty_of_generation_config(tmp_path, samples):
    """It was ignored, against the README; transformers applies it to greedy replies too."""
    ids, logits = mx.array([1, 2]), mx.array([[1.0, 3.0, -1.0, 2.0]])

    def penalized(*arguments, **config):
        sampler = sampler_of(tmp_path, *arguments, do_sample=samples, **config)
        return sampler.penalized(logits, ids).tolist() if sampler.penalties else None

    assert penalized(repetition_penalty=2.0) == [[1.0, 1.5, -2.0, 2.0]]
    assert penalized("--repetition-penalty", "4", repetition_penalty=2.0) == [[1.0, 0.75, -4.0, 2]]
    for none in ({}, {"repetition_penalty": 1.0}, {"repetition_penalty": None}):
        assert penalized(**none) is None
    assert penalized("--repetition-penalty", "1", repetition_penalty=2.0) is None


@pytest.mark.parametrize(
    "config",
    [{"repetition_penalty": 0}, {"repetition_penalty": "1.1"}, {"do_sample": "no"}],
)
def test_generation_config_is_checked_without_sampling(tmp_path, config):
    (key,) = config
    with pytest.raises(UserError, match=f"`{key}` in `.*generation_config.json` is `"):
        sampler_of(tmp_path, **config)


def test_sampling_without_a_temperature_is_at_one(tmp_path):
    """As transformers reads the file; without `do_sample` it is greedy there too."""
    assert sampler_of(tmp_path, do_sample=True).temp == 1.0
    assert sampler_of(tmp_path, temperature=0.6).temp == 0.0


@pytest.mark.parametrize("settings", [{"top_p": 1e-50}, {"temp": 1e-40}, {"min_p": 1.0}])
def test_extreme_settings_are_greedy(settings):
    """All scores were -inf, and the reply a row of token 0: 1e-50 is 0 in float32."""
    sampler = Sampler(**({"temp": 1.0} | settings))
    logits = mx.array([[0.0, 1.0, 3.0, 2.0]])
    assert [sampler(logits, position).item() for position in range(20)] == [2] * 20


def test_trace_is_tried_before_the_load_and_left_as_it_is(tmp_path):
    """A load of minutes and then `Permission denied`; or a trace lost to a load that failed."""
    check_writable(tmp_path / "new")
    assert not list(tmp_path.iterdir())
    (tmp_path / "old").write_text("[3, [[1, 2]]]\n")
    check_writable(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "[3, [[1, 2]]]\n"


@pytest.mark.parametrize("name", ["", "absent/trace", "x" * 300])
def test_trace_that_cannot_be_written(tmp_path, name):
    with pytest.raises(OSError) as error:
        check_writable(tmp_path / name)
    assert "cannot be used: " in unusable(error.value).message


def test_a_trace_holds_every_choice_until_it_is_closed(tmp_path):
    """The lines are what the simulator of the benchmark replays."""
    store = SimpleNamespace(on_route=None)
    trace = Trace(store, tmp_path / "trace")
    store.on_route(3, np.array([[1, 2], [5, 0]], np.int32))
    store.on_route(4, np.array([[7, 2]], np.int32))
    lines = (tmp_path / "trace").read_text().splitlines()
    assert list(map(json.loads, lines)) == [[3, [[1, 2], [5, 0]]], [4, [[7, 2]]]]
    trace.close()
    assert store.on_route is None


def test_a_trace_into_a_pipe_that_nobody_reads(tmp_path):
    """It waited for a reader, for ever, once the model was loaded."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe"):
        Trace(SimpleNamespace(on_route=None), tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    store = SimpleNamespace(on_route=None)
    trace = Trace(store, tmp_path / "pipe")
    store.on_route(3, np.array([[1, 2]], np.int32))
    assert os.read(reader, 100) == b"[3, [[1, 2]]]\n"
    trace.close()
    os.close(reader)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_trace_on_a_full_disk_ends_alone(capsys):
    """The reply goes on, and one line says what happened."""
    store = SimpleNamespace(on_route=None)
    Trace(store, Path("/dev/full"))
    store.on_route(3, np.array([[1, 2]], np.int32))
    assert store.on_route is None and capsys.readouterr().err.count("warning: the trace") == 1


def test_drafts_are_judged_in_one_place():
    """Option, folder and API refused the same thing in four places, two texts among them."""
    assert [fixed_drafts(value) for value in ("auto", "0", 4)] == [None, 0, 4]
    assert fixed_drafts("auto", has_mtp=False) is None and fixed_drafts(0, has_mtp=False) == 0
    without = SimpleNamespace(mtp=None)
    assert make_control(without, "auto").fixed == make_control(without, 0).fixed == 0
    for judge in (lambda: fixed_drafts("2", has_mtp=False), lambda: make_control(without, 2)):
        with pytest.raises(UserError, match="`--drafts 2` needs the MTP module") as error:
            judge()
        assert "python -m convert mtp" in error.value.hint


def test_statistics_are_off_with_json_unless_asked_for():
    """The object on stdout holds them; a script that reads stderr too got them twice."""
    stats = [chat.screen_options(parse(*words))["stats"] for words in ([], ["--json"])]
    asked = chat.screen_options(parse("--json", "--stats", "line", "--raw"))
    assert stats == ["line", "off"] and asked["stats"] == "line" and asked["raw"]


def test_settings_given_go_before_those_of_a_kept_chat():
    """`--seed` had the default 0, which would have replaced a kept seed."""
    assert chat.given(parse("--continue", "--temp", "0", "--top-k", "3")) == {"temp": 0, "top_k": 3}
