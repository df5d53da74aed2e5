"""JSON from strangers: whatever is not a plain object of JSON is one sentence, in little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_dsv3.checkpoint.format import FORMAT, read_manifest
from mlx_dsv3.config import read_config
from mlx_dsv3.errors import UserError
from mlx_dsv3.json_files import read_json

ROOT = Path(__file__).parents[1]
REFUSED = {
    "": "is not JSON: Expecting value",
    "{": "is not JSON",
    "{}{}": "is not JSON: Extra data",
    "[1]": "holds a list, not an object",
    "null": "holds a NoneType, not an object",
    '{"a": NaN}': "holds `NaN`, which is not JSON",
    '{"a": -Infinity}': "holds `-Infinity`, which is not JSON",
    '{"a": 1e999}': "holds the number `1e999`",
    '{"a": ' + "9" * 4301 + "}": "holds a number of 4,301 digits",
    '{"a": 1, "a": 2}': "names `a` twice",
    '{"a": {"b": 1, "c": 0, "b": 2}}': "names `b` twice",
    '{"a": "\\ud800"}': "is not UTF-8: surrogates",
    '{"\\udfff": 1}': "is not UTF-8: surrogates",
    '{"a":' * 100_000: "more than 32 deep",
    '{"a":' + "[" * 900 + "]" * 900 + "}": "more than 32 deep",
    '{"a": [' + "[]," * 500_000 + "1]}": "holds more than 500,000 values",
    '{"a": "' + "x" * (4 << 20) + '"}': "4,194,304 is the most",
}


@pytest.mark.parametrize("text, words", REFUSED.items(), ids=range(len(REFUSED)))
def test_what_is_not_an_object_of_json(tmp_path, text, words):
    """Nests of 10^5 were a traceback, and so was printing one of 900."""
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_json(path)
    assert caught.value.message.startswith(f"`{path}` ") and words in caught.value.message
    assert caught.value.hint and len(caught.value.message) < 300


@pytest.mark.parametrize("coding", ["latin-1", "utf-16", "utf-32"])
def test_other_encodings(tmp_path, coding):
    (tmp_path / "x.json").write_text('{"a": "é"}', encoding=coding)
    with pytest.raises(UserError, match="x.json` is not text in UTF-8"):
        read_json(tmp_path / "x.json")


def test_only_files_are_read(tmp_path):
    """A pipe would be waited for without end; a folder was a traceback."""
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="config.json` is not a file"):
        read_config(tmp_path)
    with pytest.raises(UserError, match="is not a file"):
        read_json(tmp_path)


def test_what_json_may_hold(tmp_path):
    """Brackets in texts, pairs of half characters, long whole numbers, 32 levels."""
    nest = json.loads('{"a":' * 32 + "1" + "}" * 32)
    good = {"a": "[{,\\ud800", "\U0001f600": [1.5, -2, None, True, 10**99], "nest": nest["a"]}
    (tmp_path / "x.json").write_text(json.dumps(good))
    assert read_json(tmp_path / "x.json") == good


PEAK = """
import resource, sys
from pathlib import Path
from mlx_dsv3.checkpoint.format import INDEX_BYTES
from mlx_dsv3.json_files import read_json
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_json(Path(sys.argv[1]), INDEX_BYTES)
except Exception as error:
    print(type(error).__name__, file=sys.stderr)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["lists", "names", "letters"])
def test_memory_is_bounded(tmp_path, kind):
    """12 MB of empty lists took 330 MB: what stands in a text is counted before it is made."""
    texts = {
        "lists": '{"a":[' + "[]," * 4 * 10**6 + "1]}",
        "names": "{" + ",".join(f'"{i:06x}":{10**18 + i}' for i in range(200_000)) + "}",
        "letters": '{"a":"\U0001f600' + "x" * 12_000_000 + '"}',  # four bytes each in memory
    }
    (tmp_path / "x.json").write_text(texts[kind], encoding="utf-8")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "x.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == ("UserError\n" if kind == "lists" else ""), done.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 150e6


@pytest.fixture
def manifest() -> dict:
    """What `convert run` writes, with the keys that an earlier version left out left out."""
    return {
        "format": FORMAT,
        "source": {"id": None, "revision": None, "headers_sha256": "6d", "tensors": 885},
        "recipe": {"name": "q4"},
        "layout": "records",
        "plan": "a5",
        "device": "cpu",
        "roles": {
            "head": {
                "bytes": 1,
                "bits_per_weight": 4.5,
                "relative_rms_error": 0.1,
                "worst": {"tensor": "lm_head", "relative_rms_error": 0.1},
            },
            "norm": {"bytes": 1, "bits_per_weight": 16},
        },
        "files": {"config.json": {"bytes": 1, "sha256": "00"}},
        "digest": "77",
    }


def read_changed(folder: Path, manifest: dict) -> dict:
    (folder / "conversion.json").write_text(json.dumps(manifest))
    return read_manifest(folder)


@pytest.mark.parametrize(
    "field", ["format", "source", "recipe", "layout", "plan", "device", "roles", "files", "digest"]
)
@pytest.mark.parametrize("value", [None, 2, "x", [], {"x": []}, {"x": {"bytes": 1}}])
def test_a_manifest_of_another_shape(tmp_path, manifest, field, value):
    """Missing keys were tracebacks; whatever a program reads of it is looked at once."""
    assert read_changed(tmp_path, manifest) == manifest
    if isinstance(value, str) and isinstance(manifest[field], str) and field != "layout":
        return
    with pytest.raises(UserError, match=rf"conversion.json` has `{field}[.x]*` = `"):
        read_changed(tmp_path, manifest | {field: value})


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "..", ".", "", "a/b", "a\\b", "a\0b"])
def test_a_manifest_names_files_of_its_folder(tmp_path, manifest, name):
    """`/etc/passwd` was opened, and its size told."""
    files = {name: manifest["files"]["config.json"]}
    with pytest.raises(UserError, match="conversion.json` has `files"):
        read_changed(tmp_path, manifest | {"files": files})


@pytest.mark.parametrize(
    "row",
    [
        {"worst": []},
        {"worst": {"tensor": ["lm_head"]}},
        {"worst": {"relative_rms_error": "0.1"}},
        {"relative_rms_error": None},
        {"extremes_rms_error": "0.1"},
        {"weighted_rms_error": None},
        {"weighted_extremes_rms_error": []},
        {"bytes": "1"},
        {"bits_per_weight": None},
    ],
)
def test_a_manifest_with_other_figures(tmp_path, manifest, row):
    roles = {"head": manifest["roles"]["head"] | row}
    with pytest.raises(UserError, match="has `roles.head` = "):
        read_changed(tmp_path, manifest | {"roles": roles})
