"""Conversions of the demo model damaged on purpose: the replay names the layer and the half."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlx_dsv3.checkpoint.headers import read_header
from mlx_dsv3.parity.golden import read_golden
from parity.goldens import FLOAT32, FP8


class Folder:
    """A copy of a conversion whose tensors can be changed in place."""

    def __init__(self, source: Path, target: Path):
        shutil.copytree(source, target)
        self.path = target
        self.entries = {}
        for file in target.glob("*.safetensors"):
            self.entries |= read_header(file)

    def bytes_of(self, name: str) -> np.memmap:
        """Return a writable view of a tensor's bytes, a row for each of its rows."""
        info = self.entries[name]
        view = np.memmap(info.path, np.uint8, "r+", info.offset, (info.nbytes,))
        return view.reshape(info.shape[0], -1)

    def numbers(self, name: str) -> np.memmap:
        """Return a writable view as integers of the tensor's width, exponents above mantissas."""
        width = {"BF16": np.uint16, "F32": np.uint32}[self.entries[name].dtype]
        return self.bytes_of(name).view(width)

    def matching(self, prefix: str) -> list[str]:
        return [name for name in self.entries if name.startswith(prefix)]


def most_used(layer: int) -> list[int]:
    """Return the two experts that the golden prompt uses most in a layer."""
    experts = np.array(read_golden(FLOAT32).prompts[0][f"layers.{layer}.experts"])
    return np.bincount(experts.flatten()).argsort()[::-1][:2].tolist()


def swap_experts(folder: Folder) -> None:
    """Two experts of layer 2 in each other's place."""
    one, other = most_used(2)
    prefix = f"model.layers.2.mlp.experts.{one}."
    for name in folder.matching(prefix):
        a, b = folder.bytes_of(name), folder.bytes_of(name.replace(f".{one}.", f".{other}."))
        a[:], b[:] = b.copy(), a.copy()


def double_a_scale_row(folder: Folder) -> None:
    """One row of scales (of weights where there are none) of layer 1's o_proj times two."""
    stem = "model.layers.1.self_attn.o_proj."
    name = stem + ("scales" if stem + "scales" in folder.entries else "weight")
    row = folder.numbers(name)[17]
    exponent = 1 << (7 if row.dtype == np.uint16 else 23)
    row[:] = np.where(row << 1 == 0, row, row + exponent).astype(row.dtype)


def halve_rope(folder: Folder) -> None:
    """Rope rows of layer 3's queries in two halves instead of adjacent pairs."""
    config = json.loads((folder.path / "config.json").read_text())
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    order = [*range(nope), *range(nope, nope + rope, 2), *range(nope + 1, nope + rope, 2)]
    for name in folder.matching("model.layers.3.self_attn.q_b_proj."):
        heads = folder.bytes_of(name).reshape(config["num_attention_heads"], nope + rope, -1)
        heads[:] = heads[:, order].copy()


def wrong_mtp_norm(folder: Folder) -> None:
    """The main model's final norm in the MTP module's place."""
    name = folder.matching("model.layers.4.shared_head.norm.weight")[0]
    folder.bytes_of(name)[:] = folder.bytes_of("model.norm.weight")


def swap_mtp_norms(folder: Folder) -> None:
    """enorm and hnorm in each other's place."""
    a, b = (folder.bytes_of(f"model.layers.4.{name}.weight") for name in ("enorm", "hnorm"))
    a[:], b[:] = b.copy(), a.copy()


def shift_router(folder: Folder) -> None:
    """Selection bias of layer 1 for the wrong experts."""
    bias = folder.bytes_of("model.layers.1.mlp.gate.e_score_correction_bias")
    weight = folder.bytes_of("model.layers.1.mlp.gate.weight")
    bias[:], weight[:] = np.roll(bias, 1, 0), np.roll(weight, 1, 0)


def swap_head_rows(folder: Folder) -> None:
    """A tensor after every stage: rows of lm_head exchanged."""
    for name in folder.matching("lm_head."):
        folder.bytes_of(name)[:] = folder.bytes_of(name)[::-1].copy()


DAMAGES = {
    swap_experts: "layer 2 MLP",
    double_a_scale_row: "layer 1 attention",
    halve_rope: "layer 3 attention",
    wrong_mtp_norm: "MTP norm",
    swap_mtp_norms: "MTP input",
    shift_router: "layer 1 MLP",
    swap_head_rows: "the head",
}


@pytest.mark.parametrize("mode", [[], ["--teacher-forced"]], ids=["free", "teacher-forced"])
@pytest.mark.parametrize("recipe", ["float32", "q8"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_found_and_named(converted, replay, tmp_path, damage, recipe, mode):
    """Each loads without a complaint and talks; the report must name layer and half."""
    folder = Folder(converted(recipe), tmp_path / "damaged")
    damage(folder)
    status, report, err = replay(folder.path, FLOAT32, *mode)
    assert status == 1
    assert err.startswith(f"error: {DAMAGES[damage]} left its bound: "), err
    if mode:  # and, with golden inputs, nothing else
        assert {breach["where"] for breach in report["breaches"]} == {DAMAGES[damage]}


@pytest.mark.parametrize("damage", [swap_experts, double_a_scale_row, halve_rope, wrong_mtp_norm])
def test_damage_shows_against_fp8_too(converted, replay, tmp_path, damage):
    """A golden file of the original arithmetic allows 3 % a half-layer: damage is still larger."""
    folder = Folder(converted("q8"), tmp_path / "damaged")
    damage(folder)
    status, _, err = replay(folder.path, FP8, "--teacher-forced")
    assert status == 1
    assert err.startswith(f"error: {DAMAGES[damage]} left its bound: "), err


def lose_a_word(folder: Folder) -> None:
    """The head's row of the word that golden expected least of those that it says once."""
    prompt = read_golden(FLOAT32).prompts[0]
    ids, logprobs = (np.array(prompt[name]) for name in ("ids", "logprobs"))
    once = [i for i, word in enumerate(ids[1:]) if (ids == word).sum() == 1]
    word = ids[1 + min(once, key=logprobs.__getitem__)]
    for name in ("lm_head.scales", "lm_head.biases"):
        folder.bytes_of(name)[word] = 0


def test_a_lost_word_shows_in_the_perplexity_alone(converted, replay, tmp_path):
    """Why perplexity is judged beside KL, where the word is one of thousands (0.0019 of 0.0039)."""
    folder = Folder(converted("q8"), tmp_path / "damaged")
    lose_a_word(folder)
    status, report, err = replay(folder.path, FP8)
    assert status == 1
    assert {breach["what"] for breach in report["breaches"]} == {
        "relative difference of perplexity"
    }
    assert err == (
        "error: the head left its bound: relative difference of perplexity 0.095 (bound 0.012)\n"
    )
