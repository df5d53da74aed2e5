"""What a person, or a cat, types into a chat: sequences of keys, each from its seed and number.

A sequence is a list of steps: ("type", bytes), ("wait", seconds), ("resize", (columns, rows)) or
("signal", number). Files are of the folder that `furnish` makes: a defect in /save must not write
over a file of the machine. Ctrl-\\ is left out: it ends every program, at once.
"""

import json
import os
import random
import re
import signal
from pathlib import Path

COMMANDS = (  # a test holds them equal to the chat's
    "/help /? /exit /quit /bye /clear /system /set /show /think /regen /undo /retry /read /save "
    "/load /copy /stats /context /plan /drafts /trace /editor"
).split()
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x1b]52;c;eA==\x07"
QUESTIONS = (
    "What is the capital of France?|And of Japan?|Hello!|What is speculative decoding?|"
    "Thank you.|你好，世界|مرحبا بالعالم|e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467 🇫🇷|"
    "</think>|<think>|<｜User｜>hi<｜Assistant｜>|//not a command| a secret|/"
).split("|") + ["x" * 200]
FILES = (
    "good.txt|long.txt|chat.json|empty.json|broken.json|deep.json|wrong.json|folder|absent/x|pipe|"
    "folder/new.json|loop|latin.txt|with space.txt|.|..||new.json|new.json --with-cache|~/x.json|"
    "~nobody/x|'open|good.txt what?|\\|a\0b|trace.jsonl|off|--with-cache"
).split("|") + ["n" * 300]
NAMES = (
    "temp top_p top-k min_p repetition_penalty seed max_tokens system markdown stats think "
    "hide-thinking raw json temperature __class__"
).split()
VALUES = (
    "0|1|-1|0.5|30|nan|inf|1e999|on|off||x|½|none|line|json|0x10|1_0|٣|1 2|null|" + HOSTILE
).split("|") + ["9" * 400]
WORDS = (
    "on|off|messages|settings|model|prompt|all|code 1|code 99|é|You are brief.|auto|\u202e abc|"
    "\ud800|" + HOSTILE
).split("|") + ["x" * 200]
NUMBERS = "|0|1|2|9|-1|99999999999999999999|1.5|one|1 1|٢".split("|")
KEYS = (  # of a keyboard, and what terminals send by themselves
    "\t|\t\t|\x1b[A|\x1b[A\x1b[A|\x1b[B|\x1b[C|\x1b[D|\x1b[H|\x1b[F|\x1b[3~|\x1b[5~|\x1b[6~|\x1bOP|"
    "\x1b[15~|\x1b[1;5D|\x1b[1;2C|\x1b\x7f|\x7f|\x08|\x01|\x05|\x0b|\x15|\x17|\x19|\x14|\x0c|\x1f|"
    "\x10|\x12|\x12cap|\x13|\x11|\x16\x03|\x11\x04|\x18\x18|\x18\x05|\x0e|\x0f|\x1b|\x1b\r|\x1bb|\x1bf|"
    "\x1bd|\x1bu|\x1b.|\x1b5x|\x1b-|\x1b#|\x00|\x07|\x1a|\x1d|\x1e|\x1b[200~|\x1b[201~|\x1b[1;1R|"
    "\x1b[999;999R|\x1b[M !!|\x1b[<0;1;1M|\x1b[?1;2c|\x1b]11;rgb:0/0/0\x07|\x1bP1$r0m\x1b\\|\x1b[I|"
    '\x03|\x03\x03|\x04|"""|"""\r|"""a\rb\r"""|\r\r|\n|\x1b[27;2;13~'
).split("|")
LEAVING = re.compile(rb"[\x04\t\x0e\x0f\x10\x12]|\x1b\[A|/(?:exit|quit|bye)")
FILE_COMMANDS, NUMBER_COMMANDS = ("/read", "/load", "/save", "/trace"), ("/retry", "/drafts")


def furnish(folder: Path) -> None:
    """Make the files that sequences name, good and bad, and an editor that needs nobody."""
    messages = [
        {"role": "user", "content": "What is the capital of Italy?"},
        {"role": "assistant", "content": "The capital of Italy is Rome."},
    ]
    chat = {"format": "mlx_dsv3 chat 1", "model": "", "system": None, "thinking": None}
    chat |= {"settings": {}, "drafts": "auto", "messages": messages}
    texts = {
        "good.txt": "A banana is yellow.\n" * 5,
        "with space.txt": f"An owl {HOSTILE} sees at night.",
        "long.txt": "".join(f"Line {i} of a long text.\n" for i in range(60)),
        "chat.json": json.dumps(chat),
        "empty.json": "",
        "broken.json": json.dumps(chat)[:-40],
        "deep.json": "[" * 5000,
        "wrong.json": json.dumps(chat | {"messages": [{"role": "user", "content": 7}]}),
        "editor": '#!/bin/sh\necho "What is the capital of Spain?" >> "$1"\n',
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "editor").chmod(0o755)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")


def command(some: random.Random) -> str:
    """Return a command with an argument that it may or may not take."""
    name = some.choice(COMMANDS)
    if some.random() < 0.1:
        name = name[: some.randrange(1, len(name) + 1)] + some.choice(("", "x", "ß", "\u202e"))
    pool = WORDS + NUMBERS
    if some.random() < 0.8:
        pool = FILES if name in FILE_COMMANDS else NUMBERS if name in NUMBER_COMMANDS else pool
    argument = some.choice(pool)
    if name == "/set" and some.random() < 0.9:
        argument = f"{some.choice(NAMES)} {some.choice(VALUES)}"
    return name if some.random() < 0.3 else f"{name} {argument}"


def pasted(some: random.Random) -> str:
    """Return a paste of up to 40 lines; one in ten never ends."""
    lines = (
        some.choice((*QUESTIONS, HOSTILE, "/exit", '"""', "\t")) for _ in range(some.randint(1, 40))
    )
    text = some.choice(("\r", "\n", "\r\n")).join(lines)
    return f"\x1b[200~{text}" + "\x1b[201~" * (some.random() < 0.9)


def junk(some: random.Random) -> bytes:
    """Return bytes of no encoding; Ctrl-D and Ctrl-\\ have their own places."""
    return some.randbytes(some.randint(1, 30)).translate(None, b"\x04\x1c")


def steps(seed: int, number: int) -> list[tuple]:
    """Return the sequence of a number."""
    some, out = random.Random(f"{seed}-{number}"), []
    kinds = {"command": 40, "question": 16, "keys": 16, "paste": 6, "junk": 6, "stop": 10}
    kinds |= {"resize": 3, "signal": 3}
    for kind in some.choices(list(kinds), kinds.values(), k=some.randint(1, 6)):
        text = None
        if kind == "command":
            text = command(some)
        elif kind == "question":
            text = some.choice(QUESTIONS)
        elif kind == "keys":
            text = "".join(some.choices(KEYS, k=some.randint(1, 5)))
        elif kind == "paste":
            text = pasted(some)
        elif kind == "junk":
            text = junk(some)
        elif kind == "stop":
            out += [("wait", some.random() * 0.15), ("type", b"\x03")]
        elif kind == "resize":
            out.append(
                ("resize", (some.choice((1, 2, 20, 80, 300)), some.choice((1, 2, 5, 24, 90))))
            )
        else:
            out.append(("signal", some.choice((signal.SIGINT, signal.SIGWINCH, signal.SIGCONT))))
        if text is not None:
            data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
            out.append(("type", data + b"\r" * (some.random() < 0.8)))
        if some.random() < 0.4:
            out.append(("wait", some.random() * 0.1))
    return out


def may_leave(sequence: list[tuple]) -> bool:
    """Say whether a sequence may end the chat: by Ctrl-D, a command, a completion, the history.

    A Ctrl-C while it leaves ends it too.
    """
    typed = b"".join(value for kind, value in sequence if kind == "type")
    return bool(LEAVING.search(typed))


def goes_on(seed: int, number: int) -> bool:
    """Say whether the chat that begins with a sequence takes up the last one."""
    return random.Random(f"begin {seed}-{number}").random() < 0.8


def ending(seed: int, number: int) -> tuple[str, bool]:
    """Return how the chat that ends with a sequence does, and whether in the midst of a reply."""
    some = random.Random(f"end {seed}-{number}")
    ways = ("/exit", "Ctrl-D", "SIGTERM", "SIGHUP", "SIGKILL", "closed window")
    return some.choice(ways), some.random() < 0.5
