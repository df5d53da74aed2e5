"""transformers' DeepseekV3ForCausalLM and MTP model: the oracle that neither side was written from.

Eager attention, eager experts, float32, read with `from_pretrained` from a folder in the hub's own
layout, so the tensor names are tested too. transformers 5.24 looks for MTP tensors in layer 61
alone (spec 4.7); a small model overrides that pattern.
"""

import pytest
import torch
from transformers import DeepseekV3ForCausalLM
from transformers.cache_utils import DynamicCache, MtpCache
from transformers.modeling_layers import MtpModel
from transformers.utils import logging


class Oracle:
    """Logits, final states and MTP logits as transformers computes them."""

    def __init__(self, folder, num_hidden_layers: int):
        pattern = [rf"model\.layers\.{num_hidden_layers}\..*"]
        logging.disable_progress_bar()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", pattern)
            self.model = DeepseekV3ForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="eager",
                experts_implementation="eager",
            ).eval()
            self.mtp_model = MtpModel.from_pretrained(self.model).eval()

    @torch.no_grad()
    def __call__(self, ids, cache: DynamicCache | None = None):
        """Return logits and the states after the final norm, as the reference does."""
        # By position: the cache is `past_key_values` in transformers 5.23, `cache` from 5.24 on.
        states = self.model.model(ids, None, None, cache).last_hidden_state
        return self.model.lm_head(states), states

    def make_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def make_mtp_cache(self) -> MtpCache:
        return MtpCache(config=self.mtp_model.config)

    @torch.no_grad()
    def mtp(self, g, next_ids, cache: MtpCache | None = None):
        """Return MTP logits and states; pair j has position j + 1 here (spec 4.1)."""
        cache = self.make_mtp_cache() if cache is None else cache
        start = cache.get_seq_length() + 1
        positions = torch.arange(start, start + next_ids.shape[1])[None]
        f = self.mtp_model.forward_layer(0, g, positions, cache, input_ids=next_ids)
        return self.mtp_model._project_to_logits(f), f
