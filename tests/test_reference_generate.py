"""The reference's generation: its cache, its MTP loop and its sampler, on random models."""

import pytest
import tiny
import torch
from parity.pairs import load_reference

from mlx_dsv3.reference.generate import Counts, Sampler, generate

PROMPT = [5, 9, 150, 3, 77, 20]


def drafting_model():
    """Return a random model whose MTP module is right now and then (spec 7.2, item 3)."""
    config = tiny.A
    tensors = tiny.random_tensors(config, seed=3)
    prefix = f"model.layers.{config['num_hidden_layers']}."
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")) and not name.startswith(prefix):
            tensors[name] *= 0.2
    D = config["hidden_size"]
    noise = 0.15 * torch.randn(D, D, generator=torch.Generator().manual_seed(0)) / D**0.5
    tensors[prefix + "eh_proj.weight"] = torch.cat([torch.eye(D), noise], dim=1)
    tensors[prefix + "enorm.weight"] = torch.ones(D)
    tensors[prefix + "shared_head.norm.weight"] = tensors["model.norm.weight"].clone()
    return load_reference(config, tensors)


@pytest.fixture(scope="module")
def model():
    return drafting_model()


@torch.inference_mode()
def test_greedy_with_a_cache_is_greedy_without(model):
    """Each token is the argmax of a full forward pass over everything before it."""
    tokens = list(generate(model, PROMPT, 12))
    seq = list(PROMPT)
    for token in tokens:
        assert token == int(model(torch.tensor([seq]))[0][0, -1].argmax())
        seq.append(token)


@torch.inference_mode()
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temp=0.7, top_p=0.9, seed=4)])
@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
def test_drafts_change_no_token(model, drafts, sampler):
    """Rejected rows left in a cache, a pair fed twice, a draft judged by the row after its own."""
    expected = list(generate(model, PROMPT, 40, sampler=sampler))
    counts = Counts()
    assert (
        list(generate(model, PROMPT, 40, sampler=sampler, drafts=drafts, counts=counts)) == expected
    )
    assert counts.drafted > counts.accepted > 0 or sampler.temp, "no mixture of acceptance"


@torch.inference_mode()
def test_stops(model):
    """At a stop token inside accepted drafts, and at the limit, to the token."""
    tokens = list(generate(model, PROMPT, 30))
    stop = tokens[9]
    for drafts in (0, 3):
        until = list(generate(model, PROMPT, 30, drafts=drafts, stop=[stop]))
        assert until == tokens[: tokens.index(stop) + 1]
        for limit in (1, 2, 7):
            assert list(generate(model, PROMPT, limit, drafts=drafts)) == tokens[:limit]


def test_sampler_follows_the_distribution():
    """Frequencies over 20,000 positions against the softmax of a few logits, chi-square."""
    logits, count = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]]), 20_000
    sampler = Sampler(temp=0.8, seed=1)
    noise = torch.stack([sampler.noise(position, 5) for position in range(count)])
    drawn = (logits.double().log_softmax(-1) / 0.8 + noise).argmax(-1)
    assert sampler(logits, 17) == [int(drawn[17])]
    expected = (logits[0].double() / 0.8).softmax(-1) * count
    observed = torch.bincount(drawn, minlength=5)
    assert ((observed - expected).square() / expected).sum() < 18.5  # 4 degrees, p = 0.001


def test_top_p_keeps_the_nucleus():
    """The tokens whose mass before them is below top_p: two of these four."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    sampler = Sampler(temp=1.0, top_p=0.6, seed=0)
    assert {sampler(logits, position)[0] for position in range(200)} == {0, 1}
