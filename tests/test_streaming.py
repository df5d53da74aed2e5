"""Experts streamed from disk: the same bits at every capacity, the right bytes in every slot."""

import os
import threading
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from streamed import (
    PACKINGS,
    PROMPT,
    E,
    K,
    check_slots,
    expected_rows,
    load_with,
    open_store,
    write_experts,
)

from mlx_dsv3.errors import UserError
from mlx_dsv3.experts import products, reader
from mlx_dsv3.experts.bank import EMPTY, Bank
from mlx_dsv3.experts.store import ExpertStore


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}

    def write(packing: str, arrangement: str = "records"):
        if (packing, arrangement) not in made:
            folder = tmp_path_factory.mktemp("experts")
            made[packing, arrangement] = write_experts(folder, packing, arrangement)
        return made[packing, arrangement]

    return write


def logits_of(folder, capacity: int, decoded: int, on_route=None) -> tuple[np.ndarray, ExpertStore]:
    """Return the logits of a prefill, of single tokens, of verifications, and of the MTP module."""
    loaded = load_with(folder, capacity)
    loaded.store.on_route = on_route
    model, mtp, store = loaded.model, loaded.mtp, loaded.store
    ids, cache = mx.array(PROMPT[None]), model.make_cache()
    g = model.hidden(ids, cache)
    out = [model.lm_head(g), mtp(g[:, :-1], ids[:, 1:])[0]]
    for i in range(decoded):
        out.append(model(ids[:, i : i + 1], cache))
    for i in range(0, 20, 4):
        out.append(model(ids[:, i : i + 4], cache))
    rows = np.array(mx.concatenate([array[0] for array in out]))
    store.close()
    return rows, store


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    "packing, arrangement", [*product(PACKINGS, ["records"]), ("q4", "stacked")]
)
def test_logits_are_the_same_bits_at_every_capacity(folder_of, packing, arrangement):
    """Prefill in waves, hits first, MTP, from top-k slots up: no byte of difference.

    The slow lane takes every capacity for every format in both arrangements.
    """
    folder = folder_of(packing, arrangement)
    resident, _ = logits_of(folder, E, 20)
    every = packing == "q4" and arrangement == "records"
    for capacity in (K, K + 1, E // 4, E // 2, E - 1) if every else (K + 1, E // 2):
        streamed, store = logits_of(folder, capacity, 20)
        assert np.array_equal(streamed, resident), f"{capacity} slots"
        assert store.counters.misses > E  # it did stream


@pytest.mark.usefixtures("both_ways")
@pytest.mark.slow
@pytest.mark.parametrize("arrangement", ["records", "stacked"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_200_tokens_are_the_same_bits_at_every_capacity(folder_of, packing, arrangement):
    folder = folder_of(packing, arrangement)
    resident, _ = logits_of(folder, E, 200)
    for capacity in (K, K + 1, 2 * K, E // 4, E // 2, E - 1):
        streamed, store = logits_of(folder, capacity, 200)
        assert np.array_equal(streamed, resident), f"{capacity} slots"
        assert all(bank.counters.misses >= E for bank in store.banks.values())


@pytest.mark.parametrize("packing", PACKINGS)
def test_gathered_prefills_are_close_to_dense_ones(folder_of, packing, request):
    """A GPU gathers rows where a CPU takes one dense product per expert."""
    dense, _ = logits_of(folder_of(packing), E, 0)
    request.getfixturevalue("all_in_mlx")
    gathered, _ = logits_of(folder_of(packing), E, 0)
    assert np.abs(dense - gathered).max() <= 1e-5 * np.abs(gathered).max()
    assert not np.array_equal(dense, gathered)  # both ways did run


@pytest.mark.usefixtures("both_ways")
def test_a_full_bank_read_the_streamed_way_gives_the_same_bits(folder_of):
    """As soon as somebody wants to see which experts were chosen."""
    resident, _ = logits_of(folder_of("q4"), E, 20)
    forced, store = logits_of(folder_of("q4"), E, 20, on_route=lambda layer, experts: None)
    assert sum(bank.counters.hits for bank in store.banks.values()) > 0
    assert np.array_equal(forced, resident)


@pytest.mark.usefixtures("both_ways")
def test_a_resident_bank_keeps_no_activations(folder_of):
    """On a CPU its prompts go by id as streamed ones do, but no slot ever changes."""
    loaded = load_with(folder_of("q4"), E)
    model, store = loaded.model, loaded.store
    mx.eval(model(mx.array(PROMPT[None]), model.make_cache()))
    assert not any(bank.pending_uses for bank in store.banks.values())
    store.close()


def test_padded_waves_give_the_same_bits(folder_of, monkeypatch, all_in_mlx):
    """On Metal the rows of a wave are padded to keep its kernel; no Linux test reaches that."""
    resident, _ = logits_of(folder_of("q4"), E, 0)
    monkeypatch.setattr(Bank, "min_sorted_rows", property(lambda bank: 4 * bank.capacity))
    padded, _ = logits_of(folder_of("q4"), 2 * K, 0)
    assert np.array_equal(padded, resident)


@pytest.mark.parametrize("capacity", [K, 16, 41])
def test_every_slot_holds_the_expert_the_map_says(folder_of, capacity):
    """2,000 random steps: sets of all sizes, overlapping fetches, failures, evictions."""
    folder, rng = folder_of("q4"), np.random.default_rng(capacity)
    truth, store = expected_rows(folder), open_store(folder, capacity)
    bank = store.open_layer(1)
    for step in range(2000):
        first = rng.choice(E, rng.integers(1, capacity // 2 + 1), replace=False).astype(np.int32)
        fetch = bank.begin(first)
        if rng.random() < 0.5:  # a second wave begun while the first one loads
            rest = np.setdiff1d(np.arange(E, dtype=np.int32), first)
            second = rng.choice(rest, rng.integers(1, capacity // 2 + 1), replace=False)
            other = bank.begin(second, keep=bank.slot_of[first])
            other.wait()
        if rng.random() < 0.05:
            fetch.batch.error = UserError("made up")
            with pytest.raises(UserError, match="made up"):
                fetch.wait()
        else:
            fetch.wait()
            assert (bank.slot_of[first] != EMPTY).all()
        if step % 100 == 0:
            check_slots(bank, truth)
    check_slots(bank, truth)
    store.close()


def test_a_slot_is_not_overwritten_under_a_lazy_graph(folder_of):
    """A product built but not evaluated must see the expert it was built for."""
    store = open_store(folder_of("q4"), K)
    bank, x = store.open_layer(1), mx.random.normal((K, 1, 128), key=mx.random.key(0))
    first, second = np.arange(K, dtype=np.int32), np.arange(K, 2 * K, dtype=np.int32)
    bank.begin(first).wait()
    slots = bank.slot_of[first]
    lazy = products.compute_experts(bank, x, mx.array(slots), False)
    bank.note_use(slots, lazy)
    now = np.array(products.compute_experts(bank, x, mx.array(slots), False))
    bank.begin(second).wait()
    assert np.array_equal(np.array(lazy), now)
    again = products.compute_experts(bank, x, mx.array(bank.slot_of[second]), False)
    assert not np.array_equal(np.array(again), now)
    store.close()


@pytest.mark.usefixtures("both_ways")
def test_prefill_reads_each_expert_at_most_once_a_layer(folder_of):
    """Expert-major waves: 300 tokens need every expert, and no expert twice."""
    loaded = load_with(folder_of("q4"), E // 4)
    model, store = loaded.model, loaded.store
    mx.eval(model.hidden(mx.array(PROMPT[None]), model.make_cache()))
    for layer in (1, 2):
        counters = store.banks[layer].counters
        assert counters.misses == E
        assert counters.hits == 0
    store.close()


def test_decoding_hits_what_it_has(folder_of):
    """The same token again and again needs its experts from disk once."""
    loaded = load_with(folder_of("q4"), K)
    model, store = loaded.model, loaded.store
    for _ in range(5):
        mx.eval(model(mx.array([[3]])))
    for layer in (1, 2):
        counters = store.banks[layer].counters
        assert (counters.misses, counters.hits) == (K, 4 * K)
    store.close()


def test_what_is_used_often_outlasts_what_was_used_last(folder_of):
    """By age alone the regular would go; by counts alone it would stay when nobody asks for it."""
    store = open_store(folder_of("q4"), K)
    bank = store.open_layer(1)

    def use(*experts):
        bank.begin(np.array(experts, np.int32)).wait()

    for other in range(1, K):
        use(0)
        use(0, other)
    use(*range(1, K))  # the regular is now the oldest
    use(K)
    assert bank.slot_of[0] != EMPTY
    for _ in range(8 * E):
        use(*range(1, K))
    use(K)
    assert bank.slot_of[0] == EMPTY
    store.close()


@pytest.mark.parametrize("kind", ["truncated", "error"])
def test_a_failed_read_ends_the_step_and_nothing_else(folder_of, tmp_path, monkeypatch, kind):
    """A cut file or a dying disk: an error with file and offset; the session then goes on."""
    folder = folder_of("q4")
    healthy = np.array(load_with(folder, E).model(mx.array(PROMPT[None])))
    loaded = load_with(folder, K)
    model, store = loaded.model, loaded.store
    path = folder / "model-experts-00001.safetensors"
    preadv, size = os.preadv, path.stat().st_size

    def failing(fd, buffers, offset):
        if os.fstat(fd).st_size == size and os.fstat(fd).st_ino == path.stat().st_ino:
            if kind == "truncated":
                return 0
            raise OSError(5, "Input/output error")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(reader.os, "preadv", failing)
    with pytest.raises(UserError, match="byte [0-9]+") as error:
        model(mx.array(PROMPT[None]))
    assert path.name in error.value.message and error.value.hint
    monkeypatch.setattr(reader.os, "preadv", preadv)
    assert np.array_equal(np.array(model(mx.array(PROMPT[None]))), healthy)
    store.close()


def test_reads_are_joined_before_an_exception_leaves(folder_of, monkeypatch):
    """Ctrl-C while a wave loads: a read still under way would write into a reused slot."""
    loaded = load_with(folder_of("q4"), K)
    model, store = loaded.model, loaded.store
    under_way, preadv, lock = [0], os.preadv, threading.Lock()

    def counted(fd, buffers, offset):
        with lock:
            under_way[0] += 1
        try:
            return preadv(fd, buffers, offset)
        finally:
            with lock:
                under_way[0] -= 1

    def interrupted(rows, experts):
        raise KeyboardInterrupt

    monkeypatch.setattr(reader.os, "preadv", counted)
    monkeypatch.setattr(products.Choices, "compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(mx.array(PROMPT[None]))
    assert under_way == [0]
    assert all(not bank.fetches for bank in store.banks.values())
    store.close()


def test_probe_measures_and_leaves_experts_that_count(folder_of):
    """The probe fills slots with true experts and is no hit or miss of the first reply."""
    folder = folder_of("q4")
    truth, store = expected_rows(folder), open_store(folder, 16)
    bank = store.open_layer(1)
    speed, nbytes = store.probe()
    assert speed > 0 and nbytes == 16 * sum(request.nbytes for request in bank.requests[0])
    assert (bank.expert_in != EMPTY).all() and bank.counters.misses == 0
    check_slots(bank, truth)
    store.close()


def test_abandoned_reads_are_skipped_and_their_experts_absent(folder_of, monkeypatch):
    """After Ctrl-C or an error nobody waits for gigabytes that nobody wants any more."""
    folder = folder_of("q4")
    truth, store = expected_rows(folder), open_store(folder, 40)
    bank, gate, read = store.open_layer(1), threading.Event(), store.reader.read

    def slow(job):
        gate.wait(10)
        read(job)

    monkeypatch.setattr(store.reader, "read", slow)
    bank.begin(np.arange(40, dtype=np.int32))
    threading.Timer(0.2, gate.set).start()
    bank.join()
    assert (bank.expert_in == EMPTY).all() and (bank.slot_of == EMPTY).all()
    monkeypatch.undo()
    bank.begin(np.arange(20, dtype=np.int32)).wait()
    check_slots(bank, truth)
    assert 0 < bank.counters.gb_per_s < 100
    store.close()


def test_on_route_is_told_every_choice(folder_of):
    """Of resident layers too; and nobody is asked for ids any more when nobody listens."""
    loaded, told = load_with(folder_of("q4"), E), []
    loaded.store.on_route = lambda layer, experts: told.append((layer, experts.copy()))
    mx.eval(loaded.model(mx.array(PROMPT[None, :7])))
    assert [layer for layer, _ in told] == [1, 2]
    assert all(experts.shape == (7, K) for _, experts in told)
    assert all((np.diff(experts) > 0).all() for _, experts in told)  # as the router returns them
    loaded.store.on_route = None
    mx.eval(loaded.model(mx.array(PROMPT[None, :7])))
    assert len(told) == 2 and not any(bank.wants_ids for bank in loaded.store.banks.values())
    loaded.store.close()
