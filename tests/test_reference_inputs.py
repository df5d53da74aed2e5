"""What users and strangers give the reference's programs: wrong, it is one sentence and status 2.

Each case runs `main` in this process. What nobody thought of is for the fuzz
lane (`tests/fuzz`).
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from mlx_dsv3.errors import UserError, run_main
from mlx_dsv3.reference import generate, golden, record
from mlx_dsv3.reference.model import Args

CONFIG = tiny.A | {"num_hidden_layers": 2}
SHARD = "model-00001-of-000003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny.write_tokenizer(tiny.write_hub(tmp_path_factory.mktemp("whole") / "hub", CONFIG))


@pytest.fixture(autouse=True)
def no_git(monkeypatch):
    """Ask git nothing: it takes half of a recording's time."""
    monkeypatch.setattr(golden, "code_version", lambda: "unknown")


@pytest.fixture
def source(whole, tmp_path):
    """Return a copy of a small checkpoint, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "hub"))


@pytest.fixture
def prompt(tmp_path):
    file = tmp_path / "ids.json"
    file.write_text("[1, 2, 3, 4]")
    return file


@pytest.fixture
def refused(source, prompt, tmp_path, capsys):
    """Return a function that runs both programs on the checkpoint and returns what they say."""

    def run(*words, programs=(record, generate), file=prompt, folder=source, out=None) -> str:
        for program in programs:
            out = out or tmp_path / "golden"
            mine = [out, "--prompt-file", file] if program is record else ["-p", "w1 w2 w3"]
            argv = [str(word) for word in (folder, *mine, "--device", "cpu", *words)]
            assert run_main(lambda argv=argv, program=program: program.main(argv)) == 2
            said = capsys.readouterr()
            assert not said.out and said.err.startswith("error: ") and "\n\nhint: " in said.err
            assert said.err.count("\n") == 3, said.err
            assert not (tmp_path / "golden").exists()
            assert not (tmp_path / "golden.partial").exists(), "an empty folder stays"
        return said.err

    return run


def change(path: Path, **fields) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# --- SOURCE -----------------------------------------------------------------------------------


def test_a_mistyped_source(refused, tmp_path, monkeypatch):
    """`demo/checkpointt` may be a repository; without a network it was a raw exception."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(*_, **__):
        raise LocalEntryNotFoundError("An error happened\nwhile trying to locate the files")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    said = refused(folder="demo/checkpointt")
    assert "there is no folder `demo/checkpointt`, and the hub cannot be reached" in said
    assert "`absent` is not a folder" in refused(folder="absent")
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *_, **__: exec("raise OSError('half\\na file')"),
    )
    assert "`demo/checkpointt` cannot be fetched: half" in refused(folder="demo/checkpointt")


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json"])
@pytest.mark.parametrize(
    "data", [b"[1]", b"", b'{"a": ', b"\xff", b"[" * 100_000], ids=["list", "", "torn", "x", "deep"]
)
def test_json_that_is_broken(refused, source, prompt, name, data):
    """Each was a JSONDecodeError, KeyError, AttributeError or RecursionError."""
    (source / name).write_bytes(data)
    text = prompt.with_name("text.txt")
    text.write_text("w1 w2 w3 w4")
    assert f"{name}` " in refused(file=text)


def test_a_tokenizer_that_panics(refused, source, prompt):
    """Rust's panic is no Exception, and ended the program."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}
    (source / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    text = prompt.with_name("text.txt")
    text.write_text("a b a b")
    refused(file=text)


def test_a_tokenizer_of_too_many_values(refused, source, prompt):
    """30 MB of empty lists took 700 MB."""
    (source / "tokenizer.json").write_text('{"a": [' + "[]," * 10**6 + "[]]}")
    text = prompt.with_name("text.txt")
    text.write_text("w1 w2 w3 w4")
    assert "tokenizer.json` holds more than 2,000,000 values" in refused(file=text)


def test_a_tokenizer_without_words(refused, source, prompt):
    """It was opened, and the first word that it lacks ended the program in a bare Exception."""
    model = {"type": "WordLevel", "vocab": {}, "unk_token": "w0"}
    (source / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    text = prompt.with_name("text.txt")
    text.write_text("w1 w2 w3 w4")
    assert "tokenizer.json` is no tokenizer: WordLevel error: Missing" in refused(file=text)


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json", SHARD])
@pytest.mark.parametrize("kind", ["pipe", "folder", "absent"])
def test_what_is_no_file(refused, source, prompt, name, kind):
    """A pipe in place of an index passed for a checkpoint without one."""
    (source / name).unlink()
    if kind != "absent":
        (os.mkfifo if kind == "pipe" else os.mkdir)(source / name)
    text = prompt.with_name("text.txt")
    text.write_text("w1 w2 w3 w4")
    said = refused(file=text)
    assert (f"{name}` is not a file" in said) == (kind != "absent")


@pytest.mark.parametrize("place", ["../hub/", "/tmp/", "sub/"])
def test_an_index_stays_in_its_folder(refused, source, place):
    """`../other/model.safetensors` was read: another folder's weights, or any file."""
    names = json.loads((source / INDEX).read_text())["weight_map"]
    change(source / INDEX, weight_map={name: place + shard for name, shard in names.items()})
    said = refused()
    assert f"into `{place}{SHARD}`, which is not a file name" in said


@pytest.mark.parametrize("names", [None, [1], {}, {"model.norm.weight": 1}])
def test_an_index_of_other_types(refused, source, names):
    change(source / INDEX, weight_map=names)
    assert f"{INDEX}` " in refused()


def rewrite_header(shard: Path, edit) -> None:
    """Pass a shard's header through `edit`; its data stay."""
    raw = shard.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps(edit(json.loads(raw[8 : 8 + length]))).encode()
    shard.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


ENTRIES = {
    "no entry": [1],
    "dtype": {"dtype": "Q9"},
    "dtype of another size": {"dtype": "F64"},
    "shape": {"shape": [-1]},
    "words": {"shape": ["a"]},
    "null": {"shape": None},
    "one offset": {"data_offsets": [0]},
    "negative": {"data_offsets": [-4, 0]},
    "nothing": {"data_offsets": [0, 0]},
    "beyond": {"data_offsets": [10**12, 10**12 + 4]},
}


@pytest.mark.parametrize("case", ENTRIES)
def test_a_damaged_entry(refused, source, case):
    """`NoneType`, `IndexError`, `view() received an invalid combination`, or silence."""

    def edit(header):
        name = next(name for name in header if name.endswith("_scale_inv"))
        entry = ENTRIES[case]
        header[name] = header[name] | entry if isinstance(entry, dict) else entry
        return header

    rewrite_header(source / SHARD, edit)
    assert f"{SHARD}` " in refused()


SHARDS = {
    "empty": lambda raw: b"",
    "half": lambda raw: raw[: len(raw) // 2],
    "one byte less": lambda raw: raw[:-1],
    "one byte more": lambda raw: raw + b"\0",
    "no header": lambda raw: b"\xff" * len(raw),
    "a header of 4 EB": lambda raw: (1 << 62).to_bytes(8, "little") + raw[8:],
    "a list": lambda raw: (3).to_bytes(8, "little") + b"[1]",
    "not JSON": lambda raw: raw[:8] + b"\xff" + raw[9:],
}


@pytest.mark.parametrize("case", SHARDS)
def test_a_damaged_shard(refused, source, case):
    """A truncated one was found when its layer came; a damaged one was an OverflowError."""
    raw = (source / SHARD).read_bytes()
    (source / SHARD).write_bytes(SHARDS[case](raw))
    assert f"{SHARD}` " in refused()


CONFIGS = {
    "num_hidden_layers": (3_000_000, 10**12, 0, -1, 2.0, "2", True, None, 1, 3),
    "n_routed_experts": (3_000_000, 0, 15),
    "hidden_size": (10**9, 0, -64, 64.0, "64", 65),
    "vocab_size": (10**15, None, 159),
    "kv_lora_rank": (None, 31),
    "qk_rope_head_dim": (15,),
    "moe_layer_freq": (0, [0, 1]),
    "n_group": (0, 3, 16),
    "topk_group": (0, 9),
    "num_experts_per_tok": (0, 99),
    "num_nextn_predict_layers": (0, 5, "1"),
    "first_k_dense_replace": (0, -1),
    "n_shared_experts": (None, 1),
    "q_lora_rank": (None, 25),
    "norm_topk_prob": ("false", None),
    "routed_scaling_factor": (float("inf"), "x"),
    "rms_norm_eps": (float("nan"), -1),
    "rope_theta": (0, 1, "x", 10**400),
    "rope_scaling": (
        [1],
        "yarn",
        {"type": "yarn"},
        {"factor": 40},
        tiny.YARN | {"factor": "x"},
        tiny.YARN | {"factor": 0},
        tiny.YARN | {"beta_fast": 0},
        tiny.YARN | {"beta_fast": 1e308},
        tiny.YARN | {"truncate": "no"},
    ),
    "quantization_config": (
        None,
        [1],
        {"quant_method": "awq"},
        tiny.FP8_CONFIG | {"weight_block_size": [0, 0]},
        tiny.FP8_CONFIG | {"weight_block_size": [128, 64]},
        tiny.FP8_CONFIG | {"weight_block_size": "x"},
        tiny.FP8_CONFIG | {"weight_block_size": [16, 16]},
    ),
    "quantization": ({"bits": 4},),
    "bos_token_id": ("x", 160, [0]),
    "eos_token_id": ({"a": 1}, [[1]], -1),
    "model_type": ("llama", ["x"]),
    "max_position_embeddings": ("x", 0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_no_model(refused, source, name):
    """NaN with status 0, a hang at 10^12 layers, a model of 2 layers computed with 1 of them."""
    for value in CONFIGS[name]:
        config = json.loads((source / "config.json").read_text())
        change(source / "config.json", **{name: value})
        refused("--arithmetic", "bf16")
        change(source / "config.json", **config)


def test_rope_turns_pairs():
    """A checkpoint of an odd rope width, whole in itself, was an error of shapes in the middle."""
    with pytest.raises(UserError, match="`qk_rope_head_dim` = `15`; rope turns pairs"):
        Args.from_dict(CONFIG | {"qk_rope_head_dim": 15})


def test_a_tensor_too_many(refused, source):
    """A bias in the shards was left out of the sum, without a word."""
    names = json.loads((source / INDEX).read_text())["weight_map"]
    name = "model.layers.0.self_attn.o_proj.bias"
    change(source / INDEX, weight_map=names | {name: SHARD})
    assert f"the shards hold `{name}`, which the model of config.json does not have" in refused()


def test_what_is_fp8_or_whole_numbers(refused, source):
    """An FP8 embedding was used without its scales; integers were taken for weights."""

    def edit(header, **fields):
        name = next(name for name in header if name.endswith("layers.0.input_layernorm.weight"))
        header[name] |= fields
        return header

    for dtype in "I16", "U16":
        rewrite_header(source / SHARD, lambda header, dtype=dtype: edit(header, dtype=dtype))
        assert "`model.layers.0.input_layernorm.weight` is `torch." in refused()


def test_damage_that_only_numbers_show(source, prompt, tmp_path, capsys):
    """A scale that is NaN: a recording of NaN, hours later, with status 0."""
    name = "model.layers.0.mlp.up_proj.weight"
    file = source / json.loads((source / INDEX).read_text())["weight_map"][name]
    raw = bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])[name]
    start = 8 + length + entry["data_offsets"][0]
    raw[start : start + 64] = b"\x7f" * 64  # NaN in e4m3
    file.write_bytes(raw)
    argv = [source, tmp_path / "golden", "--prompt-file", prompt, "--device", "cpu"]
    assert run_main(lambda: record.main([*map(str, argv)])) == 2
    assert "error: the states after layer 0 are not all finite numbers" in capsys.readouterr().err
    assert not (tmp_path / "golden").exists()


# --- options and prompts ------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["foo", "", "meta", "cpu:3", "cuda:-1", "cuda:99"])
def test_a_device_that_is_not_here(refused, monkeypatch, device):
    """RuntimeError and AssertionError of torch; now before a checkpoint is fetched."""
    from mlx_dsv3.reference import source

    monkeypatch.setattr(source, "resolve", lambda _: pytest.fail("it fetches"))
    said = refused("--device", device)
    assert said.startswith(f"error: `--device{' ' if 'cuda:9' in device else '` is `'}{device}`")


WORDS = [
    (generate, "--max-tokens -1", "`--max-tokens` is `-1`; it takes a whole number from 1"),
    (generate, "--max-tokens 0", "`--max-tokens` is `0`"),
    (generate, "--max-tokens 163840", "`max_position_embeddings` is 163,840"),
    (generate, "--temp -1", "`--temp` is `-1`"),
    (generate, "--temp nan", "`--temp` is `nan`"),
    (generate, "--temp inf", "`--temp` is `inf`"),
    (generate, "--top-p 0", "`--top-p` is `0`"),
    (generate, "--top-p 1.1", "`--top-p` is `1.1`"),
    (generate, "--top-p nan", "`--top-p` is `nan`"),
    (generate, "--seed x", "`--seed` is `x`"),
    (generate, "--drafts -1", "`--drafts` is `-1`"),
    (generate, "-p a\udcff", "`--prompt` is not text in UTF-8"),
    (record, "--max-tokens -2", "`--max-tokens` is `-2`; it takes a whole number from 3"),
    (record, "--max-tokens 2", "`--max-tokens` is `2`"),
    (record, "--states some", "`--states`"),
]


@pytest.mark.parametrize("program, words, said", WORDS, ids=[ascii(words) for _, words, _ in WORDS])
def test_options(refused, program, words, said):
    """`--max-tokens -1` had no end but EOS; NaN, 0 and negative numbers were taken."""
    assert said in refused(*words.split(), programs=[program])


@pytest.mark.parametrize("rank", [None, "0"])
def test_half_of_a_torchrun(refused, monkeypatch, rank):
    """WORLD_SIZE left over in a shell: a ValueError of torch's about RANK."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    said = refused(programs=[generate])
    assert "no torchrun started" in said if rank is None else "cannot reach each other" in said


def test_memory_that_ends(source, prompt, tmp_path, monkeypatch, capsys):
    """A prompt too long for a GPU was a traceback of torch's."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("mlx_dsv3.reference.model.MLA.forward", full)
    recorded = [source, tmp_path / "golden", "--prompt-file", prompt]
    for program, argv in (record, recorded), (generate, [source, "-p", "w1"]):
        argv = [*map(str, argv), "--device", "cpu"]
        assert run_main(lambda argv=argv, program=program: program.main(argv)) == 2
        assert "error: the memory of `cpu` does not suffice\n" in capsys.readouterr().err


def test_seeds_of_any_size(source, capsys):
    """A seed above 2^31 was an overflow in torch; the chat takes any."""
    argv = [str(source), "-p", "w1 w2", "--device", "cpu", "--temp", "1", "--max-tokens", "3"]
    for seed in "99999999999", "-99999999999", "4294967295":
        assert generate.main([*argv, "--seed", seed]) == 0


PROMPTS = {
    "[1, 2, 160]": "holds the id 160, outside the vocabulary of 160",
    "[-1, 2, 3]": "holds the id -1",
    "[1, 2]": "has 2 tokens; a recording needs 3",
    "[true, true, true]": "is not a list of token ids",
    "[1.0, 2.0, 3.0]": "is not a list of token ids",
    '["a", "b", "c"]': "is not a list of token ids",
    '{"a": 1, "b": 2, "c": 3}': "holds a dict, not a list",
    "5": "holds a int, not a list",
    "null": "holds a NoneType, not a list",
    "[1, 2": "is not JSON",
    "": "is not JSON",
    "\udcff": "is not text in UTF-8",
}


@pytest.mark.parametrize("text", PROMPTS, ids=ascii)
def test_lists_of_ids(refused, prompt, text):
    """An object or a number was a TypeError; `true` was the token 1."""
    prompt.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert f"`{prompt}` {PROMPTS[text]}" in refused(programs=[record])


@pytest.mark.parametrize("data", [b"", b"\xff\xfew\0", None], ids=["empty", "UTF-16", "folder"])
def test_texts(refused, tmp_path, data):
    """UTF-16 was a UnicodeDecodeError."""
    file = tmp_path / "text.txt"
    file.mkdir() if data is None else file.write_bytes(data)
    assert f"`{file}` " in refused(programs=[record], file=file)


def test_a_prompt_longer_than_the_model_places(refused, source, prompt):
    """Positions beyond the trained ones were recorded as if they were its own."""
    change(source / "config.json", max_position_embeddings=3)
    said = refused(programs=[record])
    assert f"`{prompt}` has 4 tokens; `max_position_embeddings` is 3" in said


def test_prompts_are_read_before_a_checkpoint_is_fetched(refused, tmp_path, monkeypatch):
    """A mistyped text was found after 700 GB of download."""
    from mlx_dsv3.reference import source

    monkeypatch.setattr(source, "resolve", lambda _: pytest.fail("it fetches"))
    said = refused(programs=[record], file="absent.txt")
    assert "`absent.txt` cannot be used: no such file" in said
    assert "does not work on `cpu`" in refused("--matmul", "scaled_mm")


def test_ctrl_c_keeps_what_was_said(source, monkeypatch, capsys):
    """Text of an hour was lost with the interrupt."""
    calls = []

    def sample(self, logits, position):
        calls.append(position)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [5] * len(logits)

    monkeypatch.setattr(generate.Sampler, "__call__", sample)
    argv = [str(source), "-p", "w1 w2 w3", "--device", "cpu", "--max-tokens", "9"]
    assert run_main(lambda: generate.main(argv)) == 130
    assert capsys.readouterr().out == "w3 w3\n"
