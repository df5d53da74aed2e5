"""What needs no golden file: perplexity of a text, and logits at several expert capacities."""

import json
import math
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_folder import changed_copy, spoil

from mlx_dsv3.errors import UserError, run_main
from mlx_dsv3.load import load
from mlx_dsv3.parity import __main__ as parity
from mlx_dsv3.parity.golden import read_golden
from parity.goldens import FLOAT32, GOLDEN

LONG_TEXT = str(GOLDEN / "long.txt")


@pytest.fixture
def perplexity(capsys):
    """Return a function (folder, file, flags) -> the figures."""

    def run(folder: Path, file: Path | str, *flags: str) -> dict:
        assert parity.main(["perplexity", str(folder), str(file), "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)

    return run


def test_perplexity_is_that_of_the_replay(converted, replay, perplexity):
    """The same text gives the golden report's number; windows begin with BOS."""
    _, report, _ = replay(converted("q8"), FLOAT32)
    found = perplexity(converted("q8"), GOLDEN / "chat.txt")
    assert found["tokens"] == len(read_golden(FLOAT32).prompts[0]["ids"]) - 1
    assert found["perplexity"] == pytest.approx(report["text"]["perplexity"], rel=1e-5)
    short = perplexity(converted("q8"), LONG_TEXT, "--context", "64")
    long = perplexity(converted("q8"), LONG_TEXT)
    assert short["tokens"] == long["tokens"] and short["perplexity"] > long["perplexity"]


def by_hand(folder: Path, file: str, context: int, bos: int | None) -> tuple[int, float]:
    """Return tokens and nats per token in float64, from the logits of whole windows."""
    loaded = load(folder)
    head = [] if bos is None else [bos]
    ids = loaded.tokenizer.encode(Path(file).read_text(), add_special_tokens=False)
    ids = ids[ids[:1] == head :]
    step, losses = context - len(head), []
    for start in range(0, len(ids), step):
        window = head + ids[start : start + step]
        logits = np.array(loaded.model(mx.array([window]))[0]).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += [-logprobs[i, token] for i, token in enumerate(window[1:])]
    return len(losses), float(np.mean(losses))


@pytest.mark.parametrize("context", [64, 275])
@pytest.mark.parametrize("bos", [0, None])
def test_every_counted_token_is_summed(converted, perplexity, tmp_path, bos, context):
    """Without BOS nothing predicts a window's first token: it was left out and divided by.

    Windows of 64 gave 13.3 for 13.8. At 275 the last has one token, without BOS none to count.
    """
    folder = changed_copy(converted("q8"), tmp_path / "q8", bos_token_id=bos)
    found = perplexity(folder, LONG_TEXT, "--context", str(context))
    tokens, nats = by_hand(folder, LONG_TEXT, context, bos)
    ids = 276 if bos is None else 275  # the text begins with BOS, which then is a token like others
    assert found["tokens"] == tokens
    assert found["nats_per_token"] == pytest.approx(nats, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) * ids / 1506, rel=1e-5)


def test_texts_of_one_token(converted, perplexity, no_loading, tmp_path):
    """BOS predicts it; without BOS there is nothing to count, which was 0 nats."""
    (tmp_path / "one.txt").write_text("I")
    (tmp_path / "none.txt").write_text("")
    folder = changed_copy(converted("q8"), tmp_path / "q8", bos_token_id=None)
    for source, file, words in (
        (folder, "one.txt", "has one token, and nothing before it to predict it from"),
        (folder, "none.txt", "has no tokens"),
        (converted("q8"), "none.txt", "has no tokens"),
    ):
        with pytest.raises(UserError, match=words):
            parity.main(["perplexity", str(source), str(tmp_path / file)])


def test_a_text_of_one_token_behind_bos(converted, perplexity, tmp_path):
    (tmp_path / "one.txt").write_text("I")
    assert perplexity(converted("q8"), tmp_path / "one.txt")["tokens"] == 1


def test_what_is_no_text(converted, no_loading, tmp_path, capsys):
    """A traceback, or a wait for ever: one sentence, with the name."""
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    os.mkfifo(tmp_path / "pipe")
    for name, words in {
        "latin": "is not text in UTF-8: byte 3 is 0xe9",
        "pipe": "is not a file",
        "": "is not a file",
        "absent": "cannot be used: no such file or directory",
    }.items():
        argv = ["perplexity", str(converted("q8")), str(tmp_path / name)]
        assert run_main(lambda argv=argv: parity.main(argv)) == 2
        err = capsys.readouterr().err
        assert words in err and err.startswith(f"error: `{tmp_path / name}")


@pytest.mark.parametrize("bos", [1152, 2_000_000_000, -1, "0", [0], True])
def test_perplexity_refuses_a_bos_beyond_the_vocabulary(converted, no_loading, tmp_path, bos):
    """It is the only id that comes from config.json: the process ended in a segmentation fault."""
    folder = changed_copy(converted("q8"), tmp_path / "q8", bos_token_id=bos)
    with pytest.raises(UserError, match="has `bos_token_id` = "):
        parity.main(["perplexity", str(folder), str(GOLDEN / "chat.txt")])


def test_windows_within_the_model(converted, perplexity, no_loading, tmp_path):
    """A window beyond the model's own length is refused before it loads."""
    folder = changed_copy(converted("q8"), tmp_path / "q8", max_position_embeddings=4096)
    with pytest.raises(UserError, match="`--context` is 4,097 and `max_position_embeddings`"):
        parity.main(["perplexity", str(folder), LONG_TEXT, "--context", "4097"])


def test_a_model_that_computes_no_number(converted, tmp_path, capsys):
    """A NaN in a weight: a perplexity of `nan`, and status 0."""
    folder = changed_copy(converted("float32"), tmp_path / "nan")
    spoil(folder, "model.norm.weight")
    argv = ["perplexity", str(folder), str(GOLDEN / "chat.txt"), "--json"]
    assert run_main(lambda: parity.main(argv)) == 2
    out, err = capsys.readouterr()
    assert out == "" and "computes a loss of nan nats per token, which is not a perplexity" in err


def test_the_hint_about_remote_code_can_be_followed(converted, perplexity, tmp_path):
    """It named a flag that the command did not take."""
    folder = changed_copy(converted("q8"), tmp_path / "q8")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    # A class of its own: transformers notes in the class that it came from outside.
    code = "from transformers import PreTrainedTokenizerFast as Fast\nclass Own(Fast): pass\n"
    (folder / "own.py").write_text(code)
    with pytest.raises(UserError, match="own code, which nobody allowed") as caught:
        parity.main(["perplexity", str(folder), LONG_TEXT])
    assert "`--trust-remote-code` runs it" in caught.value.hint
    assert perplexity(folder, LONG_TEXT, "--trust-remote-code")["tokens"] == 275


def test_perplexity_ranks_recipes(converted, perplexity):
    """What the command is for: q4 loses something, q8 next to nothing."""
    exact, q8, q4 = (
        perplexity(converted(recipe), LONG_TEXT)["nats_per_token"]
        for recipe in ("float32", "q8", "q4")
    )
    assert abs(q8 - exact) < abs(q4 - exact)


def test_capacities(converted, capsys):
    """Logits do not depend on how many experts are in memory: prefill, decoding and MTP."""
    assert parity.main(["capacities", str(converted("q4")), "--slots", "4", "13", "31", "4"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3 and all(line.endswith("equal, bit for bit") for line in out)
