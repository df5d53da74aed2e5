"""`parity compare`: two MLX folders over the same text."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx_folder import changed_copy, spoil

from mlx_dsv3.errors import UserError, run_main
from mlx_dsv3.load import load
from mlx_dsv3.parity import __main__ as parity
from mlx_dsv3.parity import compare as comparing
from mlx_dsv3.parity.compare import Comparison
from mlx_dsv3.parity.perplexity import windows
from parity.goldens import GOLDEN

LONG, CHAT = str(GOLDEN / "long.txt"), str(GOLDEN / "chat.txt")


@pytest.fixture
def compare(capsys):
    """Return a function (model, reference, words) -> the figures."""

    def run(model: Path, reference: Path, *words: str) -> dict:
        argv = ["compare", str(model), str(reference), *words, "--context", "24", "--json"]
        assert parity.main(argv) == 0
        return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)

    return run


def test_a_model_against_itself(converted, compare):
    """What was kept of the reference must give its own bits again, packed head and all."""
    found = compare(converted("q4"), converted("q4"), LONG)
    assert found["tokens"] == 275
    for name, value in {"kl": 0, "kl_p99": 0, "best_token": 1, "perplexity_ratio": 1}.items():
        assert found[name] == {"value": value, "low": value, "high": value}
    assert found["perplexity"] == found["reference_perplexity"]


def logprobs(folder: Path, files: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probabilities in float64, one window at a time, and the tokens that came."""
    found, targets = [], []
    with load(folder) as loaded:
        for file in files:
            ids = loaded.tokenizer.encode(Path(file).read_text(), add_special_tokens=False)
            for window in windows(ids[ids[:1] == [0] :], 0, 24):
                logits = np.array(loaded.model(mx.array([window]))[0, :-1]).astype(np.float64)
                found.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
                targets += window[1:]
    return np.concatenate(found), np.array(targets)


def test_figures_are_those_of_the_definition(converted, compare):
    """Directly, by NumPy, in float64: the wrong direction of KL, a wrong row, a lost window."""
    files = [LONG, CHAT]
    found = compare(converted("q3"), converted("float32"), *files)
    (p, targets), (q, _) = (logprobs(converted(name), files) for name in ("float32", "q3"))
    kl = (np.exp(p) * (p - q)).sum(-1)
    at = np.arange(len(targets)), targets
    expected = {
        "kl": kl.mean(),
        "kl_p99": np.percentile(kl, 99, method="inverted_cdf"),
        "best_token": (p.argmax(-1) == q.argmax(-1)).mean(),
        "perplexity": np.exp(-q[at].mean()),
        "reference_perplexity": np.exp(-p[at].mean()),
        "perplexity_ratio": np.exp((p[at] - q[at]).mean()),
    }
    assert found["tokens"] == len(targets) and kl.mean() > 0.01
    for name, value in expected.items():
        assert found[name]["value"] == pytest.approx(value, rel=1e-4), name
        assert found[name]["low"] < value < found[name]["high"], name


def test_what_is_kept_is_used_again(converted, compare, tmp_path, monkeypatch):
    """The reference is not loaded twice; for another text the kept folder is refused."""
    keep = ("--keep", str(tmp_path / "kept"))
    once = compare(converted("q3"), converted("float32"), LONG, *keep)
    loaded, load_model = [], parity.load_model

    def noting(folder, **options):
        loaded.append(folder.path)
        return load_model(folder, **options)

    monkeypatch.setattr(parity, "load_model", noting)
    again = compare(converted("q3"), converted("float32"), LONG, *keep)
    assert again == once and loaded == [converted("q3")]
    for words in ((converted("float32"), LONG, CHAT), (converted("q4"), LONG)):
        with pytest.raises(UserError, match="holds the states of another reference, text"):
            compare(converted("q3"), *words, *keep)
    with pytest.raises(UserError, match="is there and is no folder of kept states"):
        compare(converted("q3"), converted("float32"), LONG, "--keep", str(GOLDEN))
    (tmp_path / "kept" / "head.safetensors").unlink()  # as a kill before the end leaves it
    assert compare(converted("q3"), converted("float32"), LONG, *keep) == once
    states = tmp_path / "kept" / "states.npy"
    os.truncate(states, states.stat().st_size // 2)
    with pytest.raises(UserError, match=r"`.*states.npy` is damaged"):
        compare(converted("q3"), converted("float32"), LONG, *keep)


def test_a_full_disk_is_told_first(converted, no_loading, monkeypatch):
    folders = str(converted("q4")), str(converted("q8"))
    usage = SimpleNamespace(free=1_000_000)
    monkeypatch.setattr("mlx_dsv3.parity.kept.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"states take 1\.\d MB, and the disk of `.*` has 1.0 MB"):
        parity.main(["compare", *folders, LONG, "--context", "24"])


@pytest.mark.parametrize(
    ("files", "flags", "words"),
    [
        (["absent"], (), "`absent` cannot be used: no such file or directory"),
        (["empty"], (), "`empty` has no tokens"),
        ([LONG], (), "has 276 tokens, 1 window of 512; an interval takes 10 windows or more"),
        ([LONG], ("--context", "999999"), "`--context` is 999,999 and `max_position_embeddings`"),
    ],
)
def test_what_is_no_text(converted, no_loading, tmp_path, monkeypatch, capsys, files, flags, words):
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("")
    argv = ["compare", str(converted("q4")), str(converted("q8")), *files, *flags]
    assert run_main(lambda: parity.main(argv)) == 2
    err = capsys.readouterr().err
    err = err[err.index("error: ") :]  # the fixture may convert first
    assert words in err and "hint: " in err


def test_folders_of_other_tokens(converted, no_loading, tmp_path):
    """Ids that mean other words give a KL that means nothing."""
    other = changed_copy(converted("q8"), tmp_path / "bos", bos_token_id=1)
    with pytest.raises(UserError, match="have different tokens for this text"):
        parity.main(["compare", str(converted("q4")), str(other), LONG])
    with pytest.raises(UserError, match="`nowhere` is not a folder"):
        parity.main(["compare", str(converted("q4")), "nowhere", LONG])


def test_other_vocabularies(converted, good_folders, no_loading, tmp_path):
    """The words may be the same, and the log-probabilities are of more."""
    other = shutil.copytree(good_folders / "mlx", tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).unlink(missing_ok=True)
        shutil.copy(converted("q4") / name, other / name)
    with pytest.raises(UserError, match="vocabular"):
        parity.main(["compare", str(other), str(converted("q4")), LONG])


def test_a_model_that_computes_no_number(converted, tmp_path):
    folder = changed_copy(converted("float32"), tmp_path / "nan")
    spoil(folder, "model.norm.weight")
    with pytest.raises(UserError, match="computes nan nats per token"):
        argv = ["compare", str(folder), str(converted("q8")), LONG, "--context", "24"]
        parity.main(argv)


def test_intervals_cover(monkeypatch):
    """Tokens of a window are alike: a bootstrap over tokens would cover half as often."""
    monkeypatch.setattr(comparing, "DRAWS", 300)
    rng, trials, covered = np.random.default_rng(1), 200, 0
    for _ in range(trials):
        sizes = rng.integers(5, 30, 60)
        kl = np.repeat(rng.gamma(2, 0.5, 60), sizes) * rng.gamma(4, 0.25, sizes.sum())
        numbers = Comparison(sizes, kl, kl < 1, kl, kl)
        found = numbers.intervals()["kl"]
        covered += found["low"] <= 1 <= found["high"]
    assert 0.89 <= covered / trials <= 0.98
