"""Ctrl-C while experts stream: at any line, at any moment, and while a first one is served."""

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from interrupt import Interrupt
from streamed import PROMPT, E, K, check_slots, expected_rows, load_with, open_store, write_experts

from mlx_dsv3.experts import bank as bank_module
from mlx_dsv3.experts import products
from mlx_dsv3.experts.bank import EMPTY, Bank
from mlx_dsv3.experts.interrupts import deferred_interrupts

STREAMING = (str(Path(products.__file__).parent), contextlib.__file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_experts(tmp_path_factory.mktemp("experts"), "q4")


def raise_sigint(*_) -> None:
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_strikes_after_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with deferred_interrupts():
            with deferred_interrupts():
                raise_sigint()
                raise_sigint()
                done.append("inner")
            done.append("outer")
        done.append("after")
    assert done == ["inner", "outer"]
    with pytest.raises(KeyboardInterrupt):
        raise_sigint()


def test_an_error_of_the_block_is_not_lost_with_the_interrupt():
    with pytest.raises(KeyboardInterrupt) as interrupt:
        with deferred_interrupts():
            raise_sigint()
            raise OSError("a full disk")
    assert isinstance(interrupt.value.__context__, OSError)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_a_process_with_its_own_mind_about_sigint(handler):
    """nohup's children ignore it; a server sets a flag. Both must get the handler back."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        with deferred_interrupts():
            raise_sigint()
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_the_handler_alone():
    """`signal.signal` raises there; a server runs the model in a thread."""
    seen, before = [], signal.getsignal(signal.SIGINT)

    def work():
        with deferred_interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_block_is_whole_or_not_begun():
    """Ctrl-C at each line on the way into a block, in it, and on the way out."""
    counts = [0, 0]

    def step():
        with deferred_interrupts():
            counts[0] += 1
            counts[1] += 1

    line, found = 1, set()
    while True:
        counts[:] = 0, 0
        interrupt = Interrupt((__file__, *STREAMING), line)
        was_interrupted = interrupt.run(step)
        assert was_interrupted == interrupt.was_sent
        assert counts in ([0, 0], [1, 1]), line
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if not was_interrupted:
            break
        found.add(tuple(counts))
        line += 1
    assert found == {(0, 0), (1, 1)}


def test_ctrl_c_does_not_wait_for_a_slow_disk(folder, monkeypatch):
    """Waiting for gigabytes is no block to defer anything in."""
    store, gate = open_store(folder, K), threading.Event()
    bank, read = store.open_layer(1), store.reader.read

    def slow(job):
        gate.wait(30)
        read(job)

    monkeypatch.setattr(store.reader, "read", slow)
    before, start = signal.signal(signal.SIGALRM, raise_sigint), time.perf_counter()
    fetch = bank.begin(np.arange(K, dtype=np.int32))
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(KeyboardInterrupt):
        fetch.wait()
    assert time.perf_counter() - start < 5
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(KeyboardInterrupt):  # a second one, while what is under way is joined
        bank.join()
    assert time.perf_counter() - start < 5
    signal.signal(signal.SIGALRM, before)
    gate.set()
    bank.join()
    assert (bank.expert_in == EMPTY).all() and not bank.fetches
    store.close()


def hung(signum, frame):
    raise AssertionError("the reads of an interrupted step never ended")


@pytest.fixture
def alarm():
    """Restore SIGALRM, by which the tests find reads that hang."""
    before = signal.signal(signal.SIGALRM, hung)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_fetch_is_settled_whole_or_not_at_all(folder):
    """Ctrl-C at each line of the wait for a read that failed: half a map, or counted twice."""
    store, line, kept = open_store(folder, K), 1, set()
    bank, experts = store.open_layer(1), np.arange(K, dtype=np.int32)
    while True:
        fetch = bank.begin(experts)
        assert fetch.is_done(20)
        fetch.batch.error, before = OSError("made up"), bank.counters.read_s
        interrupt = Interrupt((bank_module.__file__,), line)
        with contextlib.suppress(OSError):
            interrupt.run(fetch.wait)
        is_settled = fetch not in bank.fetches
        assert is_settled == (bank.slot_of == EMPTY).all() == (bank.expert_in == EMPTY).all()
        assert is_settled == (bank.counters.read_s > before)
        kept.add(is_settled)
        bank.join()
        if not interrupt.was_sent:
            break
        line += 1
    assert kept == {False, True}
    store.close()


def check_interrupts(folder, monkeypatch, stride: int, second: int | None) -> int:
    """Interrupt a prompt and three tokens at every `stride`-th line, with cold banks each time."""
    expected = np.array(load_with(folder, E).model(mx.array(PROMPT[None, :30])))
    loaded = load_with(folder, 2 * K)
    model, store = loaded.model, loaded.store
    truth, line, count, seconds, join = expected_rows(folder), 1, 0, [], Bank.join

    def interrupted_join(bank: Bank) -> None:
        if second and sys.exc_info()[0] is KeyboardInterrupt:  # it serves the first one
            seconds.append(Interrupt(STREAMING, second))
            sys.settrace(seconds[-1])
        join(bank)

    monkeypatch.setattr(Bank, "join", interrupted_join)

    def steps() -> None:
        mx.eval(model(mx.array(PROMPT[None, :30])))
        for token in PROMPT[30:33].tolist():
            mx.eval(model(mx.array([[token]])))

    while True:
        for bank in store.banks.values():
            bank.forget(np.arange(E))
        signal.alarm(20)
        was_interrupted = Interrupt(STREAMING, line).run(steps)
        if second is None:
            check_slots(store.banks[1], truth)
            assert not any(bank.fetches for bank in store.banks.values())
        if count % 10 == 0 or second is not None:
            assert np.array_equal(np.array(model(mx.array(PROMPT[None, :30]))), expected)
            check_slots(store.banks[1], truth)
        signal.alarm(0)
        if not was_interrupted:
            store.close()
            assert second is None or sum(each.was_sent for each in seconds) > count / 4
            return count
        line, count = line + stride, count + 1


@pytest.mark.parametrize("second", [None, 5])
def test_ctrl_c_while_experts_stream(folder, monkeypatch, alarm, second):
    """An expert that counts as present and was never read: wrong replies without an error.

    Once, and twice: the second time while what the first one left is put in order.
    """
    assert check_interrupts(folder, monkeypatch, 97, second) > 25


@pytest.mark.slow
@pytest.mark.parametrize("second", [None, 1, 7, 20])
def test_ctrl_c_at_every_line_while_experts_stream(folder, monkeypatch, alarm, second):
    assert check_interrupts(folder, monkeypatch, 5 if second else 1, second) > 300


def from_a_timer(seconds: float) -> None:
    """Send SIGINT from the main thread itself, between two of its bytecodes or in a wait."""

    def send(*_):
        signal.signal(signal.SIGALRM, hung)
        signal.alarm(20)
        raise_sigint()

    signal.signal(signal.SIGALRM, send)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def from_outside(seconds: float) -> None:
    """Send SIGINT to the process, as a terminal does."""
    signal.alarm(20)
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


@pytest.mark.parametrize("send", [from_a_timer, from_outside])
@pytest.mark.parametrize("rounds", [50, pytest.param(2000, marks=pytest.mark.slow)])
def test_ctrl_c_at_random_moments(folder, alarm, rounds, send):
    """One in a hundred is lost: MLX clears errors while it takes in a NumPy array."""
    loaded = load_with(folder, K)
    model, store = loaded.model, loaded.store
    truth, rng, interrupted = expected_rows(folder), np.random.default_rng(0), 0
    for _ in range(rounds):
        for bank in store.banks.values():
            bank.forget(np.arange(E))
        try:
            send(rng.uniform(0.001, 0.05))
            for token in PROMPT.tolist():
                mx.eval(model(mx.array([[token]])))
        except KeyboardInterrupt:
            interrupted += 1
        signal.alarm(0)
        check_slots(store.banks[1], truth)
        assert not any(bank.fetches for bank in store.banks.values())
    assert interrupted > 0.9 * rounds
    store.close()
