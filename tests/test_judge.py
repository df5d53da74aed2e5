"""The judge: what its page promises, and that it is no model that knows its text by heart."""

import json
from pathlib import Path

import pytest

pytest.importorskip("mlx")
import mlx.core as mx
from tokenizers import Tokenizer

from convert.__main__ import main as convert
from demo.judge import corpus
from demo.model_config import JUDGE
from mlx_dsv3.load import load
from mlx_dsv3.parity import __main__ as parity
from mlx_dsv3.reference import record

HERE = Path(corpus.__file__).parent
CHECKPOINT = HERE / "checkpoint"
HELD_OUT, IMPORTANCE = ((HERE / f"{n}.txt").read_text() for n in ("held_out", "importance"))
MIDDLE = len(HELD_OUT) // 2  # where plays are


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("judge") / "q8"
    assert convert(["run", str(CHECKPOINT), str(folder), "--recipe", "q8"]) == 0
    return folder


def perplexity(capsys, folder: Path, file: Path) -> float:
    capsys.readouterr()
    assert parity.main(["perplexity", str(folder), str(file), "--context", "512", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["perplexity"]


def test_checkpoint_is_the_one_described():
    """12 MB are what a repository takes, and the shapes are those that the page names."""
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 12e6
    assert json.loads((CHECKPOINT / "config.json").read_text()) == JUDGE
    tok = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    assert tok.get_vocab_size() == JUDGE["vocab_size"]
    ids = tok.encode(HELD_OUT, add_special_tokens=False).ids
    assert len(ids) == 75228 and tok.decode(ids) == HELD_OUT


def test_texts_share_no_passage():
    """What importance is measured on must not be what recipes are judged on."""
    lines = [
        set(filter(lambda line: len(line) > 80, t.splitlines())) for t in (HELD_OUT, IMPORTANCE)
    ]
    assert min(map(len, lines)) > 100 and not lines[0] & lines[1]
    assert not corpus.COARSE.search(HELD_OUT + IMPORTANCE)


def test_a_number_decides_where_a_passage_goes(monkeypatch):
    """Nothing of a text is lost, and a coarse passage leaves the small texts, not the training."""
    line = "{:04d} " + "x" * 995 + "\n"
    text = "".join(map(line.format, range(4 * 128))).replace("0000", "Fuck")
    for name in ("plays", "novels", "jargon"):
        monkeypatch.setattr(corpus, name, lambda packages: ["short"])
    monkeypatch.setattr(corpus, "bible", lambda: [text])
    parts = corpus.split(Path())
    assert [p[:4] for p in parts["held_out"]] == ["0256", "shor", "shor", "shor"]
    assert [p[:4] for p in parts["importance"]] == ["0128", "0384"]
    assert "".join(corpus.passages(text)) == text and len(parts["train"]) == 124


def test_text_that_it_never_saw(folder, tmp_path, capsys):
    """A wrong export or tokenizer shows here; so would a text that it had been trained on."""
    file = tmp_path / "excerpt.txt"
    file.write_text(HELD_OUT[MIDDLE:][:1000])
    assert 12 < perplexity(capsys, folder, file) < 40


def test_drafts_are_often_right_and_often_wrong(folder):
    """The demo's are always right, which hides what a wrong draft costs."""
    with load(folder) as loaded:
        ids = loaded.tokenizer.encode(HELD_OUT[MIDDLE:][:1000], add_special_tokens=False)
        ids = mx.array([[0, *ids]])
        g = loaded.model.hidden(ids)
        best = loaded.model.lm_head(g)[0, 1:-1].argmax(-1)
        draft = loaded.mtp(g[:, :-1], ids[:, 1:])[0][0, :-1].argmax(-1)
    assert 0.55 < (best == draft).astype(mx.float32).mean().item() < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ["float32", "fp8"])
def test_bounds_hold_for_it(arithmetic, tmp_path, capsys):
    """The demo alone gave narrower ones: its attention adds something to every row."""
    argv = [str(CHECKPOINT), str(tmp_path / "golden"), "--device", "cpu", "--states", "all"]
    for number in range(4):
        file = tmp_path / f"{number}.txt"
        file.write_text(HELD_OUT[len(HELD_OUT) * number // 4 :][:330])
        argv += ["--prompt-file", str(file)]
    assert record.main([*argv, "--arithmetic", arithmetic]) == 0
    for recipe in ("float32", "q8", "q6", "q4", "q3", "q2-mixed", "mxfp4"):
        folder = tmp_path / recipe
        assert convert(["run", str(CHECKPOINT), str(folder), "--recipe", recipe]) == 0
        for mode in ([], ["--teacher-forced"]):
            assert parity.main([str(folder), str(tmp_path / "golden"), *mode]) == 0, (
                capsys.readouterr()
            )


@pytest.mark.slow
def test_perplexity_of_the_page(folder, capsys):
    assert perplexity(capsys, folder, HERE / "held_out.txt") == pytest.approx(22.927, rel=1e-3)
