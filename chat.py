"""Chat with a DeepSeek-V3 in the terminal: one question with -p or from a pipe, or a REPL.

The answer goes to stdout and everything else to stderr, so that a pipe holds only the answer.
No tensor code here: arguments, the loop of turns, slash commands and the statistics line.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mlx_dsv3.conversation.messages import Conversation, clean
from mlx_dsv3.decoding.draft_control import MAX_DRAFTS
from mlx_dsv3.errors import Parser, UserError, run_main

DEMO = Path("build/demo-q4")
SLOW_DISK = 0.5e9  # bytes a second: an external or network disk
LEAST_PROBED = 64 << 20  # bytes: fewer say nothing about a disk
HINT_AT_CTRL_C = "(/exit or Ctrl-D leaves)"


@dataclass(frozen=True)
class Setting:
    """A number that an option takes: which are good, the same in words, and a hint."""

    kind: type
    is_good: Callable[[float], bool]
    words: str
    hint: str

    def check(self, value: object, where: str, text: str | None = None) -> float:
        """Return the value, or raise `UserError` with where it was given, and as what text."""
        kinds = (int,) if self.kind is int else (int, float)
        if type(value) not in kinds or not self.is_good(value):
            given = value if text is None else text
            raise UserError(f"{where} is `{given}`; it takes {self.words}", self.hint)
        return value


SETTINGS = {
    "max_tokens": Setting(
        int, lambda n: n >= 1, "a whole number from 1", "leave it out for no limit"
    ),
    # Beyond 1000 all tokens are alike; float32 makes the largest numbers infinite.
    "temp": Setting(
        float,
        lambda x: 0 <= x <= 1000,
        "a number from 0 to 1000",
        "`--temp 0` is greedy, `--temp 0.6` is usual for R1",
    ),
    "top_p": Setting(
        float,
        lambda x: 0 < x <= 1,
        "a number above 0, at most 1",
        "`--top-p 1` keeps every token, `--top-p 0.95` is usual",
    ),
    "top_k": Setting(
        int, lambda n: n >= 0, "a whole number from 0", "`--top-k 0` keeps every token"
    ),
    "min_p": Setting(
        float,
        lambda x: 0 <= x <= 1,
        "a number from 0 to 1",
        "`--min-p 0` keeps every token, `--min-p 0.05` is usual",
    ),
    "repetition_penalty": Setting(
        float, lambda x: 0 < x < float("inf"), "a number above 0", "1 is none, 1.1 is usual"
    ),
    "seed": Setting(int, lambda n: True, "a whole number", "leave it out for seed 0"),
    "expert_memory": Setting(
        float, lambda x: 0 <= x <= 1e6, "GB, a number from 0", "`--plan` shows what experts take"
    ),
    "context": Setting(
        int, lambda n: n >= 1, "a number of tokens from 1", "`--plan` shows what a length takes"
    ),
}
SAMPLING = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
# What a generation_config.json may carry besides for a filter that is off (mlx-lm's and vLLM's).
OFF = {"top_p": 0, "top_k": -1}


def number(name: str) -> Callable[[str], float]:
    """Return the parser of a numeric option."""
    setting, flag = SETTINGS[name], f"`--{name.replace('_', '-')}`"

    def parse(text: str) -> float:
        try:
            value = setting.kind(text)
        except ValueError:
            value = text
        return setting.check(value, flag, text)

    return parse


def one_of(flag: str, *values: str, words: str = "") -> Callable[[str], str]:
    """Return the parser of an option with few values."""

    def parse(text: str) -> str:
        if text not in values:
            raise UserError(f"`{flag}` is `{text}`", f"choose {words or ', '.join(values)}")
        return text

    return parse


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="chat.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    counts = map(str, range(MAX_DRAFTS + 1))
    drafts = one_of("--drafts", "auto", *counts, words=f"auto or 0 to {MAX_DRAFTS}")
    experts, stats = ("auto", "resident", "streamed"), ("line", "json", "off")
    add("model", nargs="?", metavar="MODEL", help=f"MLX folder, or hub id of one; else {DEMO}")
    add("-p", "--prompt", help="answer this and exit; a piped stdin is appended")
    add("-s", "--system", help="system prompt")
    reply = "longest reply; else the context's end"
    add("--max-tokens", type=number("max_tokens"), metavar="N", help=reply)
    add("--temp", type=number("temp"), metavar="X", help="temperature; 0 is greedy")
    add("--top-p", type=number("top_p"), metavar="X")
    add("--top-k", type=number("top_k"), metavar="N")
    add("--min-p", type=number("min_p"), metavar="X")
    penalty = number("repetition_penalty")
    add("--repetition-penalty", type=penalty, metavar="X", help="1 is none")
    add("--seed", type=number("seed"), default=0, metavar="N", help="same seed, same reply")
    where, names = one_of("--experts", *experts), "|".join(experts)
    add("--experts", type=where, default="auto", metavar=names, help="see --plan")
    add("--expert-memory", type=number("expert_memory"), metavar="GB", help="for routed experts")
    add(
        "--context",
        type=number("context"),
        metavar="N",
        help="plan memory for N tokens; else 32,768, or what fits",
    )
    add("--plan", action="store_true", help="print the memory plan and exit")
    add("--drafts", type=drafts, default="auto", metavar="auto|N", help="MTP drafts, 0 to 4")
    add("--trace", metavar="FILE", help="write the experts chosen by each token")
    add("--stats", type=one_of("--stats", *stats), default="line", metavar="|".join(stats))
    add("--trust-remote-code", action="store_true", help="run tokenizer code")
    add("--version", action="version", version=package_version())
    return parser


def package_version() -> str:
    try:
        return version("mlx-dsv3")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "mlx-dsv3 (not installed)"


def find_model(options: argparse.Namespace):
    """Open MODEL by its headers, else the demo model where it was built; nothing is loaded yet."""
    from mlx_dsv3.checkpoint.folder import open_model

    if options.model is None and not DEMO.is_dir():
        raise UserError(
            "no MODEL was given and the demo model is not built",
            "`make demo` builds `build/demo-q4`",
        )
    model = DEMO if options.model is None else options.model
    folder = open_model(model, with_mtp=options.drafts != "0")
    check_before_load(options, has_mtp=bool(folder.sidecar))
    return folder


def check_before_load(options: argparse.Namespace, has_mtp: bool) -> None:
    """Refuse now what would be refused after minutes of loading."""
    if options.drafts not in ("auto", "0") and not has_mtp:
        raise UserError(
            f"`--drafts {options.drafts}` needs the MTP module and the folder has no "
            "`mtp.safetensors`",
            "`python -m convert mtp SOURCE FOLDER` adds it from the original checkpoint",
        )
    if options.trace is not None:
        check_writable(Path(options.trace))


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be opened for writing; it stays as it is."""
    try:
        if path.is_fifo() or path.is_char_device():
            return  # opening and closing would end whoever reads it
        is_new = not os.path.lexists(path)
        path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise UserError(
            f"`{path}` cannot be written: {error.strerror}",
            "give `--trace` a file in a folder that you may write to",
        ) from None


def sampling_defaults(path: Path) -> dict[str, float]:
    """Return what generation_config.json says of sampling, unchecked; greedy where nothing."""
    from mlx_dsv3.config import read_json

    config = read_json(path) if path.is_file() else {}
    samples = bool(config.get("do_sample"))  # temperature 1 is then transformers' own default
    defaults = {"temp": float(samples), "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    for name, key in SAMPLING.items():
        value = config.get(key) if samples else None
        if value is not None and (isinstance(value, bool) or value != OFF.get(name)):
            defaults[name] = value
    return defaults


def make_sampler(options: argparse.Namespace, folder: Path):
    """Take sampling settings from the flags, then from generation_config.json, else greedy."""
    from mlx_dsv3.decoding.sampler import Sampler, repetition_penalties

    path = folder / "generation_config.json"
    settings = sampling_defaults(path)
    for name, key in SAMPLING.items():
        if (given := getattr(options, name)) is not None:
            settings[name] = given
        else:
            SETTINGS[name].check(settings[name], f"`{key}` in `{path}`")
    penalties = repetition_penalties(options.repetition_penalty)
    return Sampler(**settings, seed=options.seed, penalties=penalties)


class Chat:
    """One conversation with a loaded model."""

    def __init__(self, options: argparse.Namespace):
        folder = find_model(options)
        from mlx_dsv3.generate import make_control  # 2 s of imports: a refusal comes before them
        from mlx_dsv3.load import load

        self.options = options
        self.sampler = make_sampler(options, folder.path)
        self.loaded = load(
            folder,
            experts=options.experts,
            expert_memory_gb=options.expert_memory,
            context=options.context,
            trust_remote_code=options.trust_remote_code,
        )
        if options.stats == "line":
            tell_context(self.loaded, options.context)
            if self.loaded.store.is_streamed:
                tell_streaming(self.loaded)
        if options.trace is not None:
            self.loaded.store.trace_to(Path(options.trace))
        self.control = make_control(self.loaded, options.drafts)
        self.renew_state()
        self.conversation = Conversation(self.loaded.tokenizer, options.system)
        self.last_stats = None
        self.last_layers = {}  # layer -> its counters in the last reply

    def renew_state(self) -> None:
        """Begin with empty caches, which the next turn fills with what the conversation holds."""
        from mlx_dsv3.generate import make_state

        self.state = make_state(self.loaded, with_drafts=self.control.fixed != 0)

    def turn(self, text: str) -> None:
        """Answer one message, streaming to stdout.

        Ctrl-C ends the reply and keeps what was said; a turn that fails leaves no trace.
        """
        from mlx_dsv3.generate import stream

        reply, stats, reason, pieces = "", None, None, iter(())
        before = self.layers()
        self.conversation.add_user(text)
        try:
            try:
                pieces = stream(
                    self.loaded,
                    self.conversation.prompt_ids(),
                    max_tokens=self.options.max_tokens,
                    sampler=self.sampler,
                    control=self.control,
                    state=self.state,
                )
                for piece in pieces:
                    reply, stats, reason = reply + piece.text, piece.stats, piece.finish_reason
                    print(piece.text, end="", flush=True)
                    if reason == "length":
                        self.remark("(cut off at the token limit)")
            except KeyboardInterrupt:
                if stats is not None:
                    pieces.close()
                reason = "interrupted"
                self.remark("(stopped)")
            print(flush=True)
            if stats is not None:
                self.last_stats = stats
                self.last_layers = {i: count - before[i] for i, count in self.layers().items()}
                self.print_stats(reason)
        except BaseException as error:  # a second Ctrl-C too
            self.conversation.undo()
            if reply and isinstance(error, Exception):
                print(flush=True)  # the error begins its own line
            raise
        self.conversation.add_assistant(reply)

    def layers(self) -> dict:
        """Return a copy of the counters of the layers that ask for experts, where some stream."""
        store = self.loaded.store
        banks = store.banks if store.is_streamed else {}
        return {i: replace(bank.counters) for i, bank in banks.items() if bank.wants_ids}

    def remark(self, text: str) -> None:
        """Say how a reply ended, beneath it; as JSON the statistics say so."""
        if self.options.stats != "json":
            print(f"\n{text}", end="", file=sys.stderr)

    def print_stats(self, reason: str) -> None:
        """Print the statistics of the reply that ended, as `--stats` says."""
        if self.options.stats == "json":
            values = {"finish_reason": reason, **stats_values(self.last_stats, self.last_layers)}
            print(json.dumps(values), file=sys.stderr)
        elif self.options.stats == "line":
            print(f"[{'; '.join(stats_words(self.last_stats))}]", file=sys.stderr)

    def show_stats(self) -> None:
        """Show what the last reply took, in full."""
        if self.last_stats is None:
            print("no reply yet", file=sys.stderr)
            return
        print("\n".join(stats_words(self.last_stats)), file=sys.stderr)
        drafts = self.last_stats.drafts
        if self.control.fixed != 0:
            for what, counts in (("made", drafts.steps), ("accepted", drafts.lengths)):
                words = ", ".join(f"{i}: {n}" for i, n in enumerate(counts) if n) or "none"
                print(f"steps by drafts {what}: {words}", file=sys.stderr)
            print(f"mean accepted: {drafts.mean_accepted:.2f}", file=sys.stderr)
        for layer, count in self.last_layers.items():
            capacity = self.loaded.store.banks[layer].capacity
            print(f"layer {layer}: {capacity} slots, {experts_words(count)}", file=sys.stderr)

    def clear(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self.conversation.clear()
        print("(cleared)", file=sys.stderr)


def tell_context(loaded, asked: int | None) -> None:
    """Say where memory allows less context than there is by default."""
    from mlx_dsv3.memory import DEFAULT_CONTEXT

    planned, usual = loaded.plan.context, loaded.args.max_position_embeddings
    if asked is None and planned < min(DEFAULT_CONTEXT, usual):
        print(f"memory allows a context of {planned:,} tokens", file=sys.stderr)


def tell_streaming(loaded) -> None:
    """Say how experts are streamed and what the disk allows, measured now."""
    store, remark = loaded.store, loaded.plan.rows()[-1][2]
    speed, nbytes = store.probe()
    print(
        f"experts {remark} in memory; the folder reads at {speed / 1e9:.2f} GB/s, so a token takes "
        f"{store.token_bytes / speed:.2g} s of reading where none of its experts is there",
        file=sys.stderr,
    )
    if speed < SLOW_DISK and nbytes >= LEAST_PROBED:
        print(
            "hint: that is slow for experts; copy the folder to an internal disk, or give "
            "`--expert-memory` more",
            file=sys.stderr,
        )


def experts_words(count) -> str:
    """Return what was asked of the experts, of one layer or of all."""
    return (
        f"{count.hit_rate:.0%} hits, {count.nbytes / 1e9:.2f} GB read ({count.gb_per_s:.1f} GB/s), "
        f"{count.wait_s:.2f} s waited"
    )


def experts_values(count) -> dict:
    """Return the same for `--stats json`."""
    values = asdict(count)
    values["bytes"] = values.pop("nbytes")
    return values | {"hit_rate": count.hit_rate, "gb_per_s": count.gb_per_s}


def stats_values(stats, layers: dict) -> dict:
    """Return the statistics for `--stats json`, what follows from the counts included."""
    values, drafts = asdict(stats), stats.drafts
    values |= {"prompt_tps": stats.prompt_tps, "reply_tps": stats.reply_tps}
    for name in ("acceptance", "mean_accepted", "tokens_per_forward", "speed_up"):
        values["drafts"][name] = getattr(drafts, name)
    if stats.experts is not None:
        each = {str(layer): experts_values(count) for layer, count in layers.items()}
        values["experts"] = experts_values(stats.experts) | {"layers": each}
    return values


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
        words.append(f"experts {experts_words(experts)}")
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
    """Run a slash command or take a turn; an error is told and the chat goes on."""
    word = line.split()[0]
    try:
        if not word.startswith("/"):
            chat.turn(line)
        elif word in COMMANDS:
            COMMANDS[word](chat)
        else:
            print(f"unknown command `{word}`; /help lists them", file=sys.stderr)
    except Leave:
        raise
    except UserError as error:
        print(error, file=sys.stderr)
    except Exception as error:  # of any kind: loading the model took minutes
        chat.renew_state()
        print(told(error), file=sys.stderr)


def told(error: Exception) -> UserError:
    """Return a failure that nobody foresaw in one sentence, with its place."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    reason = next(iter(str(error).splitlines()), "no reason given")
    return UserError(
        f"the turn failed at `{Path(place.filename).name}` line {place.lineno}: "
        f"{type(error).__name__}: {clean(reason)}",
        "the conversation is as it was before the turn; `/clear` begins a new one",
    )


def repl(chat: Chat) -> None:
    """Read lines until /exit or Ctrl-D; Ctrl-C at the prompt says how to leave."""
    from prompt_toolkit import PromptSession

    session = PromptSession(">>> ")
    if chat.options.stats != "json":
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
    from mlx_dsv3.sizes import gigabytes

    plan = plan_memory(
        find_model(options),
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
    is_piped = sys.stdin is not None and not sys.stdin.isatty()
    piped = sys.stdin.buffer.read().decode("utf-8", "replace").strip() if is_piped else ""
    question = "\n\n".join(text for text in (options.prompt, piped) if text)
    chat_is_open = not question and sys.stdin is not None and sys.stdin.isatty()
    if not question and not chat_is_open:
        raise UserError("there is no question: stdin is empty", "`-p TEXT` asks one")
    chat = Chat(options)
    try:
        if chat_is_open:
            repl(chat)
        else:
            chat.turn(question)
    finally:
        chat.loaded.store.close()


if __name__ == "__main__":
    sys.exit(run_main(main))
