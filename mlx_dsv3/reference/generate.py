"""Text from the reference, greedy or sampled, with a cache, with and without the MTP module.

    python -m mlx_dsv3.reference.generate SOURCE -p TEXT [--max-tokens 100] [--drafts 1] ...

TEXT goes in as it is, behind BOS: a chat turn has to be written out, with its role tokens. The
noise that samples a token is a function of seed and position alone and drafts are accepted where
they equal the token so chosen (spec 4.5), so the text does not depend on `--drafts`. With torchrun
the model is divided among the processes (`parallel.py`).
"""

from mlx_dsv3.errors import UserError, imports, run_program, visible

with imports(__name__):
    import argparse
    import sys
    from collections.abc import Collection, Iterator
    from dataclasses import dataclass
    from pathlib import Path

    import torch
    from tokenizers import Tokenizer
    from torch import Tensor

    from mlx_dsv3.options import Parser, first_line, number, whole
    from mlx_dsv3.reference import parallel, source, weights
    from mlx_dsv3.reference.args import Args
    from mlx_dsv3.reference.model import Model
    from mlx_dsv3.reference.weights import Arithmetic


@dataclass
class Sampler:
    """Greedy where `temp` is 0; else a sample of the `top_p` nucleus at that temperature."""

    temp: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def noise(self, position: int, size: int) -> Tensor:
        """Return the Gumbel noise (size,) of one position."""
        seed = (self.seed << 32) + position
        if not -(1 << 63) <= seed < 1 << 64:  # all that torch takes
            seed %= 1 << 64
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(size, generator=generator, dtype=torch.float64)
        return -torch.log(-torch.log(uniform.clamp_min(1e-300)))

    def __call__(self, logits: Tensor, position: int) -> list[int]:
        """Return a token for each row of logits (rows, vocabulary); row i is for position + i."""
        if self.temp == 0:
            return logits.argmax(-1).tolist()
        logprobs = logits.double().cpu().log_softmax(-1)
        ordered = logprobs.sort(-1, descending=True)
        before = ordered.values.exp().cumsum(-1) - ordered.values.exp()
        dropped = (before >= self.top_p).scatter(-1, ordered.indices, before >= self.top_p)
        logprobs = logprobs.masked_fill(dropped, -torch.inf) / self.temp
        rows, size = logits.shape
        noise = torch.stack([self.noise(position + i, size) for i in range(rows)])
        return (logprobs + noise).argmax(-1).tolist()


@dataclass
class Counts:
    """Steps of the main model after the prompt, and drafts made and accepted."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0


def trim(cache: list[dict], length: int) -> None:
    """Keep the first `length` positions of some layers' caches."""
    for layer in cache:
        for name, value in layer.items():
            layer[name] = value[:, :length]


def draft(model: Model, cache: list[dict], g: Tensor, next_ids: list[int], num: int) -> list[int]:
    """Feed the pairs (g, next token) that the MTP cache lacks; return `num` greedy drafts.

    Further drafts come from the module's own states, whose cache entries are removed again.
    """
    logits, f = model.mtp(g, torch.tensor([next_ids], device=g.device), cache)
    length, drafts = cache[-1]["latent"].shape[1], [int(logits[0, -1].argmax())]
    while len(drafts) < num:
        token = torch.tensor([drafts[-1:]], device=g.device)
        logits, f = model.mtp(f[:, -1:], token, cache)
        drafts.append(int(logits[0, -1].argmax()))
    trim(cache[-1:], length)
    return drafts


def generate(
    model: Model,
    prompt: list[int],
    max_tokens: int,
    *,
    sampler: Sampler | None = None,
    drafts: int = 0,
    stop: Collection[int] = (),
    counts: Counts | None = None,
) -> Iterator[int]:
    """Yield up to `max_tokens` tokens after the prompt, a stop token included (spec 4.3).

    `drafts` is the number of tokens that the MTP module proposes before each step.
    """
    sampler, counts = sampler or Sampler(), counts or Counts()
    device, cache = model.model.embed_tokens.weight.device, model.make_cache()
    seq, left, fed, guesses = list(prompt), max_tokens, list(prompt), []
    while left:
        logits, g = model(torch.tensor([fed], device=device), cache)
        last = len(fed) - 1 - len(guesses)  # of the tokens fed, the last that is committed
        chosen = sampler(logits[0, last:], len(seq))
        num = 0
        while num < len(guesses) and chosen[num] == guesses[num]:
            num += 1
        new = chosen[: num + 1]
        for token in new:
            yield token
            if token in stop:
                return
        seq, left = seq + new, left - len(new)
        trim(cache[: model.args.num_hidden_layers], len(seq) - 1)
        following = fed[1 : last + 1] + new  # the token after each state that is now certain
        num_drafts = min(drafts, left - 1)
        guesses = (
            draft(model, cache, g[:, : len(following)], following, num_drafts)
            if num_drafts > 0
            else []
        )
        fed = [seq[-1], *guesses]
        counts.steps += 1
        counts.accepted += num
        counts.drafted += len(guesses)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m mlx_dsv3.reference.generate", description=first_line(__doc__))
    source.add_options(parser)
    parser.add_argument("-p", "--prompt", required=True, help="text, with its role tokens")
    parser.add_argument("--max-tokens", type=whole("--max-tokens", 1), default=100)
    parser.add_argument("--temp", type=number("temp"), default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=number("top_p"), default=1.0)
    parser.add_argument("--seed", type=number("seed"), default=0)
    parser.add_argument(
        "--drafts",
        type=whole("--drafts", 0),
        default=0,
        help="tokens that the MTP module proposes",
    )
    return parser.parse_args(argv)


def load(folder: Path, arithmetic: Arithmetic) -> Model:
    """Read the checkpoint, or with torchrun this process's part of it."""
    if parallel.num_processes() > 1:
        return parallel.load(folder, arithmetic)
    return weights.load(folder, arithmetic=arithmetic)


def prompt_ids(args: argparse.Namespace, tokenizer: Tokenizer, config: dict) -> list[int]:
    """Return the ids of `--prompt`; raise `UserError` where the model cannot continue them."""
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise UserError("`--prompt` is not text in UTF-8", "check the terminal's LANG") from None
    ids = source.encode(tokenizer, args.prompt, config)
    if not ids:
        raise UserError("`--prompt` is empty", "give a text, as `-p 'Hello!'`")
    source.check_ids(ids, config, "the prompt", args.max_tokens)
    return ids


def run(args: argparse.Namespace, device: str) -> int:
    """Open everything that can be refused, then load, generate and print."""
    tensors, arithmetic = source.open_checkpoint(args, device)
    config, folder = tensors.config, tensors.folder
    tokenizer = source.open_tokenizer(folder)
    ids, eos = prompt_ids(args, tokenizer, config), config.get("eos_token_id")
    if args.drafts and not Args.from_dict(config).num_nextn_predict_layers:
        raise UserError(f"`{folder}` has no MTP layer", "drop `--drafts`")
    stop = eos if isinstance(eos, list) else [eos]
    counts, sampler = Counts(), Sampler(args.temp, args.top_p, args.seed)
    settings = {"sampler": sampler, "drafts": args.drafts, "stop": stop, "counts": counts}
    model, tokens = load(folder, arithmetic), []
    try:
        for token in generate(model, ids, args.max_tokens, **settings):
            tokens.append(token)
    finally:  # Ctrl-C too: what was said is said
        if tokens and parallel.rank() == 0:
            text = tokenizer.decode(tokens)
            print(visible(text) if sys.stdout.isatty() else text)
    if counts.drafted and parallel.rank() == 0:
        print(f"{counts.accepted} of {counts.drafted} drafts accepted", file=sys.stderr)
    return 0


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with source.enough_memory(args.device):
        if parallel.num_processes() == 1:
            return run(args, args.device)
        device = parallel.start(args.device)
        try:
            return run(args, device)
        finally:
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_program(main)
