"""JSON from outside, read once and strictly: what comes out may be looked at, printed, written.

Checked are what every file has in common: its size, its nesting, the length of its numbers, no
`NaN`, no name twice, no half of a character. A text of a megabyte may hold 300,000 empty lists,
which take 27 megabytes: so values are counted before they are made. What a field may hold is for
whoever reads it to say. Standard library only.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path

from mlx_dsv3.errors import UserError, read_text

MOST_BYTES = 4 << 20  # of a file for which nothing else is said; V3's config.json has 2 KB
MOST_VALUES = 500_000  # an index of Kimi-K2 has 207,000; a name and a number take 261 bytes
MOST_WORDS = 2_000_000  # of a tokenizer.json: V3's ids and merges are 260,000, as pairs 520,000
MOST_LEVELS = 32
MOST_DIGITS = 100  # `model_max_length` of many tokenizers has 31
AGAIN = "fetch the file again; a download that stopped half-way looks like this"
HALF_CHARACTERS = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(
    path: Path, most_bytes: int = MOST_BYTES, hint: str = AGAIN, most_values: int = MOST_VALUES
) -> dict:
    """Read a file that holds a JSON object; raise `UserError` with its name where it holds none."""
    text = read_text(path, most_bytes)
    return parse_json(text, f"`{path}`", hint, most_values=most_values)


def parse_json(
    text: str | bytes,
    name: str,
    hint: str = AGAIN,
    kind: type = dict,
    most_values: int = MOST_VALUES,
) -> dict | list:
    """Return the object, or the list, of a JSON text; `name` is what messages call it.

    Bytes are UTF-8.
    """

    def refuse(why: str):
        raise UserError(f"{name} {why}", hint)

    def once(pairs: list[tuple]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
            refuse(f"names `{brief(twice)}` twice")
        return found

    def whole(digits: str) -> int:
        return int(digits) if len(digits) <= MOST_DIGITS else refuse(LONG.format(len(digits)))

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse(f"holds the number `{brief(text)}`")

    try:
        text = text if isinstance(text, str) else text.decode()
        check_count(text, name, hint, most_values)
        value = json.loads(
            text,
            object_pairs_hook=once,
            parse_int=whole,
            parse_float=number,
            parse_constant=lambda word: refuse(f"holds `{word}`, which is not JSON"),
        )
        if HALF_CHARACTERS.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        refuse(DEEP)
    except UnicodeError as error:
        refuse(f"is not UTF-8: {error.reason}")
    except ValueError as error:
        refuse(f"is not JSON: {error}")
    if not isinstance(value, kind):
        refuse(f"holds a {type(value).__name__}, not {'an object' if kind is dict else 'a list'}")
    if not _is_flat(value):
        refuse(DEEP)
    return value


def check_count(text: str, name: str, hint: str = AGAIN, most: int = MOST_VALUES) -> None:
    """Refuse a text of JSON that holds more values than `most`, whoever is to read it."""
    if sum(text.count(c) for c in "[{,") > most:
        raise UserError(f"{name} holds more than {most:,} values", hint)


LONG = "holds a number of {:,} digits"
DEEP = f"has lists or objects within each other, more than {MOST_LEVELS} deep"


def _is_flat(value: dict | list) -> bool:
    """Say whether nothing lies too deep for functions that recurse, as those that print do."""
    level = [value]
    for _ in range(MOST_LEVELS):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [inner for part in parts for inner in part if isinstance(inner, dict | list)]
    return not level


def brief(value: object) -> str:
    """Return a value as a message shows it: a page of text would hide the sentence."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
