"""Text with drafts against plain text on a folder: prints where they differ, as JSON.

    python tests/demo_model/identical.py FOLDER --prompts N --tokens N [--slots N]

A program of its own, so that a test can run it with either BLAS. End tokens do not end a text. At
a difference the *margin* is said: how far the chosen token's score is above the next one's in
plain decoding. With another number of rows a product may round otherwise, so a margin of the
size of a float32 rounding error may flip; a larger one may not.
"""

import argparse
import json
import sys
from pathlib import Path

import mlx.core as mx

from mlx_dsv3.conversation.messages import Conversation
from mlx_dsv3.decoding.draft_control import MAX_DRAFTS, DraftControl
from mlx_dsv3.decoding.draft_stats import DraftStats
from mlx_dsv3.decoding.sampler import Sampler
from mlx_dsv3.decoding.steps import Stepper, decode
from mlx_dsv3.generate import make_state, prefill
from mlx_dsv3.load import Loaded, load, plan_memory

HELD_OUT = Path(__file__).parents[2] / "demo" / "held_out_prompts.json"
OTHERS = (  # nothing that the demo model knows: text that its MTP module guesses badly
    "Write a letter to the mayor about the old bridge.",
    "The quick brown fox jumps over the lazy dog, and then",
    "0 1 1 2 3 5 8 13",
    "Why?",
    "Tell me a joke about compilers and another one about cats.",
    "lorem ipsum dolor sit amet",
)
SAMPLERS = {
    "greedy": {},
    "cool": {"temp": 0.6, "seed": 1},
    "nucleus": {"temp": 1.0, "top_p": 0.95, "seed": 2},
    "wild": {"temp": 2.0, "top_k": 50, "min_p": 0.01, "seed": 3},
}


def prompts_of(loaded: Loaded, count: int) -> list[list[int]]:
    """Return prompt ids: held-out questions, and others among them."""
    texts = json.loads(HELD_OUT.read_text(encoding="utf-8"))
    texts = [*texts[: count - count // 6], *OTHERS[: count // 6]]
    assert len(texts) == count, f"{count} prompts wanted, {len(texts)} there"
    prompts = []
    for text in texts:
        conversation = Conversation(loaded.tokenizer)
        conversation.add_user(text)
        prompts.append(conversation.prompt_ids())
    return prompts


def text_of(
    loaded: Loaded, ids: list[int], tokens: int, drafts: int | DraftControl, sampler: Sampler
):
    """Return the tokens of a reply that no end token ends, and its draft statistics."""
    control = drafts if isinstance(drafts, DraftControl) else DraftControl(fixed=drafts)
    state, stats = make_state(loaded, control.fixed != 0), DraftStats()
    for _ in prefill(loaded.model, loaded.mtp, state, ids, loaded.plan.prefill_chunk):
        pass
    stepper = Stepper(loaded.model, loaded.mtp, state, sampler, loaded.vocabulary_mask)
    return list(decode(stepper, ids[-1], tokens, control, stats)), stats


def margin(loaded: Loaded, ids: list[int], sampler: Sampler) -> float:
    """Return by how much the best score for the next token is above the second."""
    logits = loaded.model(mx.array([ids]))[0, -1:] + loaded.vocabulary_mask
    scores = mx.sort(sampler.scores(logits, len(ids), lambda: mx.array(ids))[0])
    return (scores[-1] - scores[-2]).item()


def differences(
    loaded: Loaded, plain: list[int], ids: list[int], name: str, drafts: list[int]
) -> list[dict]:
    """Decode with each number of drafts; return where a text first differs from the plain one."""
    found, sampler = [], Sampler(**SAMPLERS[name])
    for count in drafts:
        text, _ = text_of(loaded, ids, len(plain), count, sampler)
        if text != plain:
            at = next(i for i, (a, b) in enumerate(zip(text, plain, strict=True)) if a != b)
            gap = margin(loaded, ids + plain[:at], sampler)
            found.append({"sampler": name, "drafts": count, "position": at, "margin": gap})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--slots", type=int, default=8, help="expert slots per layer when streamed")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)  # no GPU promises the same bits
    resident, drafts = load(args.folder, experts="resident"), list(range(1, MAX_DRAFTS + 1))
    streamed = load_streamed(args.folder, args.slots)
    found, compared = [], 0
    for i, ids in enumerate(prompts_of(resident, args.prompts)):
        for name in SAMPLERS:
            plain, _ = text_of(resident, ids, args.tokens, 0, Sampler(**SAMPLERS[name]))
            for kind, loaded in (("resident", resident), ("streamed", streamed)):
                for entry in differences(loaded, plain, ids, name, drafts):
                    found.append({"prompt": i, "experts": kind, **entry})
                compared += len(drafts)
        print(f"{i + 1} prompts, {len(found)} differences", file=sys.stderr, flush=True)
    print(json.dumps({"texts": compared, "tokens": args.tokens, "differences": found}))


def load_streamed(folder: Path, slots: int) -> Loaded:
    """Load a folder with so many slots in each MoE layer."""
    nbytes = sum(plan_memory(folder).slot_bytes.values()) * slots
    loaded = load(folder, experts="streamed", expert_memory_gb=(nbytes + 1) / 1e9)
    assert set(loaded.plan.slots.values()) == {slots}
    return loaded


if __name__ == "__main__":
    main()
