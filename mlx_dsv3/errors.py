"""The one exception that means "the user can fix this".

Command lines catch `UserError` alone, print it and exit with status 2; every other exception is a
bug or an operating system failure and keeps its traceback. A package that is not installed is the
user's to fix as well: `run_main` sees those that `main` imports, `imports` those above it.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# The extra of pyproject.toml that brings an optional package, with what goes with it.
EXTRAS = {
    "mlx": "cpu",
    "torch": "reference",
    "tokenizers": "reference",
    "triton": "triton",
    "matplotlib": "plot",
}
OURS = {"mlx_dsv3", "convert", "chat", "demo"}
STDLIB = sys.stdlib_module_names


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


def missing_package(error: ImportError) -> UserError | None:
    """Say which package to install, or return None where a missing one is not the reason."""
    name = (error.name or "").split(".")[0]
    if "libmlx" in str(error):  # MLX's Linux wheel has its backend in a second package
        name, what = "mlx", "a backend of `mlx`"
    elif isinstance(error, ModuleNotFoundError) and name not in {"", *OURS, *STDLIB}:
        what = f"the package `{name}`"
    else:
        return None
    extra = EXTRAS.get(name)
    how = f"pip install 'mlx-dsv3[{extra}]'`, or in a checkout `pip install '.[{extra}]'"
    return UserError(
        f"this program needs {what}, which is not installed",
        f"`{how if extra else f'pip install {name}'}`",
    )


def tell(error: BaseException) -> int:
    """Print what the user can fix and return the exit status; raise any other error again."""
    if isinstance(error, ImportError):
        error = missing_package(error) or error
    if isinstance(error, UserError):
        print(error, file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print(file=sys.stderr)
        return 130
    raise error


def run_main(main: Callable[[], int | None]) -> int:
    """Run a command line: 2 after a `UserError` or where a package is missing, 130 after Ctrl-C."""
    try:
        return main() or 0
    except (UserError, ImportError, KeyboardInterrupt) as error:
        return tell(error)


@contextmanager
def imports(name: str) -> Iterator[None]:
    """Around the imports at the top of a program: end it as `run_main` would.

    `name` is the module's `__name__`; where it is imported, and not run, errors keep their way.
    """
    try:
        yield
    except (ImportError, KeyboardInterrupt) as error:
        if name != "__main__":
            raise
        sys.exit(tell(error))
