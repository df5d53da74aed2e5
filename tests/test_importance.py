"""Importance: sums against the reference's inputs, runs that stop, and files from strangers."""

import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from refusal import refusal
from streamed import CONFIG, load_with, write_experts
from tiny import A, B

from convert.__main__ import main as convert
from mlx_dsv3.checkpoint.importance import DRAWN, Importance, least_rows, read, shapes
from mlx_dsv3.config import ModelArgs
from mlx_dsv3.errors import UserError, run_main
from mlx_dsv3.importance import __main__ as program
from mlx_dsv3.importance import measure
from mlx_dsv3.importance.measure import Measurement, partial_of
from mlx_dsv3.importance.sums import Sums, write
from mlx_dsv3.importance.texts import Texts
from mlx_dsv3.importance.watch import go_through, watch

EXPERT = "model.layers.1.mlp.experts.3."
ABOUT = {"kind": "importance", "format": "1", "rows": "5000", "num_experts_per_tok": "3"}
ABOUT |= {"source": '{"headers_sha256": "h", "source_sha256": "s", "id": "a/b"}'}


def windows(vocab_size: int, *lengths: int) -> list[list[int]]:
    draw = np.random.default_rng(1)
    return [draw.integers(0, vocab_size, length).tolist() for length in lengths]


class Inputs:
    """Sums of squares of what the reference's layers are given, by the names of importance."""

    def __init__(self, model, args: ModelArgs, patch):
        self.args, self.sums, self.rows, self.scores = args, {}, {}, None
        softmax = torch.Tensor.softmax
        patch.setattr(torch.Tensor, "softmax", lambda x, dim: self.keep(softmax(x, dim)))
        self.hooks = []
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                note = lambda module, given, out, name=name: self.note(name, given[0], out)  # noqa: E731
                self.hooks.append(module.register_forward_hook(note))

    def keep(self, scores):
        self.scores = scores
        return scores

    def note(self, name: str, x, out) -> None:
        prefix = name.rpartition(".")[0]
        if name.endswith("kv_b_proj"):
            self.latent = x
            return
        if name.endswith(("q_proj", "q_b_proj")):
            heads = out.unflatten(-1, (self.args.num_attention_heads, -1)).transpose(1, 2)
            self.add(f"{prefix}.embed_q", heads[..., : self.args.qk_nope_head_dim])
        if name.endswith("o_proj"):
            self.add(f"{prefix}.unembed_out", self.scores @ self.latent[:, None])
        self.add(name, x)

    def add(self, name: str, x) -> None:
        squares = x.double().square()
        per_head = "embed_q" in name or "unembed_out" in name
        summed = squares.sum((0, 2))[:, None] if per_head else squares.flatten(0, -2).sum(0)
        self.sums[name] = self.sums.get(name, 0) + summed.numpy()
        self.rows[name] = self.rows.get(name, 0) + x.shape[:-1].numel() / (
            x.shape[1] if per_head else 1
        )


@pytest.mark.parametrize("config", [A, B], ids=["A", "B"])
def test_mean_squares_are_those_of_the_references_inputs(random_pair, monkeypatch, config):
    """Of every layer, expert and head, in windows that the model itself would not absorb."""
    pair = random_pair(config)
    found = Inputs(pair.reference, pair.args, monkeypatch)
    ids = torch.tensor(windows(160, 200, 200))
    _, g = pair.reference(ids)
    pair.reference.mtp(g[:, :-1], ids[:, 1:])
    [hook.remove() for hook in found.hooks]
    sums = Sums(pair.args, with_mtp=True)
    loaded = SimpleNamespace(model=pair.model, mtp=pair.mtp)
    watch(loaded, sums.note)
    go_through(loaded, mx.array(ids.numpy()), sums.note)
    sums.settle(2)
    means, last = sums.means(), f"model.layers.{config['num_hidden_layers']}."
    del found.sums["lm_head"]  # the MTP module used it too
    np.testing.assert_allclose(means["lm_head"], g.square().mean((0, 1)), rtol=1e-4)
    assert f"{last}eh_proj" in found.sums and f"{last}self_attn.unembed_out" in found.sums
    for name, total in found.sums.items():
        stored, row = name, ()
        if ".experts." in name:
            prefix, _, rest = name.partition(".experts.")
            row, stored = int(rest.split(".")[0]), f"{prefix}.experts.{rest.partition('.')[2]}"
            stored = stored.replace("up_proj", "gate_proj")
            assert means[f"{prefix}.experts.rows"][row] == found.rows[name], name
        np.testing.assert_allclose(
            means[stored][row], total / found.rows[name], rtol=2e-4, atol=1e-6, err_msg=name
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_experts(tmp_path_factory.mktemp("streamed"), "q4")


def measured(folder: Path, out: Path, capacity: int, most: int = 2048) -> dict[str, np.ndarray]:
    """Measure three windows with so many experts in memory; return OUT."""
    texts = Texts(windows(CONFIG["vocab_size"], 180, 180, 60), [])
    with load_with(folder, capacity) as loaded:
        measure.MOST_TOKENS = most
        Measurement(loaded, texts, out, ABOUT | {"key": "k"}).run()
    return {name: np.array(value) for name, value in mx.load(str(out)).items()}


def test_the_same_however_experts_lie_and_windows_run(folder, tmp_path, both_ways, monkeypatch):
    """Streamed, and one window at a time, which other kernels round otherwise."""
    monkeypatch.setattr(measure, "MOST_TOKENS", 2048)
    whole = measured(folder, tmp_path / "whole.safetensors", 64)
    for capacity, most, rtol in ((6, 2048, 1e-6), (64, 180, 1e-5)):
        other = measured(folder, tmp_path / f"{capacity}.safetensors", capacity, most)
        for name, values in whole.items():
            np.testing.assert_allclose(other[name], values, rtol=rtol, err_msg=name)


def test_a_stopped_run_goes_on(folder, tmp_path, monkeypatch):
    """Byte by byte what an uninterrupted one writes; another command's file is refused."""
    monkeypatch.setattr(measure, "MOST_TOKENS", 180)
    measured(folder, tmp_path / "whole.safetensors", 64, 180)
    settle, out = Sums.settle, tmp_path / "out.safetensors"

    def stop_before_the_second(self, windows):
        if self.done == 1:
            raise KeyboardInterrupt
        settle(self, windows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Sums, "settle", stop_before_the_second)
        measured(folder, out, 64, 180)
    assert not out.exists()
    with pytest.raises(UserError, match="another model, text, window or dtype"):
        Sums(ModelArgs.from_dict(CONFIG), False).resume(partial_of(out), "other")
    monkeypatch.setattr(measure, "SAVE_S", 0)
    measured(folder, out, 6, 180)
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not partial_of(out).exists()


ARGS = ModelArgs.from_dict(A)


def good(with_mtp: bool = True) -> dict[str, np.ndarray]:
    """Return the tensors of a good file for the tiny model A."""
    draw, found = np.random.default_rng(0), {}
    for name, shape in shapes(ARGS, with_mtp).items():
        is_count = name.endswith("rows")
        found[name] = np.full(shape, 900, "<i8") if is_count else draw.random(shape).astype("<f4")
    return found


def stored(path: Path, **changes) -> Importance:
    about = ABOUT | {name: value for name, value in changes.items() if name in ABOUT}
    tensors = good() | {k: v for k, v in changes.items() if k not in ABOUT}
    write(path, {name: value for name, value in tensors.items() if value is not None}, about)
    return read(path)


def test_what_the_converter_gets(tmp_path):
    """Few rows are drawn to the layer's mean, none at all is the mean; up has what gate has."""
    tensors = good()
    rows = np.arange(16) * 10
    found = stored(tmp_path / "x", **{"model.layers.1.mlp.experts.rows": rows})
    found.check(ARGS)
    gate = tensors["model.layers.1.mlp.experts.gate_proj"].astype(float)
    mean = rows @ gate / rows.sum()
    own = found.weights(f"{EXPERT}gate_proj")
    np.testing.assert_allclose(own, (30 * gate[3] + DRAWN * mean) / (30 + DRAWN), rtol=1e-6)
    np.testing.assert_array_equal(found.weights(f"{EXPERT}up_proj"), own)
    none = found.weights("model.layers.1.mlp.experts.0.gate_proj")
    np.testing.assert_allclose(none, mean, rtol=1e-6)
    assert found.weights("model.layers.2.self_attn.embed_q").shape == (4, 1, 16)
    assert found.weights("model.embed_tokens") is None
    assert found.share("lm_head") == 1 and 0 < found.share(f"{EXPERT}up_proj") < 1
    shares = [found.share(f"model.layers.1.mlp.experts.{e}.up_proj") for e in range(16)]
    assert sum(shares) == pytest.approx(3) and min(shares) > 0


NAN, LESS = good()["lm_head"].copy(), good()["lm_head"].copy()
NAN[3], LESS[3] = np.nan, -1e-9
FOREIGN = {
    "which has values that are not finite": {"lm_head": NAN},
    "which has values below 0": {"lm_head": LESS},
    "which is 0 in every channel": {"lm_head": np.zeros(64, "<f4")},
    "`model.layers.2.self_attn.o_proj` is not there": {"model.layers.2.self_attn.o_proj": None},
    "of another model: `lm_head` has [65] there; the model has [64]": {
        "lm_head": np.ones(65, "<f4")
    },
    "the model is not": {"model.layers.9.self_attn.o_proj": np.ones(48, "<f4")},
    "as F64 [64]": {"lm_head": np.ones(64)},
    "has 1,023 rows; 1,024 are the least": {"rows": "1023"},
    "has another number of experts per token": {"num_experts_per_tok": "2"},
    "has `-5` as its `rows`": {"rows": "-5"},
    "holds no importance": {"kind": "state"},
    "has format `2`, not 1": {"format": "2"},
    "counts no rows": {"model.layers.1.mlp.experts.rows": np.zeros(16, "<i8")},
    "counts more than": {"model.layers.1.mlp.experts.rows": np.full(16, 2**62)},
    "is not JSON": {"source": "{"},
}


@pytest.mark.parametrize("words", FOREIGN)
def test_foreign_files_are_refused(tmp_path, words):
    with pytest.raises(UserError) as error:
        stored(tmp_path / "x.safetensors", **FOREIGN[words]).check(ARGS)
    assert words in error.value.message and error.value.hint


def test_other_weights_of_one_shape(tmp_path):
    """R1's importance is not V3's; another form of a checkpoint may be of the same weights."""
    found = stored(tmp_path / "x")

    def identity(headers: str, is_same: bool | None):
        source = SimpleNamespace(headers_sha256=headers)
        return SimpleNamespace(source=source, is_that_of=lambda noted: is_same)

    for known in (identity("h", True), identity("h", None), identity("other", False), None):
        found.check(ARGS, known)
    with pytest.raises(UserError, match="is of other weights than the source's: those of `a/b`"):
        found.check(ARGS, identity("h", False))


def test_the_least_rows_follow_the_experts():
    """V3 has 256 experts of which a token meets 8: 16 rows each take 512 tokens."""
    v3 = SimpleNamespace(n_routed_experts=256, num_experts_per_tok=8)
    assert least_rows(v3) == 1024
    assert least_rows(SimpleNamespace(n_routed_experts=384, num_experts_per_tok=4)) == 1536


CHANGES = {
    "which has values that are not finite": {"lm_head": NAN},
    "which has values below 0": {"lm_head": LESS},
    "of another model: `lm_head` has [65]": {"lm_head": np.ones(65, "<f4")},
    "has 900 rows; 1,024 are the least": {"rows": "900"},
}


def put(path: Path, **changes) -> Path:
    try:
        stored(path, **changes)
    except UserError:
        pass  # it is there
    return path


def test_a_conversion_takes_a_file_and_verify_the_same(folders, tmp_path, capsys):
    hub, out, file = folders / "hub", tmp_path / "out", put(tmp_path / "i.safetensors")
    flags = ["--recipe", "q2-fit", "--importance"]
    for words, changes in CHANGES.items():
        bad = put(tmp_path / "bad", **changes)
        assert words in refusal(capsys, convert, "plan", hub, *flags, bad)
        assert words in refusal(capsys, convert, "run", hub, out, *flags, bad)
    assert not out.exists()
    error = refusal(capsys, convert, "run", hub, out, "--importance", file)
    assert "has no use in the recipe `q4`, whose levels are `extremes`" in error
    assert convert(["plan", str(hub), *flags, str(file)]) == 0
    assert "with `q2-fit`, weighed by `i.safetensors`" in capsys.readouterr().out
    assert convert(["run", str(hub), str(out), *flags, str(file)]) == 0
    noted = json.loads((out / "conversion.json").read_text())["importance"]
    assert noted == {"file": file.name, "sha256": read(file).sha256}
    again = ["verify", out, "--source", hub]
    assert "without it nothing follows" in refusal(capsys, convert, *again)
    other = put(tmp_path / "other", rows="6000")
    assert "is another file" in refusal(capsys, convert, *again, "--importance", other)
    assert convert([*map(str, again), "--full", "--importance", str(file)]) == 0
    error = refusal(capsys, convert, "verify", out, "--importance", file)
    assert "`--importance` needs `--source`" in error
    error = refusal(
        capsys, convert, "verify", folders / "out", "--source", hub, "--importance", file
    )
    assert "names no importance" in error


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("What is the capital of France? It is Paris, I think.\n" * 120)
    return path


def test_texts_that_are_refused(converted, tmp_path, capsys, monkeypatch, text):
    monkeypatch.setattr(program, "load_model", lambda *_, **__: pytest.fail("it loads"))
    folder, out = converted("q4"), tmp_path / "out"
    for name, content in {"empty": b"", "short": b"Hello, you.", "binary": b"\xff\xd8\0"}.items():
        (tmp_path / name).write_bytes(content)
    for name, words in {
        "empty": "has 0 tokens; a window takes 511",
        "short": " tokens; a window takes 511",
        "binary": "is not text in UTF-8",
        "absent": "cannot be used: no such file",
    }.items():
        assert words in refusal(capsys, program.main, folder, "--text", text, tmp_path / name, out)
    few = tmp_path / "few"
    few.write_text(text.read_text()[: 120 * 20])
    error = refusal(capsys, program.main, folder, "--text", few, out, "--context", 64)
    assert "are the least for this model" in error
    assert "a text and OUT" in refusal(capsys, program.main, folder, "--text", text)
    error = refusal(capsys, program.main, folder, "--text", text, few)
    assert "exists and is not what this command writes" in error
    assert few.read_text() and not out.exists()


def test_a_converted_folder(converted, checkpoint, tmp_path, capsys, text):
    """The file is the model's that was measured; the same command has nothing left to do."""
    out = tmp_path / "out.safetensors"
    argv = [str(converted("q4")), "--text", str(text), str(out), "--context", "128"]
    assert run_main(lambda: program.main(argv)) == 0
    found, said = read(out), capsys.readouterr().err
    manifest = json.loads((converted("q4") / "conversion.json").read_text())
    assert "the rarest expert had" in said and found.with_mtp
    found.check(ModelArgs.from_dict(json.loads((checkpoint / "config.json").read_text())))
    assert found.source == manifest["source"] and int(found.about["rows"]) >= 1024
    assert run_main(lambda: program.main(argv)) == 0
    assert "was measured already" in capsys.readouterr().err
    assert "exists and is not" in refusal(capsys, program.main, *argv[:-1], 256)
