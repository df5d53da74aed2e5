"""Command line of the converter: plan, run, verify, mtp.

Parses, calls, prints. `UserError` ends with status 2, a failed verification with 1, Ctrl-C with
130 and a folder that the same command completes.
"""

import argparse
import json
import sys
from pathlib import Path

from mlx_dsv3.errors import UserError, check_writable, imports, in_line, run_program

with imports(__name__):
    from convert import recipe as recipes
    from convert import verify
    from convert.destination import SHARDS, Destination
    from convert.download import Shards, disk_peak, open_repo
    from convert.fit_memory import survey
    from convert.identity import Identity
    from convert.manifest import write_json
    from convert.plan import Plan
    from convert.planner import build
    from convert.progress import Progress, choose_style
    from convert.report import plan_as_dict, print_errors, print_fitted, print_plan
    from convert.run import run
    from convert.sidecar import plan_sidecar, write_config
    from convert.source import Source, open_folder
    from mlx_dsv3.checkpoint.format import MANIFEST
    from mlx_dsv3.checkpoint.hub import Repo, is_repo_id
    from mlx_dsv3.checkpoint.importance import Importance
    from mlx_dsv3.checkpoint.importance import read as read_importance
    from mlx_dsv3.options import Parser, number, whole
    from mlx_dsv3.sizes import size

MOST_JOBS = 64
DEFAULT_JOBS = 2  # each holds about 0.3 GB at V3's shapes; two keep a disk and two cores busy


def parser() -> argparse.ArgumentParser:
    """Return the parser; all defaults live here."""
    root = Parser(
        prog="python -m convert", description="Convert DeepSeek-V3 checkpoints to MLX folders."
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", help="show what `run` would write; writes nothing")
    convert = commands.add_parser("run", help="convert SOURCE into DEST; repeat it to resume")
    check = commands.add_parser("verify", help="read a converted folder back")
    mtp = commands.add_parser("mtp", help="add the MTP layer to a folder converted elsewhere")
    for command in (plan, convert, mtp):
        where = "folder of a checkpoint, or a hub id"
        command.add_argument("source", metavar="SOURCE", type=filled, help=where)
        command.add_argument("--revision", type=filled, help="with a hub id: branch, tag or commit")
    dest = {check: "a converted folder", mtp: "the folder that gets the layer"}
    for command in (convert, check, mtp):
        what = dest.get(command, "folder of the result")
        command.add_argument("dest", metavar="DEST", type=filled, help=what)
        jobs, threads = whole("--jobs", 1, MOST_JOBS), "threads for each stage (%(default)s)"
        command.add_argument("--jobs", type=jobs, default=DEFAULT_JOBS, metavar="N", help=threads)
    for command in (plan, convert):
        command.add_argument("--recipe", help=f"{', '.join(recipes.RECIPES)}, or a JSON file")
        command.add_argument("--q-bits", type=int)
        command.add_argument("--q-group-size", type=int)
        command.add_argument("--q-mode", choices=list(recipes.ALLOWED))
        command.add_argument(
            "--fit-memory",
            type=number("fit_memory"),
            metavar="GB",
            help="choose bits by layer, to run resident on a machine with so much memory",
        )
        length = "tokens that --fit-memory keeps room for"
        command.add_argument("--context", type=number("context"), metavar="N", help=length)
        kept = "write the recipe there, for `--recipe FILE`"
        command.add_argument("--save-recipe", type=recipe_file, metavar="FILE", help=kept)
        command.add_argument(
            "--stacked", action="store_true", help="stack routed experts, for other engines"
        )
    convert.add_argument(
        "--discard-source",
        action="store_true",
        help="with a hub id: delete each shard when its tensors are converted",
    )
    for command in (plan, convert, check):
        measured = "what `mlx_dsv3.importance` measured: fitted levels go by it"
        command.add_argument("--importance", type=filled, metavar="FILE", help=measured)
    check.add_argument("--source", type=filled, help="derive a sample again from this checkpoint")
    check.add_argument("--revision", type=filled, help="with a hub id: branch, tag or commit")
    check.add_argument("--full", action="store_true", help="with --source: derive everything")
    for command in (plan, convert, check, mtp):
        command.add_argument("--json", action="store_true", help="JSON for scripts")
    return root


def filled(text: str) -> str:
    """Return a word of the command line; an empty one is a shell variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("an empty word names nothing")
    return text


def recipe_file(text: str) -> Path:
    """Return the name of a file that `--recipe` will know as one."""
    if not text.endswith(".json"):
        hint = f"`--save-recipe {text}.json` writes one"
        raise UserError(f"`--save-recipe` is `{text}`; a recipe's name ends with `.json`", hint)
    check_writable(Path(text))
    return Path(text)


def open_source(args: argparse.Namespace, only_mtp: bool = False) -> tuple[Source, Shards | None]:
    """Open SOURCE, or the MTP layer's shards of it: a folder, or a repository by its headers.

    Shards of a repository come when they are asked for.
    """
    if Path(args.source).exists() or not is_repo_id(args.source):
        if args.revision or getattr(args, "discard_source", False):
            raise UserError(
                "`--revision` and `--discard-source` are for repositories on the hub",
                "a folder's files are never deleted; drop the flag",
            )
        return open_folder(Path(args.source), only_mtp), None
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # the converter shows its own
    return open_repo(Repo(args.source, args.revision), only_mtp)


def make_plan(args: argparse.Namespace) -> tuple[Plan, Shards | None]:
    """Plan by the recipe that is asked for, or by one that fits a memory, which is shown first."""
    recipe = recipes.choose(args.recipe, args.q_bits, args.q_group_size, args.q_mode)
    check_fit_memory(args)
    importance = open_importance(args, recipe)
    source, shards = open_source(args)
    if args.fit_memory is not None:
        if importance:
            importance.check(source.args, Identity(source))
        fitted = survey(source, args.context, importance).fit(args.fit_memory)
        recipe = fitted.recipe
        if not args.json:
            print_fitted(fitted)
    if args.save_recipe:
        write_json(args.save_recipe, recipe.as_dict())
    plan = build(source, recipe, "stacked" if args.stacked else "records", importance)
    if importance:
        importance.check(source.args, plan.identity)
    return plan, shards


def check_fit_memory(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    chosen = [args.recipe, args.q_bits, args.q_group_size, args.q_mode]
    if args.fit_memory is not None and any(flag is not None for flag in chosen):
        hint = "drop one of the two; `--save-recipe FILE.json` keeps what was chosen"
        raise UserError("`--fit-memory` excludes `--recipe` and `--q-*`: it chooses both", hint)
    if args.context is not None and args.fit_memory is None:
        raise UserError("`--context` needs `--fit-memory`", "a conversion is for any context")


def open_importance(args: argparse.Namespace, recipe: recipes.Recipe) -> Importance | None:
    """Read FILE of `--importance`, for a recipe that has a use for it."""
    if args.importance is None:
        return None
    if recipe.levels != "fitted" and args.fit_memory is None:
        fitted = [name for name, known in recipes.RECIPES.items() if known.levels == "fitted"]
        raise UserError(
            f"`--importance` has no use in the recipe `{recipe.name}`, whose levels are "
            f"`{recipe.levels}`",
            f"fitted levels take it: `--recipe` {', '.join(fitted)}",
        )
    return read_importance(args.importance)


def keep_revision(args: argparse.Namespace, destination: Destination, progress: Progress) -> None:
    """Without `--revision`, take the one that a conversion from this repository began with.

    The hub may have moved on since; files of two revisions would be mixed.
    """
    source = (destination.unfinished().head or {}).get("source") or {}
    if args.revision or Path(args.source).exists() or source.get("id") != args.source:
        return
    args.revision = source.get("revision")
    progress.note(f"continuing with revision `{args.revision}`, with which this conversion began")


def begin(args: argparse.Namespace) -> tuple[Progress, Destination]:
    """Return what reports and where it goes, checked before the source is looked at."""
    progress, destination = Progress(choose_style(args.json)), Destination(args.dest, args.words)
    destination.check_command()
    destination.check_place()
    keep_revision(args, destination, progress)
    return progress, destination


def plan_command(args: argparse.Namespace) -> None:
    """Print what `run` would do."""
    plan, shards = make_plan(args)
    if args.json:
        print(json.dumps(plan_as_dict(plan)))
    else:
        print_plan(plan, disk_peak(plan, DEFAULT_JOBS) if shards else None)


def run_command(args: argparse.Namespace) -> None:
    """Convert, or say that it is done already."""
    progress, destination = begin(args)
    destination.check_apart_from(Path(args.source))
    plan, shards = make_plan(args)
    if plan.source.args.has_mtp and not plan.with_mtp:
        progress.note(
            "config.json announces an MTP layer but the shards hold none; converting without it"
        )
    if (mtp := plan.recipe.by_role["mtp"]) and plan.with_mtp and mtp.bits < 8:
        progress.note(
            f"the recipe gives the MTP layer {mtp.bits} bits: few drafts will be accepted"
        )
    if destination.is_complete(plan.digest, plan.identity):
        progress.note(f"`{args.dest}` was converted already")
        return
    if args.discard_source:
        destination.check_space(disk_peak(plan, args.jobs))
        shards.discard_into(destination.partial / SHARDS)
    else:
        destination.check_space(plan.nbytes + (shards.missing_bytes() if shards else 0))
    run(plan, destination, args.jobs, progress, shards=shards)
    progress.note(f"`{args.dest}` converted: {size(plan.nbytes)}, `{plan.recipe.name}`")


def mtp_command(args: argparse.Namespace) -> None:
    """Add the sidecar to a folder."""
    progress, destination = begin(args)
    source, _ = open_source(args, only_mtp=True)
    plan = plan_sidecar(source, args.dest)
    destination.check_space(plan.nbytes)
    run(plan, destination, args.jobs, progress, write_config)
    progress.note(f"`{args.dest}` has its MTP layer: {size(plan.nbytes)}")


def verify_command(args: argparse.Namespace) -> int:
    """Print the errors by role and what was found; return 1 when that is anything."""
    for flag in ("full", "importance"):
        if getattr(args, flag) and not args.source:
            raise UserError(f"`--{flag}` needs `--source`", "name the checkpoint of the conversion")
    manifest = verify.open_manifest(args.dest)
    findings, num_derived = [*verify.check_files(args.dest, manifest, args.jobs)], 0
    if not findings:  # damaged headers would only be reported twice
        findings += verify.check_values(args.dest, manifest, args.jobs)
    if args.source and not findings:
        source, _ = open_source(args, only_mtp=manifest["layout"] == "mtp")
        importance = read_importance(args.importance) if args.importance else None
        plan = verify.plan_again(manifest, source, importance)
        findings += verify.check_headers(args.dest, plan)
        if not findings:
            again = [*verify.check_against_source(args.dest, manifest, plan, args.full)]
            findings, num_derived = [text for _, text in again if text], len(again)
    if args.json:
        result = {
            "findings": findings,
            "derived_again": num_derived,
            "roles": manifest["roles"],
        }
        print(json.dumps(result))
        return 1 if findings else 0
    print_errors(manifest["roles"])
    for finding in findings:
        print(in_line(finding), file=sys.stderr)
    again = f"; {num_derived:,} units derived again and equal" if num_derived else ""
    if manifest["layout"] == "mtp":
        again += f"; {MANIFEST} speaks of {' and '.join(sorted(manifest['files']))} alone"
    what = f": {len(findings)} findings" if findings else f" is good{again}"
    print(in_line(f"`{args.dest}`{what}"))
    return 1 if findings else 0


COMMANDS = {
    "plan": plan_command,
    "run": run_command,
    "verify": verify_command,
    "mtp": mtp_command,
}


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(words)
    args.words = words
    if "dest" in args:
        args.dest = Path(args.dest)
    return COMMANDS[args.command](args) or 0


if __name__ == "__main__":
    run_program(main)
