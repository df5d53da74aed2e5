"""What enters each linear layer of a loaded model, squared and summed while windows run through it.

`watch` puts listeners around the layers of a model that is loaded for this alone; the model's own
code knows nothing of it. Attention is absorbed whatever the length, window by window, because the
expanded form never has what enters `unembed_out`. At V3's sizes and windows of 512 that adds about
3 % to the arithmetic (computed). The result of routed experts carries their inner rows along, so
that each expert is read and computed once, whatever way its product takes.
"""

# B windows  L tokens of each  D hidden  H heads  E routed experts  K experts per token  F width

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dsv3.checkpoint.format import layer_prefix
from mlx_dsv3.load import Loaded
from mlx_dsv3.model.decoder import DecoderLayer
from mlx_dsv3.model.mla import MLA, attend_absorbed
from mlx_dsv3.model.moe import MLP

Note = Callable[[str, mx.array, int], None]  # name, sums (B, ...) over rows, how many rows


class Watched(nn.Module):
    """A layer that tells the sum of squares of what it is given, for one name or several.

    A module, so that the one that holds it still finds it among its parameters.
    """

    def __init__(self, layer: nn.Module, names: list[str], note: Note):
        super().__init__()
        self.layer, self._names, self._note = layer, names, note

    def __call__(self, x: mx.array):
        tell(self._names, x, self._note)
        return self.layer(x)


def tell(names: list[str], x: mx.array, note: Note) -> None:
    """Note the sums of squares of x (B, L, in), or of each head's (B, H, L, in)."""
    squares = mx.square(x.astype(mx.float32)).sum(-2, keepdims=x.ndim == 4)
    for name in names:
        note(name, squares, x.shape[0] * x.shape[-2])


class Absorbed:
    """Latent attention in the absorbed form, each window for itself: scores of one are alive."""

    def __init__(self, attention: MLA):
        self.attention = attention

    def __call__(self, x: mx.array, cache=None, last: int | None = None) -> mx.array:
        out = [self.attend(x[i : i + 1]) for i in range(len(x))]
        return mx.concatenate(out)

    def attend(self, x: mx.array) -> mx.array:
        module = self.attention
        queries_and_rows = module.project(x, 0)
        up = module.embed_q, module.unembed_out
        out = attend_absorbed(*queries_and_rows, *up, module.scale)  # (1, H, L, V)
        return module.o_proj(out.swapaxes(1, 2).flatten(-2))


class WithInput:
    """A projection of a bank whose result carries its input along: (..., out + in)."""

    def __init__(self, projection):
        self.projection = projection

    def gather(self, x: mx.array, slots: mx.array, is_sorted: bool) -> mx.array:
        return mx.concatenate([self.projection.gather(x, slots, is_sorted), x], axis=-1)

    def multiply(self, x: np.ndarray, slot: int) -> np.ndarray:
        return np.concatenate([self.projection.multiply(x, slot), x], axis=-1)

    def __getattr__(self, name: str):
        return getattr(self.projection, name)


class WatchedExperts:
    """The routed experts of a layer; sums are (E, in), over the rows that were routed to each."""

    def __init__(self, experts, prefix: str, note: Note):
        self.experts, self.prefix, self.note = experts, prefix, note
        experts.bank.down = WithInput(experts.bank.down)

    def __call__(self, x: mx.array, indices: mx.array, meanwhile: mx.array | None) -> mx.array:
        D, E = x.shape[-1], self.experts.bank.num_experts
        y, hidden = mx.split(self.experts(x, indices, meanwhile), [D], axis=-1)
        for name, rows in (("gate_proj", x[..., None, :]), ("down_proj", hidden)):
            squares = mx.square(rows.astype(mx.float32))  # (B, L, 1, D), (B, L, K, F)
            sums = mx.zeros((E, squares.shape[-1])).at[indices].add(squares)
            self.note(f"{self.prefix}{name}", sums[None], 0)
        counts = mx.zeros((E,), mx.int32).at[indices].add(mx.ones(indices.shape, mx.int32))
        self.note(f"{self.prefix}rows", counts[None], 0)
        return y


def watch(loaded: Loaded, note: Note) -> None:
    """Have every linear layer of a model, and of its MTP module, tell `note` what it is given."""
    blocks = [*loaded.model.layers, *([loaded.mtp] if loaded.mtp else [])]
    for i, block in enumerate(blocks):
        watch_block(block, layer_prefix(i), note)
    if loaded.mtp:
        replace(loaded.mtp, "eh_proj", layer_prefix(len(blocks) - 1), note)


def replace(module: nn.Module, layer: str, prefix: str, note: Note, *names: str) -> None:
    """Put a listener in the place of a layer, which stands for `names` where it joins several."""
    told = [prefix + name for name in names or (layer,)]
    setattr(module, layer, Watched(getattr(module, layer), told, note))


def watch_block(block: DecoderLayer, prefix: str, note: Note) -> None:
    attention, where = block.self_attn, f"{prefix}self_attn."
    is_low_rank = "q_b_proj" in attention
    query = "q_a_proj" if is_low_rank else "q_proj"
    replace(attention, "qkv_a_proj", where, note, query, "kv_a_proj_with_mqa")
    for name in (*(["q_b_proj"] * is_low_rank), "embed_q", "unembed_out", "o_proj"):
        replace(attention, name, where, note)
    block.self_attn = Absorbed(attention)
    if isinstance(block.mlp, MLP):
        watch_mlp(block.mlp, f"{prefix}mlp.", note)
        return
    if "shared_experts" in block.mlp:
        watch_mlp(block.mlp.shared_experts, f"{prefix}mlp.shared_experts.", note)
    block.mlp.experts = WatchedExperts(block.mlp.experts, f"{prefix}mlp.experts.", note)


def watch_mlp(mlp: MLP, prefix: str, note: Note) -> None:
    replace(mlp, "gate_up_proj", prefix, note, "gate_proj", "up_proj")
    replace(mlp, "down_proj", prefix, note)


def go_through(loaded: Loaded, ids: mx.array, note: Note) -> None:
    """Run windows (B, L) through a watched model, and their pairs through its MTP module.

    No logits are computed: what enters the head is the main model's last states, and no draft's.
    """
    states = loaded.model.hidden(ids)
    tell(["lm_head"], states, note)
    if loaded.mtp and ids.shape[1] > 1:
        mx.eval(loaded.mtp.states(states[:, :-1], ids[:, 1:]))
