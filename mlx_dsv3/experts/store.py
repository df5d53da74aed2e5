"""Routed experts in memory: banks of slots, filled from disk as they are needed.

Each MoE layer has one `Bank` of C slots. With a slot for every expert it is *resident*: filled
once, slot e holds expert e, and nothing ever waits for the host. With fewer it is *streamed*:
`begin` maps the experts of a step to slots, evicting the least recently used, and reader threads
bring the missing ones straight into the rows of the bank's arrays while MLX computes.

The rule that makes writing into MLX arrays safe: a slot remembers the last array computed from it
(`readers`), and that array is evaluated before a byte of the slot changes. Graphs are lazy; the
router of the next layer having run proves nothing. Banks are never assigned into, cast or updated:
MLX would put another array in their place and later reads would go to the orphan.

No layer arithmetic here but the gathered product. Threads touch bytes only, never MLX.
"""

import contextlib
import fcntl
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import mlx.core as mx
import numpy as np

from mlx_dsv3.checkpoint.headers import TensorInfo
from mlx_dsv3.config import ModelArgs
from mlx_dsv3.device import is_gpu
from mlx_dsv3.errors import UserError
from mlx_dsv3.experts.files import (
    FLOAT_BYTES,
    PARTS,
    LayerExperts,
    Quantization,
    Request,
    convert_floats,
    read_exactly,
)
from mlx_dsv3.model.cpu import fewest_rows, multiply

NUM_READERS = 12
# A reader that wants the GIL waits up to this long for the main thread (Python's default is 5 ms).
SWITCH_INTERVAL_S = 0.0005
BANK_DTYPES = {"U32": mx.uint32, "U8": mx.uint8}
FLOAT_DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
MARKER_BYTES = 1 << 20
PROBE_BYTES = 400 << 20
EMPTY = -1


@dataclass
class Projection:
    """One linear map of C experts: weight (C, out, in or packed), scales and biases if packed."""

    weight: mx.array
    scales: mx.array | None
    biases: mx.array | None
    quantization: Quantization | None

    def gather(self, x: mx.array, slots: mx.array, is_sorted: bool) -> mx.array:
        """Multiply x (..., 1, in) by the expert in each slot (...): (..., 1, out)."""
        if self.quantization is None:
            weight = self.weight.swapaxes(-1, -2)
            return mx.gather_mm(x, weight, rhs_indices=slots, sorted_indices=is_sorted)
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.biases,
            rhs_indices=slots,
            transpose=True,
            group_size=self.quantization.group_size,
            bits=self.quantization.bits,
            mode=self.quantization.mode,
            sorted_indices=is_sorted,
        )

    def multiply(self, x: np.ndarray, slot: int) -> np.ndarray:
        """Multiply many rows x (n, in) by the expert in one slot: (n, out)."""
        parts = [None if a is None else a[slot] for a in (self.weight, self.scales, self.biases)]
        return multiply(x, *parts, self.quantization)

    @property
    def nbytes(self) -> int:
        arrays = (self.weight, self.scales, self.biases)
        return sum(array.nbytes for array in arrays if array is not None)


@dataclass
class Counters:
    """What one layer's bank did: experts asked for, found, read; bytes; seconds waited."""

    hits: int = 0
    misses: int = 0
    nbytes: int = 0
    wait_s: float = 0.0
    read_s: float = 0.0  # while reads were under way, waited for or not

    def __sub__(self, other: "Counters") -> "Counters":
        return Counters(*(getattr(self, f) - getattr(other, f) for f in self.__dataclass_fields__))

    def __add__(self, other: "Counters") -> "Counters":
        return Counters(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    @property
    def gb_per_s(self) -> float:
        """Return the GB read in a second of reading, 0 where nothing was read."""
        return self.nbytes / self.read_s / 1e9 if self.read_s else 0.0

    @property
    def hit_rate(self) -> float:
        return self.hits / max(self.hits + self.misses, 1)


class Fetch:
    """Reads for one step of one bank, taken by the reader threads; `wait` joins them.

    The main thread may leave at any point (Ctrl-C). So a fetch is known to its bank before a slot
    changes hands, and what it brings counts only when nothing is `left` to read; whoever leaves
    early calls `Bank.join`. The main thread uses single C calls here (of deques, and `acquire`):
    the locks of `threading` in Python, an `Event`'s too, do not survive an interrupt.
    """

    def __init__(self, bank: "Bank", missing: np.ndarray):
        self.bank, self.missing = bank, missing
        self.reads: deque[tuple[Request, int]] = deque()  # (request, slot) not begun yet
        self.left = len(missing)  # reads not done; their true number once they are queued
        self.active = 0  # readers at work
        self.error: BaseException | None = None
        self.begun = self.ended = time.perf_counter()
        self._lock = threading.Lock()  # of the readers
        self._signal = threading.Lock()  # held until the last reader is done
        self._signal.acquire()

    def serve(self, read: Callable[["Bank", Request, int], None]) -> None:
        """Read what is left, as one of several threads."""
        while self.reads:
            with self._lock:
                self.active += 1  # before the read is taken: see `is_finished`
            error = None
            try:
                job = take(self.reads)
                if job is not None:
                    read(self.bank, *job)
            except BaseException as caught:  # raised on the main thread by `wait`
                error = caught
                self.reads.clear()
            with self._lock:
                self.left -= job is not None and error is None
                self.error = self.error or error
                self.active -= 1
                if self.is_finished:
                    self.ended = time.perf_counter()
                    if self._signal.locked():
                        self._signal.release()

    @property
    def is_finished(self) -> bool:
        """Say that no reader is at work and none will be; without a lock, so in this order."""
        return not self.reads and not self.active

    def is_done(self, timeout_s: float) -> bool:
        """Wait at most so long; say whether every read has ended."""
        if not self.is_finished:
            self._signal.acquire(timeout=timeout_s)
        return self.is_finished

    def wait(self) -> None:
        """Join the reads and raise their error; then the experts they were for are absent."""
        self.end()
        if self.error:
            raise self.error

    def end(self) -> None:
        """Join the reads and settle what came of them."""
        start = time.perf_counter()
        while not self.is_done(1.0):
            pass
        bank, counters = self.bank, self.bank.counters
        counters.wait_s += time.perf_counter() - start
        counters.read_s += max(self.ended - max(self.begun, bank.busy_until), 0.0)
        bank.busy_until = max(self.ended, bank.busy_until)
        if self.left and not self.error:
            self.error = InterruptedError("the reads were abandoned")
        if self.error:
            bank.forget(self.missing)
        bank.fetches.discard(self)


def take(jobs: deque):
    """Return the next of some jobs that others take too, None where none is left."""
    try:
        return jobs.popleft()
    except IndexError:
        return None


class Bank:
    """C slots of one layer's experts: gate and up as one projection of 2 F rows, and down."""

    def __init__(self, experts: LayerExperts, capacity: int, dtype: mx.Dtype, store):
        self.layer, self.capacity = experts.layer, capacity
        self.num_experts = experts.args.n_routed_experts
        self.gate_up = make_projection(experts, ("gate_proj", "up_proj"), capacity, dtype)
        self.down = make_projection(experts, ("down_proj",), capacity, dtype)
        self.store = store
        self.counters = Counters()
        self.requests = [experts.requests(expert) for expert in range(self.num_experts)]
        self.slot_of = np.full(self.num_experts, EMPTY, np.int32)
        self.expert_in = np.full(capacity, EMPTY, np.int32)
        self.used = np.zeros(capacity, np.int64)  # step of last use
        self.step = 0
        self.readers: dict[int, mx.array] = {}
        self.fetches: set[Fetch] = set()
        self.busy_until = 0.0  # when the last read ended that was waited for
        self._rows = {}
        for name, projection in (("gate_up", self.gate_up), ("down", self.down)):
            for part in PARTS:
                if (array := getattr(projection, part)) is not None:
                    view = memoryview(array).cast("B")
                    self._rows[f"{name}.{part}"] = (view, array.nbytes // capacity, array.dtype)

    @property
    def is_resident(self) -> bool:
        return self.capacity == self.num_experts

    @property
    def wants_ids(self) -> bool:
        """Say whether the host must see which experts a step chose."""
        return not self.is_resident or self.store.always_read_ids or self.store.trace is not None

    @property
    def min_sorted_rows(self) -> int:
        """Rows below which Metal would leave the tiled kernel; CPU rows are computed alone."""
        return 4 * self.capacity if is_gpu() else 0

    @property
    def dearest(self) -> Quantization | None:
        """Return the format, of the two projections, that costs most to unpack for NumPy."""
        return max((self.gate_up.quantization, self.down.quantization), key=fewest_rows)

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    def row(self, slot: int, target: str) -> tuple[memoryview, mx.Dtype]:
        """Return the writable bytes of a slot in one array, and the array's dtype."""
        view, nbytes, dtype = self._rows[target]
        return view[slot * nbytes : (slot + 1) * nbytes], dtype

    def begin(self, experts: np.ndarray, keep: np.ndarray | None = None) -> Fetch:
        """Map distinct experts to slots and start reading those that are missing.

        Slots of `experts` and of `keep` are not evicted. Their contents are there once the
        returned fetch is done; `slot_of` is right at once.
        """
        self.step += 1
        slots = self.slot_of[experts]
        is_hit = slots != EMPTY
        missing = experts[~is_hit]
        self.used[slots[is_hit]] = self.step
        self.counters.hits += len(experts) - len(missing)
        self.counters.misses += len(missing)
        fetch = Fetch(self, missing)
        if not len(missing):
            return fetch
        busy = slots[is_hit] if keep is None else np.concatenate([slots[is_hit], keep])
        victims = self.victims(len(missing), busy)
        self.settle(victims)
        self.fetches.add(fetch)  # from here on `join` makes good what is left half-way
        evicted = self.expert_in[victims]
        self.slot_of[evicted[evicted != EMPTY]] = EMPTY
        self.expert_in[victims] = missing
        self.slot_of[missing] = victims
        self.used[victims] = self.step
        self.store.read(fetch, victims)
        return fetch

    def bring(self, experts: np.ndarray) -> None:
        """Bring distinct experts into slots and wait for them."""
        try:
            self.begin(experts).wait()
        except BaseException:
            self.join()
            raise

    def victims(self, count: int, busy: np.ndarray) -> np.ndarray:
        """Return the least recently used slots, empty ones first, none of them busy."""
        age = np.where(self.expert_in == EMPTY, EMPTY, self.used)
        age[busy] = np.iinfo(np.int64).max
        order = np.argsort(age, kind="stable")[:count]
        assert len(order) == count and age[order[-1]] < np.iinfo(np.int64).max, (
            f"layer {self.layer}: {count} slots wanted, {self.capacity} there, {len(busy)} busy"
        )
        return order

    def read_by(self, slots: np.ndarray, array: mx.array) -> None:
        """Remember that `array` is computed from these slots.

        A large array is not kept alive for it: a number computed from it stands in its place.
        """
        if array.nbytes > MARKER_BYTES:
            array = array[:1, :1].sum()
            mx.async_eval(array)
        for slot in slots.tolist():
            self.readers[slot] = array

    def settle(self, slots: np.ndarray) -> None:
        """Evaluate what still reads these slots, so that their bytes may change."""
        readers = {slot: self.readers[slot] for slot in slots.tolist() if slot in self.readers}
        if readers:
            mx.eval(list(readers.values()))
        for slot in readers:
            del self.readers[slot]

    def forget(self, experts: np.ndarray) -> None:
        """Mark experts as absent, whatever of their way into slots was done."""
        self.slot_of[experts] = EMPTY
        present = np.flatnonzero(self.slot_of != EMPTY)
        self.expert_in[:] = EMPTY
        self.expert_in[self.slot_of[present]] = present

    def join(self) -> None:
        """Drop reads that have not begun and wait for the others; for the way out of an error.

        Their errors are told by whoever is leaving. May itself be interrupted, and called again.
        """
        for fetch in list(self.fetches):
            fetch.reads.clear()
            fetch.end()


def make_projection(
    experts: LayerExperts, names: tuple[str, ...], capacity: int, dtype: mx.Dtype
) -> Projection:
    """Allocate C slots for one or two projections stacked along their rows."""
    quantizations = {experts.quantization(name) for name in names}
    if len(quantizations) > 1:
        raise UserError(
            f"layer {experts.layer}: `gate_proj` and `up_proj` of the experts are quantised "
            "differently; mlx_dsv3 computes them as one product",
            "convert the checkpoint again with one of `python -m convert`'s recipes",
        )
    arrays = {}
    for part, info in experts.parts(names[0]).items():
        rows, columns = info.shape
        shape = (capacity, rows * len(names), columns)
        arrays[part] = mx.zeros(shape, BANK_DTYPES.get(info.dtype, dtype))
    mx.eval(arrays)
    parts = [arrays.get(part) for part in PARTS]
    return Projection(*parts, quantization=quantizations.pop())


@dataclass
class Files:
    """Descriptors by path, opened once. On macOS reads bypass the page cache (`F_NOCACHE`):
    the bank is the cache, and holding the same bytes twice is the commonest self-made loss."""

    descriptors: dict[Path, int] = field(default_factory=dict)

    def open(self, path: Path) -> int:
        if path not in self.descriptors:
            fd = os.open(path, os.O_RDONLY)
            if hasattr(fcntl, "F_NOCACHE"):
                fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
            self.descriptors[path] = fd
        return self.descriptors[path]

    def close(self) -> None:
        for fd in self.descriptors.values():
            os.close(fd)
        self.descriptors.clear()


class SwitchInterval:
    """The switch interval of the process: short from the first streamed store to the last."""

    def __init__(self):
        self.users: set[int] = set()
        self.before = sys.getswitchinterval()

    def shorten(self, user: object) -> None:
        if not self.users:
            self.before = sys.getswitchinterval()
            sys.setswitchinterval(SWITCH_INTERVAL_S)
        self.users.add(id(user))

    def restore(self, user: object) -> None:
        if id(user) in self.users:
            self.users.remove(id(user))
            if not self.users:
                sys.setswitchinterval(self.before)


switch_interval = SwitchInterval()


class ExpertStore:
    """The routed experts of a folder, one bank a layer, and the threads that read them.

    `tensors` maps names to where they lie (main model and MTP sidecar); `dtype` is the activation
    dtype, which scales are held in; `slots` gives the slots of a layer, one for every expert
    where it does not. `always_read_ids` (for tests) sends full banks the streamed way too.
    """

    def __init__(
        self,
        tensors: dict[str, TensorInfo],
        args: ModelArgs,
        dtype: mx.Dtype,
        slots: dict[int, int] | None = None,
        always_read_ids: bool = False,
    ):
        self.always_read_ids = always_read_ids
        self.tensors, self.args, self.dtype = tensors, args, dtype
        self.slots = slots or {}
        self.banks: dict[int, Bank] = {}
        self.trace: TextIO | None = None
        self._files = Files()
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, daemon=True, name=f"expert-reader-{i}")
            for i in range(NUM_READERS)
        ]
        for thread in self._threads:
            thread.start()
        if self.is_streamed:
            switch_interval.shorten(self)

    @property
    def is_streamed(self) -> bool:
        return any(count < self.args.n_routed_experts for count in self.slots.values())

    @property
    def token_bytes(self) -> int:
        """Return the bytes of all experts that a token chooses in streamed layers."""
        sizes = [
            sum(request.nbytes for request in bank.requests[0])
            for bank in self.banks.values()
            if not bank.is_resident
        ]
        return sum(sizes) * self.args.num_experts_per_tok

    @property
    def counters(self) -> Counters:
        """Return the sum over the layers whose experts are asked for one by one."""
        return sum((bank.counters for bank in self.banks.values() if bank.wants_ids), Counters())

    def open_layer(self, layer: int) -> Bank:
        """Allocate the bank of a layer and, where every expert has a slot, fill it."""
        experts = LayerExperts(layer, self.tensors, self.args)
        capacity = self.slots.get(layer, self.args.n_routed_experts)
        bank = self.banks[layer] = Bank(experts, capacity, self.dtype, self)
        for path in {request.path for requests in bank.requests for request in requests}:
            self._files.open(path)
        if bank.is_resident:
            everyone = np.arange(bank.num_experts, dtype=np.int32)
            bank.bring(everyone)
            bank.counters = Counters()
        return bank

    def probe(self) -> tuple[float, int]:
        """Fill slots of streamed banks; return the bytes per second that it took, and the bytes.

        Those experts then count as present, so nothing is read for the measurement alone. What
        the system already had in memory is part of the figure.
        """
        nbytes, start = 0, time.perf_counter()
        for bank in self.banks.values():
            size = sum(request.nbytes for request in bank.requests[0])
            count = min(bank.capacity, -(-(PROBE_BYTES - nbytes) // size))
            if count > 0 and not bank.is_resident:
                bank.bring(np.arange(count, dtype=np.int32))
                bank.counters = Counters()
                nbytes += count * size
        return nbytes / (time.perf_counter() - start), nbytes

    def trace_to(self, path: Path) -> None:
        """Write the experts of every token and layer to a file: one JSON list a layer and call.

        Each line is [layer, [[ids of the first token], ...]]. Resident layers then read their ids
        back too, which costs the synchronisation that they otherwise save.
        """
        try:
            self.trace = path.open("w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise UserError(f"`{path}` cannot be written: {error.strerror}") from None

    def record(self, layer: int, experts: np.ndarray) -> None:
        """Append one call's experts (T, K) to the trace."""
        try:
            self.trace.write(f"[{layer}, {experts.tolist()}]\n")
        except OSError as error:  # a full disk must not end the reply
            print(f"warning: the trace `{self.trace.name}` ends: {error}", file=sys.stderr)
            with contextlib.suppress(OSError):
                self.trace.close()
            self.trace = None

    def fetch(self, layer: int, experts: list[int]) -> np.ndarray:
        """Bring distinct experts into slots, wait for them, and return the slots."""
        bank = self.banks[layer]
        experts = np.array(experts, np.int32)
        bank.bring(experts)
        return bank.slot_of[experts]

    def read(self, fetch: Fetch, slots: np.ndarray) -> None:
        """Give the readers what brings a fetch's missing experts into slots."""
        requests = fetch.bank.requests
        reads = [
            (request, slot)
            for expert, slot in zip(fetch.missing.tolist(), slots.tolist(), strict=True)
            for request in requests[expert]
        ]
        fetch.bank.counters.nbytes += sum(request.nbytes for request, _ in reads)
        fetch.left, fetch.begun = len(reads), time.perf_counter()
        fetch.reads.extend(reads)
        for _ in range(min(len(reads), NUM_READERS)):
            self._jobs.put(fetch)  # each wakes one reader; one is enough to read all

    def _serve(self) -> None:
        while (fetch := self._jobs.get()) is not None:
            fetch.serve(self._read)

    def _read(self, bank: Bank, request: Request, slot: int) -> None:
        buffers, floats = [], []
        for span in request.spans:
            row, dtype = bank.row(slot, span.target)
            if FLOAT_DTYPES.get(span.dtype, dtype) == dtype:
                buffers.append(row[span.begin : span.begin + span.nbytes])
                continue
            scratch, ratio = bytearray(span.nbytes), dtype.size / FLOAT_BYTES[span.dtype]
            begin, nbytes = int(span.begin * ratio), int(span.nbytes * ratio)
            buffers.append(scratch)
            floats.append((scratch, span.dtype, dtype, row[begin : begin + nbytes]))
        read_exactly(self._files.open(request.path), buffers, request.offset, request.path)
        for scratch, source, target, view in floats:
            view[:] = convert_floats(scratch, source, target)

    def close(self) -> None:
        """Stop the readers and close the files; resident banks stay usable."""
        for bank in self.banks.values():
            bank.join()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []
        if self.trace is not None:
            self.trace.close()
        self._files.close()
        switch_interval.restore(self)
