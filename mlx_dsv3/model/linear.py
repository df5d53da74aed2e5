"""Linear layers: those of one input as one product, and products of many rows on a CPU.

Two products of 1536 and 576 rows cost a GPU two launches; one of 2112 rows costs one. Layers are
joined after loading, where their quantisation agrees (mlx-lm's mixed recipes give `kv_a` more
bits than `q_a`; those stay apart).

MLX's CPU backend multiplies a quantised weight row by row, and its own BLAS is slow: a prompt would
take as long as its tokens one by one. There a weight is unpacked once for many rows, a block at a
time, and multiplied in NumPy, which brings a fast BLAS. Few rows stay with MLX: where unpacking
costs more than it saves, in decoding, and in the verification of drafts, whose every row must equal
a plain step's. A GPU sees nothing of this.
"""

from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from threadpoolctl import ThreadpoolController

from mlx_dsv3.checkpoint.format import PARTS
from mlx_dsv3.device import is_gpu

MIN_TOKENS = 6  # of a call that may leave MLX: one more than a verification of drafts has
WAIT_ROWS = 3  # that the wait for arrays, on their way to NumPy and back, costs a call (8 tokens)
# Rows of one weight from which unpacking it is faster than MLX's row by row, by format (2 cores,
# matrices of 0.1 to 4 million weights: `python benchmarks/bench_prefill.py --rows`).
FEWEST_ROWS = {
    ("affine", 2): 8,
    ("affine", 3): 11,
    ("affine", 4): 6,
    ("affine", 5): 17,
    ("affine", 6): 24,
    ("affine", 8): 5,
    ("mxfp4", 4): 26,
    ("mxfp8", 8): 2,
    ("nvfp4", 4): 23,
}
BLOCK_BYTES = 32 << 20  # of unpacked weights at a time


def on_cpu(x: mx.array) -> bool:
    """Say whether MLX would compute with x on a CPU, in float32."""
    return x.dtype == mx.float32 and not is_gpu()


def fewest_rows(packing) -> int:
    """Return the rows from which NumPy is the faster one for a weight of this format."""
    unknown = max(FEWEST_ROWS.values())
    return 1 if packing is None else FEWEST_ROWS.get((packing.mode, packing.bits), unknown)


def goes_to_numpy(x: mx.array, rows: int, packing) -> bool:
    """Say whether a call with so many rows of x leaves MLX."""
    return on_cpu(x) and rows >= max(MIN_TOKENS, fewest_rows(packing) + WAIT_ROWS)


@cache
def blas() -> ThreadpoolController:
    """Return the switch of NumPy's BLAS.

    Its threads wait for each other at the end of each product, by yielding: where a core is busy,
    products of few rows take 20 to 40 ms instead of 1 (docs/log.md). One thread never waits, and
    is nearly as fast here, because unpacking the weight is most of the time.
    """
    return ThreadpoolController()


def multiply(x: np.ndarray, weight: mx.array, scales, biases, packing) -> np.ndarray:
    """Return x (rows, in) times the transpose of a weight (out, in), float32.

    `packing` bears `bits`, `group_size` and `mode` of a packed weight; None for a plain one.
    """
    out = np.empty((len(x), weight.shape[0]), np.float32)
    step = max(1, BLOCK_BYTES // (4 * x.shape[-1]))
    for i in range(0, len(weight), step):
        part = weight[i : i + step]
        if packing is not None:
            part = mx.dequantize(
                part,
                scales[i : i + step],
                None if biases is None else biases[i : i + step],
                group_size=packing.group_size,
                bits=packing.bits,
                mode=packing.mode,
                dtype=mx.float32,
            )
        matrix = np.array(part, copy=False).T  # evaluated here
        with blas().limit(limits=1, user_api="blas"):
            np.matmul(x, matrix, out=out[:, i : i + step])
    return out


class Linear(nn.Linear):
    """`nn.Linear` without bias."""

    def __init__(self, input_dims: int, output_dims: int):
        super().__init__(input_dims, output_dims, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        y = apply_many(self, x, None)
        return super().__call__(x) if y is None else y

    def to_quantized(self, **packing) -> "QuantizedLinear":
        return QuantizedLinear.from_linear(self, **packing)


class QuantizedLinear(nn.QuantizedLinear):
    """`nn.QuantizedLinear` without bias."""

    def __call__(self, x: mx.array) -> mx.array:
        y = apply_many(self, x, self)
        return super().__call__(x) if y is None else y


def apply_many(layer: nn.Module, x: mx.array, packing) -> mx.array | None:
    """Return the layer's output for x (..., in) of many rows on a CPU, else None."""
    if not goes_to_numpy(x, x.shape[-2], packing):
        return None
    rows = np.array(x.reshape(-1, x.shape[-1]), copy=False)
    parts = layer.get("scales"), layer.get("biases")
    return mx.array(multiply(rows, layer.weight, *parts, packing)).reshape(*x.shape[:-1], -1)


def quantization_of(layer: nn.Module) -> tuple | None:
    """Return (bits, group size, mode) of a quantised layer, None of a plain one."""
    if "scales" not in layer:
        return None
    return layer.bits, layer.group_size, layer.mode


class Joined(nn.Module):
    """Linear layers with one input; `__call__` returns one output for each."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        rows = [layer.weight.shape[0] for layer in layers]
        self._splits = [sum(rows[: i + 1]) for i in range(len(rows) - 1)]
        if len({quantization_of(layer) for layer in layers}) > 1:
            self.layers = list(layers)
            return
        first = layers[0]
        for part in PARTS:
            if first.get(part) is not None:
                first[part] = mx.concatenate([layer[part] for layer in layers])
        self.layers = [first]

    def __call__(self, x: mx.array) -> list[mx.array]:
        if len(self.layers) == 1:
            return mx.split(self.layers[0](x), self._splits, axis=-1)
        return [layer(x) for layer in self.layers]
