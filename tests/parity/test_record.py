"""Recording streams a checkpoint and must keep exactly what the whole model in memory computes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mlx_dsv3.errors import UserError
from mlx_dsv3.reference import generate, golden, record, stream, weights
from mlx_dsv3.reference.fp8 import Fp8Linear
from mlx_dsv3.reference.model import MoE
from mlx_dsv3.reference.source import resolve

ROOT = Path(__file__).parents[2]
IDS = ([5, 9, 150, 3, 77, 20, 20, 4, 11, 0, 93, 31], list(range(40, 81)), [1, 2, 3])
UE8M0 = tiny.FP8_CONFIG | {"scale_fmt": "ue8m0"}


@pytest.fixture
def source(tmp_path):
    """Return a function (config, options) -> (checkpoint, arguments of `record`)."""

    def write(config: dict, prompts=IDS, storage="fp8", **options) -> tuple[Path, list[str]]:
        folder = tiny.write_hub(tmp_path / "source", config, storage=storage, **options)
        argv = [str(folder), str(tmp_path / "golden.safetensors"), "--device", "cpu"]
        for p, ids in enumerate(prompts):
            file = tmp_path / f"prompt{p}.json"
            file.write_text(json.dumps(ids))
            argv += ["--prompt-file", str(file)]
        return folder, argv

    return write


def run(argv: list[str], *more: str) -> dict[str, torch.Tensor]:
    assert record.main([*argv, *more]) == 0
    return load_file(argv[1])


def in_memory(model, ids: list[int]) -> dict[str, torch.Tensor]:
    """Return what a recording of every position must hold, from the whole model and hooks."""
    kept, hooks = {}, []
    for i, layer in enumerate(model.model.layers):
        is_mtp = i == model.args.num_hidden_layers
        name = "mtp" if is_mtp else f"layers.{i}"

        def before(module, inputs, name=name):
            kept[name] = inputs[0][0]

        def after(module, inputs, output, name=name):
            kept[name] = output[0]

        def gate(module, inputs, output, name=name):
            kept[f"{name}.experts"] = output[0].sort(-1).values.short()
            kept[f"{name}.margins"] = module.margins(inputs[0]).float()

        late = layer.post_attention_layernorm
        hooks.append(
            late.register_forward_pre_hook(lambda m, x, n=name: before(m, x, n + ".attention"))
        )
        if is_mtp:
            first, last = layer.input_layernorm, layer.shared_head.norm
            hooks.append(
                first.register_forward_pre_hook(lambda m, x, n=name: before(m, x, n + ".input"))
            )
            hooks.append(
                last.register_forward_pre_hook(lambda m, x, n=name: before(m, x, n + ".mlp"))
            )
        else:
            hooks.append(
                layer.register_forward_hook(lambda m, x, y, n=name: after(m, x, y, n + ".mlp"))
            )
        if isinstance(layer.mlp, MoE):
            hooks.append(layer.mlp.gate.register_forward_hook(gate))
    x = torch.tensor([ids])
    logits, g = model(x)
    kept |= {"ids": x[0].int(), "embedding": model.model.embed_tokens(x)[0], "norm": g[0]}
    kept |= head_entries("", logits[0].float(), x[0, 1:])
    if model.args.num_nextn_predict_layers:
        drafts, f = model.mtp(g[:, :-1], x[:, 1:])
        kept["mtp.norm"] = f[0]
        kept |= head_entries("mtp.", drafts[0].float(), x[0, 2:])
    for hook in hooks:
        hook.remove()
    return kept


def head_entries(prefix: str, logits: torch.Tensor, targets: torch.Tensor) -> dict:
    total, top = logits.logsumexp(-1), logits.topk(20)
    chosen = logits[: len(targets)].gather(-1, targets[:, None])[:, 0]
    return {
        prefix + "logsumexp": total,
        prefix + "logprobs": chosen - total[: len(targets)],
        prefix + "top_ids": top.indices.int(),
        prefix + "top_logprobs": top.values - total[:, None],
    }


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "storage", "arithmetic"),
    [
        ("A", "bf16", "float32"),
        ("B", "fp8", "float32"),
        ("D", "fp8", "bf16"),
        ("D", "fp8", "fp8"),
        ("D, ue8m0", "fp8", "fp8"),
        ("D, no MTP", "fp8", "fp8"),
    ],
)
def test_streamed_equals_in_memory(source, name, storage, arithmetic):
    """Bit for bit: experts in groups, several prompts through one layer, MTP, all states."""
    config = tiny.CONFIGS[name[0]]
    if "no MTP" in name:
        config = config | {"num_nextn_predict_layers": 0}
    folder, argv = source(config, storage=storage)
    if "ue8m0" in name:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": UE8M0}))
    found = run(argv, "--arithmetic", arithmetic, "--states", "all")
    hub = weights.HubTensors(folder)
    model = weights.load(folder, arithmetic=weights.arithmetic_of(arithmetic, hub.config))
    kinds = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    assert bool(kinds) == (arithmetic == "fp8")
    assert all(module.ue8m0 == ("ue8m0" in name) for module in kinds)
    for p, ids in enumerate(IDS):
        for key, value in in_memory(model, ids).items():
            assert torch.equal(found.pop(f"{p}.{key}"), value), f"{p}.{key}"
        assert found.pop(f"{p}.positions").tolist() == list(range(len(ids)))
    assert not found, f"unexpected {sorted(found)}"


@torch.inference_mode()
def test_which_layers_are_fp8(source):
    """Spec 5.1: kv_b as in the absorbed form, router, eh_proj, norms and head stay BF16."""
    folder, _ = source(tiny.D)
    hub = weights.HubTensors(folder)
    model = weights.load(folder, arithmetic=weights.arithmetic_of("fp8", hub.config))
    kinds = {
        name.split(".")[-1] if "experts" not in name else "expert"
        for name, module in model.named_modules()
        if isinstance(module, Fp8Linear)
    }
    attention = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"}
    assert kinds == attention | {"gate_proj", "up_proj", "down_proj", "expert"}
    assert model.model.layers[1].self_attn.kv_b_proj.weight.dtype == torch.bfloat16
    assert model.model.layers[4].eh_proj.weight.dtype == torch.bfloat16
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32


def test_sampled_positions(source):
    """States at 16 positions from first to last; router and logits at every one."""
    _, argv = source(tiny.A, storage="bf16")
    every = run(argv, "--arithmetic", "float32", "--states", "all")
    Path(argv[1]).unlink()
    sampled = run(argv, "--arithmetic", "float32")
    assert sampled.keys() == every.keys()
    for p, ids in enumerate(IDS):
        at = sampled[f"{p}.positions"].long()
        assert at[0] == 0 and at[-1] == len(ids) - 1 and len(at) == min(16, len(ids))
        pairs = at[at < len(ids) - 1]
        for key in (key for key in every if key.startswith(f"{p}.")):
            if key.endswith((".attention", ".mlp", ".input", "norm", "embedding")):
                rows = pairs if ".mtp." in key else at
                assert torch.equal(sampled[key], every[key][rows]), key
            elif not key.endswith("positions"):
                assert torch.equal(sampled[key], every[key]), key


@torch.inference_mode()
def test_parts_of_bounded_size(source, monkeypatch):
    """Long prompts in chunks of queries, one expert at a time, the head in blocks: same numbers."""
    _, argv = source(tiny.A, storage="bf16")
    whole = run(argv, "--arithmetic", "float32")
    Path(argv[1]).unlink()
    monkeypatch.setattr(stream, "SCORE_BYTES", 4 * 4 * 41 * 7)  # 7 queries of the longest prompt
    monkeypatch.setattr(stream, "EXPERT_BYTES", 1)
    monkeypatch.setattr(stream, "HEAD_BYTES", 2 * 64 * 50)  # 50 of 160 rows
    parts = run(argv, "--arithmetic", "float32")
    for key, value in whole.items():
        if key.endswith(("ids", "experts", "positions")):
            assert torch.equal(parts[key], value), key
        else:
            assert torch.allclose(parts[key], value, rtol=1e-4, atol=1e-5), key


def test_unused_experts_are_not_read(source, monkeypatch):
    """Eight tokens of 671B choose 64 of 256 experts: the other 192 need not leave the disk."""
    _, argv = source(tiny.A, prompts=([5, 9, 150],), storage="bf16")
    read = []
    take = stream.Reader.take

    def spy(self, names):
        read.extend(names)
        return take(self, names)

    monkeypatch.setattr(stream.Reader, "take", spy)
    found = run(argv, "--arithmetic", "float32")
    for i in (1, 2, 3):
        chosen = set(found[f"0.layers.{i}.experts"].flatten().tolist())
        prefix = f"model.layers.{i}.mlp.experts."
        assert {int(n.split(".")[5]) for n in read if n.startswith(prefix)} == chosen


# --- resuming -------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_after", range(5))
def test_resumes_after_each_layer(source, monkeypatch, stop_after):
    """Ctrl-C between layers: the rest gives the very bytes of an uninterrupted recording."""
    _, argv = source(tiny.D)
    run(argv)
    path = Path(argv[1])
    expected = path.read_bytes()
    path.unlink()
    begun = []

    def interrupt(self, i, seconds):
        begun.append(i)
        if i == stop_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(record.Recording, "report", interrupt)
        with pytest.raises(KeyboardInterrupt):
            record.main(argv)
    assert not path.exists() and begun[-1] == stop_after
    layers = []
    layer = stream.Stream.layer
    monkeypatch.setattr(
        stream.Stream, "layer", lambda self, i, states: layers.append(i) or layer(self, i, states)
    )
    run(argv)
    assert path.read_bytes() == expected
    assert layers == list(range(stop_after + 1, 4))
    assert not path.with_name(path.name + ".partial").exists()


def test_resumes_between_two_files(source, monkeypatch):
    """Killed after a layer's file and before its states: that layer is done again."""
    _, argv = source(tiny.A, storage="bf16")
    run(argv, "--arithmetic", "bf16")
    path = Path(argv[1])
    expected = path.read_bytes()
    path.unlink()
    save = golden.save_atomically

    def stop(entries, file, metadata):
        if metadata.get("next") == "3":
            raise KeyboardInterrupt
        save(entries, file, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(golden, "save_atomically", stop)
        with pytest.raises(KeyboardInterrupt):
            record.main([*argv, "--arithmetic", "bf16"])
    run(argv, "--arithmetic", "bf16")
    assert path.read_bytes() == expected


def test_other_settings_do_not_resume(source, monkeypatch):
    """Half a recording in BF16 and half in FP8 would look like drift."""
    _, argv = source(tiny.D)
    with monkeypatch.context() as patch:
        patch.setattr(record.Recording, "head", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            record.main([*argv, "--arithmetic", "bf16"])
    with pytest.raises(UserError, match="another `arithmetic`: `bf16`; this run asks for `fp8`"):
        record.main(argv)
    run(argv, "--arithmetic", "bf16")


# --- what the file says, and what is refused --------------------------------------------------


def test_metadata(source):
    """A golden file without its origin proves nothing; a path of the recording machine is noise."""
    folder, argv = source(tiny.D)
    run(argv)
    with safe_open(argv[1], "pt") as file:
        about = file.metadata()
    assert about["arithmetic"] == "fp8" and about["matmul"] == "plain"
    assert about["device"] == "cpu" and about["torch"] == torch.__version__
    assert about["model"] == "source" and about["states"] == "sampled" and about["format"] == "1"
    assert len(about["source_sha256"]) == 64 and len(about["commit"]) >= 40
    assert json.loads(about["config"])["kv_lora_rank"] == 128
    assert json.loads(about["prompts"]) == ["prompt0.json", "prompt1.json", "prompt2.json"]
    assert str(folder.parent).encode() not in Path(argv[1]).read_bytes()


def test_digest_tells_checkpoints_apart(tmp_path):
    """V3 and R1 have equal headers; a recording of one must not pass for the other's."""
    digests = set()
    for seed in (0, 1):
        hub = weights.HubTensors(tiny.write_hub(tmp_path / str(seed), tiny.D, seed=seed))
        digests.add((hub.headers_sha256(), hub.source_sha256()))
    assert len({headers for headers, _ in digests}) == 1
    assert len({source for _, source in digests}) == 2


def test_text_prompts_begin_with_bos(source, tmp_path):
    """BOS once, whether the text has it or not; no token is added at the end."""
    folder, argv = source(tiny.A, prompts=(), storage="bf16")
    tiny.write_tokenizer(folder)
    for name, text in (("a.txt", "w1 w2 w3"), ("b.txt", "<s> w1 w2 w3 w4")):
        (tmp_path / name).write_text(text)
        argv += ["--prompt-file", str(tmp_path / name)]
    found = run(argv, "--max-tokens", "4")
    assert found["0.ids"].tolist() == found["1.ids"].tolist() == [0, 3, 4, 5]


def test_hub_ids_and_folders(monkeypatch, tmp_path):
    """A hub id is fetched without the repository's code; a folder is never taken for one."""
    import huggingface_hub

    asked = []

    def download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("deepseek-ai/DeepSeek-R1") == tmp_path
    assert asked == [("deepseek-ai/DeepSeek-R1", ["*.json", "*.safetensors"])]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "r1").mkdir(parents=True)
    for name in ("models/r1", "./absent/r1", "/absent", "absent"):
        assert resolve(name) == Path(name)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arithmetic", "fp8"], "needs FP8 weights; this checkpoint has none"),
        (["--prompt-file", "absent.txt"], "`absent.txt` cannot be used: no such file"),
        (["--prompt-file", "{tmp}/text.txt"], "has no tokenizer.json"),
        (["--prompt-file", "{tmp}/short.json"], "has 2 tokens; a recording needs 3"),
        (["--prompt-file", "{tmp}/beyond.json"], "holds the id 160, outside the vocabulary of 160"),
        (["--matmul", "scaled_mm"], "`--matmul scaled_mm` does not work on `cpu`"),
    ],
)
def test_refusals(source, tmp_path, more, message):
    """Each in words, before any layer is read."""
    _, argv = source(tiny.A, storage="bf16")
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "short.json").write_text("[1, 2]")
    (tmp_path / "beyond.json").write_text("[1, 2, 160]")
    with pytest.raises(UserError, match=message):
        record.main([*argv, *(word.replace("{tmp}", str(tmp_path)) for word in more)])
    assert not Path(argv[1]).exists()


@pytest.mark.parametrize("program", [record, generate], ids=lambda program: program.__name__)
def test_a_wrong_flag_is_one_sentence(program):
    """argparse printed its usage, and another form of message than the rest of the program."""
    with pytest.raises(UserError, match="`--matmul`: invalid choice: 'fast'") as caught:
        program.main(["folder", "--matmul", "fast"])
    assert caught.value.hint == f"`python -m {program.__name__} --help` lists the options"


def test_generate_without_a_tokenizer(source, monkeypatch):
    """It read 671B first and ended in a bare exception of the tokenizer's."""
    folder, _ = source(tiny.A)
    monkeypatch.setattr(generate, "load", lambda *_: pytest.fail("it loads"))
    with pytest.raises(UserError, match="has no tokenizer.json"):
        generate.main([str(folder), "-p", "text", "--device", "cpu"])


def test_an_existing_golden_file_stays(source):
    """A recording of days must not be overwritten by a repeated command."""
    _, argv = source(tiny.A, storage="bf16")
    Path(argv[1]).write_text("precious")
    with pytest.raises(UserError, match="golden.safetensors` exists"):
        record.main(argv)
    assert Path(argv[1]).read_text() == "precious"


# --- memory at true size ----------------------------------------------------------------------

MEASURE = """
import resource, sys
from mlx_dsv3.reference.record import main
assert main(sys.argv[1:]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def spread_tokens(folder: Path) -> None:
    """Make the router choose many experts: the benchmark's numbers are positive and near 1e-4.

    Embeddings and router get random signs and 2^16 times the size, so that tokens differ, stay so
    beside the outputs of the layers, and outweigh the selection bias.
    """
    hub, generator = weights.HubTensors(folder), torch.Generator().manual_seed(0)
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.gate.weight"):
        entry = hub.entry(name)
        with open(entry.path, "r+b") as file:
            for start in range(0, entry.nbytes, 1 << 24):
                file.seek(entry.start + start)
                chunk = bytearray(file.read(min(1 << 24, entry.nbytes - start)))
                high = torch.frombuffer(chunk, dtype=torch.uint8)[
                    1::2
                ]  # sign, 7 of 8 exponent bits
                signs = torch.randint(0, 2, high.shape, generator=generator, dtype=torch.uint8)
                high += 8 + (signs << 7)
                file.seek(entry.start + start)
                file.write(chunk)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Write one dense and one MoE layer of V3 at true size, about 15 GB, and delete it after."""
    import bench_convert as bench

    folder = tmp_path_factory.mktemp("large") / "source"
    bench.write_checkpoint(folder, bench.V3)
    spread_tokens(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ["fp8", "float32"])
def test_memory_at_true_size(large, tmp_path, arithmetic):
    """Embedding, head, a dense layer and 256 experts, none of them whole in memory at once."""
    (tmp_path / "ids.json").write_text(json.dumps(list(range(100, 164))))
    argv = [str(large), str(tmp_path / "golden.safetensors"), "--device", "cpu"]
    argv += ["--prompt-file", str(tmp_path / "ids.json"), "--arithmetic", arithmetic]
    command = [sys.executable, "-c", MEASURE, *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024)
    used = load_file(argv[1])["0.layers.1.experts"].unique().numel()
    print(f"{arithmetic}: peak {peak / 1e9:.2f} GB, {used} experts\n{done.stderr}")
    assert used > 128, "the prompt reads only a few experts"
    assert peak < 4e9
