"""The routed experts of a folder: a bank for each MoE layer, and one reader for all of them.

Opens layers, closes files, sums what the banks counted. Which expert is where is the banks'.
"""

import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_dsv3.checkpoint.headers import TensorInfo
from mlx_dsv3.config import ModelArgs
from mlx_dsv3.experts.bank import Bank, Counters
from mlx_dsv3.experts.files import LayerExperts
from mlx_dsv3.experts.reader import Reader

PROBE_BYTES = 400 << 20


class ExpertStore:
    """The routed experts of a folder.

    `tensors` maps names to where they lie (main model and MTP sidecar); `dtype` is the activation
    dtype, which scales are held in; `slots` gives the slots of a layer, one for every expert
    where it does not.
    """

    def __init__(
        self,
        tensors: dict[str, TensorInfo],
        args: ModelArgs,
        dtype: mx.Dtype,
        slots: dict[int, int] | None = None,
    ):
        self.tensors, self.args, self.dtype = tensors, args, dtype
        self.slots = slots or {}
        self.banks: dict[int, Bank] = {}
        self.reader = Reader()
        self._on_route: Callable[[int, np.ndarray], None] | None = None

    @property
    def is_streamed(self) -> bool:
        return any(count < self.args.n_routed_experts for count in self.slots.values())

    @property
    def on_route(self) -> Callable[[int, np.ndarray], None] | None:
        """What is told the layer and the experts (T, K) of every call.

        Resident layers then read their ids back too, which costs the synchronisation that they
        otherwise save.
        """
        return self._on_route

    @on_route.setter
    def on_route(self, callback: Callable[[int, np.ndarray], None] | None) -> None:
        self._on_route = callback
        for bank in self.banks.values():
            bank.on_route = callback

    @property
    def token_bytes(self) -> int:
        """Return the bytes of all experts that a token chooses in streamed layers."""
        banks = (bank for bank in self.banks.values() if not bank.is_resident)
        return sum(bank.expert_bytes for bank in banks) * self.args.num_experts_per_tok

    @property
    def counters(self) -> Counters:
        """Return the sum over the streamed layers, traced or not: a trace may end in a reply."""
        banks = (bank for bank in self.banks.values() if not bank.is_resident)
        return sum((bank.counters for bank in banks), Counters())

    def open_layer(self, layer: int) -> Bank:
        """Allocate the bank of a layer and, where every expert has a slot, fill it."""
        experts = LayerExperts(layer, self.tensors, self.args)
        capacity = self.slots.get(layer, self.args.n_routed_experts)
        bank = self.banks[layer] = Bank(experts, capacity, self.dtype, self.reader)
        bank.on_route = self.on_route
        if bank.is_resident:
            bank.bring(np.arange(bank.num_experts, dtype=np.int32))
        return bank

    def probe(self) -> tuple[float, int]:
        """Fill slots of streamed banks; return the bytes per second that it took, and the bytes.

        Those experts then count as present, so nothing is read for the measurement alone. What
        the system already had in memory is part of the figure.
        """
        nbytes, start = 0, time.perf_counter()
        for bank in self.banks.values():
            count = min(bank.capacity, -(-(PROBE_BYTES - nbytes) // bank.expert_bytes))
            if count > 0 and not bank.is_resident:
                bank.bring(np.arange(count, dtype=np.int32))
                nbytes += count * bank.expert_bytes
        return nbytes / (time.perf_counter() - start), nbytes

    def close(self) -> None:
        """Stop the reader and close its files; resident banks stay usable. Twice is once."""
        for bank in self.banks.values():
            bank.join()
        self.reader.close()
