"""How far an MLX model is from the original: replay of a golden file, perplexity, capacities.

    python -m mlx_dsv3.parity MODEL GOLDEN [--teacher-forced] [--json] [--plot FILE.png]
    python -m mlx_dsv3.parity perplexity MODEL FILE
    python -m mlx_dsv3.parity capacities MODEL

Exit status 1 outside the bounds, with the first stage that left them. `docs/parity.md` says how
to check a conversion and what the figures mean. This file is the command line and the report.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

from mlx_dsv3.errors import Parser, UserError, imports, run_main

with imports(__name__):
    import mlx.core as mx
    from rich.console import Console
    from rich.table import Table

    from mlx_dsv3.checkpoint.folder import open_model
    from mlx_dsv3.config import read_json
    from mlx_dsv3.load import load_checked_tokenizer, load_model, plan_memory
    from mlx_dsv3.parity.bounds import RECIPES, TOP1_GAP, Sources, Verdict, recipe_of
    from mlx_dsv3.parity.differences import TokenDifferences
    from mlx_dsv3.parity.golden import Golden, read_golden
    from mlx_dsv3.parity.replay import Replay, check_same_model

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
COMMANDS = ("perplexity", "capacities")
CONTEXT = 2048


def read_conversion(folder: Path) -> dict | None:
    """Return conversion.json, or None for a folder converted elsewhere."""
    file = folder / "conversion.json"
    return read_json(file) if file.is_file() else None


def load_with_flags(args: argparse.Namespace, **options):
    """Load MODEL with the flags every command has."""
    chosen = {"experts": args.experts, "expert_memory_gb": args.expert_memory} | options
    dtype = DTYPES[args.dtype] if args.dtype else None
    return load_model(args.folder, dtype=dtype, **chosen)


# --- replay -----------------------------------------------------------------------------------


def replay(args: argparse.Namespace) -> int:
    """Replay GOLDEN, print the report, return 0 within the bounds and 1 outside."""
    golden = read_golden(args.golden)
    check_same_model(golden, args.folder.args, args.model)
    if args.teacher_forced and not golden.has_every_state:
        hint = "record with `--states all`"
        raise UserError("`--teacher-forced` needs the states of every position", hint)
    conversion = read_conversion(args.folder.path)
    name = args.bounds or recipe_of(conversion, args.folder.config)
    if args.plot:
        check_plot(Path(args.plot))
    loaded = load_with_flags(args)
    model, mtp, store = loaded.model, loaded.mtp, loaded.store
    try:
        dtype = dtype_name(model)
        result = Replay(model, mtp, golden, args.teacher_forced).run()
    finally:
        store.close()
    sources = Sources(name, golden.about["arithmetic"], dtype, args.teacher_forced)
    verdict = Verdict(result, sources)
    about = {
        "model": args.model,
        "recipe": name,
        "activations": dtype,
        "experts": "streamed" if store.is_streamed else "resident",
        "mode": "teacher-forced" if args.teacher_forced else "free",
        "same_source": same_source(golden, conversion),
    }
    if args.json:
        print(json.dumps(as_json(golden, about, verdict), indent=2))
    else:
        print_report(golden, about, verdict)
    if args.plot:
        plot(verdict, about, Path(args.plot))
    if verdict.breaches:
        hint = "" if args.teacher_forced or not golden.has_every_state else TEACHER_HINT
        print(UserError(str(verdict.breaches[0]), hint), file=sys.stderr)
    return 1 if verdict.breaches else 0


TEACHER_HINT = "`--teacher-forced` tells one wrong layer from differences that piled up"


def dtype_name(model) -> str:
    return "bfloat16" if model.model.norm.weight.dtype == mx.bfloat16 else "float32"


def same_source(golden: Golden, conversion: dict | None) -> bool | None:
    """Say whether folder and golden file come from one set of weights; None where unknown.

    Headers tell models of other shapes apart; norms and biases, V3 from V3-0324.
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


def as_json(golden: Golden, about: dict, verdict: Verdict) -> dict:
    result, bound = verdict.result, verdict.sources.bound()
    stages = [
        {
            "name": stage.name,
            "error": stage.error,
            "worst": stage.worst,
            "channel": stage.channel,
            "cosine": stage.cosine,
            "router": stage.agreement(),
            "router_outside_ties": stage.agreement(bound.tie),
            "bound": verdict.bound(stage.name).error,
        }
        for stage in result.stages.values()
    ]
    mtp = None
    if result.mtp_text is not None:
        mtp = text_json(result.mtp_text) | {
            "accepted": share(result.accepted),
            "golden_accepted": share(result.golden_accepted),
        }
    return {
        "golden": {key: value for key, value in golden.about.items() if key != "config"},
        **about,
        "tokens": golden.num_tokens,
        "stages": stages,
        "text": text_json(result.text),
        "mtp": mtp,
        "bound": bound._asdict(),
        "breaches": [vars(breach) for breach in verdict.breaches],
    }


def text_json(text: TokenDifferences) -> dict:
    ours, golden = text.perplexities
    return {
        "kl": text.kl,
        "top1": text.top1,
        "top1_outside_ties": text.top1_outside(TOP1_GAP),
        "perplexity": ours,
        "golden_perplexity": golden,
    }


def share(values: list[bool]) -> float:
    return sum(values) / len(values)


def print_report(golden: Golden, about: dict, verdict: Verdict) -> None:
    """Print origin, one row for each stage, the text, and the verdict."""
    source, result, bound = golden.about, verdict.result, verdict.sources.bound()
    num = len(golden.prompts)
    print(
        f"golden  {source['model']}, {source['arithmetic']} on {source['device']}, torch "
        f"{source['torch']}, {num} prompt{'s' * (num > 1)}, {golden.num_tokens} tokens"
    )
    print(
        f"model   {about['model']}, recipe {about['recipe']}, activations {about['activations']}, "
        f"experts {about['experts']}, {about['mode']}"
    )
    if about["same_source"] is False:
        print("note: the golden file was recorded from other shards than the model's")
    if result.mtp_text is None and "mtp.logprobs" in golden.prompts[0]:
        print("note: the model has no MTP module; that of the golden file is not compared")
    table = Table("stage", "error", "worst", "channel", "1 - cosine", "router", "outside ties")
    wrong = {breach.where for breach in verdict.breaches}
    for stage in result.stages.values():
        routed = [stage.agreement(), stage.agreement(bound.tie)]
        table.add_row(
            stage.name + (" *" if stage.name in wrong else ""),
            *(f"{value:.1e}" for value in (stage.error, stage.worst, stage.channel)),
            f"{max(1 - stage.cosine, 0):.0e}",
            *("" if value is None else f"{value:.1%}" for value in routed),
        )
    Console(width=max(Console().width, 88)).print(table)
    print_text("text", result.text)
    if result.mtp_text is not None:
        print_text("MTP ", result.mtp_text)
        ours, theirs = share(result.accepted), share(result.golden_accepted)
        print(f"MTP   drafts the main model agrees with: {ours:.1%}, golden {theirs:.1%}")
    word = "outside" if verdict.breaches else "within"
    print(f"{word} the bounds (mean row error {bound.error:.1e}, KL {bound.kl:.1e})")


def print_text(label: str, text: TokenDifferences) -> None:
    ours, golden = text.perplexities
    print(
        f"{label}  KL {text.kl:.1e}, best token {text.top1:.1%} "
        f"({text.top1_outside(TOP1_GAP):.1%} outside ties), perplexity {ours:.4f}, "
        f"golden {golden:.4f} ({ours / golden - 1:+.2%})"
    )


def check_plot(file: Path) -> None:
    """Refuse, before minutes of replay, a picture that cannot be drawn or written."""
    try:
        is_new = not os.path.lexists(file)
        file.open("a").close()
        if is_new:
            file.unlink()
    except OSError as error:
        raise UserError(f"`{file}` cannot be written: {error.strerror}", PLOT_HINT) from None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise UserError("`--plot` needs matplotlib", "pip install 'mlx-dsv3[plot]'") from None
    if file.suffix.lstrip(".").lower() not in FigureCanvasAgg.get_supported_filetypes():
        raise UserError(f"`{file}` is no name of a picture", PLOT_HINT)


PLOT_HINT = "give `--plot` a file like `depth.png` in a folder that you may write to"


def plot(verdict: Verdict, about: dict, file: Path) -> None:
    """Draw error and router agreement over depth; needs matplotlib, an extra."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = list(verdict.result.stages.values())
    figure, (top, bottom) = pyplot.subplots(2, sharex=True, figsize=(10, 6), layout="constrained")
    limits = [verdict.bound(stage.name).error for stage in stages]
    top.semilogy([max(stage.error, 1e-9) for stage in stages], "o-", label="mean row error")
    top.semilogy([max(stage.worst, 1e-9) for stage in stages], ".", label="worst row error")
    top.semilogy(limits, "--", color="grey", label="bound of the mean")
    top.set_ylabel("relative error")
    top.legend()
    routed = [i for i, stage in enumerate(stages) if stage.overlaps]
    for tie, label in ((None, "all"), (verdict.sources.bound().tie, "outside ties")):
        values = [100 * stages[i].agreement(tie) for i in routed]
        bottom.plot(routed, values, "o-", label=label)
    bottom.set_ylabel("router agreement, %")
    bottom.legend()
    step = max(1, len(stages) // 20)
    names = [stage.name for stage in stages][::step]
    bottom.set_xticks(range(0, len(stages), step), names, rotation=90)
    figure.suptitle(f"{about['recipe']}, {about['mode']} replay")
    figure.savefig(file)
    pyplot.close(figure)


# --- perplexity -------------------------------------------------------------------------------


def perplexity(args: argparse.Namespace) -> int:
    """Print the perplexity of a text file, in windows of `--context` tokens."""
    file = Path(args.file)
    if not file.is_file():
        raise UserError(f"`{file}` is no file", "give a text file in UTF-8")
    folder, config = args.folder, args.folder.config
    bos, size = config.get("bos_token_id"), folder.args.vocab_size
    if bos is not None and (type(bos) is not int or not 0 <= bos < size):
        raise UserError(  # the tokenizer is checked; an id beyond it would read foreign memory
            f"config.json of `{args.model}` has `bos_token_id` = `{bos}`; "
            f"the model has ids 0 to {size - 1}",
            "copy config.json from the model's page on the hub",
        )
    tokenizer = load_checked_tokenizer(folder.path, folder.args, config, False)
    loaded = load_with_flags(args)
    model, store = loaded.model, loaded.store
    text = file.read_text(encoding="utf-8")
    try:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if bos is not None and ids[:1] == [bos]:
            ids = ids[1:]
        if len(ids) < 2:
            raise UserError(f"`{file}` has {len(ids)} tokens", "give a longer text")
        loss = windows_loss(model, ids, bos, args.context)
    finally:
        store.close()
    num = len(ids) - (bos is None)
    report = {
        "model": args.model,
        "file": args.file,
        "tokens": num,
        "context": args.context,
        "activations": dtype_name(model),
        "nats_per_token": loss / num,
        "perplexity": math.exp(loss / num),
        "bits_per_byte": loss / math.log(2) / len(text.encode("utf-8")),
    }
    if args.json:
        print(json.dumps(report))
    else:
        print(
            f"perplexity {report['perplexity']:.4f} ({report['nats_per_token']:.4f} nats a token, "
            f"{report['bits_per_byte']:.4f} bits a byte; {num:,} tokens in windows of "
            f"{args.context:,})"
        )
    return 0


def windows_loss(model, ids: list[int], bos: int | None, context: int) -> float:
    """Return the sum of -log p in nats; each window begins with BOS and knows nothing before it."""
    total, head, step = 0.0, [] if bos is None else [bos], context - (bos is not None)
    for start in range(0, len(ids), step):
        window = head + ids[start : start + step]
        if len(window) < 2:
            continue
        states = model.hidden(mx.array([window]))[0]
        for first in range(0, len(window) - 1, 256):
            rows = states[first : min(first + 256, len(window) - 1)]
            logits = model.lm_head(rows).astype(mx.float32)
            targets = mx.array(window[first + 1 : first + 1 + len(rows)])
            chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
            total += float((mx.logsumexp(logits, axis=-1) - chosen).sum())
    return total


# --- capacities -------------------------------------------------------------------------------


def capacities(args: argparse.Namespace) -> int:
    """Compare logits at several expert capacities bit by bit; return 1 where any differs."""
    loaded = load_with_flags(args, experts="resident", expert_memory_gb=None)
    model, mtp, store, model_args = loaded.model, loaded.mtp, loaded.store, loaded.args
    ids = mx.array([[(7 * i + 3) % model_args.vocab_size for i in range(args.tokens)]])
    expected = logits_of(model, mtp, ids)
    store.close()
    del loaded, model, mtp
    plan = plan_memory(args.folder, dtype=expected["prefill"].dtype, experts="resident")
    slot_gb = sum(plan.slot_bytes.values()) / 1e9  # of one slot in every layer
    status, counts = 0, args.slots or default_slots(model_args)
    for slots in counts:
        budget = slot_gb * slots * (1 + 1e-9)
        loaded = load_with_flags(args, experts="streamed", expert_memory_gb=budget)
        model, mtp, store = loaded.model, loaded.mtp, loaded.store
        found = logits_of(model, mtp, ids)
        store.close()
        del loaded, model, mtp
        different = [name for name in expected if not same_bits(found[name], expected[name])]
        status |= bool(different)
        verdict = f"{', '.join(different)} differ" if different else "equal, bit for bit"
        print(f"{slots} of {model_args.n_routed_experts} experts in memory: {verdict}")
    return status


def default_slots(args) -> list[int]:
    """Return a few capacities from the least that runs to all but one."""
    least, most = args.num_experts_per_tok, args.n_routed_experts
    return sorted({least, least + 1, most // 4, most // 2, most - 1} & set(range(least, most)))


def logits_of(model, mtp, ids: mx.array) -> dict[str, mx.array]:
    """Return logits of a prefill, of single tokens after it, and of the MTP module."""
    cache, half = model.make_cache(), ids.shape[1] // 2
    g = model.hidden(ids[:, :half], cache)
    found = {"prefill": model.lm_head(g)}
    single = [model(ids[:, i : i + 1], cache) for i in range(half, min(half + 8, ids.shape[1]))]
    found["decoding"] = mx.concatenate(single, axis=1)
    if mtp is not None:
        found["MTP"] = mtp(g[:, :-1], ids[:, 1:half])[0]
    mx.eval(found)
    return found


def same_bits(a: mx.array, b: mx.array) -> bool:
    kind = mx.uint16 if a.dtype == mx.bfloat16 else mx.uint32
    return a.dtype == b.dtype and bool(mx.array_equal(a.view(kind), b.view(kind)))


# --- command line -----------------------------------------------------------------------------


def common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="MLX folder, or hub id of one")
    parser.add_argument("--dtype", choices=DTYPES, help="activations (default: the device's)")
    parser.add_argument("--experts", choices=("auto", "resident", "streamed"), default="auto")
    parser.add_argument("--expert-memory", type=float, help="GB of expert slots", metavar="GB")


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line; the first word may be a command, else it is MODEL of a replay."""
    command = argv[0] if argv and argv[0] in COMMANDS else None
    usage = __doc__.split("\n\n")
    parser = Parser(
        prog=f"python -m mlx_dsv3.parity{f' {command}' if command else ''}",
        description=usage[0],
        epilog=None if command else usage[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common(parser)
    if command == "perplexity":
        parser.add_argument("file", help="text in UTF-8")
        parser.add_argument("--context", type=int, default=CONTEXT, help="tokens in a window")
        parser.add_argument("--json", action="store_true")
    elif command == "capacities":
        parser.add_argument("--slots", type=int, nargs="+", help="experts in memory, by layer")
        parser.add_argument("--tokens", type=int, default=64)
    else:
        parser.add_argument("golden", help="file of `python -m mlx_dsv3.reference.record`")
        parser.add_argument("--teacher-forced", action="store_true", help="golden input everywhere")
        parser.add_argument("--bounds", choices=RECIPES, help="those of another recipe")
        parser.add_argument("--json", action="store_true")
        parser.add_argument("--plot", metavar="FILE.png", help="error and routing over depth")
    args = parser.parse_args(argv[1:] if command else argv)
    args.run = {"perplexity": perplexity, "capacities": capacities}.get(command, replay)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    args.folder = open_model(args.model)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(run_main(main))
