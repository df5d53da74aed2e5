"""Read the facts the demo model is taught (`facts.toml`) and compute what can be computed.

Knows nothing about conversations: `corpus.py` turns each `Attribute` into questions and answers.
An attribute whose answer names a field that a thing lacks is skipped for that thing.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

Things = dict[str, dict[str, str]]  # name of a thing -> field -> value

PLACES = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
MONTH_LENGTHS = "31 28 31 30 31 30 31 31 30 31 30 31".split()
OPPOSITES = (
    "hot cold big small fast slow up down light dark day night open closed wet dry old new "
    "hard soft full empty high low happy sad rich poor loud quiet strong weak early late "
    "clean dirty left right long short thick thin near far good bad"
).split()
MIXES = {
    ("red", "yellow"): "orange",
    ("blue", "yellow"): "green",
    ("red", "blue"): "purple",
    ("red", "white"): "pink",
    ("black", "white"): "grey",
    ("blue", "white"): "light blue",
    ("red", "green"): "brown",
}


@dataclass(frozen=True)
class Attribute:
    """One thing to ask, in four kinds of wording, and the one answer."""

    key: str
    answer: str
    nouns: tuple[str, ...] = ()
    direct: tuple[str, ...] = ()
    follow: tuple[str, ...] = ()
    indirect: tuple[str, ...] = ()


@dataclass(frozen=True)
class Domain:
    """A table of things with the attributes that may be asked about them."""

    name: str
    things: Things
    attributes: tuple[Attribute, ...]
    weight: float
    swap: bool  # "how about Mars?" makes sense between its things


def parse_table(columns: str, text: str) -> Things:
    """Parse lines of cells between bars; `-` leaves a field out."""
    names = [name.strip() for name in columns.split("|")]
    things = {}
    for line in text.strip().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        assert len(cells) == len(names), line
        things[cells[0]] = {n: c for n, c in zip(names, cells, strict=True) if c != "-"}
    return things


def cycle(names: list[str], unit: str) -> Things:
    """Give every name of a cycle its neighbours and its place."""
    return {
        name: {
            "e": name,
            "after": names[(i + 1) % len(names)],
            "before": names[i - 1],
            "place": PLACES[i],
            "unit": unit,
        }
        for i, name in enumerate(names)
    }


def months() -> Things:
    things = cycle(MONTHS, "month")
    for name, days in zip(MONTHS, MONTH_LENGTHS, strict=True):
        things[name]["days"] = days
    return things


def mixes() -> Things:
    """List every mix in both orders."""
    return {
        f"{x} and {y}": {"e": f"{x} and {y}", "x": x, "y": y, "mix": mix}
        for (p, q), mix in MIXES.items()
        for x, y in ((p, q), (q, p))
    }


def sums() -> Things:
    return {
        f"{x} plus {y}": {"e": f"{x} plus {y}", "x": str(x), "y": str(y), "sum": str(x + y)}
        for x in range(11)
        for y in range(11)
    }


def inverse(things: Things, field: str) -> Things:
    """Map each value of a field that only one thing has to that thing."""
    values = [t[field] for t in things.values() if field in t]
    return {
        t[field]: {"e": t[field], "it": t["e"], "one": t.get("a", t["e"])}
        for t in things.values()
        if field in t and values.count(t[field]) == 1
    }


def computed(name: str, tables: dict[str, Things]) -> Things:
    """Make the table of a domain that the file does not spell out."""
    inverses = {
        "symbols": ("metals", "symbol"),
        "sounds": ("animals", "sound"),
        "young": ("animals", "young"),
        "uses": ("metals", "use"),
        "fames": ("planets", "fame"),
    }
    if name in inverses:
        source, field = inverses[name]
        return inverse(tables[source], field)
    if name == "capitals":
        rows = tables["countries"].values()
        return {t["capital"]: {"e": t["capital"], "country": t["e"]} for t in rows}
    if name == "opposites":
        return {w: {"e": w, "other": OPPOSITES[i ^ 1]} for i, w in enumerate(OPPOSITES)}
    makers = {"days": lambda: cycle(DAYS, "day"), "months": months, "mixes": mixes, "sums": sums}
    return makers[name]()


@cache
def load() -> tuple[tuple[Domain, ...], dict[str, tuple[str, ...]]]:
    """Return the domains, and the small talk as {reply: ways to bring it about}."""
    data = tomllib.loads(Path(__file__).with_name("facts.toml").read_text(encoding="utf-8"))
    domains, tables = [], {}
    for entry in data["domain"]:
        name = entry["name"]
        if "table" in entry:
            tables[name] = parse_table(entry["columns"], entry["table"])
        else:
            tables[name] = computed(name, tables)
        attributes = tuple(
            Attribute(**{k: tuple(v) if isinstance(v, list) else v for k, v in a.items()})
            for a in entry["attribute"]
        )
        swap = entry.get("swap", True)
        domains.append(Domain(name, tables[name], attributes, entry["weight"], swap))
    return tuple(domains), {s["reply"]: tuple(s["says"]) for s in data["small_talk"]}
