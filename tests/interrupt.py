"""Ctrl-C at a chosen line of our code, as a signal could bring it."""

import sys
from collections.abc import Callable


class Interrupt:
    """Raise KeyboardInterrupt at the n-th line of some files, and again `then` lines later."""

    def __init__(self, files: tuple[str, ...], line: int, then: int | None = None):
        self.files, self.left, self.then = files, line, then

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(self.files):
            return None
        if event == "line":
            self.left -= 1
            if not self.left:
                self.left, self.then = self.then or 0, None
                raise KeyboardInterrupt
        return self

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
