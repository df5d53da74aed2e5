"""Train the demo model, or the judge, with the reference and export it in the hub's FP8 layout.

    python -m demo.train --minutes 36 --seed 0
    python -m demo.train --judge build/judge-text/train.txt --minutes 70 --seed 0

The arithmetic is `mlx_dsv3/reference/model.py`, of which the expert loop and the attention are
replaced by faster forms, compared with it before the first step. Loss: next token, plus
`MTP_WEIGHT` times the MTP module's token after next. Experts are balanced as DeepSeek does it, by
moving the selection bias, without an auxiliary loss. In the last part every second step of the
demo model runs on weights rounded to 4 bits (straight through), so that a 4-bit conversion still
answers; the judge, which is to tell good roundings from bad ones, never sees any.

Time decides the schedule when --minutes is given; then another machine takes another number of
steps.
"""

import argparse
import math
import time
from pathlib import Path

from mlx_dsv3.errors import imports, run_program

with imports(__name__):
    import numpy as np
    import torch
    import torch.nn.functional as F
    from tokenizers import Tokenizer

    from demo import corpus, tokenizer
    from demo.batches import SHAPES, Packer, Windows, tokenise
    from demo.export import export
    from demo.model_config import CONFIG, JUDGE
    from demo.rounding import four_bit_names, round_four_bit
    from mlx_dsv3.reference.model import MLA, Args, Model, MoE, apply_rope, rotation

MTP_WEIGHT = 0.4
BALANCE_STEP = 0.002  # DeepSeek uses 0.001 over far more steps
ROUND_FROM = 0.7  # share of the run after which every second step sees 4-bit weights


def batched_moe(self, x):
    """Compute `MoE.forward` with one batched product for each projection, loads padded equal."""
    flat = x.flatten(0, -2)  # (T, D)
    indices, weights = self.gate(flat)
    T, K = indices.shape
    E = len(self.experts)
    expert, order = indices.flatten().sort(stable=True)
    load = torch.bincount(expert, minlength=E)
    capacity = int(load.max())
    start = load.cumsum(0) - load
    slot = expert * capacity + torch.arange(T * K, device=x.device) - start[expert]
    source = torch.full((E * capacity,), T, device=x.device).index_copy(0, slot, order // K)
    if torch.is_autocast_enabled(x.device.type):
        flat = flat.to(torch.bfloat16)  # before the gather: half the bytes to move
    rows = torch.cat([flat, flat.new_zeros(1, flat.shape[1])])  # row T pads
    rows = rows.index_select(0, source).view(E, capacity, -1)
    gate, up, down = (
        torch.stack([getattr(e, name).weight for e in self.experts]).transpose(1, 2)
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    y = (F.silu(rows @ gate) * (rows @ up)) @ down  # (E, capacity, D)
    where = torch.empty_like(slot).index_copy(0, order, slot)  # slot of each (token, choice)
    y = y.flatten(0, 1).index_select(0, where).view(T, K, -1)
    out = (y.to(weights.dtype) * weights[..., None]).sum(1).to(x.dtype)
    return out.view_as(x) + self.shared_experts(x)


def fused_attention(self, x, cache=None):
    """Compute `MLA.forward` without a cache through torch's fused attention."""
    args = self.args
    cos, sin = rotation(args, 0, x.shape[1], x)
    q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
    q_nope, q_pe = q.unflatten(-1, (self.H, -1)).transpose(1, 2).split([self.N, self.R], dim=-1)
    latent, k_pe = self.kv_a_proj_with_mqa(x).split([args.kv_lora_rank, self.R], dim=-1)
    kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.H, -1)).transpose(1, 2)
    k_nope, v = kv.split([self.N, args.v_head_dim], dim=-1)
    k_pe = apply_rope(k_pe, cos, sin)[:, None].expand(-1, self.H, -1, -1)
    q = torch.cat([q_nope, apply_rope(q_pe, cos, sin)], dim=-1)
    k = torch.cat([k_nope, k_pe], dim=-1)
    v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))  # the fused kernel needs one width
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
    return self.o_proj(out[..., : args.v_head_dim].transpose(1, 2).flatten(2))


def use_fast_forms(model: Model) -> None:
    """Replace expert loop and attention after asserting that they give what the reference gives."""
    x = torch.randn(2, 40, model.args.hidden_size, device=model.lm_head.weight.device)
    for kind, fast in ((MoE, batched_moe), (MLA, fused_attention)):
        for module in (m for m in model.modules() if isinstance(m, kind)):
            with torch.no_grad():
                difference = (fast(module, x) - module(x)).abs().max().item()
            assert difference < 1e-5, (kind, difference)
            module.forward = fast.__get__(module)


def build(config: dict, seed: int) -> Model:
    """Make the model: deviation 0.02, less where a matrix writes to the residual stream."""
    torch.manual_seed(seed)
    model = Model(Args.from_dict(config))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(parameter, std=0.02 / (math.sqrt(8) if writes else 1))
    return model


class Balancer:
    """Count the tokens of each expert and move the selection bias towards equal loads."""

    def __init__(self, model: Model):
        self.gates = [m.gate for m in model.modules() if isinstance(m, MoE)]
        self.loads = {}
        for gate in self.gates:
            gate.register_forward_hook(self.count)

    def count(self, gate, inputs, outputs):
        self.loads[gate] = torch.bincount(outputs[0].flatten(), minlength=gate.weight.shape[0])

    @torch.no_grad()
    def step(self, size: float) -> float:
        """Move every bias; return the largest load over the mean load."""
        worst = 0.0
        for gate in self.gates:
            load = self.loads[gate].float()
            gate.e_score_correction_bias += size * (load.mean() - load).sign()
            worst = max(worst, (load.max() / load.mean()).item())
        return worst


def weighted_loss(logits, targets, weights):
    """Return the weighted mean cross-entropy."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def losses(model, ids, weights):
    """Return the next-token loss and the MTP loss of a batch (B, L + 1)."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits, g = model(ids[:, :-1])
        mtp_logits, _ = model.mtp(g[:, :-1], ids[:, 1:-1])
    main = weighted_loss(logits, ids[:, 1:], weights[:, 1:])
    return main, weighted_loss(mtp_logits, ids[:, 2:], weights[:, 2:])


def make_optimizer(model, lr: float):
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() == 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def learning_rate(progress: float, step: int, peak: float) -> float:
    """Warm up over 60 steps, then fall as a cosine to a fiftieth."""
    floor = peak / 50
    return min(step / 60, 1) * (floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def rounded_copies(model) -> dict:
    """Round the matrices in place to 4 bits and return the unrounded ones."""
    kept = {}
    parameters = dict(model.named_parameters())
    for name in four_bit_names(parameters):
        kept[name] = parameters[name].data
        parameters[name].data = round_four_bit(name, parameters[name].data)
    return kept


def restore(model, kept: dict) -> None:
    parameters = dict(model.named_parameters())
    for name, data in kept.items():
        parameters[name].data = data


def train(model, batches, args, log) -> dict:
    """Run the schedule; return what the README records."""
    optimizer, balancer = make_optimizer(model, args.lr), Balancer(model)
    started, step, tokens, progress, before_s = time.time(), 0, 0, 0.0, 0.0
    if args.state and args.state.exists():
        state = torch.load(args.state, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, tokens, before_s = state["step"], state["tokens"], state["seconds"]
    means, rounds = np.zeros(2), args.judge is None
    while progress < 1:
        seconds = time.time() - started + before_s
        progress = max(seconds / 60 / args.minutes, step / args.steps)
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(min(progress, 1), step, args.lr)
        ids, weights = (t.to(args.device) for t in batches.batch(*SHAPES[step % len(SHAPES)]))
        kept = rounded_copies(model) if rounds and progress > ROUND_FROM and step % 2 else {}
        main, mtp = losses(model, ids, weights)
        (main + MTP_WEIGHT * mtp).backward()
        restore(model, kept)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        worst = balancer.step(BALANCE_STEP * (1 - progress))
        tokens += ids.shape[0] * (ids.shape[1] - 1)
        means += np.array([main.item(), mtp.item()])
        if step % args.log_every == 0:
            main_mean, mtp_mean = means / args.log_every
            means[:] = 0
            log(
                f"step {step} loss {main_mean:.4f} mtp {mtp_mean:.4f} load {worst:.2f} "
                f"tokens {tokens} epoch {batches.epochs} minutes {seconds / 60:.1f}"
            )
        if args.state and step % args.save_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step, "tokens": tokens, "seconds": seconds}, args.state)
    return {"steps": step, "tokens": tokens, "minutes": round(seconds / 60, 1)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--conversations", type=int, default=200_000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--judge", type=Path, metavar="TEXT", help="train the judge, on this file (demo/judge)"
    )
    parser.add_argument("--out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--state", type=Path, help="file to save to and to resume from")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--log-every", type=int, default=25)
    args = parser.parse_args()
    here = Path(__file__).parent
    args.out = args.out or (here / "judge" if args.judge else here) / "checkpoint"
    return args


def open_tokenizer(args, words, size: int) -> Tokenizer:
    """Train and save the tokenizer, or take that of a saved state: its weights belong to it."""
    if args.state and args.state.exists():
        return Tokenizer.from_file(str(args.out / "tokenizer.json"))
    tok = tokenizer.train(words, size)
    tokenizer.save(tok, args.out)
    return tok


def demo(args, log) -> tuple[dict, Tokenizer, Packer]:
    """Return the demo model's config, tokenizer and conversations."""
    texts = list(corpus.corpus(args.conversations, args.seed))
    words = (m["content"] for c in texts[:40_000] for m in c)
    tok = open_tokenizer(args, words, tokenizer.BASE_SIZE)
    pieces = tokenise(tok, texts)
    log(f"{len(pieces)} conversations, {sum(len(p[0]) for p in pieces)} tokens")
    return CONFIG, tok, Packer(pieces, args.seed)


def judge(args, log) -> tuple[dict, Tokenizer, Windows]:
    """Return the judge's config, tokenizer and text, which has a blank line between passages."""
    texts = args.judge.read_text(encoding="utf-8").split("\n\n")
    tok = open_tokenizer(args, texts, JUDGE["vocab_size"] - 2)
    encoded = tok.encode_batch([text + "\n\n" for text in texts], add_special_tokens=False)
    ids = np.concatenate([np.array(e.ids, np.int64) for e in encoded])
    log(f"{len(ids)} tokens")
    return JUDGE, tok, Windows(ids, args.seed)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    started = time.time()

    def log(line: str) -> None:
        print(f"[{time.time() - started:7.1f}s] {line}", flush=True)

    config, tok, batches = judge(args, log) if args.judge else demo(args, log)
    model = build(config, args.seed).to(args.device)
    use_fast_forms(model)
    log(f"{sum(p.numel() for p in model.parameters())} parameters")
    result = train(model, batches, args, log)
    log(str(result))
    export(model.state_dict(), config, tok, args.out)
    log(f"wrote {args.out.name}")


if __name__ == "__main__":
    run_program(main)
