"""What we take from mlx-lm, name by name, and what we rely on beyond the name.

A release of mlx-lm that changes one of these fails here, in words, before a model is wrong.
"""

import ast
import inspect
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import tiny
from compare import same_bits
from mlx_folder import write_json, write_tokenizer
from mlx_lm.generate import generate_step
from mlx_lm.models import activations
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.mla import MultiLinear
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_logits_processors
from mlx_lm.utils import load_tokenizer

from mlx_dsv3.model.cache import LatentCache
from mlx_dsv3.model.linear import swiglu

ROOT = Path(__file__).parents[1]
# Every name that the package imports from mlx-lm; each has a test below.
CONTRACT = {
    "mlx_lm.models.mla.MultiLinear",
    "mlx_lm.sample_utils.apply_min_p",
    "mlx_lm.sample_utils.apply_top_k",
    "mlx_lm.sample_utils.apply_top_p",
    "mlx_lm.sample_utils.make_logits_processors",
    "mlx_lm.utils.load_tokenizer",
}


def imported_names() -> set[str]:
    names = set()
    sources = [*(ROOT / "mlx_dsv3").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]
    for path in [*sources, ROOT / "chat.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "mlx_lm":
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {a.name for a in node.names if a.name.split(".")[0] == "mlx_lm"}
    return names


def test_contract_lists_what_is_imported():
    """A name taken from mlx-lm without saying what we expect of it, or one no longer used."""
    assert imported_names() == CONTRACT


# --- the cache ------------------------------------------------------------------------------


def test_generators_of_mlx_lm_use_our_cache(random_pair):
    """make_prompt_cache must ask the model; generate_step evaluates `state` and knows no rows."""
    model = random_pair(tiny.A).model
    cache = make_prompt_cache(model)
    assert [type(each) for each in cache] == [LatentCache] * 4
    prompt, ids = mx.array([5, 7, 11]), [5, 7, 11]
    for token, _ in generate_step(prompt, model, max_tokens=4, prompt_cache=cache):
        assert token == mx.argmax(model(mx.array([ids]))[0, -1]).item()
        ids.append(token)
    assert len(ids) == 7


# --- layers ---------------------------------------------------------------------------------


def test_swiglu():
    """Ours is theirs, bit for bit; silu of the first argument."""
    gate, up = mx.random.normal((3, 8)), mx.random.normal((3, 8))
    assert same_bits(swiglu(gate, up), activations.swiglu(gate, up))
    assert not mx.allclose(swiglu(gate, up), nn.silu(up) * gate, rtol=1e-3)


def test_multi_linear():
    """Weight (H, out, in), `transpose=False` for the other direction, and its packed form."""
    layer = MultiLinear(64, 32, 3)
    assert layer.weight.shape == (3, 32, 64)
    x, y = mx.random.normal((2, 1, 5, 64)), mx.random.normal((2, 1, 5, 32))
    assert mx.allclose(layer(x), x @ layer.weight.swapaxes(-1, -2), rtol=1e-5, atol=1e-5)
    assert mx.allclose(layer(y, transpose=False), y @ layer.weight, rtol=1e-5, atol=1e-5)
    for mode, size in ("affine", 64), ("mxfp4", 32):
        packed = layer.to_quantized(group_size=size, bits=4, mode=mode)
        assert (packed.bits, packed.group_size, packed.mode) == (4, size, mode)
        assert packed.weight.shape == (3, 32, 8) and packed.scales.shape == (3, 32, 64 // size)
        assert (packed.get("biases") is None) == (mode == "mxfp4")
        wide = mx.dequantize(
            packed.weight, packed.scales, packed.get("biases"), size, 4, mode, dtype=mx.float32
        )
        expected = x @ wide.swapaxes(-1, -2)
        assert mx.allclose(packed(x), expected, rtol=1e-4, atol=1e-4)


def test_nn_quantize_replaces_our_layers():
    """nn.quantize asks for `to_quantized` and takes per-layer settings from the predicate."""
    module = nn.Module()
    module.embed_q, module.norm = MultiLinear(64, 32, 2), nn.RMSNorm(64)
    nn.quantize(
        module,
        class_predicate=lambda path, layer: (
            hasattr(layer, "to_quantized") and {"group_size": 32, "bits": 8, "mode": "affine"}
        ),
    )
    assert module.embed_q.bits == 8 and module.embed_q.group_size == 32
    assert isinstance(module.norm, nn.RMSNorm)


# --- sampling and text ----------------------------------------------------------------------


def test_sampling_filters():
    """They take and return log-probabilities (B, V); what is cut becomes -inf."""
    probabilities = mx.array([[0.5, 0.3, 0.15, 0.05]])
    log = mx.log(probabilities)

    def kept(filtered: mx.array) -> list[bool]:
        assert filtered.shape == log.shape
        survivors = filtered > -mx.inf
        assert same_bits(mx.where(survivors, filtered, 0.0), mx.where(survivors, log, 0.0))
        return survivors[0].tolist()

    assert kept(apply_top_k(log, 2)) == [True, True, False, False]
    assert kept(apply_top_p(log, 0.7)) == [True, True, False, False]
    assert kept(apply_min_p(log, 0.2)) == [True, True, True, False]


def test_repetition_penalty_divides_what_was_said():
    """A processor takes (ids, logits of one row); negative logits are multiplied instead."""
    (penalty,) = make_logits_processors(repetition_penalty=2.0)
    logits = mx.array([[4.0, -4.0, 1.0]])
    assert penalty(mx.array([0, 1]), logits + 0).tolist() == [[2.0, -8.0, 1.0]]
    assert make_logits_processors() == []


def test_load_tokenizer(tmp_path):
    """A folder with tokenizer.json; the wrapper's ids, vocabulary, end tokens and text."""
    write_tokenizer(tmp_path, 12)
    write_json(tmp_path / "config.json", {"model_type": "deepseek_v3"})
    parameters = list(inspect.signature(load_tokenizer).parameters)
    assert parameters == ["model_path", "tokenizer_config_extra", "eos_token_ids"]
    tokenizer = load_tokenizer(tmp_path, {"trust_remote_code": False}, eos_token_ids=1)
    assert tokenizer.eos_token_ids == {1}
    assert tokenizer.encode("w3 w11", add_special_tokens=False) == [3, 11]
    assert max(tokenizer.get_vocab().values()) == 11
    assert tokenizer.decode([3, 11]) == "w3 w11"
    several = load_tokenizer(tmp_path, {"trust_remote_code": False}, eos_token_ids=[1, 5])
    assert several.eos_token_ids == {1, 5}
