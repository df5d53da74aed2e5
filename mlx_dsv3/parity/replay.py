"""Replay a golden file: run an MLX model half-layer by half-layer and measure each difference.

Two ways. *Free*: the model runs as it would, its differences pile up, and the first stage out of
bounds is the place to look. *Teacher-forced*: each half-layer gets the golden input, so that one
wrong layer stands alone; that needs a recording of all positions. A stage is the embedding, the
attention or the MLP of a layer, the final norm, or a step of the MTP module. Nothing here knows
what is acceptable (`bounds.py`).
"""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_dsv3.config import ModelArgs
from mlx_dsv3.errors import UserError
from mlx_dsv3.model.decoder import DecoderLayer, Model
from mlx_dsv3.model.moe import MoE
from mlx_dsv3.model.mtp import MTP
from mlx_dsv3.parity.differences import Stage, TokenDifferences
from mlx_dsv3.parity.golden import DIMENSIONS, Golden

HEAD_ROWS = 128  # positions whose logits are alive at once


def check_same_model(golden: Golden, args: ModelArgs, folder: str) -> None:
    """Refuse a golden file of a model with other dimensions."""
    for name in DIMENSIONS:
        theirs, ours = golden.config[name], getattr(args, name)
        if theirs != ours:
            raise UserError(
                f"the golden file is of another model: its `{name}` is {theirs}, "
                f"that of `{folder}` is {ours}",
                "record the checkpoint that the folder was converted from",
            )


def same_source(golden: Golden, conversion: dict | None) -> bool | None:
    """Say whether folder and golden file come from one set of weights; None where unknown.

    `conversion` is the contents of conversion.json. Headers tell models of other shapes apart;
    norms and biases, V3 from V3-0324.
    """
    if conversion is None or conversion.get("layout") == "mtp":  # of some shards, or of none
        return None
    for key in ("headers_sha256", "source_sha256"):
        ours, theirs = conversion.get("source", {}).get(key), golden.about.get(key)
        if ours is None or theirs is None:
            return None
        if ours != theirs:
            return False
    return True


@dataclass
class Result:
    """What a replay found, stage by stage and in the text."""

    stages: dict[str, Stage] = field(default_factory=dict)
    text: TokenDifferences = field(default_factory=TokenDifferences)
    mtp_text: TokenDifferences | None = None
    head: TokenDifferences = field(default_factory=TokenDifferences)  # of golden's own states
    accepted: list[bool] = field(default_factory=list)  # greedy drafts equal to the main model's
    golden_accepted: list[bool] = field(default_factory=list)

    def stage(self, name: str) -> Stage:
        return self.stages.setdefault(name, Stage(name))


class Replay:
    """One model against one golden file."""

    def __init__(self, model: Model, mtp: MTP | None, golden: Golden, teacher_forced: bool):
        self.model, self.mtp, self.golden = model, mtp, golden
        self.teacher_forced = teacher_forced
        self.result = Result()
        self.is_disturbed = False  # some position attended to one that a router sent elsewhere

    def run(self) -> Result:
        for prompt in self.golden.prompts:
            ids, result = prompt["ids"][None], self.result
            g, alike = self.decoder(prompt, ids)
            result.text.num_rerouted += int((~alike).sum())
            chosen = self.head(g, prompt, "", ids[0, 1:])
            if self.mtp is None or "mtp.logprobs" not in prompt:
                continue
            result.mtp_text = result.mtp_text or TokenDifferences()
            f, alike = self.drafter(prompt, g[:, :-1], ids[:, 1:], alike[:-1])
            result.mtp_text.num_rerouted += int((~alike).sum())
            drafts = self.head(f, prompt, "mtp.", ids[0, 2:])
            result.accepted += (drafts == chosen[1:]).tolist()
            golden = prompt["mtp.top_ids"][:, 0] == prompt["top_ids"][1:, 0]
            result.golden_accepted += golden.tolist()
        return self.result

    def decoder(self, prompt: dict, ids: mx.array) -> tuple[mx.array, np.ndarray]:
        """Run embedding, layers and final norm; return g (1, L, D), which positions are alike."""
        h = self.model.model.embed_tokens(ids)
        alike, self.is_disturbed = np.ones(ids.shape[1], bool), False
        h = self.compare("embedding", h, prompt, "embedding", alike)
        for i, layer in enumerate(self.model.layers):
            h, alike = self.layer(layer, h, prompt, f"layers.{i}", f"layer {i}", alike)
        h = self.model.model.norm(h)
        return self.compare("final norm", h, prompt, "norm", alike), alike

    def drafter(self, prompt: dict, g: mx.array, next_ids: mx.array, alike: np.ndarray):
        """Run the MTP module over all pairs; return f (1, L - 1, D), which pairs are alike."""
        h = self.mtp.pairs(g, next_ids)
        h = self.compare("MTP input", h, prompt, "mtp.input", alike)
        h, alike = self.layer(self.mtp, h, prompt, "mtp", "MTP", alike)
        h = self.mtp.shared_head.norm(h)
        return self.compare("MTP norm", h, prompt, "mtp.norm", alike), alike

    def layer(self, layer: DecoderLayer, h, prompt: dict, key: str, name: str, alike: np.ndarray):
        """Run both halves of a layer; return the state, and which positions of it are alike.

        Those are all that no router sent elsewhere, here or before; all of them where the next
        half-layer gets the golden state.
        """
        self.is_disturbed |= not alike[:-1].all()
        before = h
        h = h + layer.self_attn(layer.input_layernorm(h), None)
        h = self.compare(f"{name} attention", h, prompt, f"{key}.attention", alike, before)
        before, x = h, layer.post_attention_layernorm(h)
        if isinstance(layer.mlp, MoE):
            indices, _ = layer.mlp.gate(x)
            stage = self.result.stage(f"{name} MLP")
            margins = prompt[f"{key}.margins"]
            alike = alike & stage.route(indices[0], prompt[f"{key}.experts"], margins)
        h = h + layer.mlp(x)
        h = self.compare(f"{name} MLP", h, prompt, f"{key}.mlp", alike, before)
        return h, np.ones_like(alike) if self.teacher_forced else alike

    def compare(self, name: str, h, prompt: dict, key: str, alike, before=None) -> mx.array:
        """Measure a state (1, L, D); return what the next half-layer gets."""
        mx.eval(h)
        at = prompt["positions"]
        at = at[: int((at < h.shape[1]).sum())]
        expected = prompt[key]
        base = before[0][at] if self.teacher_forced and before is not None else None
        stage = self.result.stage(name)
        stage.add(h[0][at], expected, alike[np.array(at)], base)
        stage.is_disturbed |= self.is_disturbed
        return expected[None].astype(h.dtype) if self.teacher_forced else h

    def head(self, states: mx.array, prompt: dict, prefix: str, targets) -> np.ndarray:
        """Measure the logits of states (1, L, D); return the choices."""
        text = self.result.mtp_text if prefix else self.result.text
        chosen = self.logits(states[0], prompt, prefix, targets, np.arange(states.shape[1]), text)
        if not self.teacher_forced:  # else those were golden's states
            kept = prompt[prefix + "norm"].astype(states.dtype)
            at = np.array(prompt["positions"])[: len(kept)]
            self.logits(kept, prompt, prefix, targets, at, self.result.head)
        return chosen

    def logits(
        self, states: mx.array, prompt: dict, prefix: str, targets, at, text: TokenDifferences
    ) -> np.ndarray:
        """Measure the logits of states (P, D) at positions `at`, some of them at a time."""
        chosen = []
        for start in range(0, len(at), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            logits = self.model.lm_head(states[rows])
            text.add(logits, prompt, prefix, targets, at[rows])
            chosen.append(np.array(mx.argmax(logits, axis=-1)))
        return np.concatenate(chosen)
