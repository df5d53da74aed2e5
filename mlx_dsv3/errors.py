"""The one exception that means "the user can fix this".

Command lines catch `UserError` alone, print it and exit with status 2; every other exception is a
bug or an operating system failure and keeps its traceback.
"""

import argparse
import re
import sys
from collections.abc import Callable


class UserError(Exception):
    """One sentence that names what is wrong and where, and a hint with the next command."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        hint = f"\n\nhint: {self.hint}" if self.hint else ""
        return f"error: {self.message}{hint}"


class Parser(argparse.ArgumentParser):
    """Tells a wrong command line as every other mistake: one sentence and a hint."""

    def error(self, message: str):
        message = re.sub(r"^argument (\S+): ", r"`\1`: ", " ".join(message.split()))
        command = self.prog.removeprefix("python ")
        raise UserError(message, f"`python {command} --help` lists the options")


def run_main(main: Callable[[], int | None]) -> int:
    """Run a command line: 2 after a `UserError` (printed to stderr), 130 after Ctrl-C."""
    try:
        return main() or 0
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
