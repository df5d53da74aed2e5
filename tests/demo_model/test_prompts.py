"""Long prompts: Ctrl-C within one, and the bar that leaves before the first word."""

import os
import signal
import threading
import time
from dataclasses import replace

from mlx_dsv3.conversation.session import Session
from mlx_dsv3.model.decoder import DecoderLayer
from mlx_dsv3.terminal import progress
from mlx_dsv3.terminal.repl import Chat
from mlx_dsv3.terminal.screen import Screen

LONG = "one two three " * 100


def test_ctrl_c_stops_a_prompt_within_a_layer(loaded, monkeypatch):
    """A layer of streamed experts takes seconds, a chunk minutes. The signal is a real one."""
    session, begun, struck = Session(loaded), [], []
    original = DecoderLayer.__call__

    def call(self, *arguments):
        begun.append(time.perf_counter())
        return original(self, *arguments)

    def strike():
        struck.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(DecoderLayer, "__call__", call)
    monkeypatch.setattr(loaded, "plan", replace(loaded.plan, prefill_chunk=200))
    events = session.turn(LONG)
    prefill = next(event for event in events if event.done > 200)  # the second chunk's first layer
    threading.Timer(0.01, strike).start()
    *told, end = events
    assert all(event.done < prefill.total for event in told)
    assert (end.finish_reason, end.stats) == ("interrupted", None)
    assert sum(moment > struck[0] for moment in begun) <= 1
    *_, end = session.turn("What is the capital of France?")
    assert "Paris" in end.text


def test_the_bar_is_gone_before_the_first_word(loaded, monkeypatch, capsys):
    """On a terminal both streams go to one screen."""
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    monkeypatch.setattr(progress, "PAUSE_S", 0.0)
    monkeypatch.setattr(progress, "is_redrawn", lambda stream: True)
    order = []
    chat = Chat(Session(loaded), Screen(stats="off"))
    shown = chat.screen.show_text
    monkeypatch.setattr(chat.screen, "show_text", lambda event: (note(), shown(event)))

    def note():
        order.append(capsys.readouterr().err)

    chat.turn(LONG + "What is the capital of France?")
    assert order[0].count("tokens, ") == len(loaded.model.layers)
    assert order[0].endswith("\r\x1b[K") and not any(order[1:])
