"""Caches after every way to leave or to go back: equal to a fresh prefill of the ids they hold."""

import os
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from drafted import Drafted, make_drafted
from interrupt import Interrupt
from mlx_folder import save_ordered, write_mlx, write_tokenizer

import mlx_dsv3
from mlx_dsv3.checkpoint.folder import open_folder
from mlx_dsv3.decoding.state import State, common_prefix_length, fingerprint, load_state
from mlx_dsv3.errors import UserError
from mlx_dsv3.generate import make_state, stream
from mlx_dsv3.load import load, load_model
from mlx_dsv3.model.cache import LatentCache

PROMPT = [3, 4, 5, 150, 7]
OTHER = [91, 92, 93, 94]
TRACED = (str(Path(mlx_dsv3.__file__).parent),)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Drafted:
    return make_drafted(tmp_path_factory.mktemp("agreeing"), seed=1, damping=0.1)


def started(model: Drafted, drafts: int = 2, count: int = 8) -> State:
    """Return the state after a reply: pairs in the MTP cache, and states that wait."""
    state = model.state()
    model.feed(state, PROMPT[:-1])
    for _ in model.run(state, PROMPT[-1], count, drafts):
        pass
    return state


def copied(state: State) -> State:
    def copy(cache: LatentCache) -> LatentCache:
        other = LatentCache()
        other.append(mx.array(cache.latents))
        return other

    layers = [copy(cache) for cache in state.cache]
    pending = list(state.pending)
    return State(layers, copy(state.mtp_cache), list(state.ids), state.mtp_pairs, pending)


def continue_with(model: Drafted, state: State, ids: list[int]) -> list[int]:
    """Feed a prompt as a next turn would, reusing what the state shares with it; return a reply."""
    state.rewind(min(common_prefix_length(state.ids, ids), len(ids) - 1))
    model.feed(state, ids[len(state.ids) : -1])
    model.assert_exact(state)
    return list(model.run(state, ids[-1], 8, 2))


def check_rewinds(model: Drafted) -> None:
    """Go back to every length and go on with other ids."""
    whole = started(model)
    assert whole.mtp_pairs > 6 and whole.num_waiting > 1
    for length in range(len(whole.ids) + 1):
        state = copied(whole)
        ids = whole.ids[:length] + OTHER
        assert continue_with(model, state, ids) == model.tokens(ids, 8, 0)
        model.assert_exact(state)


def test_rewind_to_every_length(model):
    check_rewinds(model)


def test_mutation_prefix_reused_with_its_last_pair(model, monkeypatch):
    """The pair of the last kept position holds the id that followed it before (spec 4.6)."""

    def keep_every_pair(self, length):
        waiting = max(length - self.mtp_pairs, 0)
        self.pending = [self.waiting()[:, :waiting]] if waiting else []
        self.mtp_pairs = min(self.mtp_pairs, length)
        del self.ids[length:]
        self.align()

    monkeypatch.setattr(State, "rewind", keep_every_pair)
    with pytest.raises(AssertionError, match="MTP: row"):
        check_rewinds(model)


def test_rewind_twice_without_feeding(model):
    """A turn that failed before it fed anything must not leave a pair with its token behind."""
    for length in range(2, 12):
        state = started(model)
        old = state.ids[: length + 1]
        state.rewind(length)
        ids = old[: len(state.ids)] + OTHER
        assert continue_with(model, state, ids) == model.tokens(ids, 8, 0)


@pytest.mark.parametrize("drafts", [0, 1, 4])
def test_a_reply_left_after_any_token(model, drafts):
    """Also between tokens of one step: ids that were not yielded are not in the state."""
    reply = model.tokens(PROMPT, 14, drafts)
    for taken in range(1, 14):
        state = model.state()
        model.feed(state, PROMPT[:-1])
        run = model.run(state, PROMPT[-1], 14, drafts)
        assert [next(run) for _ in range(taken)] == reply[:taken]
        run.close()
        state.align()
        text = PROMPT + reply[:taken]
        assert state.ids == text[: len(state.ids)] and len(state.ids) >= len(text) - 1
        model.assert_exact(state)
        assert continue_with(model, state, text) == model.tokens(text, 8, 0)


@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
def test_end_token_and_budget_inside_accepted_drafts(model, drafts):
    """What was accepted behind the end token is rewound, and a budget is never passed."""
    reply = model.tokens(PROMPT, 24, 0)
    for count in range(1, 24, 3):
        state = model.state()
        model.feed(state, PROMPT[:-1])
        assert list(model.run(state, PROMPT[-1], count, drafts)) == reply[:count]
        model.assert_exact(state)
        assert state.ids == (PROMPT + reply)[: len(state.ids)]

        end = reply[count]
        first = reply.index(end)
        state = model.state()
        model.feed(state, PROMPT[:-1])
        tokens = model.run(state, PROMPT[-1], 24, drafts)
        assert [next(tokens) for _ in range(first + 1)] == reply[: first + 1]
        tokens.close()
        model.assert_exact(state)
        text = PROMPT + reply[: first + 1]
        assert state.ids == text[: len(state.ids)]
        assert continue_with(model, state, text + OTHER) == model.tokens(text + OTHER, 8, 0)


def check_interrupts(model: Drafted, drafts: int, stride: int) -> int:
    """Interrupt three steps at every `stride`-th line; return the number of interruptions."""
    whole, line, count = started(model), 1, 0
    last = model.tokens(PROMPT, len(whole.ids) - len(PROMPT) + 1, 0)[-1]

    def steps() -> None:
        for _ in model.run(state, last, 3 * (drafts + 1), drafts):
            pass

    while True:
        state = copied(whole)
        if not Interrupt(TRACED, line).run(steps):
            return count
        state.align()
        model.assert_exact(state)
        if count % 5 == 0:
            ids = state.ids + OTHER
            assert continue_with(model, state, ids) == model.tokens(ids, 8, 0)
        line, count = line + stride, count + 1


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_ctrl_c_at_any_line(model, drafts):
    assert check_interrupts(model, drafts, stride=97) > 10


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_ctrl_c_at_every_line(model, drafts):
    assert check_interrupts(model, drafts, stride=1) > 1000


def test_a_waiting_state_keeps_nothing_else_in_memory(model):
    """A view of the last state holds the whole prompt's: 117 MB for 8,192 tokens of V3."""
    state, size = model.state(), 64
    before = mx.get_active_memory()
    state.commit(list(range(4096)), mx.ones((1, 4096, size)) + 0)  # evaluated with the last
    state.keep_last_waiting()
    mx.eval(state.pending)
    assert mx.get_active_memory() - before < 100 * size * 4


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_saved_state_goes_on(model, drafts, tmp_path):
    """Caches, ids and waiting states come back; the reply after them is the same."""
    path = tmp_path / "talk.safetensors"
    for count in range(1, 6):
        state = started(model, drafts, count)
        state.save(path, model.model)
        loaded = load_state(path, model.model)
        assert loaded.ids == state.ids and loaded.mtp_pairs == state.mtp_pairs
        model.assert_exact(loaded)
        ids = state.ids + OTHER
        assert continue_with(model, loaded, ids) == continue_with(model, state, ids)
    assert [path.name for path in tmp_path.iterdir()] == ["talk.safetensors"]


def test_states_without_drafts_and_empty_ones_are_saved(model, tmp_path):
    path = tmp_path / "talk.safetensors"
    state = State(model.model.make_cache())
    state.commit(PROMPT, model.model.hidden(mx.array([PROMPT]), state.cache))
    for saved in (state, model.state()):
        saved.save(path, model.model)
        loaded = load_state(path, model.model)
        assert loaded.ids == saved.ids and not loaded.pending
        assert [c.length for c in loaded.cache] == [c.length for c in saved.cache]
        assert (loaded.mtp_cache is None) == (saved.mtp_cache is None)


def test_a_state_of_another_model_is_refused(model, tmp_path):
    """Same shapes, other weights: nothing would crash, and the reply would be nonsense."""
    path = tmp_path / "talk.safetensors"
    started(model).save(path, model.model)
    other = make_drafted(tmp_path / "other", seed=2)
    with pytest.raises(UserError, match="another model"):
        load_state(path, other.model)


def test_a_state_of_other_experts_is_refused(tmp_path):
    """Two conversions that differ in how `down_proj` is packed, or in experts alone, were one."""
    config = tiny.D | {"num_hidden_layers": 2}
    tensors, other = tiny.random_tensors(config), tiny.random_tensors(config, seed=1)
    found = set()
    for i, kind in enumerate(("alike", "alike", "bits", "values")):
        mixed = dict(tensors)
        if kind == "values":
            mixed |= {name: other[name] for name in other if ".experts." in name}
        folder = tmp_path / str(i)
        packing = {"bits": 4, "group_size": 64, "mode": "affine"}
        write_mlx(folder, config, mixed, packing=packing)
        if kind == "bits":
            pack_down_in_8_bits(folder, config, mixed)
        found.add(fingerprint(load_model(open_folder(folder, with_mtp=False)).model))
    assert len(found) == 3


def pack_down_in_8_bits(folder, config: dict, tensors: dict) -> None:
    """Write the `down_proj` of a folder's experts again."""
    write_mlx(
        folder / "8", config, tensors, packing={"bits": 8, "group_size": 64, "mode": "affine"}
    )
    for path in folder.glob("model-experts*.safetensors"):
        finer = mx.load(str(folder / "8" / path.name))
        arrays = mx.load(str(path))
        arrays |= {name: finer[name] for name in finer if ".down_proj." in name}
        save_ordered(path, arrays)


def test_a_state_goes_to_the_model_that_computed_it(tmp_path):
    """Another model of the same shapes went on with it, and said nonsense."""
    write_mlx(tmp_path, tiny.A, tiny.random_tensors(tiny.A))
    write_tokenizer(tmp_path, tiny.A["vocab_size"])
    one, two = load(tmp_path), load(tmp_path)
    state = make_state(one)
    for _ in stream(one, PROMPT, state=state, max_tokens=2):
        pass
    with pytest.raises(UserError, match="computed by another model"):
        next(stream(two, PROMPT, state=state, max_tokens=2))
    state.save(tmp_path / "talk.safetensors", one.model)
    kept = load_state(tmp_path / "talk.safetensors", two.model)
    next(stream(two, PROMPT, state=kept, max_tokens=2))


def test_replies_to_one_prompt_leave_nothing(model):
    """Without drafts the states that wait were slices of slices, which nothing evaluated."""

    def reply() -> None:
        state.rewind(len(PROMPT) - 1)
        model.feed(state, PROMPT[len(state.ids) : -1])
        for _ in model.run(state, PROMPT[-1], 3, 0):
            pass

    state = model.state()
    for i in range(120):
        reply()
        if i == 20:
            before = mx.get_active_memory()
    assert mx.get_active_memory() - before < 100 * 64  # a quarter of one waiting state


def test_files_that_hold_no_state_are_refused(model, tmp_path):
    """A pipe stopped the process for ever."""
    path, pipe = tmp_path / "talk.safetensors", tmp_path / "pipe"
    os.mkfifo(pipe)
    for wrong in path, pipe, tmp_path:
        with pytest.raises(UserError, match="is not a file"):
            load_state(wrong, model.model)
    path.write_bytes(b"text")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_state(path, model.model)
    for array in mx.zeros(1), mx.zeros(1, mx.uint8):
        mx.save_safetensors(str(path), {"a": array})
        with pytest.raises(UserError, match="not a saved conversation"):
            load_state(path, model.model)


DAMAGE = {
    "an id beyond the vocabulary": {"ids": "5 160"},
    "a negative id": {"ids": "-1 7"},
    "ids that are none": {"ids": "5 x"},
    "more ids than rows": {"ids": "5 7 9 11"},
    "more pairs than ids": {"mtp_pairs": "9999"},
    "negative pairs": {"mtp_pairs": "-3"},
    "no module for the pairs": {"has_mtp": "0"},
    "no number of pairs": {"mtp_pairs": None},
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_state_is_refused(model, tmp_path, what):
    """Ids of a file reach the embedding, where MLX would read foreign memory."""
    path = tmp_path / "talk.safetensors"
    started(model).save(path, model.model)
    arrays, metadata = mx.load(str(path), return_metadata=True)
    metadata = {key: value for key, value in (metadata | DAMAGE[what]).items() if value is not None}
    mx.save_safetensors(str(path), arrays, metadata)
    with pytest.raises(UserError, match="is damaged: .*\n\nhint: start a new conversation"):
        load_state(path, model.model)


def test_rows_of_another_shape_are_refused(model, tmp_path):
    path = tmp_path / "talk.safetensors"
    started(model).save(path, model.model)
    arrays, metadata = mx.load(str(path), return_metadata=True)
    for name in arrays:
        right = arrays[name]
        for wrong in right[:, 1:], right[..., 1:]:
            mx.save_safetensors(str(path), arrays | {name: wrong}, metadata)
            with pytest.raises(UserError, match=f"`{name}` has shape"):
                load_state(path, model.model)
    mx.save_safetensors(str(path), arrays | {"layers.99": arrays["layers.0"]}, metadata)
    with pytest.raises(UserError, match="`layers.99` has shape .* not None"):
        load_state(path, model.model)


def test_rows_that_are_no_numbers_are_refused(model, tmp_path):
    """NaN in one row spreads to every later token."""
    path = tmp_path / "talk.safetensors"
    started(model).save(path, model.model)
    arrays, metadata = mx.load(str(path), return_metadata=True)
    arrays["layers.1"][0, 2, 5] = mx.nan
    mx.save_safetensors(str(path), arrays, metadata)
    with pytest.raises(UserError, match="`layers.1` holds values that are not finite"):
        load_state(path, model.model)


def test_common_prefix_length():
    assert common_prefix_length([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix_length([1, 2], [1, 2, 4]) == 2
    assert common_prefix_length([], [1]) == 0
    assert common_prefix_length([2], [1]) == 0
