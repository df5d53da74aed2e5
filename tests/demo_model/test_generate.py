"""Streaming generation: greedy text, exact states after every kind of end, refusals."""

import dataclasses

import mlx.core as mx
import pytest

from mlx_dsv3.decoding.sampler import Sampler
from mlx_dsv3.errors import UserError
from mlx_dsv3.generate import make_state, stream

QUESTION = "What is the capital of France?"


def tokens_of(loaded, ids, **options) -> list[int]:
    return [piece.token for piece in stream(loaded, ids, **options)]


def test_greedy_equals_the_argmax_of_a_full_forward(loaded, ask):
    """Guards the cache and the double buffering: each token is recomputed without either."""
    ids = ask(QUESTION)
    reply = tokens_of(loaded, ids, max_tokens=8)
    for i, token in enumerate(reply):
        logits = loaded.model(mx.array([ids + reply[:i]]))[0, -1]
        assert mx.argmax(logits).item() == token


def test_text_is_the_decoded_tokens_without_the_end_token(loaded, ask):
    pieces = list(stream(loaded, ask(QUESTION)))
    ids = [piece.token for piece in pieces]
    assert pieces[-1].finish_reason == "stop" and ids[-1] in loaded.tokenizer.eos_token_ids
    assert "".join(piece.text for piece in pieces) == loaded.tokenizer.decode(ids[:-1])
    assert all(piece.finish_reason is None for piece in pieces[:-1])


def test_prefill_in_chunks_gives_the_same_reply(loaded, ask, monkeypatch):
    ids = ask(QUESTION, "Paris.", "And how many legs does a spider have?")
    whole = tokens_of(loaded, ids)
    monkeypatch.setattr(loaded, "plan", dataclasses.replace(loaded.plan, prefill_chunk=5))
    assert tokens_of(loaded, ids) == whole


def test_second_turn_reuses_the_first(loaded, ask):
    """Guards the common prefix: a reply after reuse equals one computed from scratch."""
    state = make_state(loaded)
    answer = "".join(piece.text for piece in stream(loaded, ask(QUESTION), state=state))
    second = ask(QUESTION, answer, "What is the capital of Italy?")
    pieces = list(stream(loaded, second, state=state))
    assert pieces[-1].stats.reused_tokens > len(ask(QUESTION))
    assert [piece.token for piece in pieces] == tokens_of(loaded, second)


@pytest.mark.parametrize("taken", [1, 2, 5])
def test_an_abandoned_reply_leaves_an_exact_state(loaded, ask, taken):
    """Guards the step submitted ahead: after Ctrl-C its token must not stay in the cache."""
    state, ids = make_state(loaded), ask(QUESTION)
    pieces = stream(loaded, ids, state=state)
    reply = [next(pieces).token for _ in range(taken)]
    pieces.close()
    assert all(layer.length == len(state.ids) for layer in state.cache)
    assert state.ids == (ids + reply)[: len(state.ids)] and len(state.ids) >= len(ids)
    other = ask("How many legs does a spider have?")
    assert tokens_of(loaded, other, state=state) == tokens_of(loaded, other)


def test_limit_ends_the_reply_and_is_said(loaded, ask):
    pieces = list(stream(loaded, ask(QUESTION), max_tokens=3))
    assert len(pieces) == 3 and pieces[-1].finish_reason == "length"


def test_context_end_ends_the_reply(loaded, ask, monkeypatch):
    ids = ask(QUESTION)
    monkeypatch.setattr(loaded.args, "max_position_embeddings", len(ids) + 2)
    pieces = list(stream(loaded, ids))
    assert len(pieces) == 2 and pieces[-1].finish_reason == "length"
    monkeypatch.setattr(loaded.args, "max_position_embeddings", len(ids))
    with pytest.raises(UserError, match=f"{len(ids)} tokens"):
        next(stream(loaded, ids))


def test_ids_beyond_the_embedding_never_reach_it(loaded):
    """MLX reads foreign memory for an id out of range, without an error."""
    for bad in (loaded.args.vocab_size, -1):
        with pytest.raises(UserError, match=f"token id {bad}"):
            next(stream(loaded, [0, bad]))
    with pytest.raises(UserError, match="empty"):
        next(stream(loaded, []))


def test_padding_ids_are_never_sampled(loaded, ask):
    """The head has more rows than the tokenizer ids; at a high temperature they would win."""
    known = set(loaded.tokenizer.get_vocab().values())
    assert len(known) < loaded.args.vocab_size
    for seed in range(5):
        sampler = Sampler(temp=50.0, seed=seed)
        tokens = tokens_of(loaded, ask(QUESTION), max_tokens=40, sampler=sampler)
        assert set(tokens) <= known


def test_same_seed_same_reply(loaded, ask):
    def reply(seed):
        sampler = Sampler(temp=12.0, seed=seed)
        return tokens_of(loaded, ask(QUESTION), max_tokens=20, sampler=sampler)

    assert reply(1) == reply(1)
    assert len({tuple(reply(seed)) for seed in range(6)}) > 1


def test_a_conversation_ends_where_memory_was_planned_to(loaded, ask, monkeypatch):
    """`--context` is a promise of memory: beyond it the caches would outgrow the plan."""
    ids = ask(QUESTION)
    monkeypatch.setattr(loaded, "plan", dataclasses.replace(loaded.plan, context=len(ids) + 2))
    *_, last = stream(loaded, ids)
    assert last.finish_reason == "length" and last.stats.reply_tokens == 2
    monkeypatch.setattr(loaded, "plan", dataclasses.replace(loaded.plan, context=len(ids)))
    with pytest.raises(UserError, match="memory is planned for") as error:
        next(stream(loaded, ids))
    assert "--context" in error.value.hint


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_kept_piece_keeps_its_numbers(loaded, ask, drafts):
    """All pieces shared one `Stats`: whoever kept ten of them saw the last numbers ten times."""
    pieces = list(stream(loaded, ask(QUESTION), drafts=drafts))
    for count, piece in enumerate(pieces, 1):
        assert piece.stats.reply_tokens == piece.stats.drafts.tokens == count
    first = pieces[0].stats  # of which every later one tells the time that it came
    assert {piece.stats.first_token_s for piece in pieces} == {first.first_token_s}
    assert first.first_token_s == pytest.approx(first.prompt_s + first.reply_s)
    seconds = [piece.stats.reply_s for piece in pieces]
    assert seconds == sorted(seconds) and seconds[0] < seconds[-1]
