"""Measure the judge on text that it never saw: perplexity, and what its drafts are worth.

    python -m demo.judge.evaluate build/judge-text/train.txt

Runs the exported checkpoint with the reference, in windows that begin with BOS. A draft is the MTP
module's first one, and it counts where it is the main model's best token, or the token that was
sampled. Beside it stands the commonest successor in the training text, at the same positions.
"""

import argparse
import json
import math
from pathlib import Path

from mlx_dsv3.errors import imports, run_program

with imports(__name__):
    import numpy as np
    import torch
    import torch.nn.functional as F
    from tokenizers import Tokenizer

    from demo.evaluate import load

HERE = Path(__file__).parent
CONTEXT, ROWS = 512, 16  # tokens of a window, BOS included; windows that are computed at once
PROMPT, REPLY = 64, 64  # tokens, of continuations


def successors(ids: np.ndarray, size: int) -> torch.Tensor:
    """Return the commonest token after each one of a text, by id."""
    pairs = np.bincount(ids[:-1].astype(np.int64) * size + ids[1:], minlength=size * size)
    return torch.from_numpy(pairs.reshape(size, size).argmax(1))


def windows(ids: list[int]) -> list[torch.Tensor]:
    """Return batches (B, L) of consecutive windows; the last batch is one shorter window."""
    step = CONTEXT - 1
    num = len(ids) // step
    rows = F.pad(torch.tensor(ids[: num * step]).view(num, step), (1, 0))  # BOS has the id 0
    rest = F.pad(torch.tensor(ids[num * step :])[None], (1, 0))
    return [*rows.split(ROWS), *([rest] if rest.shape[1] > 2 else [])]


@torch.no_grad()
def choices(model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits, the main model's best token, and the first draft, for the tokens from 2 on."""
    logits, g = model(ids)
    drafts, _ = model.mtp(g[:, :-1], ids[:, 1:])  # row j of it is about the token at j + 2
    return logits, logits[:, 1:-1].argmax(-1), drafts[:, :-1].argmax(-1)


@torch.no_grad()
def continuations(model, prompts: torch.Tensor, sample: bool) -> torch.Tensor:
    """Return the prompts (B, L) with `REPLY` more tokens each, best or sampled ones."""
    cache, fed, parts = model.make_cache(), prompts, [prompts]
    for _ in range(REPLY):
        logits = model(fed, cache)[0][:, -1]
        best = logits.argmax(-1, keepdim=True)
        fed = torch.multinomial(logits.softmax(-1), 1) if sample else best
        parts.append(fed)
    return torch.cat(parts, dim=1)


def shares(wanted: torch.Tensor, **guesses: torch.Tensor) -> dict[str, float | int]:
    """Return how many of the wanted tokens each guesser names."""
    found = {name: (guess == wanted).float().mean().item() for name, guess in guesses.items()}
    return {"positions": wanted.numel(), **found}


def score_text(model, table: torch.Tensor, ids: list[int], num_bytes: int) -> dict:
    """Return perplexity of a text, and shares for its own tokens and for the model's choices."""
    nats, columns = 0.0, []
    for batch in windows(ids):
        logits, best, draft = choices(model, batch)
        nats += F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).item() * (
            batch[:, 1:].numel()
        )
        columns.append([t.flatten() for t in (batch[:, 2:], best, draft, table[batch[:, 1:-1]])])
    tokens, best, draft, bigram = (torch.cat(parts) for parts in zip(*columns, strict=True))
    return {
        "tokens": len(ids),
        "nats_per_token": nats / len(ids),
        "perplexity": math.exp(nats / len(ids)),
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "perplexity_per_byte": math.exp(nats / num_bytes),
        "the text itself": shares(tokens, main=best, draft=draft, bigram=bigram),
        "main model's choice on the text": shares(best, draft=draft, bigram=bigram),
    }


def score_continuations(model, table: torch.Tensor, ids: list[int], sample: bool) -> dict:
    """Return shares for the tokens that the model itself chose after pieces of a text.

    The first one of each is left out: it comes from reading the prompt.
    """
    starts = torch.cat([batch[:, :PROMPT] for batch in windows(ids) if batch.shape[1] >= PROMPT])
    full = continuations(model, starts, sample)
    _, _, draft = choices(model, full)
    wanted, before = full[:, PROMPT + 1 :], full[:, PROMPT:-1]
    return shares(wanted, draft=draft[:, PROMPT - 1 :], bigram=table[before])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path, help="the training text, which the bigrams are of")
    parser.add_argument("--text", type=Path, default=HERE / "held_out.txt")
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = load(args.checkpoint, 8)
    tok = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    text, train = (path.read_text(encoding="utf-8") for path in (args.text, args.train))
    ids = tok.encode(text, add_special_tokens=False).ids
    table = successors(
        np.array(tok.encode(train, add_special_tokens=False).ids), model.args.vocab_size
    )
    result = score_text(model, table, ids, len(text.encode()))
    result["its greedy continuations"] = score_continuations(model, table, ids, sample=False)
    result["its sampled continuations"] = score_continuations(model, table, ids, sample=True)
    for name, value in result.items():
        print(f"{name}: {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    run_program(main)
