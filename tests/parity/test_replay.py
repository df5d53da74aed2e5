"""Golden files against conversions of the demo model: in bounds when right, named when wrong.

The files in tests/golden/ hold what plain torch computes of demo/checkpoint, on a CPU; `make
parity` records anew. No CUDA and no network here.
"""

import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from mlx_dsv3.checkpoint.headers import read_header
from mlx_dsv3.errors import UserError, run_main
from mlx_dsv3.load import plan_memory
from mlx_dsv3.parity import __main__ as parity
from mlx_dsv3.parity import bounds
from mlx_dsv3.parity.differences import Stage, TokenDifferences, divergence
from mlx_dsv3.parity.golden import read_golden
from mlx_dsv3.parity.replay import Result, same_source
from mlx_dsv3.parity.report import verdict_line

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
FLOAT32, FP8, LONG = (
    GOLDEN / f"demo-{name}.safetensors" for name in ("float32", "fp8", "fp8-long")
)


@pytest.fixture
def replay(capsys):
    """Return a function (folder, golden, flags) -> (exit status, report, error text)."""

    def run(folder: Path, golden: Path, *flags: str) -> tuple[int, dict, str]:
        capsys.readouterr()
        status = run_main(lambda: parity.main([str(folder), str(golden), "--json", *flags]))
        out, err = capsys.readouterr()
        return status, json.loads(out) if out else {}, err

    return run


# --- undamaged ------------------------------------------------------------------------------


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
        result = Result(text=TokenDifferences([0.0], [True], [1.0], [1.0], [1.0]))
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


# --- damaged --------------------------------------------------------------------------------


class Folder:
    """A copy of a conversion whose tensors can be changed in place."""

    def __init__(self, source: Path, target: Path):
        shutil.copytree(source, target)
        self.path = target
        self.entries = {}
        for file in target.glob("*.safetensors"):
            self.entries |= read_header(file)

    def bytes_of(self, name: str) -> np.memmap:
        """Return a writable view of a tensor's bytes, a row for each of its rows."""
        info = self.entries[name]
        view = np.memmap(info.path, np.uint8, "r+", info.offset, (info.nbytes,))
        return view.reshape(info.shape[0], -1)

    def numbers(self, name: str) -> np.memmap:
        """Return a writable view as integers of the tensor's width, exponents above mantissas."""
        width = {"BF16": np.uint16, "F32": np.uint32}[self.entries[name].dtype]
        return self.bytes_of(name).view(width)

    def matching(self, prefix: str) -> list[str]:
        return [name for name in self.entries if name.startswith(prefix)]


def most_used(layer: int) -> list[int]:
    """Return the two experts that the golden prompt uses most in a layer."""
    experts = np.array(read_golden(FLOAT32).prompts[0][f"layers.{layer}.experts"])
    return np.bincount(experts.flatten()).argsort()[::-1][:2].tolist()


def swap_experts(folder: Folder) -> None:
    """Two experts of layer 2 in each other's place."""
    one, other = most_used(2)
    prefix = f"model.layers.2.mlp.experts.{one}."
    for name in folder.matching(prefix):
        a, b = folder.bytes_of(name), folder.bytes_of(name.replace(f".{one}.", f".{other}."))
        a[:], b[:] = b.copy(), a.copy()


def double_a_scale_row(folder: Folder) -> None:
    """One row of scales (of weights where there are none) of layer 1's o_proj times two."""
    stem = "model.layers.1.self_attn.o_proj."
    name = stem + ("scales" if stem + "scales" in folder.entries else "weight")
    row = folder.numbers(name)[17]
    exponent = 1 << (7 if row.dtype == np.uint16 else 23)
    row[:] = np.where(row << 1 == 0, row, row + exponent).astype(row.dtype)


def halve_rope(folder: Folder) -> None:
    """Rope rows of layer 3's queries in two halves instead of adjacent pairs."""
    config = json.loads((folder.path / "config.json").read_text())
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    order = [*range(nope), *range(nope, nope + rope, 2), *range(nope + 1, nope + rope, 2)]
    for name in folder.matching("model.layers.3.self_attn.q_b_proj."):
        heads = folder.bytes_of(name).reshape(config["num_attention_heads"], nope + rope, -1)
        heads[:] = heads[:, order].copy()


def wrong_mtp_norm(folder: Folder) -> None:
    """The main model's final norm in the MTP module's place."""
    name = folder.matching("model.layers.4.shared_head.norm.weight")[0]
    folder.bytes_of(name)[:] = folder.bytes_of("model.norm.weight")


def swap_mtp_norms(folder: Folder) -> None:
    """enorm and hnorm in each other's place."""
    a, b = (folder.bytes_of(f"model.layers.4.{name}.weight") for name in ("enorm", "hnorm"))
    a[:], b[:] = b.copy(), a.copy()


def shift_router(folder: Folder) -> None:
    """Selection bias of layer 1 for the wrong experts."""
    bias = folder.bytes_of("model.layers.1.mlp.gate.e_score_correction_bias")
    weight = folder.bytes_of("model.layers.1.mlp.gate.weight")
    bias[:], weight[:] = np.roll(bias, 1, 0), np.roll(weight, 1, 0)


def swap_head_rows(folder: Folder) -> None:
    """A tensor after every stage: rows of lm_head exchanged."""
    for name in folder.matching("lm_head."):
        folder.bytes_of(name)[:] = folder.bytes_of(name)[::-1].copy()


DAMAGES = {
    swap_experts: "layer 2 MLP",
    double_a_scale_row: "layer 1 attention",
    halve_rope: "layer 3 attention",
    wrong_mtp_norm: "MTP norm",
    swap_mtp_norms: "MTP input",
    shift_router: "layer 1 MLP",
    swap_head_rows: "the text",
}


@pytest.mark.parametrize("mode", [[], ["--teacher-forced"]], ids=["free", "teacher-forced"])
@pytest.mark.parametrize("recipe", ["float32", "q8"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_found_and_named(converted, replay, tmp_path, damage, recipe, mode):
    """Each loads without a complaint and talks; the report must name layer and half."""
    folder = Folder(converted(recipe), tmp_path / "damaged")
    damage(folder)
    status, report, err = replay(folder.path, FLOAT32, *mode)
    assert status == 1
    assert err.startswith(f"error: {DAMAGES[damage]} left its bound: "), err
    if mode and damage not in (swap_head_rows,):  # and, with golden inputs, nothing else
        assert {breach["where"] for breach in report["breaches"]} == {DAMAGES[damage]}


@pytest.mark.parametrize("damage", [swap_experts, double_a_scale_row, halve_rope, wrong_mtp_norm])
def test_damage_shows_against_fp8_too(converted, replay, tmp_path, damage):
    """A golden file of the original arithmetic allows 3 % a half-layer: damage is still larger."""
    folder = Folder(converted("q8"), tmp_path / "damaged")
    damage(folder)
    status, _, err = replay(folder.path, FP8, "--teacher-forced")
    assert status == 1
    assert err.startswith(f"error: {DAMAGES[damage]} left its bound: "), err


def lose_a_word(folder: Folder) -> None:
    """The head's row of the word that golden expected least of those that it says once."""
    prompt = read_golden(FLOAT32).prompts[0]
    ids, logprobs = (np.array(prompt[name]) for name in ("ids", "logprobs"))
    once = [i for i, word in enumerate(ids[1:]) if (ids == word).sum() == 1]
    word = ids[1 + min(once, key=logprobs.__getitem__)]
    for name in ("lm_head.scales", "lm_head.biases"):
        folder.bytes_of(name)[word] = 0


def test_a_lost_word_shows_in_the_perplexity_alone(converted, replay, tmp_path):
    """Why perplexity is judged beside KL, where the word is one of thousands (0.0019 of 0.0039)."""
    folder = Folder(converted("q8"), tmp_path / "damaged")
    lose_a_word(folder)
    status, report, err = replay(folder.path, FP8)
    assert status == 1
    assert {breach["what"] for breach in report["breaches"]} == {
        "relative difference of perplexity"
    }
    assert err.startswith("error: the text left its bound: relative difference of perplexity 0.13 ")


# --- the report -----------------------------------------------------------------------------


def test_report_for_people(converted, capsys):
    """Origin, one row a stage, the text of both modules, the verdict."""
    assert parity.main([str(converted("q8")), str(FP8)]) == 0
    out = capsys.readouterr().out
    assert "golden  demo/checkpoint, fp8 on cpu" in out and "recipe q8" in out
    assert ", 1 prompt, 63 tokens\n" in out
    for word in ("embedding", "layer 3 attention", "MTP norm", "perplexity", "within the bounds"):
        assert word in out


def test_plot_without_matplotlib(converted, monkeypatch, tmp_path):
    """The extra is named before the model is loaded; the report used to be lost."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    forbid_loading(monkeypatch)
    with pytest.raises(UserError, match="`--plot` needs matplotlib"):
        parity.main([str(converted("q8")), str(FLOAT32), "--plot", str(tmp_path / "a.png")])


@pytest.mark.parametrize("name", ["absent/a.png", "folder.png"])
def test_a_plot_that_cannot_be_written(converted, monkeypatch, tmp_path, name):
    """The replay ran to its end, then a traceback and no report."""
    forbid_loading(monkeypatch)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=f"{name}` cannot be written: "):
        parity.main([str(converted("q8")), str(FP8), "--plot", str(tmp_path / name)])


@pytest.mark.parametrize("name", ["a.doc", "a"])
def test_a_plot_without_a_format(converted, monkeypatch, tmp_path, name):
    """A ValueError of matplotlib after the replay; nothing is left behind."""
    pytest.importorskip("matplotlib")
    forbid_loading(monkeypatch)
    with pytest.raises(UserError, match="is not the name of a picture"):
        parity.main([str(converted("q8")), str(FP8), "--plot", str(tmp_path / name)])
    assert not list(tmp_path.iterdir())


def test_plot(converted, tmp_path, capsys):
    """A picture of error and routing over depth, after the report."""
    pytest.importorskip("matplotlib")
    file = tmp_path / "depth.png"
    assert parity.main([str(converted("q8")), str(FLOAT32), "--plot", str(file)]) == 0
    assert file.read_bytes()[:4] == b"\x89PNG" and file.stat().st_size > 10_000


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
        (["perplexity", "{q8}", "absent.txt"], "`absent.txt` is not a file"),
        (["perplexity", "{q8}", str(GOLDEN / "long.txt"), "--context", "0"], "`--context` is `0`"),
        (["perplexity", "{q8}", str(GOLDEN / "long.txt"), "--context", "1"], "`--context` is `1`"),
        (["capacities", "{q8}", "--tokens", "3"], "`--tokens` is `3`"),
        (["capacities", "{q8}", "--slots", "4", "33"], "`--slots` has 33"),
        (["capacities", "{q8}", "--experts", "streamed"], "unrecognized arguments: --experts"),
    ],
)
def test_refusals(converted, monkeypatch, argv, message):
    """Exit status 2 and one sentence each, before minutes of loading."""
    forbid_loading(monkeypatch)
    with pytest.raises(UserError, match=message):
        parity.main([word.replace("{q8}", str(converted("q8"))) for word in argv])


def test_a_wrong_flag_is_one_sentence(capsys):
    """As in chat: argparse printed its usage instead."""
    assert run_main(lambda: parity.main(["model", "golden", "--dtype", "float16"])) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: `--dtype`: invalid choice: 'float16'")
    assert err.endswith("hint: `python -m mlx_dsv3.parity --help` lists the options\n")


def forbid_loading(monkeypatch) -> None:
    monkeypatch.setattr(parity, "load_model", lambda *_, **__: pytest.fail("it loads"))


def test_another_model_is_refused(converted, monkeypatch, tmp_path):
    """Shapes that differ would raise somewhere inside; equal shapes would merely be wrong."""
    forbid_loading(monkeypatch)
    with safe_open(FLOAT32, "np") as file:
        about = file.metadata()
    about["config"] = json.dumps(json.loads(about["config"]) | {"n_routed_experts": 256})
    other = tmp_path / "other.safetensors"
    mx.save_safetensors(str(other), mx.load(str(FLOAT32)), about)
    with pytest.raises(UserError, match="its `n_routed_experts` is 256, that of"):
        parity.main([str(converted("q8")), str(other)])


# --- perplexity and capacities ----------------------------------------------------------------


def test_perplexity_is_that_of_the_replay(converted, replay, capsys):
    """The same text gives the golden report's number; windows begin with BOS."""
    _, report, _ = replay(converted("q8"), FLOAT32)
    assert (
        parity.main(["perplexity", str(converted("q8")), str(GOLDEN / "chat.txt"), "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == len(read_golden(FLOAT32).prompts[0]["ids"]) - 1
    assert found["perplexity"] == pytest.approx(report["text"]["perplexity"], rel=1e-5)
    argv = ["perplexity", str(converted("q8")), str(GOLDEN / "long.txt"), "--context", "64"]
    assert parity.main([*argv, "--json"]) == 0
    short = json.loads(capsys.readouterr().out)
    assert parity.main([*argv[:-1], "2048", "--json"]) == 0
    long = json.loads(capsys.readouterr().out)
    assert short["tokens"] == long["tokens"] and short["perplexity"] > long["perplexity"]


@pytest.mark.parametrize("bos", [1152, 2_000_000_000, -1, "0", [0], True])
def test_perplexity_refuses_a_bos_beyond_the_vocabulary(converted, monkeypatch, tmp_path, bos):
    """It is the only id that comes from config.json: the process ended in a segmentation fault."""
    forbid_loading(monkeypatch)
    folder = tmp_path / "q8"
    folder.mkdir()
    for file in converted("q8").iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": bos}))
    with pytest.raises(UserError, match="has `bos_token_id` = .*; the model has ids 0 to 1151"):
        parity.main(["perplexity", str(folder), str(GOLDEN / "chat.txt")])


def test_perplexity_ranks_recipes(converted, capsys):
    """What the command is for: q4 loses something, q8 next to nothing."""
    found = {}
    for recipe in ("float32", "q8", "q4"):
        parity.main(["perplexity", str(converted(recipe)), str(GOLDEN / "long.txt"), "--json"])
        found[recipe] = json.loads(capsys.readouterr().out)["nats_per_token"]
    assert abs(found["q8"] - found["float32"]) < abs(found["q4"] - found["float32"])


def test_capacities(converted, capsys):
    """Logits do not depend on how many experts are in memory: prefill, decoding and MTP."""
    assert parity.main(["capacities", str(converted("q4")), "--slots", "4", "13", "31"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3 and all(line.endswith("equal, bit for bit") for line in out)


# --- measures ---------------------------------------------------------------------------------


def normal(*shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_measures_see_what_they_are_for():
    """A row, a channel, a NaN, and a row that a router sent elsewhere."""
    expected, alike = normal(8, 32), np.ones(8, bool)

    def measure(actual, alike=alike):
        stage = Stage("x")
        stage.add(mx.array(actual), mx.array(expected), alike)
        return stage

    same = measure(expected)
    assert same.error == same.worst == same.channel == 0 and same.cosine == pytest.approx(1)
    row = expected.copy()
    row[3] *= 2
    assert measure(row).worst == pytest.approx(1) and measure(row).error == pytest.approx(1 / 8)
    elsewhere = measure(row, alike & (np.arange(8) != 3))
    assert elsewhere.worst == elsewhere.channel == 0 and elsewhere.error == pytest.approx(1 / 8)
    channel = expected.copy()
    channel[:, 5] *= 1.5
    assert measure(channel).channel > 0.3 > 3 * measure(channel).error
    row[3, 0] = np.nan
    assert measure(row).error == measure(row).worst == np.inf


def test_infinities_are_differences():
    """What a file may hold: numpy warned of `inf / inf` and of a perplexity beyond float64."""
    states = normal(8, 32)
    states[3, 5] = np.inf
    stage = Stage("x")
    stage.add(mx.array(normal(8, 32)), mx.array(states), np.ones(8, bool))
    assert stage.error == stage.worst == stage.channel == np.inf
    assert TokenDifferences(losses=[1.0], golden_losses=[1e30]).perplexities[1] == np.inf


def test_divergence_is_the_whole_one():
    """20 tokens and the rest: at most the full KL, and nearly it where the rest is small."""
    logits, other = 4 * normal(16, 200), 4 * normal(16, 200) + 0.5 * normal(16, 200, seed=1)
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (logits.astype(float), other))
    full = (np.exp(p) * (p - q)).sum(-1)
    top = np.argsort(-p, -1)[:, :20]
    found = divergence(np.take_along_axis(p, top, -1), np.take_along_axis(q, top, -1))
    assert (found <= full + 1e-9).all() and found == pytest.approx(full, rel=0.5)
    assert divergence(p[:, :20], p[:, :20]) == pytest.approx(np.zeros(16), abs=1e-9)


def test_ties_do_not_count_outside_ties():
    """Another expert where two score alike is no difference; where one is clearly ahead, it is."""
    stage = Stage("x")
    golden, ours = mx.array([[1, 2], [1, 2]]), mx.array([[1, 2], [1, 3]])
    stage.route(ours, golden, mx.array([0.5, 1e-5]))
    assert stage.agreement() == 0.75 and stage.agreement(1e-3) == 1.0
    stage.route(ours, golden, mx.array([0.5, 0.5]))
    assert stage.agreement(1e-3) == pytest.approx(5 / 6)
    text = TokenDifferences(is_same=[True, False, False], gaps=[2.0, 0.1, 1.0])
    assert text.top1_outside(0.5) == 0.5


def test_bounds_of_folders_converted_elsewhere():
    """mlx-community folders have no conversion.json: their bits decide, never the folder's name."""
    assert bounds.recipe_of(None, {}) == "bf16"
    assert bounds.recipe_of(None, {"quantization": {"bits": 8, "group_size": 64}}) == "q8"
    custom = {"recipe": {"name": "mine"}}
    assert bounds.recipe_of(custom, {"quantization": {"bits": 4, "group_size": 32}}) == "q4"
    mode = {"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}
    assert bounds.recipe_of(None, mode) == "mxfp4"
    with pytest.raises(UserError, match="no bounds for quantisation `q5`"):
        bounds.recipe_of(None, {"quantization": {"bits": 5, "group_size": 64}})


def test_a_recipe_is_known_by_its_content():
    """A file `q2.json` with 8 bits was recorded as `q2`, and judged by the bounds of 2 bits."""
    from convert.recipe import RECIPES

    quantization = {"quantization": {"bits": 8, "group_size": 64}}
    for name, recipe in RECIPES.items():
        record = json.loads(json.dumps(recipe.as_dict() | {"name": "q2"}))
        assert bounds.recipe_of({"recipe": record}, quantization) == name
        assert bounds.recipe_of({"recipe": record, "layout": "mtp"}, quantization) == "q8"
    custom = RECIPES["q8"].as_dict() | {"name": "q2", "head": None}
    assert bounds.recipe_of({"recipe": custom}, quantization) == "q8"


def test_every_recipe_has_bounds():
    from convert.recipe import RECIPES

    assert set(RECIPES) == set(bounds.RECIPES)
