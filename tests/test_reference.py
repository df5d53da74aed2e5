"""The reference against transformers, against itself in other dtypes, and its FP8 and loading."""

import json

import numpy as np
import pytest
import tiny
import torch
from compare import LOGITS, ORACLE, Bound, assert_close, relative_error
from parity.pairs import BIAS_MEANS, CONFIGS, load_reference, random_ids
from safetensors.torch import load_file, save_file

from mlx_dsv3.errors import UserError
from mlx_dsv3.reference import model as reference
from mlx_dsv3.reference.fp8 import dequantize_blocks, expand_scales, quantize_blocks
from mlx_dsv3.reference.weights import load


def random_reference(config: dict, bias_mean=2.0, dtype=torch.float32) -> reference.Model:
    return load_reference(config, tiny.random_tensors(config, 0, bias_mean), dtype)


# --- against transformers -------------------------------------------------------------------


@pytest.mark.parametrize("bias_mean", BIAS_MEANS)
@pytest.mark.parametrize("name", CONFIGS)
def test_reference_agrees_with_transformers(oracle, name, bias_mean):
    """The second opinion must be right: logits, final states, MTP logits and MTP states."""
    config, ids = tiny.CONFIGS[name], random_ids(2, 23)
    judge, model = oracle(config, bias_mean), random_reference(config, bias_mean)
    expected, expected_g = judge(ids)
    logits, g = model(ids)
    assert_close(f"{name} logits", logits, expected, ORACLE)
    assert_close(f"{name} states", g, expected_g, ORACLE)
    drafted, expected_f = judge.mtp(expected_g[:, :-1], ids[:, 1:])
    drafts, f = model.mtp(g[:, :-1], ids[:, 1:])
    assert_close(f"{name} MTP logits", drafts, drafted, ORACLE)
    assert_close(f"{name} MTP states", f, expected_f, ORACLE)


def test_router_chooses_what_transformers_chooses(oracle):
    """Equal logits by luck: the routed ids of every layer are compared too."""
    ids = random_ids(1, 200)
    judge, model = oracle(tiny.A, -1.0), random_reference(tiny.A, -1.0)
    ours, theirs, hooks = [], [], []
    for layer in model.model.layers[1:4]:
        hooks += [layer.mlp.gate.register_forward_hook(lambda m, x, y: ours.append(y[0]))]
    for layer in judge.model.model.layers[1:4]:
        hooks += [layer.mlp.gate.register_forward_hook(lambda m, x, y: theirs.append(y[2]))]
    model(ids)
    judge(ids)
    for hook in hooks:
        hook.remove()
    assert len(ours) == len(theirs) == 3
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.sort(-1).values, other.sort(-1).values)


# --- against itself -------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [(10, 5, 8), (1,) * 23, (20, 2, 1)])
@pytest.mark.parametrize("name", CONFIGS)
def test_cached_equals_full(name, chunks):
    """A chunk's positions or mask that forget the cache: main model and MTP."""
    model, ids = random_reference(tiny.CONFIGS[name], 0.0), random_ids(1, 23)
    expected, g = model(ids)
    drafted, _ = model.mtp(g[:, :-1], ids[:, 1:])
    cache, start, logits, drafts = model.make_cache(), 0, [], []
    for length in chunks:
        end = start + length
        logits.append(model(ids[:, start:end], cache)[0])
        pairs = slice(start, min(end, 22))
        if pairs.start < pairs.stop:
            drafts.append(
                model.mtp(g[:, pairs], ids[:, pairs.start + 1 : pairs.stop + 1], cache)[0]
            )
        start = end
    assert_close(f"{name} logits", torch.cat(logits, 1), expected, ORACLE)
    assert_close(f"{name} MTP", torch.cat(drafts, 1), drafted, ORACLE)


@pytest.mark.parametrize("name", CONFIGS)
def test_float64_and_bf16(name):
    """A constant in the wrong dtype: float64 that is float32 inside, bf16 that widens or overflows.

    A random model's routing flips in bf16 and its logits decorrelate (spec 5.3), so bf16 is
    compared one layer at a time, with a bias that leaves the router no choice.
    """
    config, ids = tiny.CONFIGS[name], random_ids(1, 23)
    single, double = random_reference(config), random_reference(config, dtype=torch.float64)
    logits, g = double(ids)
    assert logits.dtype == g.dtype == torch.float64
    assert_close(f"{name} float32", single(ids)[0], logits, ORACLE)

    half = random_reference(config, dtype=torch.bfloat16)
    x = torch.randn(1, 23, config["hidden_size"])
    for i, layer in enumerate(half.model.layers[: config["num_hidden_layers"]]):
        exact = double.model.layers[i]
        for module in (*layer.modules(), *exact.modules()):
            if isinstance(module, reference.Gate):
                module.e_score_correction_bias.data += 10 * torch.arange(len(module.weight))
        out = layer(x.bfloat16())
        assert out.dtype == torch.bfloat16
        error = relative_error(out, exact(x.bfloat16().double()))
        assert 1e-3 < error < 2e-2, f"layer {i}: {error:.1e}"
    assert half(ids)[0].dtype == torch.bfloat16
    assert half.model.layers[-1].mlp.gate.e_score_correction_bias.dtype == torch.float32


def test_float64_is_float64_throughout():
    """Rope angles, norms or router in float32 inside a float64 model would floor it at 1e-7."""
    config, ids = tiny.C, random_ids(1, 23)
    model = random_reference(config, dtype=torch.float64)
    logits, _ = model(ids)
    chunks, start, cache = [], 0, model.make_cache()
    for length in 10, 13:
        chunks.append(model(ids[:, start : start + length], cache)[0])
        start += length
    assert_close("float64 in chunks", torch.cat(chunks, 1), logits, Bound(1e-12, 1e-13, 1e-15))
    scaled = random_reference(config, dtype=torch.float64)
    for name, parameter in scaled.named_parameters():  # undone by the norm, but for its eps
        if name.endswith("kv_a_proj_with_mqa.weight"):
            parameter.data[: config["kv_lora_rank"]] *= 1 + 2**-30
    assert 0 < relative_error(scaled(ids)[0], logits) < 1e-10


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-13), (torch.float32, 2**-24)])
def test_rotation_is_exact_in_its_dtype(dtype, error):
    """Angles of a float64 model in float32: at position 8,000 that is 5e-4 rad, not 1e-12."""
    args, start = reference.Args.from_dict(tiny.C), 8000
    x = torch.randn(3, args.qk_rope_head_dim, dtype=dtype)
    actual = reference.apply_rope(x, *reference.rotation(args, start, 3, x)).double()
    positions = torch.arange(start, start + 3, dtype=torch.float64)
    turn = torch.exp(1j * torch.outer(positions, reference.rope_frequencies(args))) * 1.0857264
    turned = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn)
    factor = turned.flatten(-2).norm() / actual.norm()  # 1.0857264 has eight digits
    assert factor == pytest.approx(1, rel=1e-6)
    assert (actual * factor - turned.flatten(-2)).abs().max() < 4 * (start + 3) * error


# --- FP8 blocks -----------------------------------------------------------------------------


def decode_e4m3(code: int) -> float:
    """Decode one byte by the format's definition (spec 2.3)."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def test_every_code():
    """All 256 codes: subnormals, the sign of zero, both NaN, and 448 as the largest."""
    codes = torch.arange(256, dtype=torch.uint8)
    decoded = dequantize_blocks(codes.view(torch.float8_e4m3fn)[None], torch.ones(1, 2))[0]
    expected = torch.tensor([decode_e4m3(code) for code in range(256)])
    assert torch.equal(decoded.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.equal(decoded[finite], expected[finite])
    assert torch.equal(decoded[finite].signbit(), expected[finite].signbit())
    assert decoded[0x7E] == 448 and decoded[1] == 2**-9


def random_codes(rows: int, columns: int) -> torch.Tensor:
    codes = torch.randint(0, 0x7E, (rows, columns), generator=torch.manual_seed(0))
    signs = torch.randint(0, 2, (rows, columns), generator=torch.manual_seed(1)) * 0x80
    return (codes + signs).to(torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("shape", [(576, 256), (192, 130), (1, 1), (127, 129), (128, 128)])
def test_scale_of_each_element(shape):
    """Row 575 uses scale row 4, not 575 // (576 / 5); the scale multiplies, whatever its name."""
    weight = random_codes(*shape)
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)) + 0.01  # no powers of two
    wide = dequantize_blocks(weight, scale)
    assert wide.shape == shape and wide.dtype == torch.float32
    for row in {0, shape[0] // 2, min(511, shape[0] - 1), shape[0] - 1}:
        for column in {0, shape[1] // 2, shape[1] - 1}:
            expected = weight[row, column].float() * scale[row // 128, column // 128]
            assert wide[row, column] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_in_every_dtype(dtype):
    """E8M0 is 2^(byte - 127); read as an integer, or as float8_e4m3, it is something else."""
    weight, scale = random_codes(192, 256), torch.tensor([[0.5, 2.0**-7], [4.0, 2.0**9]])
    wide = dequantize_blocks(weight, scale.to(dtype))
    assert torch.equal(wide, weight.float() * expand_scales(scale, (192, 256)))
    if dtype == torch.float8_e8m0fnu:
        assert scale.to(dtype).view(torch.uint8).tolist() == [[126, 120], [129, 136]]


def test_quantise_blocks_and_back():
    """Block maxima reach 448 exactly, partial blocks have their own, zero blocks stay zero."""
    weight = torch.randn(320, 200, generator=torch.manual_seed(0))
    weight[256:] *= 100
    weight[128:256, 128:] = 0
    codes, scale = quantize_blocks(weight)
    assert scale.shape == (3, 2) and codes.dtype == torch.float8_e4m3fn
    assert scale[0, 0] == weight[:128, :128].abs().max() / 448
    assert scale[2, 1] == weight[256:, 128:].abs().max() / 448
    assert scale[1, 1] == 1 and not codes[128:256, 128:].float().any()
    wide = dequantize_blocks(codes, scale)
    assert (wide - weight).abs().max() / weight.abs().max() < 0.04
    assert torch.equal(quantize_blocks(wide)[0].float(), codes.float()), "a fixed point"


# --- hub folders ----------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["fp8", "bf16"])
def test_load_reads_the_hub_layout(tmp_path, storage):
    """Every tensor by name, FP8 rounded to bfloat16, a scale in another shard than its weight."""
    config = tiny.D | {"num_hidden_layers": 2}
    tiny.write_hub(tmp_path, config, storage=storage, num_shards=3)
    shards = [load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    stored = {name: tensor for shard in shards for name, tensor in shard.items()}
    if storage == "fp8":
        apart = [
            name
            for shard in shards
            for name in shard
            if name + "_scale_inv" in stored and name + "_scale_inv" not in shard
        ]
        assert apart, "no scale lies in another shard than its weight"
    model = load(tmp_path)
    for name, tensor in model.state_dict().items():
        expected = stored[name]
        if name + "_scale_inv" in stored:
            expected = dequantize_blocks(expected, stored[name + "_scale_inv"]).bfloat16()
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected.float()), name
    double, half = load(tmp_path, torch.float64), load(tmp_path, torch.bfloat16)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert double.get_parameter(name).dtype == torch.float64
    assert torch.equal(half.get_parameter(name), stored[name])
    assert half.lm_head.weight.dtype == torch.bfloat16
    ids = random_ids(1, 23)
    assert_close("float64", model(ids)[0], double(ids)[0], LOGITS)


def test_load_single_file(tmp_path):
    """A small checkpoint has model.safetensors and no index."""
    tensors = tiny.random_tensors(tiny.B)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(tiny.B))
    ids = random_ids(1, 5)
    assert torch.equal(load(tmp_path)(ids)[0], random_reference(tiny.B)(ids)[0])


@pytest.mark.parametrize("suffix", ["", "_scale_inv"])
def test_load_names_a_missing_tensor(tmp_path, suffix):
    """A weight, or only its scale, is absent: raw FP8 codes must not pass for weights."""
    tiny.write_hub(tmp_path, tiny.A)
    name = "model.layers.0.mlp.up_proj.weight" + suffix
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][name]
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"`{name}` is in none of the shards"):
        load(tmp_path)


def test_load_refuses_a_wrong_shape(tmp_path):
    """A config of another width."""
    tiny.write_hub(tmp_path, tiny.A, storage="bf16")
    wide = tiny.A | {"intermediate_size": 97}
    (tmp_path / "config.json").write_text(json.dumps(wide))
    with pytest.raises(UserError, match=r"mlp.gate_proj.weight` has shape \(96, 64\)"):
        load(tmp_path)


def test_load_without_config(tmp_path):
    with pytest.raises(UserError, match="has no config.json"):
        load(tmp_path)


# --- config forms ---------------------------------------------------------------------------


def test_config_as_transformers_writes_it(tmp_path):
    """rope_parameters for rope_scaling and rope_theta: yarn must not be lost on the way."""
    from transformers import DeepseekV3Config

    config = tiny.C | {"rope_theta": 50000.0}
    known = {k: v for k, v in config.items() if k not in ("architectures", "torch_dtype")}
    DeepseekV3Config(**known).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written and "rope_scaling" not in written
    ours, theirs = reference.Args.from_dict(config), reference.Args.from_dict(written)
    np.testing.assert_array_equal(
        reference.rope_frequencies(ours), reference.rope_frequencies(theirs)
    )
    assert reference.softmax_scale(ours) == reference.softmax_scale(theirs)
    assert theirs.num_nextn_predict_layers == 1
