"""Products of many rows on a CPU: the one place where a CPU computes otherwise than a GPU.

MLX's CPU backend multiplies a quantised weight row by row, and its own BLAS is slow: a prompt would
take as long as its tokens one by one. Here a weight is unpacked once for many rows, a block at a
time, and multiplied in NumPy, which brings a fast BLAS. Few rows stay with MLX: where unpacking
costs more than it saves, in decoding, and in the verification of drafts, whose every row must equal
a plain step's.
"""

from functools import cache

import mlx.core as mx
import numpy as np
from threadpoolctl import ThreadpoolController

from mlx_dsv3.device import is_gpu

MIN_TOKENS = 6  # of a call that may leave MLX: one more than a verification of drafts has
WAIT_ROWS = 3  # that the wait for arrays, on their way to NumPy and back, costs a call (8 tokens)
# Rows of one weight from which unpacking it is faster than MLX's row by row, by mode and bits
# (2 cores, matrices of 0.1 to 4 million weights: `python benchmarks/bench_prefill.py --rows`).
FEWEST_ROWS = {
    "affine": {2: 8, 3: 11, 4: 6, 5: 17, 6: 24, 8: 5},
    "mxfp4": {4: 26},
    "mxfp8": {8: 2},
    "nvfp4": {4: 23},
}
BLOCK_BYTES = 32 << 20  # of unpacked weights at a time
# The threads of NumPy's BLAS wait for each other at the end of each product, by yielding: where a
# core is busy, products of few rows take 20 to 40 ms instead of 1 (docs/log.md). One thread never
# waits, and is nearly as fast here, because unpacking the weight is most of the time.
blas = cache(ThreadpoolController)


def fewest_rows(packing) -> int:
    """Return the rows from which NumPy is the faster one for a weight of this format."""
    if packing is None:
        return 1
    return FEWEST_ROWS.get(packing.mode, {}).get(packing.bits, 26)  # the most of any above


def takes(x: mx.array, rows: int, packing) -> bool:
    """Say whether NumPy takes the product of so many rows of x with a weight of this format."""
    enough = rows >= max(MIN_TOKENS, fewest_rows(packing) + WAIT_ROWS)
    return enough and x.dtype == mx.float32 and not is_gpu()


def multiply(x: np.ndarray, weight: mx.array, scales, biases, packing) -> np.ndarray:
    """Return x (..., in) times the transpose of a weight (out, in), float32.

    `packing` has `bits`, `group_size` and `mode` of a packed weight; None for a plain one.
    """
    out = np.empty((*x.shape[:-1], len(weight)), np.float32)
    step = max(1, BLOCK_BYTES // (4 * x.shape[-1]))
    for i in range(0, len(weight), step):
        block, *scaling = [a if a is None else a[i : i + step] for a in (weight, scales, biases)]
        if packing is not None:
            how = packing.group_size, packing.bits, packing.mode
            block = mx.dequantize(block, *scaling, *how, dtype=mx.float32)
        matrix = np.array(block, copy=False).T  # evaluated here
        with blas().limit(limits=1, user_api="blas"):
            np.matmul(x, matrix, out=out[..., i : i + step])
    return out
