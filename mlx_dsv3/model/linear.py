"""Linear layers, and those of one input joined into one product.

Two products of 1536 and 576 rows cost a GPU two launches; one of 2112 rows costs one. Layers are
joined after loading, where their quantisation agrees (mlx-lm's mixed recipes give `kv_a` more
bits than `q_a`; those stay apart).
"""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_dsv3.model import cpu


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up, as mlx-lm does; not from there, whose import takes 2 s."""
    return nn.silu(gate) * up


class OnEitherDevice:
    """Call MLX's layer, or on a CPU NumPy for many rows (`cpu.py`)."""

    def __call__(self, x: mx.array) -> mx.array:
        packing = self if "scales" in self else None
        if not cpu.takes(x, x.shape[-2], packing):
            return super().__call__(x)
        parts = self.weight, self.get("scales"), self.get("biases")
        return mx.array(cpu.multiply(np.array(x, copy=False), *parts, packing))


class Linear(OnEitherDevice, nn.Linear):
    """`nn.Linear` without bias."""

    def __init__(self, input_dims: int, output_dims: int):
        super().__init__(input_dims, output_dims, bias=False)

    def to_quantized(self, **packing) -> "QuantizedLinear":
        return QuantizedLinear.from_linear(self, **packing)


class QuantizedLinear(OnEitherDevice, nn.QuantizedLinear):
    """`nn.QuantizedLinear` without bias."""


class Joined(nn.Module):
    """Linear layers with one input; `__call__` returns one output for each."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self._splits = np.cumsum([len(layer.weight) for layer in layers])[:-1].tolist()
        named = ("bits", "group_size", "mode")
        formats = {tuple(getattr(layer, name, None) for name in named) for layer in layers}
        if len(formats) == 1:
            parts = [layer.parameters() for layer in layers]
            layers = [layers[0].update(tree_map(lambda *same: mx.concatenate(same), *parts))]
        self.layers = list(layers)

    def __call__(self, x: mx.array) -> list[mx.array]:
        if len(self.layers) == 1:
            return mx.split(self.layers[0](x), self._splits, axis=-1)
        return [layer(x) for layer in self.layers]
