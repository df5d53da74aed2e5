"""Drafting against plain decoding on small models: the same tokens, and exact caches throughout."""

from collections import Counter

import bench_attention
import mlx.core as mx
import pytest
from drafted import Drafted, make_drafted
from mlx_lm.sample_utils import make_logits_processors

from mlx_dsv3.decoding.draft_control import MAX_DRAFTS, DraftControl
from mlx_dsv3.decoding.sampler import Sampler
from mlx_dsv3.decoding.state import State
from mlx_dsv3.decoding.steps import Stepper

PROMPT = [3, 4, 5, 150, 7]
SAMPLERS = {
    "greedy": {},
    "warm": {"temp": 0.5, "seed": 1},
    "filtered": {"temp": 1.0, "top_p": 0.9, "top_k": 20, "min_p": 0.02, "seed": 2},
}
# How much the layers add to the last token's embedding: the less, the more drafts are accepted.
DAMPINGS = {"often": 0.1, "sometimes": 0.25, "hardly": 0.6}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a function name -> model whose drafts are accepted often, sometimes or hardly."""
    made = {}

    def load(name: str) -> Drafted:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = make_drafted(folder, seed=1, damping=DAMPINGS[name])
        return made[name]

    return load


@pytest.fixture(scope="module")
def often(models) -> Drafted:
    return models("often")


def penalties() -> list:
    return make_logits_processors(repetition_penalty=1.4, repetition_context_size=8)


@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", DAMPINGS)
def test_tokens_are_those_of_plain_decoding(models, name, sampler, drafts):
    model, count = models(name), 40
    plain = model.tokens(PROMPT, count, 0, Sampler(**SAMPLERS[sampler]))
    assert model.tokens(PROMPT, count, drafts, Sampler(**SAMPLERS[sampler])) == plain
    assert len(plain) == count and model.stats.tokens == count


def test_the_models_accept_every_number_of_drafts(models):
    """Guards the tests themselves: rewinding by 0 to 4 rows must have happened."""
    lengths = [0] * (MAX_DRAFTS + 1)
    for options in SAMPLERS.values():
        models("often").tokens(PROMPT, 60, 4, Sampler(**options))
        lengths = [a + b for a, b in zip(lengths, models("often").stats.lengths, strict=True)]
    assert min(lengths) >= 3, lengths
    models("hardly").tokens(PROMPT, 60, 4)
    assert models("hardly").stats.lengths[0] > 40


@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
def test_penalties_see_earlier_drafts(often, drafts):
    """Rows verified together must be penalised for the drafts before them, as if they were text."""
    sampler = Sampler(temp=0.5, seed=3, penalties=penalties())
    plain = often.tokens(PROMPT, 60, 0, sampler)
    assert often.tokens(PROMPT, 60, drafts, sampler) == plain
    assert sum(often.stats.accepted) > 5
    assert plain != often.tokens(PROMPT, 60, 0, Sampler(temp=0.5, seed=3))


def test_whatever_the_control_decides(often):
    """The control's choices follow the clock; the tokens must not."""

    class Restless(DraftControl):
        def choose(self, context: int) -> int:
            return context * 7 % 5

    plain = often.tokens(PROMPT, 80, 0)
    assert often.tokens(PROMPT, 80, Restless()) == plain
    assert min(often.stats.steps) > 2
    assert often.tokens(PROMPT, 80, DraftControl()) == plain


def run_checking(model: Drafted, drafts: int, sampler: Sampler | None = None) -> None:
    """Decode, and compare both caches with fresh ones after every step."""
    state = model.state()
    model.feed(state, PROMPT[:-1])
    known = 0
    for _ in model.run(state, PROMPT[-1], 40, drafts, sampler):
        if len(state.ids) != known:  # once a step: its first token
            known = len(state.ids)
            model.assert_exact(state)
    model.assert_exact(state)


@pytest.mark.parametrize(
    "sampler, drafts", [*(("greedy", k) for k in range(5)), ("warm", 1), ("warm", 4)]
)
def test_caches_equal_a_fresh_prefill_after_every_step(often, sampler, drafts):
    run_checking(often, drafts, Sampler(**SAMPLERS[sampler]))


def test_caches_across_a_growth_of_the_arrays(often):
    """a cache grows by 256 rows: rejected rows and chain entries at the edge must not survive."""
    state = often.state()
    often.feed(state, (PROMPT * 60)[:249])
    for _ in often.run(state, 3, 16, 4):
        often.assert_exact(state)
    assert state.cache[0].length > 256


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("drafts", [1, 4])
def test_prompts_of_one_and_two_tokens(often, length, drafts):
    """Verification at cache length 0 and 1; with one token nothing waits to draft from."""
    prompt = PROMPT[:length]
    assert often.tokens(prompt, 20, drafts) == often.tokens(prompt, 20, 0)


def test_waiting_states_are_put_into_the_mtp_cache(often, monkeypatch):
    """A long plain reply would otherwise keep a state of D floats for every token."""
    monkeypatch.setattr("mlx_dsv3.decoding.steps.MAX_WAITING", 5)
    state, most = often.state(), 0
    often.feed(state, PROMPT[:-1])
    tokens = []
    for token in often.run(state, PROMPT[-1], 30, DraftControl(fixed=0)):
        tokens.append(token)
        most = max(most, state.num_waiting)
        often.assert_exact(state)
    assert most == 5 - 1
    assert tokens == often.tokens(PROMPT, 30, 0)
    tokens += often.run(state, tokens[-1], 20, 2)
    assert tokens == often.tokens(PROMPT, 50, 0)


def fails(check, *arguments) -> bool:
    try:
        check(*arguments)
    except AssertionError:
        return True
    return False


def test_mutation_chain_entries_left_in_the_cache(often, monkeypatch):
    """Pairs of guessed states stay in the MTP cache: acceptance sinks, no text changes."""
    draft = Stepper.draft

    def without_trim(self, last, count):
        cache = self.state.mtp_cache
        cache.trim = lambda rows: rows
        drafts = draft(self, last, count)
        del cache.trim
        return drafts

    assert not fails(run_checking, often, 3)
    monkeypatch.setattr(Stepper, "draft", without_trim)
    assert not fails(run_checking, often, 1)  # nothing to trim with one draft
    assert fails(run_checking, often, 3)


def test_mutation_state_of_rejected_rows_reused(often, monkeypatch):
    """The next pair is made from the last verified row instead of the last accepted one."""
    commit = State.commit

    def last_rows(self, ids, g, paired=False):
        commit(self, ids, g[:, g.shape[1] - len(ids) :], paired)

    monkeypatch.setattr(State, "commit", last_rows)
    assert fails(run_checking, often, 2)


def test_mutation_rejected_rows_left_in_the_main_cache(often, monkeypatch):
    """The main cache is not rewound: later tokens attend to rejected drafts."""
    speculate = Stepper.speculate

    def without_trim(self, last, count):
        for layer in self.state.cache:
            layer.trim = lambda rows: rows
        try:
            return speculate(self, last, count)
        finally:
            for layer in self.state.cache:
                del layer.trim

    monkeypatch.setattr(Stepper, "speculate", without_trim)
    assert fails(run_checking, often, 2)


def test_verification_at_2048_tokens_takes_20_mb():
    """True V3 attention, one layer, 2 tokens, also where the cache has to grow (mlx-lm: 270 MB)."""
    ours, _, x = bench_attention.make_sides(context=2048, queries=2)
    _, _, growing = bench_attention.run(ours, x)
    _, _, grown = bench_attention.run(ours, x)
    assert ours.cache.state[0].shape[1] == 2304 and grown <= growing <= 20_000_000


def test_every_host_synchronisation_is_counted(often, monkeypatch):
    """One for a step with drafts, whatever k; one for a plain step. More would idle the device."""
    counts = Counter()
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__iter__"):
        count_calls(monkeypatch, mx.array, name, counts)
    for name in ("eval", "synchronize"):
        count_calls(monkeypatch, mx, name, counts)
    sampler = Sampler(temp=1.0, top_p=0.9, seed=5, penalties=penalties())
    state = often.state()
    often.feed(state, PROMPT[:-1])
    for drafts in range(MAX_DRAFTS + 1):
        counts.clear()
        assert len(list(often.run(state, PROMPT[-1], 12, drafts, sampler))) == 12
        assert counts["item"] == often.stats.steps[0]
        assert counts["tolist"] == often.stats.draft_steps
        assert counts.total() == sum(often.stats.steps)


def count_calls(monkeypatch, owner, name: str, counts: Counter) -> None:
    if (original := getattr(owner, name, None)) is None:
        return

    def counted(*arguments, **options):
        counts[name] += 1
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)
