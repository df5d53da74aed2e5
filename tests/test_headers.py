"""Headers of strangers: whatever is not exactly a safetensors header is refused in one sentence.

Before, the runtime checked a file's end only: an expert whose offsets were shifted by 4,096 bytes
answered in nonsense with status 0.
"""

import json
import struct
from pathlib import Path

import pytest

from mlx_dsv3.checkpoint.format import infer_quantization, read_index
from mlx_dsv3.checkpoint.headers import header_length, read_header
from mlx_dsv3.errors import UserError

GOOD = {
    "__metadata__": {"format": "mlx"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "empty": {"dtype": "U8", "shape": [0, 5], "data_offsets": [24, 24]},
    "one": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
}
DATA_BYTES = 40
HUGE = 10**30


def write(path: Path, header: dict | str | bytes, data: bytes = bytes(DATA_BYTES)) -> Path:
    raw = json.dumps(header) if isinstance(header, dict) else header
    raw = raw.encode() if isinstance(raw, str) else raw
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_header(path)
    assert "\n" not in caught.value.message and caught.value.hint
    assert f"`{path}`" in caught.value.message
    return caught.value.message


def test_a_good_header_passes(tmp_path):
    """Empty tensors, scalars, padding and any order of names are within the format."""
    path = write(tmp_path / "x.safetensors", json.dumps(GOOD) + "   ")
    tensors = read_header(path)
    start = path.stat().st_size - DATA_BYTES
    assert [info.offset - start for info in tensors.values()] == [0, 24, 24, 32]
    assert tensors["b"][:3] == (path, "BF16", (4,)) and tensors["b"].nbytes == 8


DAMAGE = {
    "no dtype": {"dtype": None},
    "unknown dtype": {"dtype": "F4"},
    "dtype that is a list": {"dtype": ["BF16"]},
    "wider dtype": {"dtype": "F64"},
    "no shape": {"shape": None},
    "shape that is a word": {"shape": "4"},
    "shape that is a number": {"shape": 4},
    "shape of words": {"shape": ["4"]},
    "negative size": {"shape": [-4]},
    "two negative sizes": {"shape": [-2, -2]},
    "float size": {"shape": [4.0]},
    "bool size": {"shape": [True, 4]},
    "many dimensions": {"shape": [4, *[1] * 1000]},
    "larger shape": {"shape": [5]},
    "smaller shape": {"shape": [3]},
    "no offsets": {"data_offsets": None},
    "offsets that are a number": {"data_offsets": 24},
    "one offset": {"data_offsets": [24]},
    "three offsets": {"data_offsets": [24, 32, 40]},
    "float offsets": {"data_offsets": [24.0, 32.0]},
    "bool offset": {"shape": [0], "data_offsets": [False, 0]},
    "offsets of words": {"data_offsets": ["24", "32"]},
    "negative offset": {"data_offsets": [-8, 0]},
    "reversed offsets": {"data_offsets": [32, 24]},
    "no bytes": {"data_offsets": [24, 24]},
    "shifted": {"data_offsets": [28, 36]},
    "over another": {"data_offsets": [16, 24]},
    "beyond the end": {"data_offsets": [HUGE, HUGE + 8]},
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_entry_is_named(tmp_path, case):
    """One tensor's entry is wrong: the sentence names it, or the one that it collides with."""
    path = write(tmp_path / "x.safetensors", GOOD | {"b": GOOD["b"] | DAMAGE[case]})
    words = refusal(path)
    assert "`b`" in words or "`one`" in words


@pytest.mark.parametrize("entry", [None, [], 3, "x", {}])
def test_an_entry_must_be_an_object(tmp_path, entry):
    assert "`b`" in refusal(write(tmp_path / "x.safetensors", GOOD | {"b": entry}))


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "3",
        "null",
        "{",
        "{}{}",
        "",
        "{}".encode("utf-16"),
        '{"b":{"dtype":"BF16","shape":[4],"data_offsets":[NaN,32]}}',
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"a":{"dtype":"U8","shape":[' + "9" * 5000 + '],"data_offsets":[0,40]}}',
    ],
)
def test_what_is_not_a_header(tmp_path, header):
    """Pages, lists, nests of 10^5 and numbers of 5,000 digits: no traceback, no overflow."""
    path = write(tmp_path / "x.safetensors", header)
    assert refusal(path).startswith(f"the safetensors header of `{path}` ")


@pytest.mark.parametrize("shape", [[0, 2**31], [0, HUGE], [0, *[1] * 8]])
def test_sizes_that_mlx_does_not_have(tmp_path, shape):
    """An empty tensor takes no bytes, whatever its other sizes: nothing else would be wrong."""
    path = write(tmp_path / "x.safetensors", GOOD | {"empty": GOOD["empty"] | {"shape": shape}})
    assert f"`empty` in `{path}` has a damaged shape" == refusal(path)


def test_offsets_of_100_digits(tmp_path):
    """The longest numbers that are read."""
    far = 10**100 - 1
    entry = GOOD["empty"] | {"data_offsets": [far, far]}
    path = write(tmp_path / "x.safetensors", GOOD | {"empty": entry})
    assert f"`empty` in `{path}` has damaged offsets" == refusal(path)


def test_a_nest_is_not_printed(tmp_path):
    """What a header calls a dtype may be a page of lists, or of letters."""
    for word in "[" * 20 + "]" * 20, "[" + "[]," * 1000 + "[]]", f'"{"x" * 5000}"':
        path = write(tmp_path / "x.safetensors", json.dumps(GOOD).replace('"BF16"', word))
        assert "`b`" in refusal(path) and len(refusal(path)) < 300


def test_an_answer_of_a_few_bytes():
    """A server may send less than was asked for: no length can be read from that."""
    with pytest.raises(UserError, match="`x` is truncated"):
        header_length(b"\1", "x", 100)


@pytest.mark.parametrize("where", ["tensor", "dtype"])
def test_a_name_given_twice(tmp_path, where):
    """JSON readers keep the last one, others the first: which tensor is meant is unknown."""
    text = json.dumps(GOOD)
    if where == "tensor":
        text = text.replace('"empty"', '"b"')
    else:
        text = text.replace('"dtype": "BF16"', '"dtype": "BF16", "dtype": "F16"')
    path = write(tmp_path / "x.safetensors", text)
    assert f"names `{'b' if where == 'tensor' else 'dtype'}` twice" in refusal(path)


@pytest.mark.parametrize("change", [-1, 1])
def test_the_file_ends_where_its_header_says(tmp_path, change):
    """A download cut short, or the tail of an older file under a newer header."""
    path = write(tmp_path / "x.safetensors", GOOD, bytes(DATA_BYTES + change))
    words = refusal(path)
    assert ("is truncated" if change < 0 else "is longer") in words


@pytest.mark.parametrize("length", [b"", b"\0\0\0", struct.pack("<Q", 2**63)])
def test_a_length_that_the_file_does_not_have(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(length)
    assert "is truncated or not a safetensors file" in refusal(path)


def test_only_files_are_read(tmp_path):
    """A folder of that name; a pipe would have made the program wait for ever."""
    assert "is not a file" in refusal(tmp_path)


@pytest.mark.parametrize(
    "weight_map", [None, [], ["x"], {}, {"a": 1}, {"a": None}, {"a": "../x"}, {"a": "/x"}]
)
def test_a_damaged_index(tmp_path, weight_map):
    """Converter and runtime read the same index: values that are not file names of the folder."""
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError) as caught:
        read_index(tmp_path)
    assert f"`{path}`" in caught.value.message


@pytest.mark.parametrize(
    "packing",
    [(192, 24, 5, False), (192, 24, 0, False), (192, 0, 6, False), (192, 42, 6, False)]
    + [(192, 24, 12, False), (192, 24, 3, True), (63, 8, 1, False)],
)
def test_a_packing_that_mlx_does_not_have(packing):
    """Words or scales of another width: zeros divided, and MLX refused groups of 63."""
    assert infer_quantization(192, 24, 6, False, "x") == (4, 32, "affine")
    with pytest.raises(UserError, match="`x` has .* MLX packs no row of"):
        infer_quantization(*packing, "x")


def test_a_nested_index(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match="index.json` has lists or objects within each other"):
        read_index(tmp_path)
