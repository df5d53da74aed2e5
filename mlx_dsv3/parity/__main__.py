"""How far an MLX model is from the original: replay of a golden file, perplexity, another folder.

    python -m mlx_dsv3.parity MODEL GOLDEN [--teacher-forced] [--json] [--plot FILE.png]
    python -m mlx_dsv3.parity perplexity MODEL FILE
    python -m mlx_dsv3.parity compare MODEL REFERENCE FILE [FILE ...]
    python -m mlx_dsv3.parity capacities MODEL

Exit status 1 outside the bounds, with the first stage that left them; 2 where a recording within
them is too short to judge by. `docs/parity.md` says how to check a conversion and what the figures
mean. This file is the command line.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mlx_dsv3.errors import UserError, imports, run_program

with imports(__name__):
    import mlx.core as mx

    from mlx_dsv3.checkpoint.folder import Folder, open_model
    from mlx_dsv3.checkpoint.format import MANIFEST, read_manifest
    from mlx_dsv3.device import default_dtype
    from mlx_dsv3.load import Loaded, load_model, plan_memory
    from mlx_dsv3.options import Parser, number, whole
    from mlx_dsv3.parity.bounds import HEAD, LEAST_TOKENS, RECIPES, Sources, Verdict, recipe_of
    from mlx_dsv3.parity.capacities import compare_capacities
    from mlx_dsv3.parity.compare import as_json as comparison_json
    from mlx_dsv3.parity.compare import compare, print_comparison, same_windows
    from mlx_dsv3.parity.golden import Golden, dtype_name, read_golden
    from mlx_dsv3.parity.perplexity import measure_perplexity
    from mlx_dsv3.parity.replay import Replay, check_same_model, same_source
    from mlx_dsv3.parity.report import PLOT_HINT, as_json, check_plot, plot, print_report

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
CONTEXT = 2048
COMPARED = 512  # of windows that are compared: there are more of them, and narrower intervals


def check(args: argparse.Namespace, folder: Folder, load: Callable[..., Loaded]) -> int:
    """Replay GOLDEN, print the report, return 0 within the bounds and 1 outside."""
    golden = read_golden(args.golden)
    check_same_model(golden, folder.args, args.model)
    if args.teacher_forced and not golden.has_every_state:
        hint = "record with `--states all`"
        raise UserError("`--teacher-forced` needs the states of every position", hint)
    file = folder.path / MANIFEST
    conversion = read_manifest(folder.path) if file.is_file() else None  # converted elsewhere
    recipe = args.bounds or recipe_of(conversion, folder.config)
    if args.plot:
        check_plot(args.plot)
    loaded = load()
    with loaded:
        is_streamed, dtype = loaded.store.is_streamed, loaded.model.model.norm.weight.dtype
        result = Replay(loaded.model, loaded.mtp, golden, args.teacher_forced).run()
    about = {
        "model": args.model,
        "recipe": recipe,
        "activations": dtype_name(dtype),
        "experts": "streamed" if is_streamed else "resident",
        "mode": "teacher-forced" if args.teacher_forced else "free",
        "same_source": same_source(golden, conversion),
    }
    arithmetic = golden.about["arithmetic"]
    sources = Sources(recipe, arithmetic, about["activations"], args.teacher_forced)
    return tell(args, golden, about, Verdict(result, sources))


def tell(args: argparse.Namespace, golden: Golden, about: dict, verdict: Verdict) -> int:
    """Print and draw what was found; return the exit status."""
    if args.json:
        print(json.dumps(as_json(golden, about, verdict), indent=2, allow_nan=False), flush=True)
    else:
        print_report(golden, about, verdict)
    if verdict.breaches:
        print(f"error: {verdict.breaches[0]}", file=sys.stderr)
        is_plain = args.teacher_forced or verdict.breaches[0].where == HEAD
        if golden.has_every_state and not is_plain:
            print(TEACHER_HINT, file=sys.stderr)
    elif verdict.is_too_short:
        print(too_short(verdict.num_tokens), file=sys.stderr)
    status = 1 if verdict.breaches else 2 if verdict.is_too_short else 0
    try:
        if args.plot:
            plot(verdict, about, args.plot)
    except Exception as error:  # matplotlib's of any kind; the report is out already
        reason = getattr(error, "strerror", None) or error
        print(UserError(f"`{args.plot}` was not drawn: {reason}", PLOT_HINT), file=sys.stderr)
        status = status or 2
    return status


def too_short(num_tokens: int) -> UserError:
    return UserError(
        f"the recording has {num_tokens} tokens, too few to judge by: no difference shows",
        f"record {LEAST_TOKENS} tokens or more; a few hundred reach most experts",
    )


TEACHER_HINT = "\nhint: `--teacher-forced` tells one wrong layer from differences that piled up"


def perplexity(args: argparse.Namespace, folder: Folder, load: Callable[..., Loaded]) -> int:
    """Print the perplexity of a text file, in windows of `--context` tokens."""
    args.context = args.context or min(CONTEXT, folder.args.max_position_embeddings)
    check_length("--context", args.context, folder)
    trusts = args.trust_remote_code
    found = measure_perplexity(folder, args.file, args.context, load, trusts)
    if args.json:
        about = {"model": args.model, "file": str(args.file)}
        print(json.dumps(about | found, allow_nan=False))
    else:
        print(
            f"perplexity {found['perplexity']:.4f} ({found['nats_per_token']:.4f} nats per token, "
            f"{found['bits_per_byte']:.4f} bits per byte; {found['tokens']:,} tokens in windows of "
            f"{args.context:,})"
        )
    return 0


def compare_folders(args: argparse.Namespace, folder: Folder, load: Callable[..., Loaded]) -> int:
    """Print how far MODEL is from REFERENCE on a text; both plans are made before either loads."""
    folder = open_model(folder, with_mtp=False)
    reference = open_model(args.reference, with_mtp=False)
    args.context = args.context or min(COMPARED, folder.args.max_position_embeddings)
    for each in (folder, reference):
        check_length("--context", args.context, each)
        plan_memory(each, **load.keywords)
    found = same_windows(folder, reference, args.files, args.context, args.trust_remote_code)
    loaders = [partial(load_model, each, **load.keywords) for each in (folder, reference)]
    dtype = load.keywords["dtype"] or default_dtype()
    numbers = compare(folder, reference, found, *loaders, dtype, args.keep)
    about = {
        "model": args.model,
        "reference": args.reference,
        "files": [str(file) for file in args.files],
        "tokens": int(numbers.sizes.sum()),
        "windows": len(found),
        "context": args.context,
        "activations": dtype_name(dtype),
    }
    if args.json:
        print(comparison_json(about, numbers.intervals()))
    else:
        print_comparison(about, numbers.intervals())
    return 0


def capacities(args: argparse.Namespace, folder: Folder, load: Callable[..., Loaded]) -> int:
    """Compare logits at several expert capacities bit by bit; return 1 where any differs."""
    check_length("--tokens", args.tokens, folder)
    status, least, most = 0, folder.args.num_experts_per_tok, folder.args.n_routed_experts
    wanted = list(dict.fromkeys(args.slots or ()))
    if bad := [count for count in wanted if not least <= count <= most]:
        raise UserError(f"`--slots` has {bad[0]}", f"this model takes {least} to {most} per layer")
    for slots, experts, different in compare_capacities(load, wanted, args.tokens):
        words = f"{', '.join(different)} differ" if different else "equal, bit for bit"
        print(f"{slots} of {experts} experts in memory: {words}")
        status |= bool(different)
    return status


def check_length(flag: str, length: int, folder: Folder) -> None:
    most = folder.args.max_position_embeddings
    if length > most:
        raise UserError(
            f"`{flag}` is {length:,} and `max_position_embeddings` of the model is {most:,}",
            f"`{flag} {most}` is the most",
        )


COMMANDS = {"perplexity": perplexity, "compare": compare_folders, "capacities": capacities}


def add_memory(parser: argparse.ArgumentParser) -> None:
    where = ("auto", "resident", "streamed")
    parser.add_argument("--experts", choices=where, default="auto", help="in memory, or from disk")
    size = number("expert_memory")
    parser.add_argument("--expert-memory", type=size, help="GB of expert slots", metavar="GB")


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line; the first word may be a command, else it is MODEL of a replay."""
    command = argv[0] if argv and argv[0] in COMMANDS else None
    usage = (__doc__ or "\n\n").split("\n\n")  # without docstrings, as with `-OO`
    parser = Parser(
        prog=f"python -m mlx_dsv3.parity{f' {command}' if command else ''}",
        description=usage[0],
        epilog=None if command else usage[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="MLX folder, or hub id of one")
    parser.add_argument("--dtype", choices=DTYPES, help="activations (default: the device's)")
    if command == "capacities":  # which decides where experts are
        parser.set_defaults(experts="auto", expert_memory=None)
    else:
        add_memory(parser)
    if command == "compare":
        other = "MLX folder, or hub id of one, that MODEL is compared with"
        parser.add_argument("reference", metavar="REFERENCE", help=other)
        texts = {"metavar": "FILE", "type": Path, "nargs": "+", "help": "texts in UTF-8"}
        parser.add_argument("files", **texts)
        kept = "folder where what was computed of REFERENCE stays, for other MODELs"
        parser.add_argument("--keep", type=Path, metavar="FOLDER", help=kept)
    elif command == "perplexity":
        parser.add_argument("file", metavar="FILE", type=Path, help="text in UTF-8")
    if command in ("perplexity", "compare"):
        window = whole("--context", 2)
        length = f"tokens in a window (default: {COMPARED if command == 'compare' else CONTEXT:,})"
        parser.add_argument("--context", type=window, metavar="N", help=length)
        runs = "run the repository's own tokenizer code"
        parser.add_argument("--trust-remote-code", action="store_true", help=runs)
    elif command == "capacities":
        count = whole("--slots", 1)
        parser.add_argument("--slots", type=count, nargs="+", help="experts in memory, per layer")
        length = whole("--tokens", 4)  # the MTP module gets a pair of half of them
        parser.add_argument("--tokens", type=length, default=64, help="length of the prompt")
    else:
        recorded = "file of `python -m mlx_dsv3.reference.record`"
        parser.add_argument("golden", metavar="GOLDEN", help=recorded)
        parser.add_argument("--teacher-forced", action="store_true", help="golden input everywhere")
        parser.add_argument("--bounds", choices=RECIPES, help="those of another recipe")
        parser.add_argument(
            "--plot", type=Path, metavar="FILE.png", help="error and routing over depth"
        )
    if command != "capacities":
        parser.add_argument("--json", action="store_true", help="JSON for scripts")
    args = parser.parse_args(argv[1:] if command else argv)
    args.run = COMMANDS.get(command, check)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    folder = open_model(args.model)
    load = partial(
        load_model,
        folder,
        dtype=DTYPES.get(args.dtype),
        experts=args.experts,
        expert_memory_gb=args.expert_memory,
    )
    return args.run(args, folder, load)


if __name__ == "__main__":
    run_program(main)
