"""Golden files against conversions of the demo model: in bounds when right.

The files in tests/golden/ hold what plain torch computes of demo/checkpoint, on a CPU; `make
parity` records anew. No CUDA and no network here.
"""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_dsv3.load import plan_memory
from mlx_dsv3.parity import bounds
from mlx_dsv3.parity.differences import TokenDifferences
from mlx_dsv3.parity.golden import read_golden
from mlx_dsv3.parity.replay import Result, same_source
from mlx_dsv3.parity.report import verdict_line
from parity.goldens import FLOAT32, FP8, GOLDEN, LONG


@pytest.mark.parametrize("mode", [[], ["--teacher-forced"]], ids=["free", "teacher-forced"])
def test_float32_conversion_equals_the_original(converted, replay, mode):
    """The conversion without a loss: every stage, router and logit to 1e-4."""
    status, report, err = replay(converted("float32"), FLOAT32, *mode)
    assert status == 0 and err == ""
    assert all(stage["error"] < 1e-4 and stage["worst"] < 1e-4 for stage in report["stages"])
    assert all(stage["router"] in (None, 1.0) for stage in report["stages"])
    assert report["text"]["top1"] == report["mtp"]["top1"] == 1.0
    assert report["text"]["kl"] < 1e-5 and report["mtp"]["kl"] < 1e-5
    assert report["mtp"]["accepted"] == report["mtp"]["golden_accepted"] > 0.3
    names = [stage["name"] for stage in report["stages"]]
    assert names[:3] == ["embedding", "layer 0 attention", "layer 0 MLP"]
    assert names[-5:] == ["final norm", "MTP input", "MTP attention", "MTP MLP", "MTP norm"]
    assert len(names) == bounds.DEMO_STAGES and report["same_source"] is True
    assert report["is_provisional"] is False


def test_same_source_is_by_weights(converted):
    """V3 and V3-0324 share every header, and passed for one source."""
    golden = read_golden(FLOAT32)
    conversion = json.loads((converted("float32") / "conversion.json").read_text())
    assert same_source(golden, conversion) is True

    def seen(**source):
        return same_source(golden, conversion | {"source": conversion["source"] | source})

    assert seen(source_sha256="0" * 64) is seen(headers_sha256="0" * 64) is False
    assert seen(source_sha256=None) is None, "converted by an earlier version"
    assert same_source(golden, conversion | {"layout": "mtp"}) is None
    assert same_source(golden, None) is None


@pytest.mark.parametrize("golden", [FLOAT32, FP8, LONG], ids=["float32", "fp8", "fp8-long"])
@pytest.mark.parametrize("recipe", ["bf16", "q8", "q4"])
def test_recipes_within_their_bounds(converted, replay, recipe, golden):
    """FP8 arithmetic of the original included: what a user of that conversion should see."""
    modes = [[]] if golden == LONG else [[], ["--teacher-forced"]]
    for mode in modes:
        status, report, err = replay(converted(recipe), golden, *mode)
        assert status == 0, f"{recipe} {golden.stem} {mode}: {err}"
        assert report["recipe"] == recipe and report["breaches"] == []


def test_q4_is_outside_the_bounds_of_q8(converted, replay):
    """Bounds that nothing can leave prove nothing."""
    status, report, err = replay(converted("q4"), FLOAT32, "--bounds", "q8")
    assert status == 1
    assert err.startswith("error: embedding left its bound: mean row error")
    assert "hint: `--teacher-forced` tells one wrong layer" in err
    _, _, err = replay(converted("q4"), LONG, "--bounds", "q8")
    assert err.startswith("error: ") and "hint: " not in err, "it has not the states for that"


def test_bounds_of_a_deep_model_are_provisional():
    """A guess that looks like a measurement: `within the bounds` of a model of 61 layers."""

    def verdict(num_stages: int, teacher_forced: bool = False) -> bounds.Verdict:
        result = Result(text=TokenDifferences(*([x] * 20 for x in (0.0, True, 1.0, 1.0, 1.0))))
        for i in range(num_stages):
            state = mx.ones((1, 4))
            result.stage(f"layer {i} MLP").add(state, state, np.ones(1, bool))
        return bounds.Verdict(result, bounds.Sources("q4", "float32", "float32", teacher_forced))

    demo, deep = verdict(bounds.DEMO_STAGES), verdict(128)
    assert verdict_line(demo) == "within the bounds (mean row error 1.5e-01, KL 2.0e-02)"
    assert verdict_line(deep) == (
        "within provisional bounds (mean row error 4.5e-01, KL 2.0e-02): "
        "the demo's, grown with the depth by a guess"
    )
    assert deep.bound("layer 127 MLP").error == pytest.approx(0.15 * (127 / 14) ** 0.5)
    assert not demo.is_provisional and not verdict(128, teacher_forced=True).is_provisional


def test_streamed_replay_is_the_resident_one(converted, replay):
    """Experts from the disk give the same report, digit for digit."""
    folder = converted("q4")
    _, resident, _ = replay(folder, LONG, "--experts", "resident")
    plan = plan_memory(folder, experts="resident")
    least = sum(plan.slot_bytes.values()) * 6 / 1e9
    flags = ["--experts", "streamed", "--expert-memory", f"{least:.6f}"]
    _, streamed, _ = replay(folder, LONG, *flags)
    assert (resident.pop("experts"), streamed.pop("experts")) == ("resident", "streamed")
    assert streamed == resident


def test_bf16_activations(converted, replay):
    """What a GPU uses; the bound allows for it and says so."""
    status, report, err = replay(converted("q8"), FLOAT32, "--dtype", "bfloat16")
    assert status == 0, err
    assert report["activations"] == "bfloat16"
    assert report["bound"]["error"] > bounds.RECIPES["q8"].error


def test_golden_files_say_where_they_come_from():
    """Small, of this checkpoint, and labelled with the hardware that computed them."""
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 2e6
    for path, arithmetic in ((FLOAT32, "float32"), (FP8, "fp8"), (LONG, "fp8")):
        about = read_golden(path).about
        assert about["arithmetic"] == arithmetic and about["device"] == "cpu"
        assert about["model"] == "demo/checkpoint" and "dirty" not in about["commit"]
        assert "/" not in about["prompts"]
    assert read_golden(FP8).has_every_state and not read_golden(LONG).has_every_state
