"""A reply's pieces are together its text, and no character is split."""

import random

import pytest
from test_conversation import real_tokenizer

from mlx_dsv3.detokenizer import UNFINISHED, Detokenizer

TEXTS = 20  # of 2,000 random tokens each


def streamed(tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.add, ids), detokenizer.end()]


def by_mlx_lm(tokenizer, ids: list[int]) -> str:
    detokenizer, text = tokenizer.detokenizer, ""
    for token in ids:
        detokenizer.add_token(token)
        text += detokenizer.last_segment
    detokenizer.finalize()
    return text + detokenizer.last_segment


@pytest.mark.parametrize("name", ["demo", "deepseek-v3", "deepseek-r1", "deepseek-v3.1"])
def test_random_tokens(name, tmp_path):
    """mlx-lm's detokenizer dropped a first space, and so the prefix that the cache held."""
    tokenizer, rng = real_tokenizer(name, tmp_path), random.Random(13)
    size, differ = max(tokenizer.get_vocab().values()) + 1, 0
    for _ in range(TEXTS):
        ids = [rng.randrange(size) for _ in range(2000)]
        whole, pieces = tokenizer.decode(ids), streamed(tokenizer, ids)
        assert "".join(pieces) == whole
        assert not any(piece.endswith(UNFINISHED) for piece in pieces[:-1])
        differ += by_mlx_lm(tokenizer, ids) != whole
    assert differ  # else use theirs


@pytest.mark.parametrize("name", ["demo", "deepseek-v3"])
def test_real_text_comes_at_once(name, tmp_path):
    """Unicode whose characters take several tokens: nothing waits longer than its character."""
    tokenizer = real_tokenizer(name, tmp_path)
    text = " Zürich 北京 👩\u200d👩\u200d👧 שלום e\u0301 \ufffd नमस्ते 𝔘𝔫𝔦 \x00\t\n  end"
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) and text in "".join(pieces)
    said = ""
    for count, piece in enumerate(pieces[:-1], 1):
        said += piece
        assert said == tokenizer.decode(ids[:count]).rstrip(UNFINISHED)
