"""The demo checkpoint end to end: convert, verify, load, answer; and beside mlx-lm."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model as load_in_mlx_lm

from convert.__main__ import main as convert
from demo import questions
from mlx_dsv3.generate import stream
from mlx_dsv3.load import load, load_model

MLX_LM_MINUTE = 60


def relative(a: mx.array, b: mx.array) -> float:
    a, b = np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def without_mtp(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint without its MTP layer: mlx-lm only knows that layer as number 61."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    prefix = f"model.layers.{config['num_hidden_layers']}."
    for path in folder.glob("*.safetensors"):
        tensors, metadata = mx.load(str(path), return_metadata=True)
        kept = {name: array for name, array in tensors.items() if not name.startswith(prefix)}
        mx.save_safetensors(str(path), kept, metadata)
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    weight_map = index["weight_map"]
    index["weight_map"] = {k: v for k, v in weight_map.items() if not k.startswith(prefix)}
    index_path.write_text(json.dumps(index))
    config["num_nextn_predict_layers"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    return folder


ON_CPU = """
import runpy
import mlx.core as mx
mx.set_default_device(mx.cpu)  # as our conversion: a GPU rounds ties otherwise
runpy.run_module("mlx_lm", run_name="__main__")
"""


@pytest.fixture(scope="module")
def mlx_lm_folder(checkpoint, tmp_path_factory) -> Path:
    """Return the demo checkpoint as `mlx_lm.convert -q` writes it."""
    folder = tmp_path_factory.mktemp("mlx_lm")
    source = without_mtp(checkpoint, folder / "source")
    command = [sys.executable, "-c", ON_CPU, "convert", "--hf-path", str(source), "-q"]
    subprocess.run([*command, "--mlx-path", str(folder / "q4")], check=True, capture_output=True)
    return folder / "q4"


def test_questions_are_answered(loaded):
    """At least 16 of the 20 committed questions, whose wording the corpus does not hold."""
    entries = json.loads(questions.QUESTIONS.read_text(encoding="utf-8"))
    assert len(entries) == 20
    answers = [(entry, questions.answer(loaded, entry["question"])) for entry in entries]
    right = [questions.holds(text, entry["expect"]) for entry, text in answers]
    assert sum(right) >= questions.REQUIRED, answers


def test_verify_passes(demo_q4, checkpoint, capsys):
    assert not convert(["verify", str(demo_q4), "--source", str(checkpoint)])


def test_loads_strictly_in_mlx_lm_with_the_same_logits(demo_q4, loaded, ask):
    """Both in float32; the records are stacked by mlx-lm itself."""
    theirs, _ = load_in_mlx_lm(demo_q4, strict=True)
    theirs.set_dtype(mx.float32)
    ids = mx.array([ask("What is the capital of France?", "Paris.", "And of Italy?")])
    assert relative(loaded.model(ids), theirs(ids)) < 1e-5


def test_a_folder_from_mlx_lm_loads_in_ours(mlx_lm_folder, loaded, ask):
    """Its experts are stacked and it has no MTP module; the logits are those of our folder."""
    loaded = load_model(mlx_lm_folder)
    model, mtp = loaded.model, loaded.mtp
    ids = mx.array([ask("How many legs does a spider have?")])
    assert mtp is None
    assert mx.array_equal(model(ids), loaded.model(ids))


def test_every_tensor_of_mlx_lm_convert_is_bitwise_ours(mlx_lm_folder, demo_q4):
    theirs, ours = {}, {}
    for path in mlx_lm_folder.glob("model*.safetensors"):
        theirs |= mx.load(str(path))
    for path in demo_q4.glob("model*.safetensors"):
        ours |= mx.load(str(path))
    assert len(theirs) > 100
    for name, array in theirs.items():
        if ".switch_mlp." in name:
            stem, leaf = name.split(".switch_mlp.")
            parts = [ours.pop(f"{stem}.experts.{e}.{leaf}") for e in range(array.shape[0])]
            found = mx.stack(parts)
        else:
            found = ours.pop(name)
        assert found.dtype == array.dtype and mx.array_equal(found, array), name
    assert not ours


def test_mlx_lm_server_serves_our_folder(demo_q4):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(demo_q4)]
    server = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        body = json.dumps({"messages": messages, "max_tokens": 20, "temperature": 0}).encode()
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        deadline = time.monotonic() + MLX_LM_MINUTE
        while True:
            try:
                answer = json.load(urllib.request.urlopen(request, timeout=30))
                break
            except urllib.error.URLError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.5)
        assert "Paris" in answer["choices"][0]["message"]["content"]
    finally:
        server.terminate()
        server.wait()


@pytest.mark.parametrize("recipe", ["q8", "q4", "q3", "mxfp4", "bf16", "float32"])
def test_every_recipe_answers(converted, ask, recipe):
    """2 bits are too few for a model of this size; 3 and more know the capital of France."""
    loaded = load(converted(recipe))
    text = "".join(piece.text for piece in stream(loaded, ask("What is the capital of France?")))
    assert "Paris" in text


def test_mtp_module_agrees_with_the_model(loaded, ask):
    """Most first drafts equal the model's own next choice on text that it writes itself."""
    ids = ask("What is the capital of France?")
    reply = [piece.token for piece in stream(loaded, ids)]
    full = mx.array([ids + reply])
    g = loaded.model.hidden(full)
    choices = mx.argmax(loaded.model.lm_head(g), axis=-1)[0]
    drafts = mx.argmax(loaded.mtp(g[:, :-1], full[:, 1:])[0], axis=-1)[0]
    start = len(ids) - 1  # row j of the drafts predicts what row j + 1 of the model chooses
    agree = drafts[start:] == choices[start + 1 :]
    assert agree.astype(mx.float32).mean().item() > 0.6
