"""Routed experts from disk to banks: every byte, in both arrangements, and what a bad file says."""

import gc
import os
import time
import weakref

import mlx.core as mx
import numpy as np
import pytest
import tiny
import torch
from compare import same_bits
from mlx_folder import save_ordered, to_mlx, write_mlx

from mlx_dsv3.checkpoint.format import Quantization, infer_quantization
from mlx_dsv3.checkpoint.headers import read_header, read_headers
from mlx_dsv3.config import ModelArgs
from mlx_dsv3.errors import UserError
from mlx_dsv3.experts import reader
from mlx_dsv3.experts.files import LayerExperts, convert_floats
from mlx_dsv3.experts.reader import read_exactly
from mlx_dsv3.experts.store import ExpertStore

CONFIG = tiny.D | {"num_hidden_layers": 2}  # widths that every packing divides
ARGS = ModelArgs.from_dict(CONFIG)
PACKINGS = {
    "bf16": None,
    "q4": {"bits": 4, "group_size": 64, "mode": "affine"},
    "q8": {"bits": 8, "group_size": 32, "mode": "affine"},
    "q3": {"bits": 3, "group_size": 64, "mode": "affine"},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Return a function (packing, arrangement) -> folder, written once each."""
    made = {}

    def write(packing: str, arrangement: str = "records"):
        if (packing, arrangement) not in made:
            folder = tmp_path_factory.mktemp("experts")
            tensors = tiny.random_tensors(CONFIG)
            write_mlx(folder, CONFIG, tensors, arrangement=arrangement, packing=PACKINGS[packing])
            made[packing, arrangement] = folder
        return made[packing, arrangement]

    return write


@pytest.fixture
def open_store():
    """Return a function (headers, dtype) -> store, closed after the test."""
    stores = []

    def make(tensors, dtype=mx.float32, args=ARGS) -> ExpertStore:
        stores.append(ExpertStore(tensors, args, dtype))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def headers_of(folder):
    return read_headers(sorted(folder.glob("*.safetensors")))


def stored(folder, layer: int, projection: str, part: str) -> mx.array | None:
    """Return a part of all experts as the files hold it, read by MLX itself: (E, out, in)."""
    arrays = {}
    for path in folder.glob("*.safetensors"):
        arrays |= mx.load(str(path))
    stacked = arrays.get(f"model.layers.{layer}.mlp.switch_mlp.{projection}.{part}")
    if stacked is not None:
        return stacked
    prefix = f"model.layers.{layer}.mlp.experts"
    rows = [arrays.get(f"{prefix}.{e}.{projection}.{part}") for e in range(ARGS.n_routed_experts)]
    return None if rows[0] is None else mx.stack(rows)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("arrangement", ["records", "stacked"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_bank_holds_the_files_bytes(folder_of, open_store, packing, arrangement, dtype):
    """An expert in its neighbour's slot, gate where up belongs, scales of one in the other.

    Packed words are the file's own; scales and plain weights are in the activation dtype.
    """
    folder = folder_of(packing, arrangement)
    store = open_store(headers_of(folder), dtype)
    for layer in 1, 2:  # a layer of the main model, and the MTP layer, always records
        bank = store.open_layer(layer)
        for part in ("weight", "scales", "biases"):
            parts = {p: stored(folder, layer, p, part) for p in PROJECTIONS}
            if parts["gate_proj"] is None:
                assert getattr(bank.down, part) is None
                continue
            if mx.issubdtype(parts["gate_proj"].dtype, mx.floating):
                parts = {p: array.astype(dtype) for p, array in parts.items()}
            both = mx.concatenate([parts["gate_proj"], parts["up_proj"]], axis=1)
            assert same_bits(getattr(bank.gate_up, part), both), part
            assert same_bits(getattr(bank.down, part), parts["down_proj"]), part
        expected = PACKINGS[packing] and Quantization(**PACKINGS[packing])
        assert bank.down.quantization == bank.gate_up.quantization == expected


def test_banks_are_written_in_place(folder_of, open_store):
    """A bank that MLX replaced: later reads would go to the orphan. Written again, same array."""
    folder = folder_of("bf16")
    store = open_store(headers_of(folder))
    bank = store.open_layer(1)
    assert store.banks[1] is bank
    array, before = bank.down.weight, mx.array(np.array(bank.down.weight))
    memoryview(array).cast("B")[:] = bytes(array.nbytes)
    assert array.sum().item() == 0
    for request in LayerExperts(1, store.tensors, ARGS).requests(7):
        store.reader.read(bank.job(request, 7))
    assert bank.down.weight is array
    assert same_bits(array[7], before[7]) and array[6].sum().item() == 0


def test_adjacent_extents_are_one_request(folder_of, open_store, monkeypatch):
    """A record is one byte range: nine small reads an expert would halve the disk's speed."""
    requests = []
    preadv = os.preadv

    def counted(fd, buffers, offset):
        requests.append(sum(len(buffer) for buffer in buffers))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(reader.os, "preadv", counted)
    open_store(headers_of(folder_of("q4"))).open_layer(1)
    assert len(requests) == ARGS.n_routed_experts
    requests.clear()
    open_store(headers_of(folder_of("q4", "stacked"))).open_layer(1)
    assert len(requests) == 9 * ARGS.n_routed_experts


@pytest.mark.parametrize("step", [1, 7, 4096])
def test_short_reads_are_continued(folder_of, open_store, monkeypatch, step):
    """preadv may return less than asked for: the rest must come from the right offset."""
    preadv = os.preadv

    def short(fd, buffers, offset):
        return preadv(fd, [memoryview(buffers[0])[:step]], offset)

    folder = folder_of("q4")
    expected = open_store(headers_of(folder)).open_layer(1)
    if step > 1:
        monkeypatch.setattr(reader.os, "preadv", short)
        bank = open_store(headers_of(folder)).open_layer(1)
        assert same_bits(bank.gate_up.weight, expected.gate_up.weight)
        assert same_bits(bank.down.scales, expected.down.scales)
    else:
        path = folder / "model-experts-00001.safetensors"
        wanted, buffers = path.read_bytes()[100:400], [bytearray(50), bytearray(250)]
        kept = list(buffers)
        monkeypatch.setattr(reader.os, "preadv", short)
        with path.open("rb") as file:
            read_exactly(file.fileno(), buffers, 100, path)
        assert b"".join(bytes(buffer) for buffer in kept) == wanted


def test_experts_spread_over_files(folder_of, open_store, tmp_path):
    """A record whose tensors lie in three files, in falling order of experts."""
    tensors = tiny.random_tensors(CONFIG)
    chosen = {
        name: to_mlx(tensor) for name, tensor in tensors.items() if "layers.1.mlp.experts" in name
    }
    for i in range(3):
        part = dict(sorted(chosen.items(), reverse=True)[i::3])
        save_ordered(tmp_path / f"model-{i}.safetensors", part)
    bank = open_store(headers_of(tmp_path)).open_layer(1)
    whole = open_store(headers_of(folder_of("bf16"))).open_layer(1)
    assert same_bits(bank.gate_up.weight, whole.gate_up.weight)
    assert same_bits(bank.down.weight, whole.down.weight)


def test_truncated_after_its_header_was_read(folder_of, open_store, tmp_path):
    """A file cut while the program runs: a half-filled bank must not be used."""
    path = tmp_path / "model-experts-00001.safetensors"
    path.write_bytes((folder_of("bf16") / path.name).read_bytes())
    tensors = read_header(path)
    last = tensors["model.layers.1.mlp.experts.15.down_proj.weight"]
    with path.open("r+b") as file:
        file.truncate(last.offset + last.nbytes - 1)
    with pytest.raises(UserError, match="ends at byte .*inside an expert") as error:
        open_store(tensors).open_layer(1)
    assert path.name in error.value.message and error.value.hint


def test_read_error_is_named(tmp_path):
    """A dying disk: the file and the byte, not a bare errno. A folder cannot be read either."""
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(UserError, match="reading `.*` at byte 64 failed: Is a directory"):
            read_exactly(fd, [bytearray(8)], 64, tmp_path)
    finally:
        os.close(fd)


def test_errors_of_reader_threads_arrive(folder_of, open_store):
    """An exception inside a reader thread that nobody collects leaves zeros in the bank."""
    store = open_store(headers_of(folder_of("bf16")))
    broken = {
        name: info
        if ".9." not in name
        else type(info)(info.path, info.dtype, info.shape, 10**9, info.nbytes)
        for name, info in store.tensors.items()
    }
    with pytest.raises(UserError, match="ends at byte 1000000000"):
        open_store(broken).open_layer(1)


def drop(tensors: dict, *words: str) -> dict:
    return {name: info for name, info in tensors.items() if not all(w in name for w in words)}


@pytest.mark.parametrize(
    "words, message",
    [
        (("experts.3.", "up_proj"), "`model.layers.1.mlp.experts.3.up_proj.weight` is in none"),
        (("experts.15.",), "`model.layers.1.mlp.experts.15.gate_proj.weight` is in none"),
        (("experts.0.", "down_proj"), "no `model.layers.1.mlp.experts.*.down_proj.weight`"),
        (("experts.5.", "scales"), "`model.layers.1.mlp.experts.5.gate_proj.scales` is in none"),
    ],
)
def test_missing_expert_tensor(folder_of, open_store, words, message):
    """An expert that stays zero: the model still talks."""
    packing = "q4" if "scales" in words else "bf16"
    tensors = drop(headers_of(folder_of(packing)), "layers.1.", *words)
    with pytest.raises(UserError) as error:
        open_store(tensors).open_layer(1)
    assert message in error.value.message


def test_layer_without_experts(folder_of, open_store):
    """A MoE layer that config.json asks for and no file has."""
    with pytest.raises(UserError, match="layer 9 has no `model.layers.9.mlp.experts"):
        open_store(headers_of(folder_of("bf16"))).open_layer(9)


def test_experts_twice(folder_of, open_store):
    """Two conversions in one folder: which of them counts must not be a matter of luck."""
    both = headers_of(folder_of("bf16", "stacked")) | read_header(
        folder_of("bf16") / "model-experts-00001.safetensors"
    )
    with pytest.raises(UserError, match="layer 1 has its experts twice"):
        open_store(both).open_layer(1)


def test_wrong_number_of_experts(folder_of, open_store):
    """Stacked tensors of 16 experts under a config of 32: byte ranges would be cut in half."""
    args = ModelArgs.from_dict(CONFIG | {"n_routed_experts": 32})
    with pytest.raises(UserError, match="holds 16 experts; config.json says 32"):
        open_store(headers_of(folder_of("bf16", "stacked")), args=args).open_layer(1)


@pytest.mark.parametrize("packing", ["bf16", "q4"])
@pytest.mark.parametrize("width", [64, 256])
def test_wrong_width(folder_of, open_store, packing, width):
    """An expert of another width than config.json says."""
    args = ModelArgs.from_dict(CONFIG | {"moe_intermediate_size": width})
    with pytest.raises(UserError, match="has shape .*config.json says"):
        open_store(headers_of(folder_of(packing)), args=args).open_layer(1)


def test_experts_that_differ(folder_of, open_store):
    """One expert in another dtype than the first would be copied byte for byte into its row."""
    tensors = headers_of(folder_of("bf16"))
    name = "model.layers.1.mlp.experts.4.up_proj.weight"
    info = tensors[name]
    tensors[name] = type(info)(info.path, "F32", info.shape, info.offset, 2 * info.nbytes)
    with pytest.raises(UserError, match=r"experts.4.up_proj.weight` is F32 .*expert 0 has BF16"):
        open_store(tensors).open_layer(1)


def test_gate_and_up_quantised_differently(folder_of, open_store):
    """They are one product here: 4-bit gate with 8-bit up must be refused, not misread."""
    four, eight = headers_of(folder_of("q4")), headers_of(folder_of("q8"))
    mixed = {name: eight[name] if ".up_proj." in name else four[name] for name in four}
    with pytest.raises(UserError, match="layer 1: `gate_proj` and `up_proj`"):
        open_store(mixed).open_layer(1)


def test_down_may_be_quantised_differently(folder_of, open_store):
    """mlx-lm's mixed recipes give down more bits: that is one format per projection."""
    four, eight = headers_of(folder_of("q4")), headers_of(folder_of("q8"))
    mixed = {name: eight[name] if ".down_proj." in name else four[name] for name in four}
    bank = open_store(mixed).open_layer(1)
    assert (bank.gate_up.quantization.bits, bank.down.quantization.bits) == (4, 8)
    assert same_bits(bank.down.weight, stored(folder_of("q8"), 1, "down_proj", "weight"))


@pytest.mark.parametrize("columns", [192, 1536])
@pytest.mark.parametrize(
    "mode, bits, group_size",
    [("affine", bits, size) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64)]
    + [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)],
)
def test_packing_is_inferred_from_shapes(mode, bits, group_size, columns):
    """Bits and group size as MLX packs them: 3 and 6 bits share words unevenly."""
    packed, scales, *_ = mx.quantize(mx.ones((4, columns)), group_size, bits, mode)
    in_blocks = scales.dtype == mx.uint8
    found = infer_quantization(columns, packed.shape[-1], scales.shape[-1], in_blocks)
    assert found == Quantization(bits, group_size, mode)


@pytest.mark.parametrize("source, kind", [("BF16", mx.bfloat16), ("F16", mx.float16)])
@pytest.mark.parametrize("target", [mx.float32, mx.bfloat16])
def test_widening_equals_astype(source, kind, target):
    """Scales converted by hand on a reader thread must round as MLX does, subnormals too."""
    patterns = np.arange(0, 65536, 7, dtype=np.uint16)
    finite = np.isfinite(np.array(mx.array(patterns).view(kind).astype(mx.float32)))
    values = mx.array(patterns[finite]).view(kind)
    raw = bytearray(bytes(memoryview(values.view(mx.uint8)).cast("B")))
    expected = values.astype(mx.float32).astype(target).view(mx.uint8)
    assert convert_floats(raw, source, target) == bytes(memoryview(expected).cast("B"))


def test_float32_is_rounded_to_nearest_even():
    """A float32 scale for a bfloat16 bank: truncation would be off by one in half the cases."""
    bits = torch.randint(0, 2**31 - 2**23, (4096,), generator=torch.manual_seed(0))
    ties = (bits & ~0xFFFF) | 0x8000
    values = torch.cat([bits, ties]).to(torch.int32).view(torch.float32)
    values = values[values.isfinite()]
    raw = bytearray(values.numpy().tobytes())
    assert (
        convert_floats(raw, "F32", mx.bfloat16)
        == values.bfloat16().view(torch.int16).numpy().tobytes()
    )


def test_scales_are_widened(folder_of, open_store):
    """bf16 scales in a float32 model make MLX cast the whole bank at every call."""
    bank = open_store(headers_of(folder_of("q4"))).open_layer(1)
    assert bank.gate_up.scales.dtype == bank.down.biases.dtype == mx.float32
    assert bank.gate_up.weight.dtype == mx.uint32
    bank = open_store(headers_of(folder_of("mxfp4"))).open_layer(1)
    assert bank.gate_up.scales.dtype == mx.uint8 and bank.gate_up.biases is None


def test_a_store_that_is_dropped_leaves_no_bank_in_memory(folder_of):
    """Nobody closed it: its threads wait, and the last read of each knew gigabytes of experts."""
    store = ExpertStore(headers_of(folder_of("bf16")), ARGS, mx.float32)
    bank, reader = weakref.ref(store.open_layer(1)), store.reader
    del store
    end = time.monotonic() + 10
    while bank() is not None and time.monotonic() < end:  # a thread may be on its way to wait
        time.sleep(0.01)
        gc.collect()
    assert bank() is None
    reader.close()


def test_bank_outlives_the_store(folder_of):
    """close() ends threads and file handles, not the weights."""
    store = ExpertStore(headers_of(folder_of("bf16")), ARGS, mx.float32)
    bank = store.open_layer(1)
    before = bank.down.weight.sum().item()
    files = list(store.reader.files.descriptors.values())
    store.close()
    assert bank.down.weight.sum().item() == before
    for fd in files:
        with pytest.raises(OSError):
            os.fstat(fd)
