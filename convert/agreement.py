"""Whether a run may go on with what an earlier one left: the same work, from the same weights.

Every refusal says what differs and how the work that lies there is finished. Knows heads of
journals and nothing of files.
"""

from pathlib import Path

from convert.identity import changed_shards
from convert.journal import Journal
from mlx_dsv3.checkpoint.format import PARTIAL
from mlx_dsv3.checkpoint.unfinished import command_line
from mlx_dsv3.errors import UserError


def place(source: dict) -> str:
    """Say in words where a recorded source lay."""
    if source.get("id"):
        return f"`{source['id']}` at revision `{source.get('revision')}`"
    return "a folder"


def resumption(journal: Journal, **flags: str | None) -> str:
    """Say how the work that lies there goes on: by the command that began, where that is known.

    A command line holds its own recipe; a revision in it may be a branch, which moves on.
    """
    command = "the command that began"
    if journal.command:
        command, flags = f"`{command_line(journal.command)}`", {"revision": flags.get("revision")}
    more = "".join(f" with `--{name} {value}`" for name, value in flags.items() if value)
    return f"{command}{more} resumes it"


def refuse_disagreement(folder: Path, head: dict, journal: Journal) -> None:
    """Refuse a run that differs from the one that began, and say in what it differs.

    Shards of a folder may be other files than at the beginning as long as nothing, or not
    everything, that is done came from such: the run converts again what they gave.
    """
    begun, num_done = journal.head, len(journal.done) + len(journal.unsynced)
    conversion, other_folder = f"`{folder}` holds a conversion begun ", "choose another folder"
    if begun["plan"] != head["plan"] and begun["recipe"] != head["recipe"]:
        raise UserError(
            conversion + f"with recipe `{begun['recipe']}` "
            f"({num_done:,} of {begun['units']:,} units done); this run asks for "
            f"`{head['recipe']}`",
            f"{resumption(journal, recipe=begun['recipe'])}, or {other_folder}",
        )
    if begun["plan"] != head["plan"]:
        raise UserError(
            conversion + "from another source, recipe or layout",
            f"{resumption(journal)}, or {other_folder}",
        )
    for key, word in (("mlx", "MLX"), ("device", "device")):
        if begun[key] != head[key]:
            raise UserError(
                conversion + f"with {word} `{begun[key]}`; this run has `{head[key]}`",
                f"continue as it was begun, or {other_folder}",
            )
    refuse_other_source(folder, head, journal, num_done)


def refuse_other_source(folder: Path, head: dict, journal: Journal, num_done: int) -> None:
    """Refuse weights that cannot be those which the conversion in `folder` has read so far."""
    conversion, other_folder = f"`{folder}` holds a conversion begun ", "choose another folder"
    begin_anew = f"delete `{folder / PARTIAL}` to begin anew, or {other_folder}"
    if journal.is_finishing:  # some files have their final names already
        begin_anew = other_folder
    theirs, ours = journal.head.get("source"), head["source"]
    if theirs is None:
        raise UserError(
            conversion + "by an earlier version, which did not note whose weights it read",
            begin_anew,
        )
    if place(theirs) != place(ours):
        raise UserError(
            conversion + f"from {place(theirs)}; this run reads {place(ours)}",
            f"{resumption(journal, revision=theirs.get('revision'))}, or {other_folder}",
        )
    changed = changed_shards(journal.head, head)
    if theirs == ours and (journal.is_finishing or not changed):  # no shard is read any more
        return
    if not journal.is_finishing and (not num_done or 0 < len(changed) < len(head["files"])):
        return
    if theirs != ours:
        raise UserError(
            conversion + "from another source: its headers are these, its weights are not",
            f"repeat with that source, or {begin_anew}",
        )
    raise UserError(
        f"`{changed[0]}` is not the file that the conversion in `{folder}` has read: "
        "its size or time differs",
        f"put that one back with its time (`cp -p`), or {begin_anew}",
    )
