"""What the drafting benchmark runs on: the models of `demo/`, and random ones of about 1 GB.

Random MTP weights are accepted never. `agree` makes a random model's next token depend mostly on
the last one (its embedding drowns the layers), and lets the MTP module pass that embedding on; so
drafts are accepted about as often as a real model's, at the real cost of every layer.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from synthetic import BASE, write_folder

from convert.__main__ import main as convert
from mlx_dsv3.conversation.messages import Conversation
from mlx_dsv3.experts.store import ExpertStore
from mlx_dsv3.load import load, load_model, plan_memory
from mlx_dsv3.model.decoder import Model
from mlx_dsv3.model.mtp import MTP

DEMO = Path(__file__).parent.parent / "demo"
CHECKPOINTS = {"demo": DEMO / "checkpoint", "judge": DEMO / "judge/checkpoint"}
PIECE = 64  # tokens of text before which the judge goes on
BOOST, NOISE = 2048.0, 0.02  # of the embedding, and of the guess: about 85 % accepted
# About 1 GB each. In float32 two experts a token and a larger shared one, so that routed experts
# are 40 % of a token's weights (V3: 55 %): MLX's CPU backend computes those row by row in any BLAS.
MID = {
    "q4": BASE | {"num_hidden_layers": 16},
    "float32": BASE
    | {
        "num_hidden_layers": 16,
        "n_routed_experts": 8,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
    },
}


@dataclass
class Subject:
    """A loaded model and the prompts it is run on."""

    name: str
    model: Model
    mtp: MTP
    store: ExpertStore
    prompts: list[list[int]]
    chunk: int  # tokens of a prompt that are fed at once
    mask: mx.array | None = None


def trained(
    work: Path, model: str, recipe: str, num_prompts: int, slots: int | None = None
) -> Subject:
    """Convert and load the demo or the judge; with `slots`, that many expert slots per layer."""
    folder = work / f"{model}-{recipe}"
    if not folder.is_dir():
        convert(["run", str(CHECKPOINTS[model]), str(folder), "--recipe", recipe])
    loaded = load(folder, experts="resident")
    name = f"{model}, {recipe}"
    if slots is not None:
        plan = loaded.plan
        loaded.store.close()
        budget = sum(plan.slot_bytes.values()) * slots / 1e9
        loaded = load(folder, experts="streamed", expert_memory_gb=budget * (1 + 1e-9))
        name += f", {slots} of {plan.num_experts} experts"
    prompts = (chats if model == "demo" else pieces)(loaded.tokenizer, num_prompts)
    chunk, mask = loaded.plan.prefill_chunk, loaded.vocabulary_mask
    return Subject(name, loaded.model, loaded.mtp, loaded.store, prompts, chunk, mask)


def chats(tokenizer, num: int) -> list[list[int]]:
    """Return held-out questions to the demo as it is asked them."""
    prompts = []
    for text in json.loads((DEMO / "held_out_prompts.json").read_text())[:num]:
        conversation = Conversation(tokenizer)
        conversation.add_user(text)
        prompts.append(conversation.prompt_ids())
    return prompts


def pieces(tokenizer, num: int) -> list[list[int]]:
    """Return pieces of the judge's held-out text, evenly spread, each behind BOS."""
    text = (DEMO / "judge/held_out.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False)
    starts = range(0, len(ids) - PIECE, len(ids) // num)[:num]
    return [[tokenizer.bos_token_id, *ids[i : i + PIECE]] for i in starts]


def mid(work: Path, recipe: str, num_prompts: int) -> Subject:
    """Write, load and prepare a random model of about 1 GB."""
    folder = write_folder(work / f"mid-{recipe}", MID[recipe], recipe)
    plan = plan_memory(folder, experts="resident")
    loaded = load_model(folder, plan=plan)
    model, mtp, store, args = loaded.model, loaded.mtp, loaded.store, loaded.args
    mx.random.seed(0)
    agree(model, mtp)
    ids = mx.random.randint(2, args.vocab_size, (num_prompts, 32)).tolist()
    return Subject(f"mid-size, {recipe}", model, mtp, store, ids, plan.prefill_chunk)


def agree(model: Model, mtp: MTP) -> None:
    """Make the module's drafts agree with the model's choices, most of the time."""
    embed, D = model.model.embed_tokens, model.args.hidden_size
    spread = mx.std(embed(mx.arange(256))).item()
    for part in ("scales", "biases") if "scales" in embed else ("weight",):
        embed[part] = embed[part] * BOOST
    guess = mx.concatenate([mx.eye(D), NOISE * mx.random.normal((D, D)) / D**0.5], axis=1)
    set_weight(mtp.eh_proj, guess * BOOST * spread)
    mx.eval(model.parameters(), mtp.parameters())


def spoil(subject: Subject) -> Subject:
    """Make the MTP module noise: every draft is in vain."""
    D = subject.model.args.hidden_size
    set_weight(subject.mtp.eh_proj, mx.random.normal((D, 2 * D), key=mx.random.key(1)) / D**0.5)
    subject.name += ", MTP noise"
    return subject


def set_weight(layer, weight: mx.array) -> None:
    """Replace the weight of a linear layer, in the layer's own format."""
    if "scales" in layer:
        layer.weight, layer.scales, layer.biases = mx.quantize(weight, layer.group_size, layer.bits)
    else:
        layer.weight = weight
    mx.eval(layer.parameters())
