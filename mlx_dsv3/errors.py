"""What the user can fix, told in one sentence; and the one way out of every program.

A `UserError` means "the user can fix this". `run_program` ends a program with the exit statuses
of docs/commands.md, however it ends: 2 after a `UserError`, a missing package or a file that the
system refuses, 130 after Ctrl-C, 141 when the reader of a pipe went away. Every other exception is
a bug and keeps its traceback. Ctrl-C counts from the first import on, so that little is imported
here.
"""

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

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
ELSEWHERE = (ValueError, RuntimeError)  # how other packages tell what the system refused them
INTERRUPTED, READER_GONE = 128 + signal.SIGINT, 141  # 128 + SIGPIPE, which Windows lacks

# Control characters but newline and tab, the separators and directions of Unicode: what moves a
# terminal's cursor, sets its title or clipboard, or lets a line look like another.
INVISIBLE = {*range(32), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F)}
INVISIBLE = INVISIBLE.union(range(0x2066, 0x206A)) - {ord("\n"), ord("\t")}
ESCAPES = {n: f"\\x{n:02x}" if n < 256 else f"\\u{n:04x}" for n in INVISIBLE}
MOST_TEXT_BYTES = 64 << 20


def visible(text: str) -> str:
    """Escape what would drive a terminal, in text that comes from outside."""
    return text.translate(ESCAPES)


def in_line(text: str) -> str:
    """Return `visible` text on one line: a file's name may hold a sentence of its own."""
    return visible(text).replace("\n", "\\n")


class UserError(Exception):
    """One sentence that names what is wrong and where, and a hint with the next command."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        message, hint = map(in_line, (self.message, self.hint))
        return f"error: {message}" + (f"\n\nhint: {hint}" if hint else "")


def read_text(path: str | os.PathLike, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """Return the text of a file in UTF-8; raise `UserError`, with its name, where it is none.

    Takes files alone: a pipe may wait for ever.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"`{path}` is not a file", "give the name of a file")
        with open(path, "rb") as file:
            data = file.read(most_bytes + 1)
    except OSError as error:
        raise unusable(error) from None
    if len(data) > most_bytes:
        raise UserError(
            f"`{path}` is too large: {os.path.getsize(path):,} bytes; "
            f"{most_bytes:,} is the most that is read",
            "check that this is the right file",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"`{path}` is not text in UTF-8: byte {error.start:,} is {data[error.start]:#04x}",
            "`iconv -t UTF-8` changes the encoding of a text; a damaged file must be fetched again",
        ) from None


def check_writable(path: str | os.PathLike) -> None:
    """Raise `OSError`, before minutes of work, for what takes no writing; a file stays as it is."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        return  # a pipe: opening and closing would end whoever reads it
    is_new = not os.path.lexists(path)
    open(path, "a").close()
    if is_new:
        os.unlink(path)


HINTS = {
    errno.ENOENT: "check the spelling",
    errno.ENOSPC: "make room on that disk, then repeat the same command",
    errno.EDQUOT: "make room on that disk, then repeat the same command",
    errno.EIO: "the disk fails; check it, then repeat the same command",
    errno.EMFILE: "`ulimit -n 4096` allows more open files",
}


def unusable(error: OSError) -> UserError:
    """Return in one sentence what the system refused, with the file's name."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None]
    what = " and ".join(f"`{name}`" for name in names) or "a file or the output"
    reason = error.strerror[:1].lower() + error.strerror[1:]
    hint = HINTS.get(error.errno, "check the path and who may use it, then repeat the same command")
    return UserError(f"{what} cannot be used: {reason}", hint)


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
    alone = "'mlx[cpu]'" if name == "mlx" and sys.platform == "linux" else name
    hint = f"`pip install {alone}`"
    if extra:
        hint += f", or in a checkout `pip install '.[{extra}]'`"
    return UserError(f"this program needs {what}, which is not installed", hint)


def refused_elsewhere(error: Exception) -> UserError | None:
    """Say what the system refused to another package, which does not name it as an OSError."""
    words = str(error)
    if isinstance(error, ValueError) and "raise maximum limit" in words:  # while mlx-lm is imported
        return UserError(
            "the system allows this process fewer than the 4,096 open files that mlx-lm asks for",
            "`ulimit -Hn` shows the hard limit, which a container is given where it is started",
        )
    if isinstance(error, RuntimeError) and words.startswith("filesystem error"):  # MLX, on a CPU
        return UserError(
            f"the folder of compiled kernels cannot be used: {words.partition(': ')[2]}",
            "set TMPDIR to a folder that you may write to",
        )
    return None


def tell(error: BaseException) -> int:
    """Print what the user can fix and return the exit status; raise any other error again."""
    if isinstance(error, KeyboardInterrupt):
        print(file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, ImportError):
        error = missing_package(error) or error
    if isinstance(error, OSError):
        discard_refused()
        if isinstance(error, BrokenPipeError):  # as quiet as `cat` is
            return READER_GONE
        error = unusable(error) if error.strerror else error
    if isinstance(error, ValueError | RuntimeError):
        error = refused_elsewhere(error) or error
    if not isinstance(error, UserError):
        raise error
    print(error, file=sys.stderr)
    return 2


def discard_refused() -> None:
    """Discard what a stream does not take: Python would try once more as it ends, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            discard(stream)


def discard(stream) -> None:
    """Send to nowhere what is still written to a stream."""
    with suppress(OSError):  # a test's has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_main(main: Callable[[], int | None]) -> int:
    """Run a command line and return its exit status; a bug keeps its traceback."""
    try:
        try:
            status = main() or 0
        except SystemExit as end:  # argparse's, after --help
            status = end.code or 0
        sys.stdout.flush()
        return status
    except (UserError, ImportError, *ELSEWHERE, OSError, KeyboardInterrupt) as error:
        try:
            return tell(error)
        except OSError as failure:
            if failure is error:
                raise
            discard(sys.stderr)
            return READER_GONE if isinstance(failure, BrokenPipeError) else 2


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Run a command line as the whole process, and end it."""
    prepare()
    try:
        on_interrupt(signal.default_int_handler, leave_at_once)
        status = run_main(main)
    except KeyboardInterrupt:  # struck between two lines of ours
        status = INTERRUPTED
    finally:
        on_interrupt(leave_at_once, signal.default_int_handler)
    sys.exit(status)


@contextmanager
def imports(name: str) -> Iterator[None]:
    """Around the imports at the top of a program: end it as `run_program` would.

    `name` is the module's `__name__`; where it is imported, and not run, errors keep their way.
    """
    if name != "__main__":
        yield
        return
    prepare()
    try:
        yield
    except (ImportError, *ELSEWHERE) as error:
        sys.exit(tell(error))


def prepare() -> None:
    """Give a process three open descriptors and streams that take every character.

    Ctrl-C ends it at once until `run_program` runs `main`: there is nothing to keep yet.
    """
    on_interrupt(leave_at_once, signal.default_int_handler)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would take its place
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def nothing_to_keep() -> Iterator[None]:
    """Let Ctrl-C end the process at once, around imports and loads that hold no work of a user.

    An interrupt within other packages' imports is not sure to arrive, nor to leave them whole.
    """
    on_interrupt(leave_at_once, signal.default_int_handler)
    try:
        yield
    finally:
        on_interrupt(signal.default_int_handler, leave_at_once)


def on_interrupt(handler: Callable, instead_of: Callable) -> None:
    """Change SIGINT's handler where it is the one expected: a process may ignore the signal."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is instead_of:
        signal.signal(signal.SIGINT, handler)


def leave_at_once(*_) -> NoReturn:
    """End the process from within a signal handler."""
    with suppress(OSError):
        os.write(2, b"\n")
    os._exit(INTERRUPTED)
