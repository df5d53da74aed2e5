"""Messages -> text, by the model's chat template, which is a program from outside.

transformers runs it in a sandbox that keeps it from the machine, and not from taking for ever. A
template that fails is told in one sentence, with its file. Knows no ids and no conversation.
"""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_dsv3.errors import UserError

LONGEST_S = 5.0  # V3.1's template takes 0.09 s with its compilation, on 2 busy cores
MOST_BYTES = 1 << 30
MOST_CHARACTERS = 1_000_000  # of a first message, where real ones write some hundred
STATM = Path("/proc/self/statm")  # Linux: the pages of this process
UNSAID = {"MemoryError": "more than a template may take"}
VARIABLES = ("thinking", "enable_thinking")  # DeepSeek-V3.1's, GLM's
OF_THIS_MODEL = "copy the chat template of this model from the hub"


class TooLong(BaseException):
    """Raised out of a template; no exception that jinja or a library would catch."""


def template_file(tokenizer) -> Path:
    """Return the file that holds the chat template."""
    folder = Path(tokenizer.name_or_path)
    file = folder / "chat_template.jinja"
    return file if file.is_file() else folder / "tokenizer_config.json"


def render(tokenizer, messages: list[dict], thinking: bool | None = None) -> str:
    """Return the text of a conversation up to the next reply, or raise `UserError`.

    `thinking` is for a template that has the variable, None for any other.
    """
    if not tokenizer.has_chat_template:
        raise UserError(
            f"`{tokenizer.name_or_path}` has no chat template, as base models have none",
            "`mlx_lm.generate --model FOLDER --prompt TEXT` continues a text; "
            "to chat, convert the chat model",
        )
    try:
        return apply(tokenizer, messages, thinking)
    except Exception as error:  # the template's own, of any kind
        raise refusal(tokenizer, messages, error) from None


def apply(tokenizer, messages: list[dict], thinking: bool | None = None) -> str:
    said = {} if thinking is None else dict.fromkeys(VARIABLES, thinking)
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **said
    )


def default_thinking(tokenizer) -> bool | None:
    """Say whether a model thinks where nobody says so; None where its template has no variable.

    Found by what the template writes. mlx-lm's wrapper gives a variable of its own to every
    tokenizer that has `<think>`: the tokenizer inside it does not.
    """
    question, inner = [{"role": "user", "content": "Hello"}], getattr(tokenizer, "_tokenizer", None)
    try:
        with bounded(tokenizer):
            on, off = apply(tokenizer, question, True), apply(tokenizer, question, False)
            return None if on == off else apply(inner or tokenizer, question) == on
    except UserError:
        raise
    except Exception:  # `render` tells it
        return None


def refusal(tokenizer, messages: list[dict], error: Exception) -> UserError:
    """Say why a template fails; where it is the system prompt's fault, say that."""
    where = f"the chat template in `{template_file(tokenizer)}`"
    kind = type(error).__name__
    reason = " ".join(str(error).split()) or UNSAID.get(kind, "no reason given")
    what = "refuses" if kind == "TemplateError" else f"fails: {kind}"  # its own raise_exception
    hint = OF_THIS_MODEL
    if messages and messages[0]["role"] == "system":
        try:
            apply(tokenizer, messages[1:])
            hint = "leave out `-s`: without a system prompt it works"
        except Exception:
            pass  # the hint stays
    return UserError(f"{where} {what}: {reason}", hint)


@contextmanager
def bounded(tokenizer) -> Iterator[None]:
    """Within it a template may take LONGEST_S and, on Linux, MOST_BYTES more than there are.

    Only the main thread can be stopped. One operation on a huge text cannot, on any system: on
    Linux it meets the limit, elsewhere it takes what memory there is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise TooLong

    handler, timer = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        with limited_memory():
            signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
            yield
    except TooLong:
        where = template_file(tokenizer)
        raise UserError(
            f"the chat template in `{where}` does not end within {LONGEST_S:g} s",
            OF_THIS_MODEL,
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def limited_memory() -> Iterator[None]:
    """Refuse the process more than MOST_BYTES of new memory, where the system can."""
    if not STATM.is_file():  # macOS takes such a limit and does not keep it
        yield
        return
    pages = int(STATM.read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + MOST_BYTES
    if before[0] != resource.RLIM_INFINITY:
        most = min(most, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
