"""The good files: a model so small that loading it takes milliseconds, in every form we read.

`hub` is the checkpoint, `mlx` and `stacked` conversions of it, `half` a conversion that was killed
before it was complete, `golden.safetensors` a recording and `cut.safetensors.partial` one that was
killed, `state.safetensors` a saved conversation; and the texts that programs take.
"""

import json
import os
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import mlx.core as mx
import tiny

from convert.__main__ import main as convert
from convert.run import _Run
from mlx_dsv3.decoding.state import State
from mlx_dsv3.load import load_model
from mlx_dsv3.model.cache import LatentCache
from mlx_dsv3.reference import golden, record

CONFIG = tiny.A | {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "max_position_embeddings": 96,
}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w9' }}{% endif %}"
)
TEXT = "w1 w2 w3 w4 w5 w6 w7 w8"


RECORDING = ["--device", "cpu", "--states", "all", "--prompt-file", "prompt.json"]


def build(root: Path) -> None:
    """Write everything into `root`, by the programs themselves, each step in its own process."""
    for step in (conversions, killed_conversion, recording, killed_recording, save_state):
        if pid := os.fork():
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, (root / "log").read_text()
        else:
            run(step, root)


def run(step: Callable[[], None], root: Path) -> None:
    """Be the process of a step; never return."""
    with open(root / "log", "w") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            os.chdir(root)
            step()
        except BaseException:
            traceback.print_exc()
            log.flush()
            os._exit(1)
    os._exit(0)


def conversions() -> None:
    write_hub(Path("hub"))
    Path("prompt.txt").write_text(TEXT)
    Path("prompt.json").write_text(json.dumps([0, 5, 6, 7, 8, 9, 10, 11]))
    Path("recipe.json").write_text(json.dumps({"default": 4, "attention": {"bits": 8}}))
    convert(["run", "hub", "mlx"])
    convert(["run", "hub", "stacked", "--stacked"])
    for name in ("mtp.safetensors", "conversion.json"):
        Path("stacked", name).unlink()


def killed_conversion() -> None:
    _Run.complete_folder = lambda *_: os._exit(0)
    convert(["run", "hub", "half"])
    raise AssertionError("was not killed")


def recording() -> None:
    record.main(["hub", "golden.safetensors", *RECORDING])


def killed_recording() -> None:
    golden.join_files = lambda *_: os._exit(0)
    record.main(["hub", "cut.safetensors", *RECORDING])
    raise AssertionError("was not killed")


def write_hub(folder: Path) -> None:
    tiny.write_hub(folder, CONFIG, num_shards=2)
    tiny.write_tokenizer(folder, 40)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(sampling))


def save_state() -> None:
    loaded = load_model("mlx")
    state = State(loaded.model.make_cache(), LatentCache())
    ids = [0, 5, 6, 7, 8]
    state.commit(ids, loaded.model.hidden(mx.array([ids]), state.cache))
    state.save("state.safetensors", loaded.model)
    loaded.store.close()
