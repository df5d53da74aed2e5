"""Linear layers, and those of one input joined into one product.

Two products of 1536 and 576 rows cost a GPU two launches; one of 2112 rows costs one. Layers are
joined after loading, where their quantisation agrees (mlx-lm's mixed recipes give `kv_a` more
bits than `q_a`; those stay apart).
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dsv3.model import cpu

PARTS = ("weight", "scales", "biases")


class OnEitherDevice:
    """Call MLX's layer, or on a CPU NumPy for many rows (`cpu.py`)."""

    packing = None  # what bears bits, group size and mode of a packed weight

    def __call__(self, x: mx.array) -> mx.array:
        if not cpu.takes(x, x.shape[-2], self.packing):
            return super().__call__(x)
        rows = np.array(x.flatten(0, -2), copy=False)
        y = cpu.multiply(rows, *[self.get(part) for part in PARTS], self.packing)
        return mx.array(y).reshape(*x.shape[:-1], -1)


class Linear(OnEitherDevice, nn.Linear):
    """`nn.Linear` without bias."""

    def __init__(self, input_dims: int, output_dims: int):
        super().__init__(input_dims, output_dims, bias=False)

    def to_quantized(self, **packing) -> "QuantizedLinear":
        return QuantizedLinear.from_linear(self, **packing)


class QuantizedLinear(OnEitherDevice, nn.QuantizedLinear):
    """`nn.QuantizedLinear` without bias."""

    @property
    def packing(self):
        return self


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
