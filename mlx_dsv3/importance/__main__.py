"""Measure how much each input channel of a model counts, over texts: for `convert --importance`.

    python -m mlx_dsv3.importance MODEL --text FILE [FILE ...] OUT [--context N]

Runs any converted folder, resident or streamed, and writes the mean square of every channel that
enters a linear layer. The same command goes on where one was stopped. `docs/quality.md` says which
texts to give. This file is the command line.
"""

import argparse
import sys
from pathlib import Path

from mlx_dsv3.errors import UserError, check_writable, imports, in_line, run_program

with imports(__name__):
    from mlx_dsv3.checkpoint.folder import open_model
    from mlx_dsv3.checkpoint.importance import read
    from mlx_dsv3.device import default_dtype
    from mlx_dsv3.importance.measure import Measurement, partial_of
    from mlx_dsv3.importance.sums import Sums
    from mlx_dsv3.importance.texts import describe, read_texts
    from mlx_dsv3.load import load_model, plan_memory
    from mlx_dsv3.options import Parser, whole
    from mlx_dsv3.parity.__main__ import DTYPES, add_memory, check_length
    from mlx_dsv3.parity.golden import dtype_name
    from mlx_dsv3.sizes import size
    from mlx_dsv3.terminal.progress import LoadBar

CONTEXT = 512


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line; the last word after `--text` is OUT, unless that stands elsewhere."""
    parser = Parser(
        prog="python -m mlx_dsv3.importance",
        description=(__doc__ or "").partition("\n")[0],
        usage="%(prog)s MODEL --text FILE [FILE ...] OUT [options]",
    )
    parser.add_argument("model", metavar="MODEL", help="MLX folder, or hub id of one")
    parser.add_argument("out", metavar="OUT", nargs="?", help="the file to write")
    texts = {"type": Path, "nargs": "+", "required": True, "metavar": "FILE"}
    parser.add_argument("--text", help="texts in UTF-8, of several kinds", **texts)
    length = f"tokens in a window (default: {CONTEXT})"
    parser.add_argument("--context", type=whole("--context", 2), metavar="N", help=length)
    add_memory(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="activations (default: the device's)")
    runs = "run the repository's own tokenizer code"
    parser.add_argument("--trust-remote-code", action="store_true", help=runs)
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = args.text.pop()
    if not args.text:
        parser.error("one word after `--text`: a text and OUT are needed")
    args.out = Path(args.out)
    return args


def is_done(out: Path, key: str) -> bool:
    """Say whether OUT is what this command writes; refuse any other file in its place."""
    if not out.exists() and not out.is_symlink():
        check_writable(out)
        return False
    if out.is_file() and read_key(out) == key:
        return True
    raise UserError(
        f"`{out}` exists and is not what this command writes",
        "give the name of a new file, or delete that one",
    )


def read_key(out: Path) -> str | None:
    try:
        return read(out).about.get("key")
    except UserError:
        return None


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    folder = open_model(args.model)
    context = args.context or min(CONTEXT, folder.args.max_position_embeddings)
    check_length("--context", context, folder)
    dtype = DTYPES.get(args.dtype) or default_dtype()
    where = {"experts": args.experts, "expert_memory_gb": args.expert_memory}
    plan = plan_memory(folder, dtype=dtype, context=context, **where)
    texts = read_texts(folder, args.text, context, args.trust_remote_code)
    about = describe(folder, texts, context, dtype_name(dtype))
    if is_done(args.out, about["key"]):
        print(in_line(f"`{args.out}` was measured already"), file=sys.stderr)
        return 0
    if (partial := partial_of(args.out)).exists():
        Sums(folder.args, bool(folder.sidecar)).resume(partial, about["key"])
    with LoadBar() as bar, load_model(folder, dtype=dtype, plan=plan, progress=bar.progress) as it:
        bar.erase()
        measure(Measurement(it, texts, args.out, about))
    return 0


def measure(measurement: Measurement) -> None:
    """Run it, and say what came of it."""
    out, rows = measurement.out, measurement.texts.rows
    try:
        measurement.run()
    except KeyboardInterrupt:
        print("stopped; repeat the same command to continue", file=sys.stderr)
        raise
    fewest = fewest_rows(measurement)
    words = f"`{out}` measured: {size(out.stat().st_size)}, {rows:,} rows{fewest}"
    print(in_line(words), file=sys.stderr)


def fewest_rows(measurement: Measurement) -> str:
    counts = [v for k, v in measurement.sums.values.items() if k.endswith(".experts.rows")]
    return f"; the rarest expert had {int(min(map(min, counts))):,}" if counts else ""


if __name__ == "__main__":
    run_program(main)
