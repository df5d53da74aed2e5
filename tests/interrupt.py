"""Ctrl-C at a chosen line of our code: the signal itself, so that code may defer it."""

import signal
import sys
from collections.abc import Callable


class Interrupt:
    """Send SIGINT at the n-th line of some files; once, because Python then ends the tracing."""

    def __init__(self, files: tuple[str, ...], line: int):
        self.files, self.left = files, line

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(self.files):
            return None
        if event == "line":
            self.left -= 1
            if not self.left:
                signal.raise_signal(signal.SIGINT)
        return self

    @property
    def was_sent(self) -> bool:
        return self.left <= 0

    def run(self, step: Callable[[], None]) -> bool:
        """Run `step`; say whether it was interrupted."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            step()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False
