"""What a stream can show: text with attributes, and bars. Knows no reply.

A file, a pipe and `TERM=dumb` get no control code at all, and `NO_COLOR` no attribute: bars it does
not forbid. A bar is of ASCII where the encoding has no blocks.
"""

import os
import sys

RESET, DIM = "\x1b[0m", "\x1b[2m"
BLOCKS = " ▏▎▍▌▋▊▉█"


def is_redrawn(stream) -> bool:
    """Say whether a stream is a terminal whose line can be drawn anew."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def takes_attributes(stream) -> bool:
    """Say whether a stream may be sent colours, bold and dim."""
    return is_redrawn(stream) and not os.environ.get("NO_COLOR")


def dim(text: str, stream) -> str:
    """Return a text as it is shown beside a reply."""
    return f"{DIM}{text}{RESET}" if takes_attributes(stream) else text


def can_show(text: str, stream) -> bool:
    """Say whether a stream's encoding has all characters of a text."""
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def bar(share: float, width: int) -> str:
    """Draw a share from 0 to 1 over so many columns, for stderr; what is not 0 shows."""
    eighths = round(min(max(share, 0), 1) * width * 8)
    eighths = max(eighths, 1) if share > 0 else 0
    if not can_show(BLOCKS, sys.stderr):
        return ("#" * -(-eighths // 8)).ljust(width)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + BLOCKS[rest] * (rest > 0)).ljust(width)


def duration(seconds: float) -> str:
    """Return seconds for people: two digits at least, minutes from ten on."""
    if seconds < 9.95:
        return f"{max(seconds, 0.001):#.2g} s"
    return f"{seconds:.0f} s" if seconds < 599.5 else f"{seconds / 60:.0f} min"
