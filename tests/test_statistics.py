"""What a reply took, in words and drawn: the line below it, `/stats` and `/context`."""

import io
from types import SimpleNamespace

from mlx_dsv3.conversation.session import End
from mlx_dsv3.decoding.draft_stats import LEAST_TOKENS, DraftStats
from mlx_dsv3.experts.bank import Counters
from mlx_dsv3.generate import Stats
from mlx_dsv3.terminal.drawing import duration
from mlx_dsv3.terminal.statistics import context_lines, stats_lines, stats_words


def stats(drafted=0, accepted=0, experts=None, **values) -> Stats:
    """Return the statistics of the longest reply that a line must have room for."""
    drafts = DraftStats(drafted=[drafted, 0, 0, 0], accepted=[accepted, 0, 0, 0])
    drafts.steps, drafts.lengths = [1, drafted, 0, 0, 0], [drafted - accepted, accepted, 0, 0, 0]
    longest = {"prompt_tokens": 131_234, "reused_tokens": 65_200, "prompt_s": 431.0}
    longest |= {"first_token_s": 431.3, "reply_tokens": 4512, "reply_s": 51.2}
    longest |= {"peak_bytes": 377_900_000_000, "drafts": drafts, "experts": experts}
    return Stats(**longest | values)


def test_durations():
    seconds = (0, 0.0514, 0.0999, 1.26, 1.999, 9.94, 9.96, 59.7, 599, 599.6, 7250)
    words = [duration(s) for s in seconds]
    assert words == [
        *(
            "0.0010 s",
            "0.051 s",
            "0.10 s",
            "1.3 s",
            "2.0 s",
            "9.9 s",
            "10 s",
            "60 s",
            "599 s",
            "10 min",
            "121 min",
        )
    ]


def test_the_line_fits_100_columns():
    """Of a resident model, after a long reply to a longer prompt: 71 % of its drafts accepted."""
    line = f"[{'; '.join(stats_words(stats(2000, 1420)))}]"
    assert len(line) <= 100
    assert line.startswith("[prompt 131,234 (65,200 reused), first token 431 s; reply 4,512, ")
    assert line.endswith("88.1/s; drafts 71%; peak 377.9 GB]")


def test_few_tokens_make_no_ratio():
    """The demo greeted with `0.03 x plain`, of 13 tokens."""
    few = {"prompt_tokens": 1020, "reused_tokens": 1000}
    for tokens, is_ratio in ((LEAST_TOKENS - 1, False), (LEAST_TOKENS, True)):
        experts = Counters(hits=900, misses=100, nbytes=10**9)
        some = stats(tokens, 10, experts, **few | {"reply_tokens": tokens - 20})
        line = "; ".join(stats_words(some))
        assert (line.count("%"), line.count(" of ")) == ((2, 0) if is_ratio else (0, 2)), line
        lines = "\n".join(lines_of(some, {3: experts}))
        assert ("%" in lines) == is_ratio and " x plain" not in lines
        assert lines.startswith("prompt       1,020 tokens, 1,000 reused\n")  # 20 say no speed
    assert lines_of(stats())[0] == "prompt       131,234 tokens, 65,200 reused, 153.2/s"


def lines_of(some: Stats, layers=None) -> list[str]:
    """Return the lines of `/stats` after a reply."""
    bank = SimpleNamespace(capacity=12)
    store = SimpleNamespace(banks=dict.fromkeys(layers or {}, bank))
    session = SimpleNamespace(loaded=SimpleNamespace(store=store))
    session.control = SimpleNamespace(fixed=None)
    return stats_lines(End("stop", some, layers or {}), session)


def test_stats_are_drawn(monkeypatch):
    """Hit rates of layers and what became of drafts, in blocks or, where there are none, ASCII."""
    layers = {3: Counters(hits=900, misses=300), 4: Counters()}
    for encoding, half in (("utf-8", "█" * 12), ("ascii", "#" * 12)):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr("sys.stderr", stream)
        lines = lines_of(stats(100, 50), layers)
        rows = {" ".join(line[:13].split()): line[13:] for line in lines}
        assert rows["accepted 0"] == rows["accepted 1"] == half * 2 + "      50 steps"
        assert rows["layer 3"].startswith(f"{half}{half[:6]}       75% hits, 12 slots")
        assert rows["layer 4"].startswith(f"{'':<24} 0% hits")
        assert all(len(line) <= 100 for line in lines)
        "".join(lines).encode(encoding)


def test_context_is_drawn(monkeypatch):
    """What fills it by share of what is there: a short chat is nothing beside 32,768 tokens."""
    loaded = SimpleNamespace(
        args=SimpleNamespace(max_position_embeddings=999), plan=SimpleNamespace(context=400)
    )
    parts = [("system", 75), ("questions", 0), ("answers", 25)]
    session = SimpleNamespace(context=lambda: parts, loaded=loaded)
    assert [line.replace(" ", "") for line in context_lines(session)] == [
        "context██████100of400tokens",
        f"system{'█' * 18}75",
        "questions0",
        f"answers{'█' * 6}25",
    ]
    for count, drawn in ((0, ""), (1, "▏")):
        session.context = lambda count=count: [("system", count)]
        line = context_lines(session)[0]
        assert line.replace(" ", "") == f"context{drawn}{count}of400tokens"
