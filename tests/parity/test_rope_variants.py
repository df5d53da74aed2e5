"""Rope settings that no release has and transformers honours: pairs, attention factor, ramp.

transformers is the judge of what they mean; both sides here were written to it apart. Defaults of
absent fields are judged the same way.
"""

import dataclasses

import numpy as np
import pytest
import tiny
from compare import LOGITS, assert_close

from mlx_dsv3.config import ModelArgs
from mlx_dsv3.model.rope import rope_frequencies, rotation_factor
from mlx_dsv3.reference import model as reference
from parity.pairs import mlx_drafts, mlx_logits, mlx_pairs, random_ids

BASE = tiny.A | {"num_hidden_layers": 2}
VARIANTS = {
    "halves": {"rope_interleave": False},
    "halves without yarn": {"rope_interleave": False, "rope_scaling": None},
    "attention factor": {"rope_scaling": tiny.YARN | {"attention_factor": 2.0}},
    "ramp not truncated": {"rope_scaling": tiny.YARN | {"truncate": False}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_reference_and_transformers(random_pair, oracle, name):
    """Each was ignored by both sides alike: parity passed, and the logits were another model's."""
    config, ids = BASE | VARIANTS[name], random_ids(1, 23)
    pair, judge = random_pair(config), oracle(config)
    expected, g = pair.reference(ids)
    judged, _ = judge(ids)
    for chunks in ((), (10, 5, 8)):
        logits = mlx_logits(pair.model, ids, chunks)
        assert_close(f"{name} {chunks}, reference", logits, expected, LOGITS)
        assert_close(f"{name} {chunks}, transformers", logits, judged, LOGITS)
    drafts, _ = mlx_drafts(pair.mtp, *mlx_pairs(pair.model, ids), (22,))
    judged, _ = judge.mtp(g[:, :-1], ids[:, 1:])
    assert_close(f"{name} MTP", drafts, judged, LOGITS)


YARNS = {
    "V3": {},
    "not truncated": {"truncate": False},
    "Kimi's betas": {"beta_fast": 1.0, "beta_slow": 1.0},
    "Kimi's betas, not truncated": {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    "ends in reverse": {"original_max_position_embeddings": 1},
    "attention factor": {"attention_factor": 0.5},
    "null attention factor": {"attention_factor": None},
    "null betas": {"beta_fast": None, "beta_slow": None},
    "no mscales": {"mscale": None, "mscale_all_dim": None},
}


@pytest.mark.parametrize("name", YARNS)
def test_yarn_equals_transformers(name):
    """Frequencies and the factor of cos and sin, for every key that yarn has.

    A ramp whose ends are in reverse was taken for one whose ends are equal.
    """
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = tiny.A | {"qk_rope_head_dim": 64, "rope_scaling": tiny.YARN | YARNS[name]}
    known = {k: v for k, v in config.items() if k not in ("architectures", "torch_dtype")}
    freqs, factor = ROPE_INIT_FUNCTIONS["yarn"](DeepseekV3Config(**known))
    ours, theirs = ModelArgs.from_dict(config), reference.Args.from_dict(config)
    np.testing.assert_allclose(rope_frequencies(ours), freqs.numpy(), rtol=3e-6)
    np.testing.assert_allclose(reference.rope_frequencies(theirs), freqs.numpy(), rtol=3e-6)
    assert rotation_factor(ours) == pytest.approx(factor, rel=1e-12)
    cos, _ = reference.rotation(theirs, 0, 1, freqs)
    assert cos[0, 0].item() == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("args", [ModelArgs, reference.Args])
def test_absent_fields_mean_what_they_mean_to_transformers(args):
    """mlx-lm's one group, no dense layer and a scale of 1: a model routed quite otherwise.

    The MTP depth is the one difference: the model's own code has a field for it and no module.
    """
    from transformers import DeepseekV3Config

    theirs = DeepseekV3Config()
    for field in dataclasses.fields(args):
        absent = field.default is dataclasses.MISSING or field.name.startswith("rope_")
        if absent or field.name in ("num_nextn_predict_layers", "moe_layer_freq"):
            continue
        assert field.default == getattr(theirs, field.name), field.name
    assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert theirs.rope_interleave
