"""The multi-token-prediction module: one more decoder layer that predicts the token after next.

It reads pairs (state g_j after the main model's final norm, token t_{j+1}) and has its own
latent cache over pairs. Embedding and head are the main model's. It only computes; drafting,
acceptance and rollback are elsewhere.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_dsv3.config import ModelArgs
from mlx_dsv3.model.cache import LatentCache
from mlx_dsv3.model.decoder import DecoderLayer, Model
from mlx_dsv3.model.linear import Linear


class SharedHead(nn.Module):
    """The module's own final norm (not `model.norm`); the head itself is the main model's."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)


class Shared:
    """What the module borrows from the main model; no module, so it owns no parameters."""

    def __init__(self, model: Model):
        self.embed_tokens = model.model.embed_tokens
        self.lm_head = model.lm_head


class MTP(DecoderLayer):
    def __init__(self, args: ModelArgs, model: Model):
        super().__init__(args, is_moe=True)
        self.enorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.hnorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.eh_proj = Linear(2 * args.hidden_size, args.hidden_size)
        self.shared_head = SharedHead(args)
        self.shared = Shared(model)

    def states(self, g: mx.array, next_ids: mx.array, cache=None) -> mx.array:
        """Return f (B, L, D) for states g (B, L, D) and the tokens (B, L) that follow them.

        To draft once more, f of the last pair takes the place of g (after `shared_head.norm`,
        spec 4.1). Positions count pairs: the first is 0.
        """
        return self.shared_head.norm(super().__call__(self.pairs(g, next_ids), cache))

    def pairs(self, g: mx.array, next_ids: mx.array) -> mx.array:
        """Return the block's input (B, L, D) for states and the tokens that follow them."""
        embedding = self.enorm(self.shared.embed_tokens(next_ids))
        pair = mx.concatenate([embedding, self.hnorm(g)], axis=-1)  # embedding first
        return self.eh_proj(pair)

    def last_state(self, g: mx.array, next_ids: mx.array, cache) -> mx.array:
        """Put pairs into the cache and return f (B, 1, D) of the last: `states`, at less cost.

        Of the others only their cache rows are wanted: no attention, no experts.
        """
        x = self.pairs(g, next_ids)  # (B, L, D)
        h = x[:, -1:] + self.self_attn(self.input_layernorm(x), cache, last=1)
        return self.shared_head.norm(h + self.mlp(self.post_attention_layernorm(h)))

    def extend(self, g: mx.array, next_ids: mx.array, cache) -> None:
        """Put pairs into the cache without computing the block: no attention, no experts."""
        self.self_attn.extend(self.input_layernorm(self.pairs(g, next_ids)), cache)

    def __call__(self, g: mx.array, next_ids: mx.array, cache=None) -> tuple[mx.array, mx.array]:
        """Return logits (B, L, vocabulary), where row j predicts t_{j+2}, and states f."""
        f = self.states(g, next_ids, cache)
        return self.shared.lm_head(f), f

    def make_cache(self) -> LatentCache:
        """Return an empty latent cache over pairs."""
        return LatentCache()
