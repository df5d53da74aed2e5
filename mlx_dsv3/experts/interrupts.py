"""Ctrl-C at known lines: what a block has begun, it ends before the interrupt is felt.

Knows no expert. Waiting is never put into such a block: a disk may be slow.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Hold SIGINT back until the block has ended, then let it strike as it would have.

    Signals are handled in the main thread alone, so other threads need nothing; nor does a
    process that ignores SIGINT or dies of it.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    arrived = []
    signal.signal(signal.SIGINT, lambda *_: arrived.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if arrived:
            signal.raise_signal(signal.SIGINT)
