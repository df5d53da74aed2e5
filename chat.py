"""Chat with a DeepSeek-V3 in the terminal: one question with -p or from a pipe, or a REPL.

The answer goes to stdout and everything else to stderr, so that a pipe holds only the answer.
No tensor code here: arguments, the loop of turns, slash commands and the statistics line.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mlx_dsv3.errors import UserError, run_main

DEMO = Path("build/demo-q4")
SLOW_DISK = 0.5e9  # bytes a second: an external or network disk
HINT_AT_CTRL_C = "(/exit or Ctrl-D leaves)"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chat.py", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"MLX folder; else {DEMO}")
    parser.add_argument("-p", "--prompt", help="answer this and exit; a piped stdin is appended")
    parser.add_argument("-s", "--system", help="system prompt")
    parser.add_argument("--max-tokens", type=int, help="longest reply; else the context's end")
    parser.add_argument("--temp", type=float, help="temperature; 0 is greedy")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--repetition-penalty", type=float, metavar="X", help="1 is none")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same reply")
    parser.add_argument(
        "--experts", choices=("auto", "resident", "streamed"), default="auto", help="see --plan"
    )
    parser.add_argument("--expert-memory", type=float, metavar="GB", help="for routed experts")
    parser.add_argument("--context", type=int, metavar="N", help="plan memory for N tokens")
    parser.add_argument("--plan", action="store_true", help="print the memory plan and exit")
    parser.add_argument("--drafts", default="auto", metavar="auto|N", help="MTP drafts, 0 to 4")
    parser.add_argument("--trace", metavar="FILE", help="write the experts chosen by each token")
    parser.add_argument("--stats", choices=("line", "json", "off"), default="line")
    parser.add_argument("--trust-remote-code", action="store_true", help="run tokenizer code")
    parser.add_argument("--version", action="version", version=package_version())
    return parser


def package_version() -> str:
    try:
        return version("mlx-dsv3")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "mlx-dsv3 (not installed)"


def find_model(name: str | None) -> Path:
    """Return the folder to load: the argument, else the demo model where it was built."""
    if name is not None:
        return Path(name)
    if DEMO.is_dir():
        return DEMO
    raise UserError(
        "no MODEL was given and the demo model is not built", "`make demo` builds `build/demo-q4`"
    )


def make_sampler(options: argparse.Namespace, folder: Path):
    """Take sampling settings from the flags, then from generation_config.json, else greedy."""
    from mlx_dsv3.config import read_json
    from mlx_dsv3.sampler import Sampler, repetition_penalties

    path = folder / "generation_config.json"
    config = read_json(path) if path.is_file() else {}
    defaults = {"temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    if config.get("do_sample"):
        names = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
        defaults = {name: config.get(key, defaults[name]) for name, key in names.items()}
    given = {name: getattr(options, name) for name in defaults}
    settings = {name: defaults[name] if given[name] is None else given[name] for name in defaults}
    if settings["temp"] < 0:
        raise UserError(f"`--temp` is {settings['temp']}", "0 is greedy, 0.6 is usual for R1")
    penalty = options.repetition_penalty
    if penalty is not None and penalty <= 0:
        raise UserError(f"`--repetition-penalty` is {penalty}", "1 is none, 1.1 is usual")
    return Sampler(**settings, seed=options.seed, penalties=repetition_penalties(penalty))


class Chat:
    """One conversation with a loaded model."""

    def __init__(self, options: argparse.Namespace):
        from mlx_dsv3.conversation import Conversation
        from mlx_dsv3.generate import make_gate, make_state
        from mlx_dsv3.load import load

        folder = find_model(options.model)
        self.options = options
        self.sampler = make_sampler(options, folder)
        self.loaded = load(
            folder,
            experts=options.experts,
            expert_memory_gb=options.expert_memory,
            context=options.context,
            trust_remote_code=options.trust_remote_code,
        )
        if self.loaded.store.is_streamed:
            tell_streaming(self.loaded)
        if options.trace:
            self.loaded.store.trace_to(Path(options.trace))
        self.gate = make_gate(self.loaded, options.drafts)
        self.state = make_state(self.loaded, with_drafts=self.gate.fixed != 0)
        self.conversation = Conversation(self.loaded.tokenizer, options.system)
        self.last_stats = None

    def turn(self, text: str) -> None:
        """Answer one message, streaming to stdout.

        Ctrl-C ends the reply and keeps what was said; a turn that fails leaves no trace.
        """
        from mlx_dsv3.generate import stream

        self.conversation.add_user(text)
        reply, stats = "", None
        try:
            pieces = stream(
                self.loaded,
                self.conversation.prompt_ids(),
                max_tokens=self.options.max_tokens,
                sampler=self.sampler,
                drafts=self.gate,
                state=self.state,
            )
            for piece in pieces:
                reply, stats = reply + piece.text, piece.stats
                print(piece.text, end="", flush=True)
                if piece.finish_reason == "length":
                    print("\n(cut off at the token limit)", end="", file=sys.stderr)
        except KeyboardInterrupt:
            pieces.close()
            print("\n(stopped)", end="", file=sys.stderr)
        except BaseException:
            self.conversation.undo()
            raise
        self.conversation.add_assistant(reply)
        print(flush=True)
        if stats is not None:
            self.print_stats(stats)

    def print_stats(self, stats) -> None:
        self.last_stats = stats
        if self.options.stats == "json":
            print(json.dumps(asdict(stats)), file=sys.stderr)
        elif self.options.stats == "line":
            print(f"[{'; '.join(stats_words(stats))}]", file=sys.stderr)

    def show_stats(self) -> None:
        """Show what the last reply took, in full."""
        if self.last_stats is None:
            print("no reply yet", file=sys.stderr)
            return
        print("\n".join(stats_words(self.last_stats)), file=sys.stderr)
        drafts = self.last_stats.drafts
        if drafts.draft_steps:
            for what, counts in (("made", drafts.steps), ("accepted", drafts.lengths)):
                words = ", ".join(f"{i}: {n}" for i, n in enumerate(counts) if n)
                print(f"steps by drafts {what}: {words}", file=sys.stderr)
            print(f"mean accepted: {drafts.mean_accepted:.2f}", file=sys.stderr)
        for layer, bank in self.loaded.store.banks.items():
            if not bank.is_resident:
                count = bank.counters
                print(
                    f"layer {layer}: {bank.capacity} slots, {count.hit_rate:.0%} hits, "
                    f"{count.nbytes / 1e9:.2f} GB read, {count.wait_s:.2f} s waited",
                    file=sys.stderr,
                )

    def clear(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self.conversation.clear()
        print("(cleared)", file=sys.stderr)


def tell_streaming(loaded) -> None:
    """Say how experts are streamed and what the disk allows, measured now."""
    store, remark = loaded.store, loaded.plan.rows()[-1][2]
    speed = store.probe()
    print(
        f"experts {remark} in memory; the folder reads at {speed / 1e9:.2f} GB/s, so a token takes "
        f"{store.token_bytes / speed:.2g} s of reading where none of its experts is there",
        file=sys.stderr,
    )
    if speed < SLOW_DISK:
        print(
            "hint: that is slow for experts; copy the folder to an internal disk, or give "
            "`--expert-memory` more",
            file=sys.stderr,
        )


def stats_words(stats) -> list[str]:
    """Return the parts of the statistics line."""
    words = [
        f"prompt {stats.prompt_tokens} tokens ({stats.reused_tokens} reused), "
        f"{stats.prompt_tps:.1f}/s",
        f"reply {stats.reply_tokens} tokens, {stats.reply_tps:.1f}/s",
    ]
    drafts = stats.drafts
    if drafts.draft_steps:
        shares = " ".join(f"{share:.0%}" for share in drafts.acceptance)
        text = f"drafts accepted {shares}, {drafts.tokens_per_forward:.2f} tokens a step"
        if drafts.speed_up is not None:
            text += f", {drafts.speed_up:.2f} x plain"
        words.append(text)
    if (experts := stats.experts) is not None:
        rate = experts.nbytes / max(experts.wait_s, 1e-9) / 1e9
        words.append(
            f"experts {experts.hit_rate:.0%} hits, {experts.nbytes / 1e9:.2f} GB read, "
            f"{experts.wait_s:.2f} s waited ({rate:.1f} GB/s)"
        )
    words.append(f"peak {stats.peak_bytes / 1e9:.2f} GB")
    return words


class Leave(Exception):
    """Raised by /exit."""


def leave(chat: Chat) -> None:
    """Leave the chat (Ctrl-D does too)."""
    raise Leave


def show_help(chat: Chat) -> None:
    """Show these commands."""
    for name, command in COMMANDS.items():
        print(f"  {name:<8} {command.__doc__.splitlines()[0]}", file=sys.stderr)
    print("  Ctrl-C   Stop the reply and keep what was said.", file=sys.stderr)


COMMANDS: dict[str, Callable[[Chat], None]] = {
    "/help": show_help,
    "/clear": Chat.clear,
    "/stats": Chat.show_stats,
    "/exit": leave,
}


def answer_line(chat: Chat, line: str) -> None:
    """Run a slash command or take a turn; an error in a turn is told and the chat goes on."""
    word = line.split()[0]
    if word.startswith("/"):
        if word in COMMANDS:
            COMMANDS[word](chat)
        else:
            print(f"unknown command `{word}`; /help lists them", file=sys.stderr)
        return
    try:
        chat.turn(line)
    except UserError as error:
        print(error, file=sys.stderr)


def repl(chat: Chat) -> None:
    """Read lines until /exit or Ctrl-D; Ctrl-C at the prompt says how to leave."""
    from prompt_toolkit import PromptSession

    session = PromptSession(">>> ")
    print("/help lists commands", file=sys.stderr)
    while True:
        try:
            line = session.prompt().strip()
            if line:
                answer_line(chat, line)
        except KeyboardInterrupt:
            print(HINT_AT_CTRL_C, file=sys.stderr)
        except (EOFError, Leave):
            return


def print_plan(options: argparse.Namespace) -> None:
    """Print what the model would take in memory, from headers alone."""
    from mlx_dsv3.load import plan_memory
    from mlx_dsv3.memory import gigabytes

    plan = plan_memory(
        find_model(options.model),
        experts=options.experts,
        expert_memory_gb=options.expert_memory,
        context=options.context,
    )
    for what, nbytes, remark in plan.rows():
        print(f"{what:<14}{gigabytes(nbytes):>12}   {remark}")
    print(f"{'together':<14}{gigabytes(plan.total_bytes):>12}")
    print(f"{'allowed':<14}{gigabytes(plan.limit_bytes):>12}   on this machine, now")


def main(argv: list[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    if options.plan:
        print_plan(options)
        return
    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().strip()
    question = "\n\n".join(text for text in (options.prompt, piped) if text)
    chat_is_open = not question and sys.stdin is not None and sys.stdin.isatty()
    if not question and not chat_is_open:
        raise UserError("there is no question: stdin is empty", "`-p TEXT` asks one")
    if options.max_tokens is not None and options.max_tokens < 1:
        raise UserError(f"`--max-tokens` is {options.max_tokens}", "leave it out for no limit")
    chat = Chat(options)
    if chat_is_open:
        repl(chat)
    else:
        chat.turn(question)


def entry() -> None:
    sys.exit(run_main(main))


if __name__ == "__main__":
    entry()
