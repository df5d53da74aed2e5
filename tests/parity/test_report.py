"""The command line of parity: its report, its picture, and what it refuses before it loads."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_folder import changed_copy, spoil
from safetensors import safe_open

from mlx_dsv3.errors import UserError, run_main
from mlx_dsv3.parity import __main__ as parity
from parity.goldens import FLOAT32, FP8, GOLDEN, LONG


def test_report_for_people(converted, capsys):
    """Origin, one row a stage, the text of both modules, the verdict."""
    assert parity.main([str(converted("q8")), str(FP8)]) == 0
    out = capsys.readouterr().out
    assert "golden  demo/checkpoint, fp8 on cpu" in out and "recipe q8" in out
    assert ", 1 prompt, 63 tokens\n" in out
    for word in ("embedding", "layer 3 attention", "MTP norm", "perplexity", "within the bounds"):
        assert word in out


def test_plot_without_matplotlib(converted, monkeypatch, no_loading, tmp_path):
    """The extra is named before the model is loaded; the report used to be lost."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="`--plot` needs matplotlib"):
        parity.main([str(converted("q8")), str(FLOAT32), "--plot", str(tmp_path / "a.png")])


@pytest.mark.parametrize("name", ["absent/a.png", "folder.png"])
def test_a_plot_that_cannot_be_written(converted, no_loading, tmp_path, capsys, name):
    """The replay ran to its end, then a traceback and no report."""
    (tmp_path / "folder.png").mkdir()
    argv = [str(converted("q8")), str(FP8), "--plot", str(tmp_path / name)]
    assert run_main(lambda: parity.main(argv)) == 2
    assert f"{name}` cannot be used: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.doc", "a"])
def test_a_plot_without_a_format(converted, no_loading, tmp_path, name):
    """A ValueError of matplotlib after the replay; nothing is left behind."""
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="is not the name of a picture"):
        parity.main([str(converted("q8")), str(FP8), "--plot", str(tmp_path / name)])
    assert not list(tmp_path.iterdir())


def test_plot(converted, tmp_path, capsys):
    """A picture of error and routing over depth, after the report."""
    pytest.importorskip("matplotlib")
    file = tmp_path / "depth.png"
    assert parity.main([str(converted("q8")), str(FLOAT32), "--plot", str(file)]) == 0
    assert file.read_bytes()[:4] == b"\x89PNG" and file.stat().st_size > 10_000


def test_a_picture_that_fails_loses_no_report(converted, monkeypatch, tmp_path, capsys):
    """The disk is full after the replay: a traceback, and the status of a crash."""

    def fail(*_):
        raise OSError(28, "No space left on device", "a.png")

    monkeypatch.setattr(parity, "check_plot", lambda file: None)
    monkeypatch.setattr(parity, "plot", fail)
    for flags, status in (([], 2), (["--bounds", "float32"], 1)):
        argv = [str(converted("q8")), str(FLOAT32), "--plot", str(tmp_path / "a.png"), *flags]
        assert parity.main(argv) == status
        out, err = capsys.readouterr()
        assert "bounds (mean row error" in out.splitlines()[-1]
        assert "a.png` was not drawn: No space left on device\n" in err
        assert err.startswith("error: embedding left its bound") == bool(flags)


def test_matplotlib_that_does_not_start(converted, no_loading, tmp_path):
    """Its own settings may be wrong: a ValueError from within its import."""
    pytest.importorskip("matplotlib")
    argv = ["mlx_dsv3.parity", str(converted("q8")), str(FP8), "--plot", str(tmp_path / "a.png")]
    python = [sys.executable, "-m", *argv]
    run = subprocess.run(
        python, env=os.environ | {"MPLBACKEND": "x"}, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 2 and run.stderr.startswith("error: matplotlib does not start: ")


@pytest.fixture
def changed_golden(tmp_path):
    """Return a function (tensor, place, value) -> a recording with one other number."""

    def save(name: str, place, value) -> Path:
        tensors, about = mx.load(str(FLOAT32), return_metadata=True)
        tensors[name][place] = value
        mx.save_safetensors(str(tmp_path / "changed.safetensors"), tensors, about)
        return tmp_path / "changed.safetensors"

    return save


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_no_number(converted, replay, changed_golden, value):
    """JSON knows neither: the report was not JSON just where something was wrong."""
    golden = changed_golden("0.layers.2.mlp", (5, 3), value)
    status, report, err = replay(converted("q8"), golden)  # the fixture's reader is strict
    assert status == 1
    assert err.startswith("error: layer 2 MLP left its bound: mean row error inf (bound ")
    assert {breach["where"] for breach in report["breaches"]} == {"layer 2 MLP"}
    assert report["breaches"][0]["value"] is None


def test_weights_that_are_no_numbers(converted, replay, tmp_path):
    """The other side of it: the first stage with a NaN is named."""
    folder = changed_copy(converted("float32"), tmp_path / "nan")
    spoil(folder, "model.layers.1.self_attn.o_proj.weight")
    status, report, err = replay(folder, FLOAT32)
    assert status == 1 and err.startswith("error: layer 1 attention left its bound: ")
    assert report["text"]["perplexity"] is None


def test_a_folder_without_the_mtp_module(converted, capsys, tmp_path):
    """Other converters drop it: the rest is compared, and the report says what is not."""
    folder = tmp_path / "plain"
    shutil.copytree(converted("q8"), folder)
    (folder / "mtp.safetensors").unlink()
    assert parity.main([str(folder), str(FLOAT32)]) == 0
    out = capsys.readouterr().out
    assert "no MTP module; that of the golden file is not compared" in out
    assert "final norm" in out and "MTP norm" not in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{q8}", "absent.safetensors"], "`absent.safetensors` is not a file"),
        (["{q8}", "{q8}/config.json"], "is truncated or not a safetensors file"),
        (["{q8}", "{q8}/mtp.safetensors"], "is not a golden file of format 1"),
        (["{q8}", str(LONG), "--teacher-forced"], "needs the states of every position"),
        (["absent", str(LONG)], "`absent` is not a folder"),
        (["{q8}", str(FP8), "--bounds", "q9"], "`--bounds`: invalid choice: 'q9'"),
        (["{q8}"], "the following arguments are required: GOLDEN"),
        (["perplexity", "{q8}", "absent.txt"], "`absent.txt` cannot be used"),
        (["perplexity", "{q8}", str(GOLDEN / "long.txt"), "--context", "0"], "`--context` is `0`"),
        (["perplexity", "{q8}", str(GOLDEN / "long.txt"), "--context", "1"], "`--context` is `1`"),
        (["capacities", "{q8}", "--tokens", "3"], "`--tokens` is `3`"),
        (["capacities", "{q8}", "--tokens", "163841"], "`--tokens` is 163,841 and `max_position"),
        (["capacities", "{q8}", "--slots", "4", "33"], "`--slots` has 33"),
        (["capacities", "{q8}", "--slots", "3"], "`--slots` has 3"),
        (["capacities", "{q8}", "--slots", "0"], "`--slots` is `0`"),
        (["capacities", "{q8}", "--slots", "-1"], "`--slots`"),
        (["capacities", "{q8}", "--slots", "x"], "`--slots` is `x`"),
        (["{q8}", str(FP8), "--expert-memory", "nan"], "`--expert-memory` is `nan`; it takes GB"),
        (["{q8}", str(FP8), "--expert-memory", "inf"], "`--expert-memory` is `inf`; it takes GB"),
        (["{q8}", str(FP8), "--expert-memory=-1"], "`--expert-memory` is `-1`; it takes GB"),
        (["{q8}", str(FP8), "--expert-memory", "x"], "`--expert-memory` is `x`; it takes GB"),
        (["capacities", "{q8}", "--experts", "streamed"], "unrecognized arguments: --experts"),
    ],
)
def test_refusals(converted, no_loading, argv, message):
    """Exit status 2 and one sentence each, before minutes of loading."""
    with pytest.raises(UserError, match=message):
        parity.main([word.replace("{q8}", str(converted("q8"))) for word in argv])


def test_a_wrong_flag_is_one_sentence(capsys):
    """As in chat: argparse printed its usage instead."""
    assert run_main(lambda: parity.main(["model", "golden", "--dtype", "float16"])) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: `--dtype`: invalid choice: 'float16'")
    assert err.endswith("hint: `python -m mlx_dsv3.parity --help` lists the options\n")


def test_another_model_is_refused(converted, no_loading, tmp_path):
    """Shapes that differ would raise somewhere inside; equal shapes would merely be wrong."""
    with safe_open(FLOAT32, "np") as file:
        about = file.metadata()
    about["config"] = json.dumps(json.loads(about["config"]) | {"n_routed_experts": 256})
    other = tmp_path / "other.safetensors"
    mx.save_safetensors(str(other), mx.load(str(FLOAT32)), about)
    with pytest.raises(UserError, match="its `n_routed_experts` is 256, that of"):
        parity.main([str(converted("q8")), str(other)])
