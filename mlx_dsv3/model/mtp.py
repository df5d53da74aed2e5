"""The multi-token-prediction module: one more decoder layer that predicts the token after next.

It reads pairs (state g_j after the main model's final norm, token t_{j+1}) and has its own
latent cache over pairs. Embedding and head are the main model's (DeepSeek-V3 report 2.2, spec 4).
It only computes; drafting, acceptance and rollback are elsewhere.
"""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn

from mlx_dsv3.config import ModelArgs
from mlx_dsv3.model.cache import LatentCache
from mlx_dsv3.model.decoder import DecoderLayer, Model
from mlx_dsv3.model.linear import Linear


class MTP(DecoderLayer):
    def __init__(self, args: ModelArgs, model: Model):
        super().__init__(args, args.num_hidden_layers)  # the layer after the last
        D, eps = args.hidden_size, args.rms_norm_eps
        self.enorm = nn.RMSNorm(D, eps=eps)
        self.hnorm = nn.RMSNorm(D, eps=eps)
        self.eh_proj = Linear(2 * D, D)
        self.shared_head = nn.Module()  # its head is the main model's, its norm is not
        self.shared_head.norm = nn.RMSNorm(D, eps=eps)
        # No module, so that what is borrowed from the main model adds no parameters here.
        self.shared = SimpleNamespace(embed_tokens=model.model.embed_tokens, lm_head=model.lm_head)

    def pairs(self, g: mx.array, next_ids: mx.array) -> mx.array:
        """Return the block's input (B, L, D) for states g (B, L, D) and the ids that follow."""
        embedding = self.enorm(self.shared.embed_tokens(next_ids))
        # Embedding first, as every release has its weights; the paper writes it last (spec 4.1).
        return self.eh_proj(mx.concatenate([embedding, self.hnorm(g)], axis=-1))

    def states(self, g: mx.array, next_ids: mx.array, cache=None, last=None) -> mx.array:
        """Return f (B, L, D) for states g (B, L, D) and the tokens (B, L) that follow them.

        With `last`, f of the last so many pairs; of the others only their cache rows are wanted:
        no attention, no experts. To draft once more, f of the last pair takes the place of g
        (after `shared_head.norm`, spec 4.1). Positions count pairs: the first is 0.
        """
        return self.shared_head.norm(super().__call__(self.pairs(g, next_ids), cache, last))

    def extend(self, g: mx.array, next_ids: mx.array, cache: LatentCache) -> None:
        """Put pairs into the cache without computing the block: no attention, no experts."""
        x = self.input_layernorm(self.pairs(g, next_ids))
        cache.append(self.self_attn.project(x, cache.length)[-1])

    def __call__(self, g: mx.array, next_ids: mx.array, cache=None) -> tuple[mx.array, mx.array]:
        """Return logits (B, L, vocabulary), where row j predicts t_{j+2}, and states f."""
        f = self.states(g, next_ids, cache)
        return self.shared.lm_head(f), f

    def make_cache(self) -> LatentCache:
        return LatentCache()
