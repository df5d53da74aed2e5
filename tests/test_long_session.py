"""A session that is kept open all day: its memory is that of its context, whatever was done."""

import random
from dataclasses import replace

import mlx.core as mx
import pytest
import tiny
from drafted import agreeing_tensors
from families import FAMILIES, write_tokenizer
from mlx_folder import write_mlx
from mlx_lm.utils import load_tokenizer

from mlx_dsv3.conversation.session import Session
from mlx_dsv3.errors import UserError
from mlx_dsv3.load import load_model
from mlx_dsv3.model.cache import GROWTH

CONTEXT, TURNS, WARM = 300, 200, 40  # tokens, turns, turns that warm up
CONFIG = tiny.A | {"vocab_size": 1152, "num_hidden_layers": 2, "n_routed_experts": 8}


@pytest.fixture(params=[2, pytest.param(0, marks=pytest.mark.slow)])
def session(request, tmp_path) -> Session:
    """Return a session with a small context, without drafts and with them."""
    write_mlx(tmp_path, CONFIG, agreeing_tensors(CONFIG, 0, damping=0.2, noise=0.15))
    loaded = load_model(tmp_path, dtype=mx.float32)
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, FAMILIES["R1"]))
    loaded = replace(loaded, tokenizer=tokenizer, plan=replace(loaded.plan, context=CONTEXT))
    return Session(loaded, settings={"temp": 1.0, "max_tokens": 2}, drafts=request.param)


def caches_bytes(session: Session) -> int:
    """Return what a session's caches have allocated, with the states that wait for drafts."""
    state = session.state
    caches = [*state.cache, *([state.mtp_cache] if state.mtp_cache else [])]
    return sum(cache.nbytes for cache in caches) + sum(g.nbytes for g in state.pending)


def most_bytes(session: Session) -> int:
    """Return what the caches of a full context take, and drafts beyond it."""
    args, rows = session.loaded.args, -(-(CONTEXT + 4) // GROWTH) * GROWTH
    layers = args.num_hidden_layers + (session.state.mtp_cache is not None)
    width = args.kv_lora_rank + args.qk_rope_head_dim
    return 4 * (rows * width * layers + CONTEXT * args.hidden_size * (layers > 2))


def test_two_hundred_turns(session):
    """With questions taken back, given again, stopped, and a context that is full at times."""
    rng, seen, refused = random.Random(0), [], 0
    for turn in range(TURNS):
        events = session.turn("what is the plan " * rng.randint(1, 30))
        try:
            for _ in events:
                if rng.random() < 0.02:
                    events.close()
            if turn % 12 == 1:
                list(session.regenerate())
            if turn % 20 == 1:
                list(session.retry(1))
        except UserError as error:
            assert "/undo" in error.hint and "/clear" in error.hint
            refused += 1
            rng.choice([session.conversation.undo, session.clear])()
        assert caches_bytes(session) <= most_bytes(session)
        if turn >= WARM:
            seen.append(mx.get_active_memory() - caches_bytes(session))
    assert refused > 5 and max(cache.length for cache in session.state.cache) <= CONTEXT
    assert max(seen[len(seen) // 2 :]) <= max(seen[: len(seen) // 2]) + (16 << 10)
