"""How a good file is damaged: as a file, as bytes, as JSON, as a safetensors file.

Each function changes one thing and says in words what. JSON is written by a dumper of our own,
which knows names that come twice and values that Python's does not write.
"""

import json
import os
import random
import shutil
import struct
from pathlib import Path

DEEP = 100_000
NUMBERS = [
    *("0", "-1", "1", "2", "3", "7", "4.0", "0.5", "-0.0", "1e400", "-1e400", "1e308", "1e-320"),
    *("NaN", "Infinity", "-Infinity", "true", "false", "null"),
    *map(str, (2**31 - 1, 2**31, 2**32 + 1, 2**63 - 1, 2**63, 2**64, 10**12, -(2**63), 3_000_000)),
    "9" * 5000,
]
STRINGS = [
    *("", " ", "x", "4", "a/b", "../x", "/etc/passwd", "config.json", "F32", "I64", "[/x]", "{0}"),
    *("\x00", "\x1b]0;PWNED\x07", "\x9b2J", "\u202e", "\ud800", "\x7f", "line\nline", "%s", "é"),
    *("{{ 7 * 7 }}", "{% for x in range(9) %}", "{{ raise_exception('no') }}", "<s>", "auto"),
    "{{ 'A' * 10**10 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a" * 100_000,
]
STRUCTURES = [
    *("[]", "{}", "[[]]", '[""]', "[1]", "[1, 1]", "[[1]]", '["x", "x"]', '{"a": 1, "a": 2}'),
    *("[" * DEEP, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP, "[0" + ",0" * 200_000 + "]"),
]
VALUES = NUMBERS + [json.dumps(text) for text in STRINGS] + STRUCTURES
BOMB = "[" + "[]," * 10_000_000 + "[]]"  # 30 MB, which are 800 MB as Python's lists
SIZES = {"F64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "I64": 8, "U8": 1}
SIZES |= {"F8_E4M3": 1, "BOOL": 1, "I8": 1, "U16": 2, "U64": 8}
EXTREME = {
    "F32": ("f", [float("nan"), float("inf"), -1.0, 1e30, 0.0]),
    "I32": ("i", [-1, 2**31 - 1, -(2**31), 48, 0, 7]),
    "I16": ("h", [-1, 2**15 - 1, -(2**15), 4, 0]),
    "BF16": ("H", [0x7FC0, 0x7F80, 0xFF80, 0x7F7F, 0]),
}


class Pairs(list):
    """A JSON object as a list of [name, value]."""


class Raw(str):
    """Text that stands in a JSON file as it is."""


def parse(text: str):
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs(map(list, pairs)))


def dump(node) -> str:
    if isinstance(node, Raw):
        return node
    if isinstance(node, Pairs):
        return "{" + ",".join(f"{dump(key)}:{dump(value)}" for key, value in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(dump, node)) + "]"
    return json.dumps(node)


def brief(value: object) -> str:
    text = ascii(str(value))
    return text if len(text) < 80 else f"{text[:60]}... ({len(text):,})"


def pick(rng: random.Random, node) -> tuple[list, int, str]:
    """Walk down a JSON tree at random; return a container, a place in it, and the way."""
    way = []
    while True:
        i = rng.randrange(len(node))
        way.append(str(node[i][0]) if isinstance(node, Pairs) else str(i))
        below = node[i][1] if isinstance(node, Pairs) else node[i]
        if not isinstance(below, list) or not below or rng.random() < 0.25:
            return node, i, "/".join(way)
        node = below


def other_value(rng: random.Random, old, tree) -> object:
    """Return something in place of `old`: near it, from elsewhere in the file, or a foul one."""
    is_number = isinstance(old, (int, float)) and not isinstance(old, bool)
    if is_number and rng.random() < 0.4:
        return rng.choice([old + 1, old - 1, -old, 2 * old, float(old), str(old), old * 1_000_000])
    if isinstance(old, str) and rng.random() < 0.2:
        return rng.choice([old + "x", old[:-1], old + "\x1b[2J", old * 2, old.upper()])
    if rng.random() < 0.15:
        node, i, _ = pick(rng, tree)
        return node[i][1] if isinstance(node, Pairs) else node[i]
    return Raw(BOMB if rng.random() < 0.002 else rng.choice(VALUES))


def change_tree(rng: random.Random, tree: list) -> str:
    """Change one place of a JSON tree."""
    if not tree:
        return "nothing"
    node, i, way = pick(rng, tree)
    kind = rng.choices(("value", "drop", "twice", "rename"), (12, 2, 1, 1))[0]
    if kind == "drop":
        del node[i]
    elif kind == "twice":
        node.append(node[i])
        if isinstance(node, Pairs):
            node[-1] = [node[i][0], other_value(rng, node[i][1], tree)]
    elif kind == "rename" and isinstance(node, Pairs):
        node[i] = [rng.choice([rng.choice(STRINGS), node[i][0] + "x"]), node[i][1]]
    elif isinstance(node, Pairs):
        node[i] = [node[i][0], new := other_value(rng, node[i][1], tree)]
        return f"{brief(way)} = {brief(dump(new))}"
    else:
        node[i] = new = other_value(rng, node[i], tree)
        return f"{brief(way)} = {brief(dump(new))}"
    return f"{kind} {brief(way)}"


def change_json(rng: random.Random, text: str) -> tuple[str, str]:
    """Return a changed text of JSON, and what was changed."""
    if rng.random() < 0.05:
        value = rng.choice(VALUES)
        return value, f"all = {brief(value)}"
    tree = parse(text)
    what = [change_tree(rng, tree) for _ in range(rng.choice((1, 1, 1, 2)))]
    return dump(tree), "; ".join(what)


def change_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Return changed bytes: cut, longer, flipped, of another encoding."""
    place = rng.randrange(len(data) + 1)
    if rng.random() < 0.3:
        place = min(place, rng.randrange(24))
    text = data.decode("utf-8", "replace")
    return rng.choice(
        (
            lambda: (data[:place], f"cut at {place}"),
            lambda: (data + rng.randbytes(rng.choice((1, 8, 4096))), "longer"),
            lambda: (data[:place] + rng.randbytes(8) + data[place + 8 :], f"bytes at {place}"),
            lambda: (data[:place] + b"\xff" + data[place:], f"0xff into {place}"),
            lambda: (data[:place] + bytes(len(data) - place), f"zeros from {place}"),
            lambda: (text.encode("utf-16"), "UTF-16"),
            lambda: (b"\xef\xbb\xbf" + data, "a byte order mark"),
            lambda: (b"", "empty"),
            lambda: (data * 2, "twice"),
            lambda: (rng.randbytes(rng.randrange(64)), "noise"),
        )
    )()


def change_file(rng: random.Random, path: Path) -> str:
    """Put something else where a file was, or beside it."""
    kind = rng.choice(
        (
            "nothing",
            "folder",
            "pipe",
            "link",
            "loop",
            "endless",
            "null",
            "outside",
            "other",
            "extra",
        )
    )
    if kind == "extra":
        name = rng.choice(("chat_template.jinja", "added_tokens.json", "special_tokens_map.json"))
        name = rng.choice((name, "model-x.safetensors", "model.safetensors", "\x1b[2J.json"))
        text = rng.choice((rng.choice(STRINGS), rng.choice(VALUES), f'{{"a": {BOMB}}}'))
        (path.parent / name).write_text(text, errors="surrogatepass")
        return f"{ascii(name)} beside it"
    path.unlink()
    others = sorted(file for file in path.parent.iterdir() if file.is_file())
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "other" and others:
        shutil.copyfile(rng.choice(others), path)
    elif kind not in ("nothing", "other"):
        outside = path.parent.absolute().parent / "prompt.json"
        targets = {"link": "none", "loop": path.name, "endless": "/dev/zero", "null": "/dev/null"}
        path.symlink_to(targets.get(kind, outside))
    return f"{kind} in its place"


class Safetensors:
    """A safetensors file as a list of [name, dtype, shape, bytes], and its metadata."""

    def __init__(self, data: bytes):
        start = 8 + int.from_bytes(data[:8], "little")
        self.header, self.data = data[8:start].decode(), data[start:]
        entries = json.loads(self.header)
        self.metadata = entries.pop("__metadata__", {})
        self.tensors = [
            [name, entry["dtype"], entry["shape"], self.data[slice(*entry["data_offsets"])]]
            for name, entry in entries.items()
        ]

    def to_bytes(self) -> bytes:
        header, data = Pairs([["__metadata__", self.metadata]] if self.metadata else []), b""
        for name, dtype, shape, value in self.tensors:
            offsets = [len(data), len(data) + len(value)]
            fields = [["dtype", dtype], ["shape", shape], ["data_offsets", offsets]]
            header.append([name, Pairs(fields)])
            data += value
        return with_length(dump_metadata(header)) + data


def dump_metadata(header: Pairs) -> bytes:
    if header and isinstance(header[0][1], dict):
        header[0][1] = Pairs(map(list, header[0][1].items()))
    return dump(header).encode("utf-8", "surrogatepass")


def with_length(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def change_header(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Change the header as JSON, its length then right again, or only that length."""
    file = Safetensors(data)
    if rng.random() < 0.1:
        length = rng.choice(
            (0, 1, len(file.header) - 1, len(file.header) + 1, 10**8, 2**63, 2**64 - 1)
        )
        return struct.pack("<Q", length) + data[8:], f"length {length}"
    text, what = change_json(rng, file.header)
    return with_length(text.encode("utf-8", "surrogatepass")) + file.data, f"header: {what}"


def change_tensors(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Change what a safetensors file holds; it stays a whole one."""
    file = Safetensors(data)
    if file.metadata and rng.random() < 0.3:
        what = change_metadata(rng, file.metadata)
        return file.to_bytes(), what
    i = rng.randrange(len(file.tensors))
    if rng.random() < 0.5:  # the few tensors of integers, which are indices
        i = rng.choice([j for j, t in enumerate(file.tensors) if t[1][0] == "I"] or [i])
    tensor, j = file.tensors[i], rng.randrange(len(file.tensors))
    name, dtype, shape, value = tensor
    kind = rng.choice(("values", "values", "values", "drop", "rename", "swap", "dtype", "shape"))
    if kind == "values":
        code, values = EXTREME.get(dtype, ("B", [0, 255, 128]))
        size = struct.calcsize(code)
        wrong = struct.pack(f"={code}", rng.choice(values))
        at = rng.randrange(max(1, len(value) // size)) * size
        everywhere = rng.random() < 0.3
        tensor[3] = (
            wrong * (len(value) // size) if everywhere else value[:at] + wrong + value[at + size :]
        )
        what = f"{wrong.hex()} {'everywhere' if everywhere else f'at {at}'}"
    elif kind == "drop":
        what = f"{file.tensors.pop(i)[0]} dropped"
    elif kind == "rename":
        tensor[0] = what = rng.choice([name + "x", rng.choice(STRINGS), name.replace("0", "1")])
    elif kind == "swap":
        tensor[1:], file.tensors[j][1:] = file.tensors[j][1:], tensor[1:]
        what = f"that of {file.tensors[j][0]}"
    else:
        if kind == "dtype":
            tensor[1] = rng.choice(list(SIZES))
        else:
            tensor[2] = rng.choice(
                (shape[::-1], [*shape, 1], [0], [], [0, *shape[1:]], [*shape[:-1], 2], [1, *shape])
            )
        count = SIZES[tensor[1]]
        for n in tensor[2]:
            count *= n
        tensor[3] = (value * (count // max(1, len(value)) + 1))[:count].ljust(count, b"\0")
        what = f"{tensor[1]} {tensor[2]}"
    return file.to_bytes(), f"tensor {brief(name)}: {what if isinstance(what, str) else what}"


def change_metadata(rng: random.Random, metadata: dict) -> str:
    """Change one entry: as JSON where it is that, else as words."""
    key = rng.choice(sorted(metadata))
    old = metadata[key]
    if old.startswith(("{", "[")) and rng.random() < 0.8:
        metadata[key], what = change_json(rng, old)
        return f"metadata {key}: {what}"
    words = old.split() or [""]
    i = rng.randrange(len(words))
    words[i] = rng.choice(NUMBERS if words[i].isdigit() else STRINGS)
    changed = " ".join(words)
    new = rng.choice((changed, changed, rng.choice((*STRINGS, *NUMBERS)), None))
    if new is None:
        del metadata[key]
    else:
        metadata[key] = new
    return f"metadata {key}: {brief(new)}"
