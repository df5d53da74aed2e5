"""Tokenizers and generation_config.json: files from outside, read by other packages' code."""

import json
import os
from pathlib import Path

import pytest
import tiny
from mlx_folder import write_json, write_tokenizer

from mlx_dsv3.config import ModelArgs, read_config
from mlx_dsv3.detokenizer import Detokenizer
from mlx_dsv3.errors import UserError
from mlx_dsv3.load import load_checked_tokenizer

SIZE = tiny.A["vocab_size"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder with a config and a tokenizer, and no weights."""
    write_json(tmp_path / "config.json", tiny.A)
    write_tokenizer(tmp_path, SIZE)
    return tmp_path


def read(folder: Path, trust_remote_code: bool = False):
    config = read_config(folder)
    return load_checked_tokenizer(folder, ModelArgs.from_dict(config), config, trust_remote_code)


def refusal(folder: Path, trust_remote_code: bool = False) -> UserError:
    with pytest.raises(UserError) as error:
        read(folder, trust_remote_code)
    assert "\n" not in error.value.message and error.value.hint
    return error.value


def change(path: Path, **values) -> None:
    write_json(path, json.loads(path.read_text()) | values)


# What transformers' config classes refuse, and no tokenizer needs.
STRICT = {
    "integer for a float": {"routed_scaling_factor": 1},
    "null for an integer": {"n_shared_experts": None},
    "yarn of kimi_k2": {"model_type": "kimi_k2"},
    "word for a token": {"pad_token_id": "none"},
}


@pytest.mark.parametrize("case", STRICT)
def test_it_does_not_hang_on_config_json(folder, case):
    """GigaChat3's integer in a float field ended the load in a traceback of huggingface_hub."""
    change(folder / "config.json", **STRICT[case])
    assert read(folder).encode("w5 w159", add_special_tokens=False) == [5, 159]


def test_a_text_does_not_change_when_more_comes(folder):
    """`w5 .` became `w5.`: a space that was shown already."""
    words = json.loads((folder / "tokenizer.json").read_text())
    del words["model"]["vocab"][f"w{SIZE - 1}"]
    words["model"]["vocab"]["."] = SIZE - 1
    write_json(folder / "tokenizer.json", words)
    change(folder / "tokenizer_config.json", clean_up_tokenization_spaces=True)
    tokenizer = read(folder)
    assert tokenizer.decode([5, SIZE - 1]) == "w5 ."
    assert [*map(Detokenizer(tokenizer).add, [5, SIZE - 1])] == ["w5", " ."]


@pytest.mark.parametrize(
    "config, generation, ends",
    [
        ({}, None, {1}),
        ({"eos_token_id": 7}, None, {1, 7}),
        ({"eos_token_id": 7}, {"eos_token_id": [5, 6]}, {1, 5, 6}),
        ({"eos_token_id": 7}, {"eos_token_id": 0}, {1, 0}),
        ({"eos_token_id": [7, 8]}, {"eos_token_id": None, "unknown": [{}]}, {1, 7, 8}),
    ],
)
def test_what_ends_a_reply(folder, config, generation, ends):
    """By generation_config.json, where R1-style folders list several, else by config.json.

    The tokenizer's own end, 1, counts in any case; an end of 0 was taken for none.
    """
    change(folder / "config.json", **config)
    if generation:
        write_json(folder / "generation_config.json", generation)
    assert read(folder).eos_token_ids == ends


@pytest.mark.parametrize("value", [[[1]], 1.0, "x", True, -1, [], [1, None], SIZE, 10**30, {}])
def test_ends_that_are_no_tokens(folder, value):
    """A list within a list was a TypeError in mid-load; a number that is no id never came."""
    write_json(folder / "generation_config.json", {"eos_token_id": value})
    error = refusal(folder)
    where = folder / "generation_config.json"
    assert error.message.startswith(f"`eos_token_id` in `{where}` is `{value}`; it takes")


@pytest.mark.parametrize("size, is_refused", [(SIZE, False), (SIZE + 1, True), (300, True)])
def test_ids_beyond_the_embedding(folder, size, is_refused):
    """An id >= vocab_size reads foreign memory: MLX checks no index."""
    write_tokenizer(folder, size)
    if not is_refused:
        read(folder)
        return
    assert f"has id {size - 1}; the model's vocab_size is {SIZE}" in refusal(folder).message


def test_added_token_beyond_the_embedding(folder):
    """Ids of added tokens are not in the base vocabulary, and count."""
    token = {"id": SIZE, "content": "<x>", "single_word": False, "lstrip": False}
    token |= {"rstrip": False, "normalized": False, "special": True}
    change(folder / "tokenizer.json", added_tokens=[token])
    assert f"has id {SIZE}" in refusal(folder).message


def test_no_tokenizer(folder):
    """A folder without tokenizer files: a sentence, not transformers' traceback."""
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert f"the tokenizer of `{folder}` does not load" in refusal(folder).message


@pytest.mark.parametrize(
    "text, words",
    [
        ("{}", "KeyError: "),
        ("{", "JSONDecodeError: Failed to parse tokenizer.json"),
        ('{"model": ' + "[" * 100_000, "RecursionError: "),
        ('{"version": "1.0", "model": {"type": "\x7f"}}', "Error: "),
    ],
)
def test_a_damaged_tokenizer(folder, text, words):
    """Whatever another package raises: one sentence with its kind and what it says."""
    (folder / "tokenizer.json").write_text(text)
    error = refusal(folder)
    assert f"the tokenizer of `{folder}` does not load: " in error.message
    assert words in error.message and "--trust-remote-code" not in error.hint


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"tool_parser_type": "none"}, "asks for `mlx_lm.tool_parsers.none`, which mlx-lm"),
        ({"chat_template_type": "none"}, "asks for `mlx_lm.chat_templates.none`, which mlx-lm"),
        ({"chat_template_type": ["x"]}, "asks for `mlx_lm.chat_templates.['x']`, which mlx-lm"),
        ({"extra_special_tokens": 5}, "does not load: TypeError: "),
        ({"model_max_length": {"x": 1}}, None),
    ],
)
def test_tokenizer_config(folder, settings, words):
    """Parts of mlx-lm that are not there were said to be packages of the model's own code.

    The length that transformers believes in is not ours: R1's says 16,384, and a longer prompt
    brought a warning of errors that do not come.
    """
    change(folder / "tokenizer_config.json", **settings)
    if words is None:
        assert read(folder).encode("w5", add_special_tokens=False) == [5]
    else:
        assert words in refusal(folder).message


@pytest.mark.parametrize("is_good", [True, False])
def test_other_packages_print_nothing(folder, capfd, is_good):
    """Rust's and transformers' warnings name what the files hold, escape sequences too.

    On stdout they stood in the answer.
    """
    token = {"content": "w5", "\x1b]0;title\x07": 1, "special": True}
    settings = {"tokenizer_class": "\x1b[2JLlamaTokenizer", "added_tokens_decoder": {"5": token}}
    change(folder / "tokenizer_config.json", **settings)
    if not is_good:
        (folder / "tokenizer.json").write_text("{}")
        refusal(folder)
    else:
        read(folder)
    print("heard", flush=True)
    assert capfd.readouterr() == ("heard\n", "")


LISTS = '{"a": [' + "[]," * 10**6 + "[]]}"


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "vocab.json", "special_tokens_map.json", "added_tokens.json"]
)
def test_files_of_too_many_values(folder, name):
    """30 MB of empty lists took 3 GB and 24 s, three of these files in other packages' readers."""
    (folder / name).write_text(LISTS)
    assert f"`{folder / name}` holds more than " in refusal(folder).message


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"],
)
def test_files_that_would_be_read_for_ever(folder, name):
    """A pipe in their place waited for a writer; a huge one was read into memory."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"`{folder / name}` is not a file" in refusal(folder).message
    (folder / name).unlink()
    with open(folder / name, "wb") as file:
        file.truncate(1 << 40)
    assert "is the most that is read" in refusal(folder).message


@pytest.mark.parametrize(
    "code, needed",
    [
        ("import absent_package, numpy\nfrom absent.part import x", "absent absent_package"),
        ("import importlib\nimportlib.import_module('absent.part')", "absent"),
    ],
)
def test_code_that_imports_what_is_missing(folder, code, needed):
    """Moonlight's and Kimi's tokenizers are code on tiktoken, which nothing here installs.

    Transformers finds an import by reading the code; one within a function only Python finds.
    """
    auto_map = {"AutoTokenizer": ["own.Own", None]}
    change(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map=auto_map)
    (folder / "own.py").write_text(f"{code}\nclass Own: pass\n")
    error = refusal(folder)
    assert "own code, which nobody allowed" in error.message and "--trust" in error.hint
    error = refusal(folder, trust_remote_code=True)
    message = f"the tokenizer of `{folder}` needs a package that is not installed: "
    names = error.message.removeprefix(message).split()
    assert sorted(names) == needed.split() and error.hint == f"`pip install {' '.join(names)}`"
