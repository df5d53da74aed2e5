"""A golden file is checked whole when it is read: whatever is wrong in it is one sentence.

Each test changes one thing in a recording of the demo checkpoint. Before, an id beyond the
vocabulary ended the process with a segmentation fault and the rest were tracebacks.
"""

import json
import os
import struct
from pathlib import Path

import mlx.core as mx
import pytest
import tiny

from mlx_dsv3.errors import UserError, run_main
from mlx_dsv3.parity import bounds, golden
from mlx_dsv3.parity.golden import read_golden
from mlx_dsv3.reference import record

LONG = Path(__file__).parents[1] / "golden" / "demo-fp8-long.safetensors"


@pytest.fixture
def changed(tmp_path):
    """Return a function that saves the recording after `change(tensors, about, config)`."""

    def save(change) -> Path:
        tensors, about = mx.load(str(LONG), return_metadata=True)
        config = json.loads(about["config"])
        change(tensors, about, config)
        if "config" in about:
            about["config"] = about["config"] if config == {} else json.dumps(config)
        mx.save_safetensors(str(tmp_path / "g.safetensors"), tensors, about)
        return tmp_path / "g.safetensors"

    return save


def refused(path: Path) -> str:
    """Return the message about a file, without its path."""
    with pytest.raises(UserError) as caught:
        read_golden(path)
    assert caught.value.hint == golden.RECORD_HINT
    return caught.value.message.removeprefix(f"`{path}` ")


def set_value(name: str, place, value):
    """Return a change of one element of a tensor."""

    def change(tensors, about, config):
        tensors[name][place] = value

    return change


def replace(name: str, make):
    """Return a change of a whole tensor; None removes it."""

    def change(tensors, about, config):
        tensor = make(tensors.pop(name))
        if tensor is not None:
            tensors[name] = tensor

    return change


# What `record` may leave: no MTP module, every layer dense, MoE in every other layer, no choice
# of experts (margins are infinite).
RECORDED = [
    tiny.A,
    tiny.A | {"num_nextn_predict_layers": 0},
    tiny.A | {"first_k_dense_replace": 4},
    tiny.A | {"first_k_dense_replace": 0, "moe_layer_freq": 2},
    tiny.B | {"num_experts_per_tok": 16},
]


@pytest.mark.parametrize("config", RECORDED, ids=["A", "no-mtp", "dense", "every-other", "all"])
@pytest.mark.parametrize("arithmetic", ["float32", "bf16"])
def test_what_record_writes_is_read(tmp_path, config, arithmetic):
    """Writer and reader share no code: neither may state another format than the other."""
    folder, out = tiny.write_hub(tmp_path / "hub", config, storage="bf16"), tmp_path / "out"
    argv = [str(folder), str(out), "--device", "cpu", "--arithmetic", arithmetic]
    for p, ids in enumerate(([1, 2, 3], list(range(40, 81)))):
        (tmp_path / f"{p}.json").write_text(json.dumps(ids))
        argv += ["--prompt-file", str(tmp_path / f"{p}.json")]
    assert record.main(argv) == 0
    found = read_golden(out)
    assert found.num_tokens == 44 and len(found.prompts[1]["positions"]) == 16
    assert ("mtp.norm" in found.prompts[0]) == (config["num_nextn_predict_layers"] == 1)


VALUES = [
    ("0.ids", 3, 2_000_000_005, "has 2000000005 in `0.ids`; 0 to 1151 is possible"),
    ("0.ids", 3, 1152, "has 1152 in `0.ids`; 0 to 1151 is possible"),
    ("1.ids", 3, -5_000_000, "has -5000000 in `1.ids`; 0 to 1151 is possible"),
    ("0.top_ids", (9, 19), 10**9, "has 1000000000 in `0.top_ids`; 0 to 1151 is possible"),
    ("1.mtp.top_ids", (0, 0), -1, "has -1 in `1.mtp.top_ids`; 0 to 1151 is possible"),
    ("0.positions", 15, 276, "has 276 in `0.positions`; 0 to 275 is possible"),
    ("0.positions", 0, -276, "has -276 in `0.positions`; 0 to 275 is possible"),
    ("0.positions", 0, 1, "has `0.positions` that do not begin with 0"),
    ("0.positions", 5, 0, "has `0.positions` that do not ascend"),
    ("0.layers.2.experts", (7, 3), 32, "has 32 in `0.layers.2.experts`; 0 to 31 is possible"),
    ("0.mtp.experts", (7, 0), -2, "has -2 in `0.mtp.experts`; 0 to 31 is possible"),
    ("0.layers.2.experts", (7, 3), 0, "has `0.layers.2.experts` that do not ascend"),
    ("0.layers.1.margins", 7, float("nan"), "has nan in `0.layers.1.margins`; 0 to inf"),
    ("1.logprobs", 7, float("-inf"), "has -inf in `1.logprobs`; -3.4e+38 to 0.01"),
    ("1.top_logprobs", 7, 0.0, "has `1.top_logprobs` of more than 100 %"),
    ("1.top_logprobs", 7, 89.0, "has 89.0 in `1.top_logprobs`; -3.4e+38 to 0.01"),
]


@pytest.mark.parametrize(("name", "place", "value", "message"), VALUES)
def test_a_value_out_of_range(changed, name, place, value, message):
    """MLX takes any number for an index; what it read was foreign memory."""
    assert refused(changed(set_value(name, place, value))).startswith(message)


TENSORS = [
    ("1.norm", lambda x: None, "lacks `1.norm`"),
    ("0.ids", lambda x: None, "lacks `0.ids`"),
    ("1.ids", lambda x: None, "holds `1.embedding`, which is not of its prompts 0 to 0"),
    ("1.layers.3.margins", lambda x: None, "lacks `1.layers.3.margins`"),
    ("0.mtp.input", lambda x: None, "lacks `0.mtp.input`"),
    ("0.ids", lambda x: x[:275], "has 275 in `0.positions`; 0 to 274 is possible"),
    ("0.ids", lambda x: x[:0], "has 0 tokens in `0.ids`; 3 are needed"),
    ("0.ids", lambda x: x[None], "has `0.ids` as int32 (1, 276); int32 ('L',) is needed"),
    ("0.positions", lambda x: x[:0], "has `0.positions` that do not begin with 0"),
    (
        "0.norm",
        lambda x: x[:, :8],
        "has `0.norm` as bfloat16 (16, 8); float32 or bfloat16 (1",
    ),
    ("0.mtp.norm", lambda x: x[:14], "has `0.mtp.norm` as bfloat16 (14, 256)"),
    ("0.logprobs", lambda x: x[1:], "has `0.logprobs` as float32 (274,); float32 (275,) is needed"),
    ("0.top_ids", lambda x: x[:, :1], "has `0.top_ids` as int32 (276, 1); int32 (276, 20)"),
    ("0.ids", lambda x: x.astype(mx.float32), "has `0.ids` as float32 (276,); int32 (276,)"),
    ("0.norm", lambda x: x.astype(mx.int32), "has `0.norm` as int32"),
]


@pytest.mark.parametrize(("name", "make", "message"), TENSORS)
def test_a_tensor_missing_or_misshapen(changed, name, make, message):
    """KeyError 'norm', or a ValueError of a broadcast, minutes after the model was loaded."""
    assert refused(changed(replace(name, make))).startswith(message)


def test_prompts_that_are_too_short(changed):
    """Of two tokens the MTP module has no target."""

    def cut(tensors, about, config):
        tensors["0.ids"], tensors["0.positions"] = tensors["0.ids"][:2], mx.array([0, 1])

    assert refused(changed(cut)) == "has 2 tokens in `0.ids`; 3 are needed"


@pytest.mark.parametrize("name", ["abc.x", "3.ids", "0.layers.4.mlp", "0.layers.0.experts", "0.x"])
def test_a_name_that_is_not_of_the_format(changed, name):
    """`abc.x` was a ValueError, prompt 3 after prompt 1 was taken for prompt 2."""

    def add(tensors, about, config):
        tensors[name] = tensors["0.ids"]

    message = f"holds `{name}`, which is not of its prompts 0 to 1"
    assert refused(changed(add)) == message


def test_no_mtp_module_or_all_of_it(changed):
    """A checkpoint without one is recorded without; half of one is a damaged file."""

    def drop(prompts):
        def change(tensors, about, config):
            for name in [n for n in tensors if n.startswith(prompts) and ".mtp." in n]:
                del tensors[name]

        return change

    assert "mtp.norm" not in read_golden(changed(drop(("0", "1")))).prompts[0]
    assert refused(changed(drop(("1",)))) == "lacks `1.mtp.input`"
    assert "which is not of its prompts" in refused(changed(drop(("0",))))


CONFIGS = [
    ("num_hidden_layers", 10**9, "lacks `0.layers.4.attention`"),
    ("num_hidden_layers", 10**30, f"has `num_hidden_layers` = `{10**30}` in its `config`"),
    (
        "num_hidden_layers",
        0,
        "has `num_hidden_layers` = `0` in its `config`",
    ),
    ("moe_layer_freq", 0, "has `moe_layer_freq` = `0` in its `config`; a whole number from 1"),
    ("hidden_size", "256", "has `hidden_size` = `'256'` in its `config`"),
    ("vocab_size", 1152.0, "has `vocab_size` = `1152.0` in its `config`"),
    ("num_experts_per_tok", True, "has `num_experts_per_tok` = `True` in its `config`"),
    ("kv_lora_rank", None, "has `kv_lora_rank` = `None` in its `config`"),
    ("first_k_dense_replace", 2, "holds `0.layers.1.experts`"),
]


@pytest.mark.parametrize(("field", "value", "message"), CONFIGS)
def test_a_config_out_of_range(changed, field, value, message):
    """The golden config decides what a file must hold, so it is checked before it is used."""
    found = refused(changed(lambda tensors, about, config: config.update({field: value})))
    assert found.startswith(message)


NO_OBJECTS = {
    "": "is not JSON: ",
    "{": "is not JSON: ",
    "[1]": "holds a list, not an object",
    "null": "holds a NoneType, not an object",
    "[" * 100_000: "has lists or objects within each other",
    "1" * 5000: "holds a number of 5,000 digits",
    '{"hidden_size": NaN}': "holds `NaN`, which is not JSON",
    '{"a": 1, "a": 2}': "names `a` twice",
}


@pytest.mark.parametrize("text", NO_OBJECTS, ids=lambda text: text[:20])
def test_a_config_that_is_no_object(changed, text):
    """JSONDecodeError, TypeError, RecursionError."""

    def change(tensors, about, config):
        about["config"] = text
        config.clear()

    path = changed(change)
    where = f"`config` in the metadata of `{path}` "
    assert refused(path).startswith(where + NO_OBJECTS[text])


@pytest.mark.parametrize("field", golden.FIELDS)
def test_a_field_of_the_report_is_missing(changed, field):
    """A KeyError after the replay, and no report."""
    found = refused(changed(lambda tensors, about, config: about.pop(field)))
    assert found == f"has no readable `{field}` in its metadata"


def test_metadata_for_the_terminal(changed):
    """The report prints it: an escape sequence would clear the screen, or worse."""
    found = refused(changed(lambda tensors, about, config: about.update(device="\x1b[2Jcpu")))
    assert found == "has no readable `device` in its metadata"


def test_arithmetic_without_bounds(changed):
    """A KeyError in the verdict. The reader's list is that of the bounds."""
    found = refused(changed(lambda tensors, about, config: about.update(arithmetic="int4")))
    assert found == "has arithmetic `int4`; known are float32, bf16, fp8"
    assert set(golden.ARITHMETICS) == set(bounds.ARITHMETIC)


def test_a_name_without_an_ending(tmp_path):
    """`record` writes any name; MLX went by the ending and knew no `golden`."""
    path = tmp_path / "x.golden"
    path.write_bytes(LONG.read_bytes())
    assert read_golden(path).num_tokens == 339


def test_what_is_no_file(tmp_path, capsys):
    """A folder, a pipe that nobody writes to, and names that no file can have."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "absent", "a\0b"):
        assert refused(path).startswith("is not a file")
    assert run_main(lambda: read_golden(tmp_path / ("x" * 300))) == 2
    assert "cannot be used: file name too long" in capsys.readouterr().err


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HEADERS = [
    {"a": ENTRY | {"shape": [-4], "data_offsets": [0, 2**64 - 16]}},  # MLX read it for ever
    {"a": ENTRY | {"shape": [-4, -1]}},  # MLX made an array of these lengths
    {"a": ENTRY | {"shape": [2**32 + 4]}},  # MLX made one of four numbers
    {"a": ENTRY | {"data_offsets": [0, 1 << 40]}},
    {"a": ENTRY, "b": ENTRY},
    {"a": ENTRY | {"dtype": "F64", "shape": [2]}},
    {"a": {}},
    {"a": None},
    {"a": ENTRY | {"dtype": "I64", "shape": [2]}},  # of no golden file
    {"__metadata__": {"format": 1}, "a": ENTRY},
    {"__metadata__": [], "a": ENTRY},
    {"__metadata__": "F32", "a": ENTRY},
    {"__metadata__": {"format": [[]]}, "a": ENTRY},
    [],
]


@pytest.mark.parametrize("header", HEADERS, ids=json.dumps)
def test_a_header_that_disagrees_with_the_data(tmp_path, header):
    """Sizes are what the bytes allow before MLX sees them."""
    text = json.dumps(header).encode()
    path = tmp_path / "g.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    refused(path)


@pytest.mark.parametrize("kept", [0, 7, 8, 2000, 300_000])
def test_a_file_that_was_cut(tmp_path, kept):
    """A copy that stopped half-way."""
    path = tmp_path / "g.safetensors"
    path.write_bytes(LONG.read_bytes()[:kept])
    assert refused(path).startswith("is truncated")
