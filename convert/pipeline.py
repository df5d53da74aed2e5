"""Work in order and in parallel: calls ahead in a pool, MLX graphs on several streams.

A few units are in memory at any moment, whatever the size of the model: every step holds back the
one before it. Knows nothing of files.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx

from convert.dequantize import Raw
from convert.manifest import device_kind
from convert.plan import Plan, Unit
from convert.quantize import Derived
from convert.transform import derive


def streams(jobs: int) -> list[mx.Stream]:
    """Return the streams to compute on: each has its own thread on the CPU backend."""
    if device_kind() == "gpu":
        return [mx.default_stream(mx.default_device())]
    return [mx.new_stream(mx.cpu) for _ in range(jobs)]


def evaluate(
    raws: Iterable[tuple[Unit, list[Raw]]], plan: Plan, on: list[mx.Stream]
) -> Iterator[tuple[Unit, list[Derived]]]:
    """Yield each unit with its evaluated arrays, keeping every stream busy with a next one."""
    running = deque()
    for i, item in enumerate(raws):
        running.append(_start(item, plan, on[i % len(on)]))
        del item  # the source's bytes: MLX has its own copy by now
        if len(running) > len(on):
            yield _evaluated(running.popleft())
    while running:
        yield _evaluated(running.popleft())


def _start(item: tuple[Unit, list[Raw]], plan: Plan, stream: mx.Stream) -> tuple:
    unit, raws = item
    with mx.stream(stream):
        outputs = derive(unit, raws, plan)
        mx.async_eval(outputs)
    return unit, outputs


def _evaluated(item: tuple[Unit, list[Derived]]) -> tuple[Unit, list[Derived]]:
    """Wait for a unit's arrays and open them as memory views, which writer threads may use."""
    unit, outputs = item
    mx.eval(outputs)
    return unit, [Derived([memoryview(a) for a in arrays], errors) for arrays, errors in outputs]


def ahead(function: Callable, items: Iterable, pool: ThreadPoolExecutor, depth: int) -> Iterator:
    """Yield (item, function(item)) in order, with `depth` more calls under way in the pool."""
    waiting = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        del item  # nothing but the queue may keep a unit's arrays alive
        if len(waiting) > depth:
            yield _result(waiting.popleft())
    while waiting:
        yield _result(waiting.popleft())


def _result(entry: tuple) -> tuple:
    item, future = entry
    return item, future.result()
