"""Folders that load, whoever wrote them, and folders that must be refused in words."""

import json
import shutil
import struct

import mlx.core as mx
import pytest
import tiny
from compare import LOGITS, Bound, assert_close, same_bits
from mlx.utils import tree_flatten, tree_map
from mlx_folder import save_ordered, to_mlx, write_json, write_mlx, write_tokenizer
from mlx_lm.utils import load_model as load_in_mlx_lm
from mlx_lm.utils import quantize_model, save_config, save_model
from parity.pairs import load_reference, random_ids

from mlx_dsv3.checkpoint.headers import read_header, read_headers
from mlx_dsv3.errors import UserError
from mlx_dsv3.load import load, load_model

Q4 = {"bits": 4, "group_size": 64, "mode": "affine"}
Q8 = {"bits": 8, "group_size": 64, "mode": "affine"}
MXFP4 = {"bits": 4, "group_size": 32, "mode": "mxfp4"}
TRUNK, EXPERTS = "model-trunk-00001.safetensors", "model-experts-00001.safetensors"
INDEX = "model.safetensors.index.json"
SMALL_D = tiny.D | {"num_hidden_layers": 2}
# Both sides in float32 on the same packed weights: what the project asks for beside mlx-lm.
MLX_LM = Bound(absolute=1e-4, relative=1e-5, cosine=1e-9)


@pytest.fixture
def folder(random_folder, tmp_path):
    """Return a copy, to damage, of a small folder with an MTP sidecar and a tokenizer."""
    source, _ = random_folder(tiny.A | {"num_hidden_layers": 2})
    copied = tmp_path / "model"
    shutil.copytree(source, copied)
    write_tokenizer(copied, tiny.A["vocab_size"])
    return copied


def logits_of(folder, ids, **options) -> mx.array:
    loaded = load_model(folder, **options)
    model, store = loaded.model, loaded.store
    store.close()
    return model(mx.array(ids.numpy()))


def widen(model):
    """Set a model of mlx-lm to float32."""
    floats = mx.floating
    model.update(
        tree_map(
            lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, floats) else a,
            model.parameters(),
        )
    )
    return model


# --- what loads -----------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [None, Q4, Q8, MXFP4])
def test_both_arrangements_are_one_model(tmp_path, packing):
    """Records and stacked tensors of the same weights: the same bits in every logit."""
    tensors, ids = tiny.random_tensors(SMALL_D), random_ids(1, 23)
    for arrangement in "records", "stacked":
        write_mlx(
            tmp_path / arrangement, SMALL_D, tensors, arrangement=arrangement, packing=packing
        )
    records = logits_of(tmp_path / "records", ids)
    assert same_bits(logits_of(tmp_path / "stacked", ids), records)


@pytest.mark.parametrize("packing", [None, Q4, MXFP4])
def test_records_load_in_mlx_lm(tmp_path, packing):
    """Our folder is an ordinary mlx-lm folder: it loads strictly there, with equal logits.

    Bias mean +2, where mlx-lm's zero mask chooses the same experts (spec 3.5).
    """
    write_mlx(tmp_path, SMALL_D, tiny.random_tensors(SMALL_D), packing=packing)
    ids = random_ids(1, 23)
    theirs = widen(load_in_mlx_lm(tmp_path, strict=True)[0])(mx.array(ids.numpy()))
    assert_close("mlx-lm", logits_of(tmp_path, ids), theirs, MLX_LM)


@pytest.mark.parametrize("packing", [None, Q4, Q8])
def test_folder_saved_by_mlx_lm_loads(tmp_path, packing):
    """mlx-lm's own save: stacked experts, its index, its `quantization` block, no sidecar."""
    write_mlx(tmp_path / "ours", SMALL_D, tiny.random_tensors(SMALL_D))
    model, config = load_in_mlx_lm(tmp_path / "ours")
    if packing:
        model, config = quantize_model(model, config, packing["group_size"], packing["bits"])
    save_model(tmp_path / "theirs", model)
    save_config(config, tmp_path / "theirs" / "config.json")
    ids = random_ids(1, 23)
    loaded = load_model(tmp_path / "theirs")
    ours, mtp, store = loaded.model, loaded.mtp, loaded.store
    store.close()
    assert mtp is None, "mlx-lm drops the MTP layer"
    logits = ours(mx.array(ids.numpy()))
    assert_close("mlx-lm", logits, widen(model)(mx.array(ids.numpy())), MLX_LM)


@pytest.mark.parametrize("packing", [None, Q4, Q8])
def test_old_folder_with_kv_b_proj(tmp_path, packing):
    """Folders from before mlx-lm split it: the same arrays as mlx-lm makes of them, bit by bit.

    A packed one is dequantised and quantised again along other axes; MTP likewise.
    """
    write_mlx(tmp_path, SMALL_D, tiny.random_tensors(SMALL_D), split_kv_b=False, packing=packing)
    loaded = load_model(tmp_path, dtype=mx.bfloat16)
    model, mtp, store = loaded.model, loaded.mtp, loaded.store
    store.close()
    theirs, _ = load_in_mlx_lm(tmp_path, strict=True)
    for layer, expected in zip(model.layers, theirs.layers, strict=True):
        for name in "embed_q", "unembed_out":
            ours = dict(tree_flatten(layer.self_attn[name].parameters()))
            for part, array in tree_flatten(expected.self_attn[name].parameters()):
                assert same_bits(ours[part], array), f"{name}.{part}"
    assert mtp.self_attn.embed_q.weight.shape[0] == SMALL_D["num_attention_heads"]


@pytest.mark.parametrize("packing", [None, Q4, Q8, MXFP4])
def test_old_folder_equals_its_tensors(tmp_path, packing):
    """K and V heads in the right halves, also where mlx-lm has no code (mxfp4, MTP).

    Quantised again, 4 bits err by up to a tenth of a weight: halves swapped err by 100 %.
    """
    tensors = tiny.random_tensors(SMALL_D)
    meaning = write_mlx(tmp_path, SMALL_D, tensors, split_kv_b=False, packing=packing)
    loaded = load_model(tmp_path)
    model, mtp, store, args = loaded.model, loaded.mtp, loaded.store, loaded.args
    store.close()
    for i, attention in enumerate([*(layer.self_attn for layer in model.layers), mtp.self_attn]):
        heads = meaning[f"model.layers.{i}.self_attn.kv_b_proj.weight"]
        heads = heads.unflatten(0, (args.num_attention_heads, -1))
        w_uk, w_uv = heads.split([args.qk_nope_head_dim, args.v_head_dim], dim=1)
        loose = Bound(1, 0.25, 0.02) if packing else Bound(0, 0, 1e-15)
        for layer, expected in (
            (attention.embed_q, w_uk.transpose(-1, -2)),
            (attention.unembed_out, w_uv),
        ):
            weight = layer.weight
            if packing:
                biases = layer.get("biases")
                weight = mx.dequantize(weight, layer.scales, biases, dtype=mx.float32, **packing)
            assert_close(f"layer {i}", weight, expected, loose)


def test_mixed_bits(tmp_path):
    """mlx-lm's mixed recipes: projections that we join have different bits, and stay apart."""
    tensors, ids = tiny.random_tensors(SMALL_D), random_ids(1, 23)
    meanings = {}
    for name, packing in ("q4", Q4), ("q8", Q8):
        meanings[name] = write_mlx(tmp_path / name, SMALL_D, tensors, packing=packing)

    def source(name: str) -> str:
        words = ("kv_", "embed", "up_proj", "lm_head")  # kv_b_proj is embed_q and unembed_out
        is_fine = any(word in name for word in words) and ".mlp.experts." not in name
        return "q8" if is_fine else "q4"

    mixed, arrays = tmp_path / "mixed", {}
    shutil.copytree(tmp_path / "q4", mixed)
    for name in "q4", "q8":
        loaded = mx.load(str(tmp_path / name / TRUNK))
        arrays |= {key: array for key, array in loaded.items() if source(key) == name}
    save_ordered(mixed / TRUNK, arrays)
    main = [key for key in meanings["q4"] if "layers.2." not in key]
    expected = {key: meanings[source(key)][key] for key in main}
    loaded = load_model(mixed)
    model, mtp, store = loaded.model, loaded.mtp, loaded.store
    store.close()
    assert len(model.layers[0].self_attn.qkv_a_proj.layers) == 2
    assert len(model.layers[0].mlp.gate_up_proj.layers) == 2
    assert len(mtp.self_attn.qkv_a_proj.layers) == 1
    config = SMALL_D | {"num_nextn_predict_layers": 0}
    logits, _ = load_reference(config, expected)(ids)
    assert_close("mixed bits", model(mx.array(ids.numpy())), logits, LOGITS)


def test_activation_dtype(folder):
    """bf16 scales in a float32 model, or a router cast with the rest."""
    for dtype in mx.float32, mx.bfloat16:
        loaded = load_model(folder, dtype=dtype)
        model, mtp, store = loaded.model, loaded.mtp, loaded.store
        store.close()
        for module in model, mtp:
            for name, array in tree_flatten(module.parameters()):
                assert array.dtype == (mx.float32 if "mlp.gate." in name else dtype), name
        assert model(mx.array([[1, 2]])).dtype == dtype
        assert model.layers[1].mlp.experts.bank.down.weight.dtype == dtype
    loaded = load_model(folder)
    model, store = loaded.model, loaded.store
    store.close()
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    assert model(mx.array([[1]])).dtype == (mx.bfloat16 if on_gpu else mx.float32)


def test_float16_is_refused(folder):
    """The residual stream overflows fp16 without an error."""
    with pytest.raises(UserError, match="float16.*overflows"):
        load_model(folder, dtype=mx.float16)


def test_folder_without_index_or_sidecar(folder):
    """A single-file model has no index; a model without MTP has no sidecar."""
    ids = random_ids(1, 8)
    expected = logits_of(folder, ids)
    (folder / INDEX).unlink()
    (folder / "mtp.safetensors").unlink()
    loaded = load_model(folder)
    model, mtp, store = loaded.model, loaded.mtp, loaded.store
    store.close()
    assert mtp is None
    assert same_bits(model(mx.array(ids.numpy())), expected)


def test_rotary_buffers_are_ignored(folder):
    """Old checkpoints carry inv_freq; it is derived, not a weight."""
    arrays = mx.load(str(folder / TRUNK))
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.ones(8)
    save_ordered(folder / TRUNK, arrays)
    load_model(folder).store.close()


def test_load_gives_everything(folder):
    """The whole, tokenizer included, from a str path."""
    loaded = load(str(folder))
    loaded.store.close()
    assert loaded.tokenizer.encode("w5 w159", add_special_tokens=False) == [5, 159]
    assert loaded.tokenizer.eos_token_ids == {1}
    assert loaded.mtp is not None and loaded.args.vocab_size == 160
    assert loaded.config["model_type"] == "deepseek_v3"


# --- what is refused ------------------------------------------------------------------------


def refusal(folder, read=load_model) -> UserError:
    with pytest.raises(UserError) as error:
        read(folder)
    assert "\n" not in error.value.message
    return error.value


def test_no_folder(tmp_path):
    """MODEL that is not a folder: a hub id typed for a path, or a file."""
    error = refusal(tmp_path / "absent")
    assert f"`{tmp_path / 'absent'}` is not a folder" in error.message and "make demo" in error.hint
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refusal(tmp_path / "file").message


def test_no_weights(tmp_path):
    """MODEL without weights: an interrupted download has config.json first."""
    write_json(tmp_path / "config.json", tiny.A)
    error = refusal(tmp_path)
    assert "has no weights" in error.message and "python -m convert run" in error.hint


def test_still_in_conversion(folder):
    """MODEL in conversion: some shards are in place, the rest in .partial."""
    (folder / ".partial").mkdir()
    (folder / "config.json").unlink()  # it is the last file that is moved into place
    error = refusal(folder)
    assert "still in conversion" in error.message and ".partial" in error.message
    assert "convert run" in error.hint


def test_other_model_type(folder):
    """deepseek_v32 has the same tensors and an indexer; deepseek_v2 another router."""
    for model_type in "deepseek_v32", "deepseek_v2":
        write_json(folder / "config.json", tiny.A | {"model_type": model_type})
        error = refusal(folder)
        assert f"model_type `{model_type}`" in error.message and error.hint


def test_hub_checkpoint(tmp_path):
    """An unconverted FP8 checkpoint: its bytes would load as integers."""
    tiny.write_hub(tmp_path, tiny.A)
    error = refusal(tmp_path)
    assert "hub checkpoint (quantization method `fp8`)" in error.message
    assert "python -m convert run" in error.hint


def test_hub_checkpoint_in_bf16_with_mtp(tmp_path):
    """An unconverted BF16 checkpoint holds layer num_hidden_layers among the others."""
    tiny.write_hub(tmp_path, tiny.A, storage="bf16")
    error = refusal(tmp_path)
    assert "its shards hold the MTP layer" in error.message and "convert run" in error.hint


def test_missing_file(folder):
    """A shard that the index names is absent."""
    (folder / EXPERTS).unlink()
    error = refusal(folder)
    assert f"`{EXPERTS}` is missing" in error.message and error.hint


def test_index_names_absent_tensor(folder):
    """An index of another conversion: what it names is in none of the files."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.1.extra.weight"] = TRUNK
    write_json(folder / INDEX, index)
    error = refusal(folder)
    assert "names `model.layers.1.extra.weight`" in error.message and error.hint


@pytest.mark.parametrize("file", [TRUNK, EXPERTS, "mtp.safetensors"])
@pytest.mark.parametrize("kept", ["header", "half", "all but a byte", "nothing"])
def test_truncated_shard(folder, file, kept):
    """A cut file fails at its header, before a weight is read."""
    data = (folder / file).read_bytes()
    length = {"header": 100, "half": len(data) // 2, "all but a byte": len(data) - 1, "nothing": 0}
    (folder / file).write_bytes(data[: length[kept]])
    error = refusal(folder)
    assert f"{file}` is truncated" in error.message and error.hint


@pytest.mark.parametrize("word", [b"I16", b"U16"])
def test_experts_of_integers(folder, word):
    """A dtype of the same size: the header is right to the byte, the experts were nonsense."""
    data = (folder / EXPERTS).read_bytes()
    begin = data.index(b'"BF16"')
    (folder / EXPERTS).write_bytes(data[:begin] + b'"%s" ' % word + data[begin + 6 :])
    error = refusal(folder)
    assert f"weight {word.decode()} " in error.message and "experts" in error.message and error.hint


def test_no_safetensors_header(folder):
    """An error page saved under the file's name."""
    (folder / TRUNK).write_bytes(struct.pack("<Q", 16) + b"<html>not found</")
    assert "the safetensors header of" in refusal(folder).message


def test_tensor_in_two_files(folder):
    """Two conversions in one folder: which one counts must not depend on the file order."""
    (folder / INDEX).unlink()
    shutil.copy(folder / TRUNK, folder / "model-again.safetensors")
    error = refusal(folder)
    assert "is in `" in error.message and "model-again.safetensors" in error.message


def rewrite_trunk(folder, change) -> None:
    arrays = mx.load(str(folder / TRUNK))
    change(arrays)
    save_ordered(folder / TRUNK, arrays)
    (folder / INDEX).unlink()


def test_missing_tensor(folder):
    """A norm that stays at ones."""
    name = "model.layers.1.input_layernorm.weight"
    rewrite_trunk(folder, lambda arrays: arrays.pop(name))
    assert f"`{name}` is missing from" in refusal(folder).message


def test_unknown_tensor(folder):
    """A weight that nothing reads is a sign of another architecture."""
    name = "model.layers.1.self_attn.indexer.wq_b.weight"
    rewrite_trunk(folder, lambda arrays: arrays.update({name: mx.ones((4, 4))}))
    assert f"`{name}` is unknown to the model" in refusal(folder).message


def test_wrong_shape(folder):
    """A tensor that broadcasts would compute something."""
    name = "model.norm.weight"
    rewrite_trunk(folder, lambda arrays: arrays.update({name: mx.ones(1)}))
    message = refusal(folder).message
    assert f"`{name}`" in message and "(1,)" in message and "(64,)" in message


def test_sidecar_of_another_depth(folder):
    """mtp.safetensors of the 4-layer model beside a 2-layer one."""
    arrays = mx.load(str(folder / "mtp.safetensors"))
    moved = {name.replace("layers.2.", "layers.4."): array for name, array in arrays.items()}
    save_ordered(folder / "mtp.safetensors", moved)
    assert "is not of layer 2" in refusal(folder).message


# --- headers --------------------------------------------------------------------------------


def test_header_gives_offsets_from_the_file_start(tmp_path):
    """Offsets that count from the data start would read the header as weights."""
    arrays = {"a": mx.arange(6).astype(mx.float32).reshape(2, 3), "b": to_mlx(tiny.torch.ones(4))}
    save_ordered(tmp_path / "x.safetensors", arrays)
    tensors = read_header(tmp_path / "x.safetensors")
    assert list(tensors) == ["a", "b"]
    info, data = tensors["a"], (tmp_path / "x.safetensors").read_bytes()
    assert (info.dtype, info.shape, info.nbytes) == ("F32", (2, 3), 24)
    assert struct.unpack("<6f", data[info.offset : info.offset + 24]) == (0, 1, 2, 3, 4, 5)
    assert tensors["b"].offset == info.offset + 24 == len(data) - 8


def test_header_skips_metadata(tmp_path):
    """`__metadata__` is no tensor."""
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {"a": mx.ones(2)}, {"format": "mlx"})
    assert list(read_headers([tmp_path / "x.safetensors"])) == ["a"]


@pytest.mark.parametrize("experts", ["resident", "streamed"])
def test_progress_counts_what_comes_into_memory(folder, experts):
    """A bar that ends at 97 % or begins at 12: trunk, MTP module and resident experts all count."""
    told = []
    loaded = load_model(folder, experts=experts, progress=lambda *each: told.append(each))
    done, totals = zip(*told, strict=True)
    assert done[0] == 0 and list(done) == sorted(done) and len(set(done)) > 3
    assert {done[-1]} == set(totals) == {loaded.plan.loaded_bytes}
