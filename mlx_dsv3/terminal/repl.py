"""A session that a person sees: lines of input, each answered by a turn or a command.

Nothing typed ends it but what leaves, and nothing typed is lost: loading the model took minutes.
"""

import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from mlx_dsv3.conversation.messages import clean
from mlx_dsv3.conversation.session import End, Event, Session
from mlx_dsv3.conversation.transcript import text_of
from mlx_dsv3.errors import UserError, discard, unusable
from mlx_dsv3.terminal.commands import Leave, choices, run_command
from mlx_dsv3.terminal.kept import Kept
from mlx_dsv3.terminal.screen import Screen
from mlx_dsv3.terminal.showing import taken_up
from mlx_dsv3.terminal.trace import Trace, check_trace

HINT_AT_CTRL_C = "(/exit or Ctrl-D leaves)"
USUAL = {signal.SIGINT: signal.default_int_handler}
USUAL |= {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
AGAIN_S = 0.5  # within it another Ctrl-C belongs to the first, and would strike where that is told


class Chat:
    """A session and the screen that shows it; `model` is the name it is kept by.

    On a terminal it has `lines` that are typed, and is `kept`. `attached` are texts that go with
    the next message.
    """

    def __init__(self, session: Session, screen: Screen, model: str = ""):
        self.session, self.screen, self.model = session, screen, model
        self.last: End | None = None  # that has statistics
        self.attached: list[str] = []
        self.trace: Trace | None = None
        self.lines, self.kept = None, None

    def turn(self, text: str) -> End:
        """Answer one message; Ctrl-C ends the reply and keeps what was said."""
        texts, self.attached = [text, *self.attached], []
        return self.show(self.session.turn("\n\n".join(texts)), is_new=True)

    def show(self, events, is_new: bool = False) -> End:
        """Show a reply as it comes, and return its end; a question that is new is kept at once."""
        try:
            for event in events:
                try:
                    if is_new:
                        self.keep()
                    is_new = False
                    self.screen.show(event)
                except BaseException as error:  # Ctrl-C gives the end, anything else comes back
                    event = events.throw(error)
                    self.screen.show(event)
            return self.ended(event)
        except BaseException:  # a second Ctrl-C too
            self.screen.fail()
            raise

    def ended(self, event: Event) -> End:
        if event.stats is not None:
            self.last = event
        return event

    def keep(self) -> None:
        """Keep the chat as it stands for `--continue`."""
        if self.kept is not None:
            self.kept.save(self.session, self.model)

    def begin_anew(self) -> None:
        """Before another conversation takes its place: what was kept of this one stays."""
        self.keep()
        self.attached = []
        if self.kept is not None:
            self.kept.begin_anew()

    def trace_to(self, path: Path | None) -> None:
        """Write the experts chosen to a file, or to none."""
        if path is not None:
            check_trace(path)
        if self.trace is not None:
            self.trace.close()
        self.trace = None
        if path is not None:
            self.trace = Trace(self.session.loaded.store, path)


def answer_line(chat: Chat, line: str) -> None:
    """Run a slash command or take a turn; an error is told and the chat continues."""
    try:
        if line.startswith("/") and not line.startswith("//"):
            run_command(chat, line)
        else:
            chat.turn(line[1:] if line.startswith("//") else line)
    except (Leave, BrokenPipeError):  # of stdout: nobody reads the answers
        raise
    except UserError as error:
        print(error, file=sys.stderr)
    except Exception as error:  # of any kind: loading the model took minutes
        is_refused = isinstance(error, OSError) and error.strerror
        print(unusable(error) if is_refused else told(error), file=sys.stderr)
    chat.keep()


def told(error: Exception) -> UserError:
    """Return a failure that nobody foresaw in one sentence, with its place."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    reason = next(iter(str(error).splitlines()), "no reason given")
    return UserError(
        f"the turn failed at `{Path(place.filename).name}` line {place.lineno}: "
        f"{type(error).__name__}: {clean(reason)}",
        "the conversation is as it was before the turn; `/clear` begins a new one",
    )


class Signals:
    """Around the chat: Ctrl-C stops a reply, SIGTERM and SIGHUP a reply and then all of it.

    They strike within an answer alone. Elsewhere one would end the chat, or break the prompt while
    that is made: there it is noted, and the next prompt listens. When the chat is kept, the process
    ends as the system would have ended it; a second SIGTERM does that at once.
    """

    def __init__(self, lines):
        self.lines, self.number, self.before = lines, None, {}
        self.is_answering, self.struck_at = False, -math.inf

    def __enter__(self) -> "Signals":
        for number, usual in USUAL.items():
            if signal.getsignal(number) is usual:  # nohup's is not
                self.before[number] = signal.signal(number, self.strike)
        return self

    def strike(self, number: int, frame) -> None:
        if number != signal.SIGINT:
            self.end(number)
        now = time.monotonic()
        if self.is_answering and now > self.struck_at + AGAIN_S:
            self.struck_at = now
            raise KeyboardInterrupt
        self.lines.is_interrupted |= number == signal.SIGINT

    def end(self, number: int) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)
        if number == signal.SIGHUP:  # the terminal has gone, and would refuse every word
            discard(sys.stdout)
            discard(sys.stderr)
        self.lines.end()

    def __exit__(self, *_) -> None:
        for number, before in self.before.items():
            signal.signal(number, before)
        if self.number is not None:
            os.kill(os.getpid(), self.number)


def repl(chat: Chat, lines=None, first: str = "") -> None:
    """Read lines until /exit or Ctrl-D; Ctrl-C at the prompt says how to leave.

    `lines` may be there already, with a `first` line that was typed while the model was loading.
    """
    from mlx_dsv3.terminal.lines import Lines  # a pipe needs none

    if lines is None:
        lines = Lines(Kept(), choices)
        if chat.screen.stats != "json":
            print("/help lists commands", file=sys.stderr)
    chat.lines, chat.kept = lines, lines.kept
    if chat.session.conversation.messages:
        chat.kept.taken_up = text_of(chat.session, chat.model)
        print(taken_up(chat.session), file=sys.stderr)
    ahead = [first] if first else []
    with Signals(lines) as signals:
        try:
            answer_lines(chat, ahead, signals)
        finally:
            chat.keep()


def answer_lines(chat: Chat, ahead: list[str], signals: Signals) -> None:
    """Answer lines, first those that are there already, until one leaves."""
    while not chat.lines.is_ended:
        try:
            if line := ahead.pop() if ahead else chat.lines.read():
                signals.is_answering = True
                answer_line(chat, line)
                signals.is_answering = False
        except KeyboardInterrupt:
            signals.is_answering = False
            chat.session.conversation.drop_unanswered()
            print(HINT_AT_CTRL_C, file=sys.stderr)
        except (EOFError, Leave):
            chat.lines.is_ended = True
