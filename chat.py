"""Chat with a DeepSeek-V3 in the terminal: one question with -p or from a pipe, or a REPL.

Options and `main` alone: what is typed and shown is in `mlx_dsv3/terminal`, the conversation in
`mlx_dsv3/conversation`. What loads the model is imported where it is needed, after every refusal.
"""

import argparse
import sys
from contextlib import ExitStack
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mlx_dsv3.errors import (
    INTERRUPTED,
    UserError,
    imports,
    nothing_to_keep,
    run_program,
)

with imports(__name__):
    from mlx_dsv3.conversation.settings import DEFAULTS, chat_settings
    from mlx_dsv3.decoding.draft_control import fixed_drafts
    from mlx_dsv3.options import SETTINGS, Parser, first_line, number
    from mlx_dsv3.terminal.trace import check_trace

DEMO = Path("build/demo-q4")
EXPERTS, STATS = ("auto", "resident", "streamed"), ("line", "json", "off")


def drafts(text: str) -> str:
    """Return the text of `--drafts`, once it is known to be good."""
    fixed_drafts(text)
    return text


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="chat.py", description=first_line(__doc__))
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help=f"MLX folder, or hub id of one; else {DEMO}")
    add("-p", "--prompt", help="answer this and exit; a piped stdin is appended")
    add("-s", "--system", help="system prompt")
    add_sampling(add)
    memory = "memory for routed experts; else what fits"
    add_choice(add, "--experts", EXPERTS, "routed experts in memory, or read from disk", "auto")
    add("--expert-memory", type=number("expert_memory"), metavar="GB", help=memory)
    context = "plan memory for N tokens; else 32,768, or what fits"
    add("--context", type=number("context"), metavar="N", help=context)
    add("--plan", action="store_true", help="print the memory plan and exit")
    tokens = "tokens to draft by MTP at each step, 0 to 4"
    add("--drafts", type=drafts, default="auto", metavar="auto|N", help=tokens)
    add("--trace", metavar="FILE", help="write which experts each token chooses")
    add_choice(add, "--stats", STATS, "figures of a reply, on stderr; off with --json")
    add("--json", action="store_true", help="print each reply as one JSON object")
    add("--raw", action="store_true", help="print replies without colour, bold or dim")
    add_choice(add, "--think", ("on", "off"), "think first, where a model can")
    add("--hide-thinking", action="store_true", help="show how long it thought, not what")
    last = "take up the last chat, of MODEL if given"
    add("-c", "--continue", action="store_true", dest="resume", help=last)
    add("--trust-remote-code", action="store_true", help="run MODEL's tokenizer where it is code")
    add("--version", action="version", version=package_version())
    return parser


def add_choice(add, name: str, choices: tuple[str, ...], help: str, default=None) -> None:
    add(name, choices=choices, metavar="|".join(choices), help=help, default=default)


def add_sampling(add) -> None:
    """Add what `/set` can change too."""
    texts = {
        "max_tokens": "longest reply; else the context's end",
        "temp": "temperature, 0 is greedy; else as MODEL says",
        "top_p": "keep the likeliest that make X; 1 is all",
        "top_k": "keep the N likeliest; 0 is all",
        "min_p": "keep those at least X times as likely as the likeliest; 0 is all",
        "repetition_penalty": "1 is none",
        "seed": "same seed, same reply; else 0",
    }
    for name, text in texts.items():
        letter = "N" if SETTINGS[name].kind is int else "X"
        add(f"--{name.replace('_', '-')}", type=number(name), metavar=letter, help=text)


def package_version() -> str:
    try:
        return version("mlx-dsv3")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "mlx-dsv3 (not installed)"


def find_model(options: argparse.Namespace):
    """Open MODEL by its headers, else the demo model where it was built; nothing is loaded yet.

    Refuses here what would else be refused after minutes of loading.
    """
    from mlx_dsv3.checkpoint.folder import open_model

    if options.model is None and not DEMO.is_dir():
        raise UserError(
            "no MODEL was given and the demo model is not built",
            "`make demo` builds `build/demo-q4`",
        )
    model = DEMO if options.model is None else options.model
    folder = open_model(model, with_mtp=options.drafts != "0")
    fixed_drafts(options.drafts, has_mtp=bool(folder.sidecar))
    if options.trace is not None:
        check_trace(Path(options.trace))
    return folder


def memory_options(options: argparse.Namespace) -> dict:
    """Return what the memory plan depends on."""
    return {
        "experts": options.experts,
        "expert_memory_gb": options.expert_memory,
        "context": options.context,
    }


def show_plan(options: argparse.Namespace) -> None:
    """Print what the model would take in memory, from headers alone."""
    folder = find_model(options)
    from mlx_dsv3.load import plan_memory
    from mlx_dsv3.terminal.start import print_plan

    print_plan(plan_memory(folder, **memory_options(options)))


def open_chat(options: argparse.Namespace, loading=None):
    """Load the model and begin a chat with it, or take up the last one.

    What can be refused at once is refused before `loading` shows anything: a bar, or the first
    prompt.
    """
    transcript = last_chat(options) if options.resume else None
    folder = find_model(options)
    settings = chat_settings(folder.path, vars(options))
    from mlx_dsv3.conversation.messages import check_template
    from mlx_dsv3.load import load, plan_memory
    from mlx_dsv3.terminal.progress import LoadBar
    from mlx_dsv3.terminal.repl import Chat
    from mlx_dsv3.terminal.screen import Screen
    from mlx_dsv3.terminal.start import start_lines

    plan, screen = plan_memory(folder, **memory_options(options)), Screen(**screen_options(options))
    check = partial(check_template, system=options.system, thinking=thinking(options))
    loading = loading or LoadBar()
    loading.is_early = folder.repo is None  # a fetch has bars of its own
    with loading:
        loaded = load(
            folder,
            plan=plan,
            trust_remote_code=options.trust_remote_code,
            check_tokenizer=check,
            progress=loading.progress,
        )
        session = open_session(loaded, options, settings, transcript)
        said = start_lines(loaded, options.context)  # measures the disk
    if screen.stats == "line":
        print("".join(f"{line}\n" for line in loading.long_load() + said), end="", file=sys.stderr)
    return Chat(session, screen, model=model_name(options.model or DEMO))


def open_session(loaded, options: argparse.Namespace, settings: dict, transcript):
    """Begin a conversation, or go on with a kept one; what the command line says goes before it."""
    from mlx_dsv3.conversation.session import Session

    session = Session(loaded, system=options.system, settings=settings, drafts=options.drafts)
    if transcript is not None:
        transcript.settings |= given(options)
        if options.system is not None:
            transcript.system = options.system
        if options.drafts != "auto":
            transcript.drafts = options.drafts
        session.restore(transcript)
    if options.think is not None:
        session.set_thinking(thinking(options))
    return session


def thinking(options: argparse.Namespace) -> bool | None:
    """Return what `--think` says, None for nothing."""
    return None if options.think is None else options.think == "on"


def last_chat(options: argparse.Namespace):
    """Return the newest chat that was kept, which names the model where none is given."""
    from mlx_dsv3.conversation.transcript import read
    from mlx_dsv3.terminal.kept import newest

    transcript = read(newest(options.model and model_name(options.model)))
    options.model = options.model or transcript.model or None
    return transcript


def model_name(model: str | Path) -> str:
    """Return by what name a chat's model is kept: a folder's from wherever, or the hub's."""
    return str(Path(model).resolve()) if Path(model).is_dir() else str(model)


def given(options: argparse.Namespace) -> dict:
    """Return the settings that the command line has, which go before those of a kept chat."""
    return {
        name: value
        for name, value in vars(options).items()
        if name in DEFAULTS and value is not None
    }


def screen_options(options: argparse.Namespace) -> dict:
    """Return what replies look like."""
    return {
        "stats": options.stats or ("off" if options.json else "line"),
        "raw": options.raw,
        "hide_thinking": options.hide_thinking,
        "as_json": options.json,
    }


def first_prompt(options: argparse.Namespace):
    """Return what shows a prompt while the model loads, or a bar where no such prompt can be."""
    from mlx_dsv3.terminal.first import FirstPrompt, can_show
    from mlx_dsv3.terminal.progress import LoadBar

    return FirstPrompt(options.stats == "json") if can_show() else LoadBar()


def read_question(prompt: str | None) -> str | None:
    """Return what -p and a pipe ask, None where a person sits at the terminal."""
    is_piped = not sys.stdin.isatty()
    piped = sys.stdin.buffer.read().decode("utf-8", "replace").strip() if is_piped else ""
    if prompt is None and not is_piped:
        return None
    question = "\n\n".join(text for text in (prompt or "", piped) if text.strip())
    if not question:
        where = "stdin" if prompt is None else "`-p`"
        raise UserError(f"there is no question: {where} is empty", "`-p TEXT` asks one")
    return question


def main(argv: list[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    if argv is None and not options.trust_remote_code:
        # This process is the chat's alone. Where torch is installed transformers would import it,
        # 1.1 of 2.2 s, and only a repository's own code could need it.
        sys.modules.setdefault("torch", None)
    if options.plan:
        show_plan(options)
        return 0
    question = read_question(options.prompt)
    with nothing_to_keep():
        loading = first_prompt(options) if question is None else None
        chat = open_chat(options, loading)

    with ExitStack() as leaving:
        leaving.callback(chat.session.loaded.close)
        if options.trace is not None:
            chat.trace_to(Path(options.trace))
        leaving.callback(chat.trace_to, None)
        if question is None:
            from mlx_dsv3.terminal.repl import repl

            repl(chat, loading.typed, loading.line)
            with nothing_to_keep():  # a Ctrl-C within a finalizer is a traceback
                leaving.close()
            return 0
        return INTERRUPTED if chat.turn(question).finish_reason == "interrupted" else 0


if __name__ == "__main__":
    run_program(main)
