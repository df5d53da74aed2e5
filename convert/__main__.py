"""Command line of the converter: plan, run, verify, mtp.

Parses, calls, prints. `UserError` ends with status 2, a failed verification with 1, Ctrl-C with
130 and a folder that the same command completes.
"""

import argparse
import json
import sys
from pathlib import Path

from convert import recipe as recipes
from convert import verify
from convert.destination import Destination
from convert.plan import Plan, build
from convert.progress import Progress, choose_style, size
from convert.report import plan_record, print_errors, print_plan
from convert.run import run
from convert.sidecar import open_mtp_source, plan_sidecar, write_config
from convert.source import open_folder
from mlx_dsv3.errors import UserError, run_main


def parser() -> argparse.ArgumentParser:
    """Return the parser; all defaults live here."""
    root = argparse.ArgumentParser(
        prog="python -m convert", description="Convert DeepSeek-V3 checkpoints to MLX folders."
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", help="show what `run` would write; writes nothing")
    convert = commands.add_parser("run", help="convert SOURCE into DEST; repeat it to resume")
    check = commands.add_parser("verify", help="read a converted folder back")
    mtp = commands.add_parser("mtp", help="add the MTP layer to a folder converted elsewhere")
    for command in (plan, convert, mtp):
        command.add_argument("source", metavar="SOURCE", type=Path, help="folder of a checkpoint")
    for command in (convert, check, mtp):
        command.add_argument("dest", metavar="DEST", type=Path, help="folder of the result")
        # Each job holds about 0.3 GB at V3's shapes; two keep a disk and two cores busy.
        command.add_argument("--jobs", type=int, default=2, help="threads for each stage")
    for command in (plan, convert):
        command.add_argument("--recipe", help=f"{', '.join(recipes.RECIPES)}, or a JSON file")
        command.add_argument("--q-bits", type=int)
        command.add_argument("--q-group-size", type=int)
        command.add_argument("--q-mode", choices=list(recipes.ALLOWED))
        command.add_argument(
            "--stacked", action="store_true", help="stack routed experts, for other engines"
        )
    check.add_argument("--source", type=Path, help="derive a sample again from this checkpoint")
    check.add_argument("--full", action="store_true", help="with --source: derive everything")
    for command in (plan, convert, check, mtp):
        command.add_argument("--json", action="store_true", help="JSON for scripts")
    return root


def make_plan(args: argparse.Namespace) -> Plan:
    recipe = recipes.choose(args.recipe, args.q_bits, args.q_group_size, args.q_mode)
    return build(open_folder(args.source), recipe, "stacked" if args.stacked else "records")


def plan_command(args: argparse.Namespace) -> None:
    """Print what `run` would do."""
    plan = make_plan(args)
    if args.json:
        print(json.dumps(plan_record(plan)))
    else:
        print_plan(plan)


def run_command(args: argparse.Namespace) -> None:
    """Convert, or say that it is done already."""
    progress = Progress(choose_style(args.json))
    plan, destination = make_plan(args), Destination(args.dest)
    if plan.source.args.has_mtp and not plan.with_mtp:
        progress.note("config.json announces an MTP layer and the shards hold none: going without")
    if destination.is_complete(plan.digest):
        progress.note(f"`{args.dest}` was converted already")
        return
    run(plan, destination, args.jobs, progress)
    progress.note(f"`{args.dest}` converted: {size(plan.nbytes)}, `{plan.recipe.name}`")


def mtp_command(args: argparse.Namespace) -> None:
    """Add the sidecar to a folder."""
    progress = Progress(choose_style(args.json))
    plan = plan_sidecar(open_mtp_source(args.source), args.dest)
    run(plan, Destination(args.dest), args.jobs, progress, write_config)
    progress.note(f"`{args.dest}` has its MTP layer: {size(plan.nbytes)}")


def verify_command(args: argparse.Namespace) -> int:
    """Print the errors by role and what was found; return 1 when that is anything."""
    if args.full and not args.source:
        raise UserError("`--full` needs `--source`", "name the checkpoint of the conversion")
    record = verify.open_record(args.dest)
    findings, num_derived = [*verify.check_files(args.dest, record, args.jobs)], 0
    if not findings:  # damaged headers would only be reported twice
        findings += verify.check_values(args.dest, args.jobs)
    if args.source and not findings:
        is_sidecar = record["layout"] == "mtp"
        source = open_mtp_source(args.source) if is_sidecar else open_folder(args.source)
        plan = verify.plan_again(record, source)
        again = [*verify.check_against_source(args.dest, record, plan, args.full)]
        findings, num_derived = [text for _, text in again if text], len(again)
    if args.json:
        result = {"findings": findings, "derived_again": num_derived, "roles": record.get("roles")}
        print(json.dumps(result))
        return 1 if findings else 0
    print_errors(record.get("roles", {}))
    for finding in findings:
        print(finding, file=sys.stderr)
    again = f"; {num_derived:,} pieces derived again and equal" if num_derived else ""
    print(
        f"`{args.dest}`: {len(findings)} findings" if findings else f"`{args.dest}` is good{again}"
    )
    return 1 if findings else 0


COMMANDS = {
    "plan": plan_command,
    "run": run_command,
    "verify": verify_command,
    "mtp": mtp_command,
}


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if getattr(args, "jobs", 1) < 1:
        raise UserError(f"`--jobs` is {args.jobs}; one thread is the least", "leave `--jobs` away")
    return COMMANDS[args.command](args) or 0


def entry() -> None:
    """Run as a console script."""
    sys.exit(run_main(main))


if __name__ == "__main__":
    entry()
