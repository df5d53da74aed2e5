"""The routed experts of one layer in memory: C slots, and which expert is in which.

With a slot for every expert a bank is *resident*: filled once, slot e holds expert e, and no step
of a GPU waits for the host (on a CPU a prompt does, for its products in NumPy). With fewer it is
*streamed*: `begin` maps the experts of a step to slots, evicting the least used of late, and the
reader's threads bring the missing ones straight into the rows of the bank's arrays while MLX
computes.

The rule that makes writing into MLX arrays safe: a slot remembers the last array computed from it
(`pending_uses`), and that array is evaluated before a byte of the slot changes. Graphs are lazy;
the router of the next layer having run proves nothing. Banks are never assigned into, cast or
updated: MLX would put another array in their place and later reads would go to the orphan.

No layer arithmetic here but the gathered product. What threads do here touches bytes, never MLX.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from mlx_dsv3.checkpoint.format import PARTS, PROJECTIONS, Quantization
from mlx_dsv3.device import is_gpu
from mlx_dsv3.errors import UserError
from mlx_dsv3.experts.files import FLOAT_BYTES, LayerExperts, Request, convert_floats
from mlx_dsv3.experts.interrupts import deferred_interrupts
from mlx_dsv3.experts.reader import Batch, Job, Reader
from mlx_dsv3.model.cpu import fewest_rows, multiply

BANK_DTYPES = {"U32": mx.uint32, "U8": mx.uint8}
FLOAT_DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
MARKER_BYTES = 1 << 20
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
        """Return the GB read per second of reading, 0 where nothing was read."""
        return self.nbytes / self.read_s / 1e9 if self.read_s else 0.0

    @property
    def hit_rate(self) -> float:
        return self.hits / max(self.hits + self.misses, 1)


class Fetch:
    """The experts that a step lacks, on their way into slots."""

    def __init__(self, bank: "Bank", missing: np.ndarray):
        self.bank, self.missing = bank, missing
        self.batch = Batch(0)

    def is_done(self, timeout_s: float) -> bool:
        """Wait at most so long; say whether every read has ended."""
        return self.batch.is_done(timeout_s)

    def wait(self) -> None:
        """Wait for the reads and raise their error; then the experts they were for are absent."""
        if self in self.bank.fetches:
            self.bank.end(self)
        if self.batch.error:
            raise self.batch.error


class Bank:
    """C slots of one layer's experts: gate and up as one projection of 2 F rows, and down.

    `on_route` is told the layer and the experts (T, K) of every call; see `ExpertStore`.
    """

    def __init__(self, experts: LayerExperts, capacity: int, dtype: mx.Dtype, reader: Reader):
        self.layer, self.capacity, self.reader = experts.layer, capacity, reader
        self.num_experts = experts.args.n_routed_experts
        self.gate_up = make_projection(experts, ("gate_proj", "up_proj"), capacity, dtype)
        self.down = make_projection(experts, ("down_proj",), capacity, dtype)
        self.on_route: Callable[[int, np.ndarray], None] | None = None
        self.counters = Counters()
        self.requests = [experts.requests(expert) for expert in range(self.num_experts)]
        self.expert_bytes = sum(request.nbytes for request in self.requests[0])  # in the files
        for path in {request.path for requests in self.requests for request in requests}:
            reader.files.open(path)
        self.identity = self.read_identity(experts)
        self.slot_of = np.full(self.num_experts, EMPTY, np.int32)
        self.expert_in = np.full(capacity, EMPTY, np.int32)
        self.uses = np.zeros(self.num_experts)  # of each expert, old ones for less
        # A use is worth half after E / K steps: those between two uses where all experts are alike.
        self.fading = 0.5 ** (experts.args.num_experts_per_tok / self.num_experts)
        self.pending_uses: dict[int, mx.array] = {}
        self.fetches: set[Fetch] = set()  # begun and not settled
        self.busy_until = 0.0  # when the last read ended that was waited for
        self._rows = {}
        for name, projection in (("gate_up", self.gate_up), ("down", self.down)):
            for part in PARTS:
                if (array := getattr(projection, part)) is not None:
                    view = memoryview(array).cast("B")
                    self._rows[f"{name}.{part}"] = (view, array.nbytes // capacity, array.dtype)

    def read_identity(self, experts: LayerExperts) -> bytes:
        """Return what tells these experts from others: their formats, and some of their bytes.

        The bytes are the first ones of each read of the first and the last expert, on disk.
        """
        parts = [experts.parts(projection) for projection in PROJECTIONS]
        formats = [[(part, i.dtype, i.shape) for part, i in sorted(p.items())] for p in parts]
        packed = self.gate_up.quantization, self.down.quantization
        values = [
            os.pread(self.reader.files.open(request.path), 64, request.offset)
            for expert in (0, -1)
            for request in self.requests[expert]
        ]
        return repr((formats, packed, values)).encode()

    @property
    def is_resident(self) -> bool:
        return self.capacity == self.num_experts

    @property
    def wants_ids(self) -> bool:
        """Say whether the host must see which experts a step chose."""
        return not self.is_resident or self.on_route is not None

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

    def begin(self, experts: np.ndarray, keep: np.ndarray | None = None) -> Fetch:
        """Map distinct experts to slots and start reading those that are missing.

        Slots of `experts` and of `keep` are not evicted. Their contents are there once the
        returned fetch is done; `slot_of` is right at once. Whoever cannot wait for it, because of
        an error or Ctrl-C, calls `join`.
        """
        self.uses *= self.fading
        self.uses[experts] += 1
        slots = self.slot_of[experts]
        is_hit = slots != EMPTY
        missing, hits = experts[~is_hit], slots[is_hit]
        self.counters.hits += len(hits)
        self.counters.misses += len(missing)
        fetch = Fetch(self, missing)
        if len(missing):
            busy = hits if keep is None else np.concatenate([hits, keep])
            with deferred_interrupts():
                self.replace(self.victims(len(missing), busy), fetch)
        return fetch

    def replace(self, slots: np.ndarray, fetch: Fetch) -> None:
        """Give the slots to the fetch's experts and have these read."""
        jobs = [
            self.job(request, slot)
            for expert, slot in zip(fetch.missing.tolist(), slots.tolist(), strict=True)
            for request in self.requests[expert]
        ]
        self.evaluate_uses(slots)
        fetch.batch = self.reader.begin(jobs)
        evicted = self.expert_in[slots]
        self.slot_of[evicted[evicted != EMPTY]] = EMPTY
        self.expert_in[slots] = fetch.missing
        self.slot_of[fetch.missing] = slots
        self.counters.nbytes += sum(job.nbytes for job in jobs)
        self.fetches.add(fetch)

    def bring(self, experts: np.ndarray) -> None:
        """Bring distinct experts into slots before any step asks for them, and wait for them."""
        try:
            self.begin(experts).wait()
        except BaseException:
            self.join()
            raise
        self.counters = Counters()

    def job(self, request: Request, slot: int) -> Job:
        """Return the read of a request into a slot."""
        place = partial(self.place, request, slot)
        return Job(request.path, request.offset, request.nbytes, place)

    def place(self, request: Request, slot: int) -> tuple[list, Callable[[], None] | None]:
        """Return where the bytes of a request go; floats of another dtype go through scratch.

        Called by the reader's threads: the bytes of a slot are sliced while others are read.
        """
        buffers, floats = [], []
        for span in request.spans:
            row, dtype = self.row(slot, span.target)
            if FLOAT_DTYPES.get(span.dtype, dtype) == dtype:
                buffers.append(row[span.begin : span.begin + span.nbytes])
                continue
            scratch, ratio = bytearray(span.nbytes), dtype.size / FLOAT_BYTES[span.dtype]
            begin, nbytes = int(span.begin * ratio), int(span.nbytes * ratio)
            buffers.append(scratch)
            floats.append((scratch, span.dtype, dtype, row[begin : begin + nbytes]))
        return buffers, partial(convert_all, floats) if floats else None

    def row(self, slot: int, target: str) -> tuple[memoryview, mx.Dtype]:
        """Return the writable bytes of a slot in one array, and the array's dtype."""
        view, nbytes, dtype = self._rows[target]
        return view[slot * nbytes : (slot + 1) * nbytes], dtype

    def victims(self, count: int, busy: np.ndarray) -> np.ndarray:
        """Return the slots of the experts least used of late, empty ones first, none of them busy.

        Better than the least recently used on both models of `demo/` (`bench_routing.py`).
        """
        worth = np.where(self.expert_in == EMPTY, EMPTY, self.uses[self.expert_in])
        worth[busy] = np.inf
        order = np.argsort(worth, kind="stable")[:count]
        assert len(order) == count and worth[order[-1]] < np.inf, (
            f"layer {self.layer}: {count} slots wanted, {self.capacity} there, {len(busy)} busy"
        )
        return order

    def note_use(self, slots: np.ndarray, array: mx.array) -> None:
        """Remember that `array` is computed from these slots.

        A large array is not kept alive for it: a number computed from it stands in its place.
        """
        if array.nbytes > MARKER_BYTES:
            array = array[:1, :1].sum()
            mx.async_eval(array)
        for slot in slots.tolist():
            self.pending_uses[slot] = array

    def evaluate_uses(self, slots: np.ndarray) -> None:
        """Evaluate what is computed from these slots, so that their bytes may change."""
        uses = [self.pending_uses.pop(slot) for slot in slots.tolist() if slot in self.pending_uses]
        if uses:
            mx.eval(uses)

    def end(self, fetch: Fetch) -> None:
        """Wait for a fetch, then settle what came of it. Only the waiting may be interrupted."""
        start = time.perf_counter()
        while not fetch.is_done(1.0):
            pass
        with deferred_interrupts():
            batch, counters = fetch.batch, self.counters
            counters.wait_s += time.perf_counter() - start
            counters.read_s += max(batch.ended - max(batch.begun, self.busy_until), 0.0)
            self.busy_until = max(batch.ended, self.busy_until)
            if batch.error:
                self.forget(fetch.missing)
            self.fetches.discard(fetch)

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
            fetch.batch.abandon()
        for fetch in list(self.fetches):
            self.end(fetch)


def convert_all(floats: list) -> None:
    """Convert what was read into scratch to its place: (scratch, source, target, place)."""
    for scratch, source, target, place in floats:
        place[:] = convert_floats(scratch, source, target)


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
