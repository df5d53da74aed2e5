"""What begins with a slash: one dictionary from a name to what it does.

Answers go to stderr. Model code is imported inside functions: while the model loads, names are
already completed and `/help` answers.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mlx_dsv3.conversation.thoughts import split
from mlx_dsv3.conversation.transcript import cache_of, read, save
from mlx_dsv3.errors import UserError, read_text
from mlx_dsv3.terminal.adjust import (
    ADJUSTABLE,
    DRAFTS,
    ON_OFF,
    change,
    nearest,
    settings_lines,
    shown,
)
from mlx_dsv3.terminal.clipboard import code_block, copy
from mlx_dsv3.terminal.names import LAST, file_of, files, first_word, number_of, path_of
from mlx_dsv3.terminal.showing import (
    PARTS,
    brief,
    say,
    show,
    show_context,
    show_plan,
    show_stats,
    taken_up,
)

MOST_READ = 2 << 20  # bytes, 8 for each token of the largest context; 64 MB are counted in minutes
KEYS = """\
  \"""                        begins and ends a message of several lines
  //TEXT                     sends a message that begins with a slash
  Enter, Alt-Enter           sends; begins a new line
  Tab, Ctrl-R, Ctrl-G        completes; searches past lines; opens an editor
  Ctrl-C                     stops the reply and keeps what was said
  Ctrl-D                     leaves"""


class Leave(Exception):
    """Raised by /exit."""


def show_help(chat, text: str) -> None:
    """Show all commands, or one of them."""
    if text:
        command = find(text if text.startswith("/") else f"/{text}")
        say(f"  {command.usage}\n  {command.help}")
        return
    for command in COMMANDS.values():
        say(f"  {command.usage:<27}{command.help}")
    say(KEYS)


def leave(chat, text: str) -> None:
    raise Leave


def clear(chat, text: str) -> None:
    chat.begin_anew()
    chat.session.clear()
    say("(cleared)")


def system(chat, text: str) -> None:
    before = chat.session.conversation.system
    change(chat, "system", text)
    if text:
        say("(the system prompt counts from the next reply on)")
    else:
        say(f"(removed the system prompt: {before})" if before else "(there is no system prompt)")


def set_value(chat, text: str) -> None:
    """Show settings, or change one; ollama's `/set parameter top_k 20` is understood too."""
    name, _, value = text.removeprefix("parameter ").strip().partition(" ")
    name = name.replace("_", "-")
    if not name:
        say("\n".join(settings_lines(chat)))
        return
    if value.strip():
        change(chat, name, value.strip())
    say(f"({name} is {shown(chat, name)})")


def think(chat, text: str) -> None:
    if text:
        change(chat, "think", text)
    say(f"(think is {shown(chat, 'think')})")


def regenerate(chat, text: str) -> None:
    if chat.session.settings["temp"] == 0:
        say("(at temperature 0 the reply will be the same; `/set temp 0.6` varies it)")
    chat.show(chat.session.regenerate())


def retry(chat, text: str) -> None:
    chat.show(chat.session.retry(number_of(text, "/retry N")))


def undo(chat, text: str) -> None:
    questions = [m for m in chat.session.conversation.messages if m["role"] == "user"]
    if not questions:
        raise UserError("there is no question to take back", "type one")
    chat.session.conversation.undo()
    say(f"(took back: {brief(questions[-1]['content'])})")


def read_file(chat, text: str) -> None:
    name, question = first_word(text)
    if not name:
        raise UserError("`/read FILE` lacks the name of a file", "give one")
    content = read_text(path_of(name), MOST_READ)
    tokens = len(chat.session.conversation.encode(content))
    what = f"{name}: {len(content):,} characters, {tokens:,} tokens"
    chat.attached.append(content)
    say(f"({what})" if question else f"({what}; they go with the next message)")
    if question:
        chat.turn(question)


def save_chat(chat, text: str) -> None:
    name, with_cache = re.subn(r"\s*(?:^|(?<=\s))--with-cache(?=\s|$)\s*", "", text)
    path = file_of(name, "/save FILE")
    save(chat.session, path, with_cache=bool(with_cache), model=chat.model)
    say(f"(saved to {path}{', with its cache' * bool(with_cache)})")


def load_chat(chat, text: str) -> None:
    path = file_of(text, "/load FILE")
    transcript, cache = read(path), cache_of(path)
    chat.begin_anew()
    problem = chat.session.restore(transcript, cache if cache.exists() else None)
    if problem:
        say(f"(its cache is not used: {problem})")
    say(taken_up(chat.session))


def copy_answer(chat, text: str) -> None:
    answers = [m for m in chat.session.conversation.messages if m["role"] == "assistant"]
    if not answers:
        raise UserError("there is no answer yet", "type a question")
    knows = chat.session.conversation.knows_thoughts
    answer = answers[-1]["content"]
    answer = split(answer)[1].lstrip("\n") if knows else answer
    what, _, number = text.partition(" ")
    if text and what != "code":
        raise UserError(f"there is no `/copy {text}`", "`/copy` or `/copy code N`")
    if text:
        answer = code_block(answer, number_of(number.strip() or "1", "/copy code N"))
    say(f"(copied {len(answer):,} characters by {copy(answer)})")


def drafts(chat, text: str) -> None:
    if text:
        change(chat, "drafts", text)
    say(f"(drafts is {shown(chat, 'drafts')})")


def trace(chat, text: str) -> None:
    path = None if text == "off" else file_of(text, "/trace FILE")
    chat.trace_to(path)
    say(f"(experts are traced to {path})" if path else "(no trace)")


def edit(chat, text: str) -> None:
    if chat.lines is None:
        raise UserError("there is no line to edit here", "a terminal has one")
    from mlx_dsv3.terminal.lines import edited

    chat.lines.default = edited(text)


def names(text: str) -> Iterable[str]:
    """Return the commands that begin so."""
    return [name for name in COMMANDS if name.startswith(text)]


def settings(text: str) -> Iterable[str]:
    """Return the names of settings, then the words of one."""
    words = text.split()
    if len(words) > 2 or text.endswith(" ") and len(words) == 2:
        return ADJUSTABLE[words[1]].words if words[1] in ADJUSTABLE else ()
    return ADJUSTABLE


@dataclass(frozen=True)
class Command:
    """A function of the chat and the text after the name; `words` are what Tab offers then."""

    run: Callable
    usage: str
    help: str
    words: tuple[str, ...] | Callable[[str], Iterable[str]] = ()


def of(run: Callable, usage: str, help: str, words=()) -> tuple[str, Command]:
    return usage.split()[0], Command(run, usage, help, words)


COMMANDS: dict[str, Command] = dict(
    (
        of(show_help, "/help [COMMAND]", "list the commands, or show one", lambda text: names("/")),
        of(leave, "/exit", "leave (Ctrl-D does too); the chat is kept"),
        of(leave, "/bye", "leave"),
        of(clear, "/clear", "begin a new conversation; the system prompt stays"),
        of(system, "/system [TEXT]", "change the system prompt; without TEXT remove it"),
        of(set_value, "/set [NAME [VALUE]]", "list the settings, show one, or change it", settings),
        of(show, "/show [PART]", f"show {', '.join(PARTS[:-1])} or {PARTS[-1]}", PARTS),
        of(think, "/think [on|off]", "let the model think first, where it can", ON_OFF),
        of(regenerate, "/regen", "answer the last question again"),
        of(undo, "/undo", "take back the last question and its reply"),
        of(retry, "/retry N", "answer question N again and forget what followed"),
        of(read_file, "/read FILE [QUESTION]", "send a text file with a message", files),
        of(save_chat, "/save FILE [--with-cache]", "save the chat; a cache speeds /load", files),
        of(load_chat, "/load FILE", "go on with a saved chat", files),
        of(copy_answer, "/copy [code N]", "copy the last answer, or its code block N", ("code",)),
        of(show_stats, "/stats", "show what the last reply took, in full"),
        of(show_context, "/context", "show what fills the context"),
        of(show_plan, "/plan", "show the memory plan"),
        of(drafts, "/drafts [auto|N]", "draft N tokens at each step, 0 to 4", DRAFTS),
        of(trace, "/trace FILE|off", "write which experts each token chooses", files),
        of(edit, "/editor [TEXT]", "write the next message in an editor"),
    )
)
ALIASES = {"/?": "/help", "/quit": "/exit"}


def find(name: str) -> Command:
    """Return a command, or refuse with the one that was probably meant."""
    command = COMMANDS.get(ALIASES.get(name, name))
    if command is None:
        meant = nearest(name, [*COMMANDS, *ALIASES])
        hint = f"did you mean `{meant}`?" if meant else "`/help` lists the commands;"
        name = brief(name)
        raise UserError(f"unknown command `{name}`", f"{hint} `/{name}` sends it as a message")
    return command


def run_command(chat, line: str) -> None:
    """Run a line that begins with a slash; what is no command is told, and never sent."""
    name, *rest = line.split(None, 1)
    command, text = find(name), rest[0].strip() if rest else ""
    if text and " " not in command.usage:  # a message on `/clear` would clear the chat
        raise UserError(
            f"`{command.usage}` takes nothing after it, and `{brief(text)}` follows",
            "leave that out; `//` in place of `/` sends it as a message",
        )
    command.run(chat, text)


def choices(text: str) -> list[str]:
    """Return by what the last word of a line may be replaced, for Tab."""
    name, *rest = text.lstrip().split(None, 1)[:2] or [""]
    last = LAST.search(text)[0]
    if name == last and not rest:
        return sorted(names(name)) if name.startswith("/") else []
    words = COMMANDS[name].words if name in COMMANDS else ()
    found = words(text) if callable(words) else words
    return [word for word in found if word.startswith(last) or words is files]
