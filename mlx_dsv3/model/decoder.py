"""The decoder: layers, embedding, head. Everything but the MTP module.

`Model(ids, cache)` returns logits as mlx-lm's generators expect; `Model.hidden` returns the
states after the final norm, which the MTP module reads.
"""

from collections import deque

import mlx.core as mx
import mlx.nn as nn

from mlx_dsv3.config import ModelArgs
from mlx_dsv3.model.cache import LatentCache
from mlx_dsv3.model.linear import Linear
from mlx_dsv3.model.mla import ABSORBED_MAX_QUERIES, MLA
from mlx_dsv3.model.moe import MLP, MoE


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs, i: int):
        super().__init__()
        D, eps = args.hidden_size, args.rms_norm_eps
        self.self_attn = MLA(args)
        self.mlp = MoE(args) if args.is_moe_layer(i) else MLP(D, args.intermediate_size)
        self.input_layernorm = nn.RMSNorm(D, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(D, eps=eps)

    def __call__(self, h: mx.array, cache=None, last: int | None = None) -> mx.array:
        """Return the states (B, L, D) after this layer; with `last`, of the last so many only."""
        attended = self.self_attn(self.input_layernorm(h), cache, last)
        h = (h[:, -last:] if last else h) + attended
        return h + self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [DecoderLayer(args, i) for i in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def through(self, ids: mx.array, cache=None):
        """Yield the states (B, L, D) after each layer, and after the final norm."""
        h = self.embed_tokens(ids)
        for i, layer in enumerate(self.layers):
            h = layer(h, cache[i] if cache else None)
            if ids.shape[1] > ABSORBED_MAX_QUERIES:
                mx.eval(h)  # bounds the memory of a lazy prefill to one layer
            yield h
        yield self.norm(h)

    def __call__(self, ids: mx.array, cache=None) -> mx.array:
        return deque(self.through(ids, cache), maxlen=1).pop()


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model = Decoder(args)
        self.lm_head = Linear(args.hidden_size, args.vocab_size)

    def hidden(self, ids: mx.array, cache=None) -> mx.array:
        """Return the states after the final norm, g (B, L, D), for ids (B, L)."""
        return self.model(ids, cache)

    def __call__(self, ids: mx.array, cache=None) -> mx.array:
        """Return logits (B, L, vocabulary) for ids (B, L)."""
        return self.lm_head(self.hidden(ids, cache))

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.model.layers

    def make_cache(self) -> list[LatentCache]:
        return [LatentCache() for _ in self.layers]
