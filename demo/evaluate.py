"""Measure the exported demo model with the reference: the 20 questions, and the MTP drafts.

Reads the checkpoint folder as any loader would (through the index, FP8 through its scales).
`--bits 4` rounds the weights once more as a 4-bit conversion does. The draft figure counts, over
every position of the greedy replies to `held_out_prompts.json`, how often the MTP module's first
draft is the main model's own choice; beside it stands what a bigram table of the corpus scores at
the same positions.
"""

import argparse
import json
import re
from pathlib import Path

from mlx_dsv3.errors import imports, run_program

with imports(__name__):
    import numpy as np
    import torch
    from safetensors import safe_open
    from tokenizers import Tokenizer

    from demo import corpus, tokenizer
    from demo.rounding import four_bit_names, round_four_bit
    from mlx_dsv3.reference.fp8 import dequantize_blocks
    from mlx_dsv3.reference.model import Args, Model

HERE = Path(__file__).parent
BIGRAM_CONVERSATIONS = 40_000


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor as float32, FP8 blocks dequantised and rounded to BF16."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    raw = {}
    for file in sorted(set(weight_map.values())):
        with safe_open(folder / file, framework="pt") as shard:
            raw |= {name: shard.get_tensor(name) for name in shard.keys()}
    state = {}
    for name, tensor in raw.items():
        if name.endswith("_scale_inv"):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = dequantize_blocks(tensor, raw[name + "_scale_inv"]).to(torch.bfloat16)
        state[name] = tensor.float()
    return state


def load(folder: Path, bits: int) -> Model:
    """Build the reference model, as exported (8 bits) or rounded once more to 4."""
    model = Model(Args.from_dict(json.loads((folder / "config.json").read_text())))
    state = read_state(folder)
    if bits == 4:
        for name in four_bit_names(state):
            state[name] = round_four_bit(name, state[name]).to(torch.bfloat16).float()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model.eval()


@torch.no_grad()
def reply(model, ids: list[int], num_ids: int, max_tokens: int = 64) -> list[int]:
    """Continue greedily up to EOS (included), ids beyond the tokenizer masked."""
    cache, fed, out = model.make_cache(), ids, []
    while len(out) < max_tokens and (not out or out[-1] != 1):
        logits, _ = model(torch.tensor([fed]), cache)
        out.append(int(logits[0, -1, :num_ids].argmax()))
        fed = out[-1:]
    return out


@torch.no_grad()
def drafts(model, ids: list[int], num_ids: int) -> list[int]:
    """Return the MTP module's first draft for every position of `ids` from 2 on."""
    logits_g = model(torch.tensor([ids]))[1]
    logits, _ = model.mtp(logits_g[:, :-1], torch.tensor([ids[1:]]))
    return logits[0, :-1, :num_ids].argmax(-1).tolist()


def encode_chat(tok, messages) -> list[int]:
    return tok.encode(tokenizer.render(messages, generate=True), add_special_tokens=False).ids


def holds(answer: str, expected: list[str]) -> bool:
    """Say whether any expected word stands in the answer as a whole word, in any case."""
    return any(re.search(rf"\b{re.escape(w)}\b", answer, re.IGNORECASE) for w in expected)


def score_questions(model, tok, questions) -> int:
    """Print each answer; return how many hold an expected word."""
    count = 0
    for question in questions:
        ids = encode_chat(tok, [{"role": "user", "content": question["question"]}])
        answer = tok.decode(reply(model, ids, tok.get_vocab_size()))
        right = holds(answer, question["expect"])
        count += right
        print(f"{'ok ' if right else 'NO '} {question['question']} -> {answer}")
    return count


def bigram_table(tok) -> np.ndarray:
    """Return the commonest next id after each id of the corpus."""
    counts = np.zeros((tok.get_vocab_size(),) * 2, dtype=np.int64)
    texts = [tokenizer.render(c) for c in corpus.corpus(BIGRAM_CONVERSATIONS)]
    for encoding in tok.encode_batch(texts, add_special_tokens=False):
        np.add.at(counts, (encoding.ids[:-1], encoding.ids[1:]), 1)
    return counts.argmax(1)


def score_drafts(model, tok, prompts) -> dict[str, float]:
    """Compare first drafts and bigram guesses with the greedy reply, position by position.

    The first token of a reply is left out: it comes from reading the prompt, and the first draft
    is made after it (spec 4.3, steps 1 and 2).
    """
    table, hits, bigram_hits, positions = bigram_table(tok), 0, 0, 0
    for prompt in prompts:
        ids = encode_chat(tok, [{"role": "user", "content": prompt}])
        answer = reply(model, ids, tok.get_vocab_size())
        drafted = drafts(model, ids + answer, tok.get_vocab_size())[len(ids) - 1 :]
        for before, token, draft in zip(answer[:-1], answer[1:], drafted, strict=True):
            hits += draft == token
            bigram_hits += table[before] == token
            positions += 1
    return {
        "positions": positions,
        "mtp_first_draft": round(hits / positions, 4),
        "bigram": round(bigram_hits / positions, 4),
    }


def count_parameters(model) -> dict[str, int]:
    """Count all parameters, the MTP layer's, and those a token of the main model meets."""
    args = model.args
    mtp, spared, total = f"model.layers.{args.num_hidden_layers}.", 0, 0
    mtp_total = 0
    for name, tensor in model.state_dict().items():
        total += tensor.numel()
        if name.startswith(mtp):
            mtp_total += tensor.numel()
        elif ".experts." in name:
            spared += tensor.numel() * (1 - args.num_experts_per_tok / args.n_routed_experts)
    embedding = model.model.embed_tokens.weight.numel()  # one row of it is read
    active = total - mtp_total - round(spared) - embedding
    return {"parameters": total, "of_which_mtp": mtp_total, "active": active}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--bits", type=int, choices=(8, 4), default=8, help="8: as exported")
    parser.add_argument("--questions", type=Path, default=HERE / "questions.json")
    parser.add_argument("--prompts", type=Path, default=HERE / "held_out_prompts.json")
    parser.add_argument("--threads", type=int, default=1)  # more cost time: it is tiny
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load(args.checkpoint, args.bits)
    tok = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    questions = json.loads(args.questions.read_text())
    right = score_questions(model, tok, questions)
    figures = score_drafts(model, tok, json.loads(args.prompts.read_text()))
    result = {"bits": args.bits, "right": right, "questions": len(questions)}
    print(json.dumps(result | figures | count_parameters(model)))


if __name__ == "__main__":
    run_program(main)
