"""A session that a person sees: lines of input, each answered by a turn or a command."""

import sys
import traceback
from pathlib import Path

from mlx_dsv3.conversation.messages import clean
from mlx_dsv3.conversation.session import End, Event, Session
from mlx_dsv3.errors import UserError
from mlx_dsv3.terminal.commands import Leave, run_command
from mlx_dsv3.terminal.kept import Kept
from mlx_dsv3.terminal.screen import Screen

HINT_AT_CTRL_C = "(/exit or Ctrl-D leaves)"


class Chat:
    """A session and the screen that shows it; `model` is the name it is kept by."""

    def __init__(self, session: Session, screen: Screen, model: str = ""):
        self.session, self.screen, self.model = session, screen, model
        self.last: End | None = None  # that has statistics

    def turn(self, text: str) -> End:
        """Answer one message; Ctrl-C ends the reply and keeps what was said."""
        return self.show(self.session.turn(text))

    def show(self, events) -> End:
        """Show a reply as it comes, and return its end."""
        try:
            for event in events:
                try:
                    self.screen.show(event)
                except BaseException as error:  # Ctrl-C gives the end, anything else comes back
                    event = events.throw(error)
                    self.screen.show(event)
            return self.ended(event)
        except Exception:
            self.screen.fail()
            raise

    def ended(self, event: Event) -> End:
        if event.stats is not None:
            self.last = event
        return event


def answer_line(chat: Chat, line: str) -> None:
    """Run a slash command or take a turn; an error is told and the chat continues."""
    try:
        if line.startswith("/"):
            run_command(chat, line)
        else:
            chat.turn(line)
    except Leave:
        raise
    except UserError as error:
        print(error, file=sys.stderr)
    except Exception as error:  # of any kind: loading the model took minutes
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
    from mlx_dsv3.terminal.lines import Lines  # a pipe needs none

    lines = Lines(Kept())
    if chat.screen.stats != "json":
        print("/help lists commands", file=sys.stderr)
    while True:
        try:
            if line := lines.read():
                answer_line(chat, line)
        except KeyboardInterrupt:
            print(HINT_AT_CTRL_C, file=sys.stderr)
        except (EOFError, Leave):
            return
