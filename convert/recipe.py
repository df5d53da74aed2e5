"""A recipe: how many bits each role gets. Knows roles and widths, no tensors.

The roles are those of `inventory.py` without the ones that are never quantised (norms, router,
selection bias). `q4` and the other uniform recipes give what `mlx_lm.convert -q` gives; the
MTP module has 8 bits whatever the recipe, because drafts of a 4-bit one are hardly ever accepted.
Levels are the values that a group's codes stand for: `extremes` spreads them from the least weight
to the largest as `mx.quantize` does, `fitted` puts them where the error is least.

What a user gives (a name, `--q-*` flags, a JSON file) is looked at before it counts: 0 bits, 4.0
and "4" are not 4, and `null` alone leaves a role as it is. A recipe that equals a built-in one is
that one, and no other bears its name, so that a name says what a folder holds.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlx_dsv3.checkpoint.format import Quantization
from mlx_dsv3.errors import UserError
from mlx_dsv3.json_files import brief, read_json

ROLES = (
    "embedding",
    "head",
    "attention",
    "dense",
    "shared",
    "experts_gate_up",
    "experts_down",
    "mtp",
)
EXPERTS = ("experts_gate_up", "experts_down")
ALLOWED = {  # mode -> (group sizes, bits); the first of each is mlx-lm's default
    "affine": ((64, 32, 128), (4, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}
DEFAULT = "q4"
DTYPES = ("BF16", "F32")
LEVELS = ("extremes", "fitted")  # the first is the default
# Of fitted experts: what groups of 64 add in bytes, more bits in a part of the layers use better
# (measured on the judge; docs/log.md).
BEST_GROUP = 128
FORM = (
    'a role is a number of bits, `{"bits": 4, "group_size": 64, "mode": "affine"}`, or `null`, '
    "which leaves it as it is"
)


@dataclass(frozen=True)
class Recipe:
    """Quantisation by role; None leaves the role in `dtype` (BF16, or F32 by widening).

    `by_layer` has the roles that some layers store in another way, by number of the layer.
    """

    name: str
    by_role: dict[str, Quantization | None]
    dtype: str = "BF16"
    levels: str = LEVELS[0]
    by_layer: dict[int, dict[str, Quantization | None]] = field(default_factory=dict)

    def quantization(self, role: str, width: int, layer: int | None = None) -> Quantization | None:
        """Return how a matrix of `role` with rows of `width` is stored; a layer has a number.

        Where a group does not divide the width, fitted levels have smaller ones; extremes are
        mlx-lm's, which leaves such a matrix as it is.
        """
        chosen = (self.by_role | self.by_layer.get(layer, {})).get(role)
        if chosen and self.is_fitted and chosen.mode == "affine":
            sizes = [size for size in (128, 64, 32) if size <= chosen.group_size]
            groups = (chosen._replace(group_size=size) for size in sizes)
            chosen = next((group for group in groups if group.fits(width)), None)
        return chosen if chosen and chosen.fits(width) else None

    @property
    def is_fitted(self) -> bool:
        return self.levels == "fitted"

    @property
    def default(self) -> Quantization | None:
        """Return what config.json names for every module; others are listed by path."""
        stored = [q for role, q in self.by_role.items() if q and role != "mtp"]
        return self.by_role["experts_gate_up"] or (stored[0] if stored else None)

    def as_dict(self) -> dict:
        """Return the form of conversion.json, which a JSON recipe may have too."""
        values = {"name": self.name, "dtype": self.dtype, **_configs(self.by_role)}
        if self.levels != LEVELS[0]:  # folders of earlier versions do not name it
            values["levels"] = self.levels
        if self.by_layer:
            values["layers"] = {str(i): _configs(roles) for i, roles in self.by_layer.items()}
        return values


def _configs(roles: dict[str, Quantization | None]) -> dict[str, dict | None]:
    return {role: q.as_config() if q else None for role, q in roles.items()}


def uniform(name: str, quantization: Quantization) -> Recipe:
    """Give every role the same quantisation, the MTP module 8 bits."""
    return Recipe(name, dict.fromkeys(ROLES, quantization) | {"mtp": Quantization(8)})


def mixed(name: str, expert_bits: int, group_size: int = 64, levels: str = LEVELS[0]) -> Recipe:
    """Quantise routed experts to `expert_bits` and everything else to 8 bits."""
    low = dict.fromkeys(EXPERTS, Quantization(expert_bits, group_size))
    return Recipe(name, dict.fromkeys(ROLES, Quantization(8)) | low, levels=levels)


def unquantized(name: str, dtype: str) -> Recipe:
    return Recipe(name, dict.fromkeys(ROLES), dtype)


RECIPES = {
    "float32": unquantized("float32", "F32"),
    "bf16": unquantized("bf16", "BF16"),
    "q8": uniform("q8", Quantization(8)),
    "q6": uniform("q6", Quantization(6)),
    "q4": uniform("q4", Quantization(4)),
    "q3": uniform("q3", Quantization(3)),
    "q2": uniform("q2", Quantization(2)),
    "mxfp4": uniform("mxfp4", Quantization(4, 32, "mxfp4")),
    "q4-mixed": mixed("q4-mixed", 4),
    "q3-mixed": mixed("q3-mixed", 3),
    "q2-mixed": mixed("q2-mixed", 2),
    "q4-fit": mixed("q4-fit", 4, BEST_GROUP, "fitted"),
    "q3-fit": mixed("q3-fit", 3, BEST_GROUP, "fitted"),
    "q2-fit": mixed("q2-fit", 2, BEST_GROUP, "fitted"),
}


def choose(
    recipe: str | None, bits: int | None, group_size: int | None, mode: str | None
) -> Recipe:
    """Return the recipe that the command line asks for; `--recipe` excludes the `--q-*` flags."""
    flags = {"bits": bits, "group_size": group_size, "mode": mode}
    given = {key: value for key, value in flags.items() if value is not None}
    if not given:
        return _named(DEFAULT if recipe is None else recipe)
    if recipe is not None:
        raise UserError("`--recipe` excludes `--q-bits`, `--q-group-size` and `--q-mode`")
    quantization = parse_quantization(given, "the command line gives")
    bits, group_size, mode = quantization
    return _known(uniform(f"q{bits}-g{group_size}-{mode}", quantization))


def _known(recipe: Recipe) -> Recipe:
    """Return the built-in recipe that this one equals, else this one."""
    equal = [known for known in RECIPES.values() if replace(recipe, name=known.name) == known]
    return equal[0] if equal else recipe


def _named(name: str) -> Recipe:
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if name.endswith(".json") and path.exists():
        recipe = from_dict(read_json(path, hint=FORM), f"`{name}`")
        return _known(replace(recipe, name=path.name if path.stem in RECIPES else path.stem))
    raise UserError(
        f"there is no recipe `{name}`", f"choose one of {', '.join(RECIPES)}, or a JSON file"
    )


def from_dict(values: dict, where: str) -> Recipe:
    """Read a JSON recipe: role -> bits (or null), `default` for the roles that are not named.

    A role may be a number of bits, an object with `bits`, `group_size` and `mode`, or null. The
    MTP module does not follow `default`: it has 8 bits unless `mtp` says otherwise.
    """
    _check_roles(values, ("default", *ROLES), where, ("name", "dtype", "levels", "layers"))
    missing = [role for role in ROLES[:-1] if role not in values]
    if missing and "default" not in values:
        raise UserError(f"{where} names neither `{missing[0]}` nor `default`", FORM)
    named = {"mtp": 8} | values
    parsed = {}
    for role in ROLES:
        key = role if role in named else "default"
        parsed[role] = parse_quantization(named[key], f"{where} gives `{key}`")
    name, dtype = values.get("name", "custom"), values.get("dtype", "BF16")
    if not isinstance(name, str):
        raise UserError(f"{where} has {shown(name)} as its `name`", "a name is a text")
    if dtype not in DTYPES:
        raise UserError(f"{where} has {shown(dtype)} as its `dtype`", "it is `BF16` or `F32`")
    if (levels := values.get("levels", LEVELS[0])) not in LEVELS:
        hint = "they are `extremes` or `fitted`"
        raise UserError(f"{where} has {shown(levels)} as its `levels`", hint)
    return Recipe(name, parsed, dtype, levels, _by_layer(values.get("layers", {}), where))


def _check_roles(values: dict, roles: tuple[str, ...], where: str, others: tuple = ()) -> None:
    if unknown := [key for key in values if key not in (*roles, *others)]:
        hint = f"roles are {', '.join(roles)}"
        raise UserError(f"{where} has the unknown role `{unknown[0]}`", hint)


def _by_layer(layers, where: str) -> dict[int, dict[str, Quantization | None]]:
    """Check `layers`: number of a layer -> role -> what stands for it there."""
    parsed = {}
    for number, roles in layers.items() if isinstance(layers, dict) else [("", layers)]:
        if not number.isdecimal() or not isinstance(roles, dict):
            raise UserError(
                f"{where} has {shown(roles)} under `layers` for `{brief(number)}`",
                'write `"layers": {"3": {"experts_down": 3}}`',
            )
        _check_roles(roles, ROLES, f"{where}, layer {number},")
        giver = f"{where} gives layer {number}'s"
        parsed[int(number)] = {
            role: parse_quantization(value, f"{giver} `{role}`") for role, value in roles.items()
        }
    return parsed


def parse_quantization(value, giver: str) -> Quantization | None:
    """Check one role's entry and fill in mlx-lm's defaults for the mode; None stays None.

    Raises `UserError` for what is not an integer, an object of the three keys, or null; its
    sentence begins with `giver`.
    """
    if value is None:
        return None
    entry = value if isinstance(value, dict) else {"bits": value}
    if unknown := set(entry) - {"bits", "group_size", "mode"}:
        raise UserError(f"{giver} the unknown key `{min(unknown)}`", FORM)
    mode = entry.get("mode", "affine")
    if not isinstance(mode, str) or mode not in ALLOWED:
        raise UserError(f"{giver} {shown(mode)} as mode", f"modes are {', '.join(ALLOWED)}")
    groups, widths = ALLOWED[mode]
    bits, group = entry.get("bits", widths[0]), entry.get("group_size", groups[0])
    if not _is_one_of(widths, bits):
        raise UserError(
            f"{giver} {shown(bits)} as bits",
            f"`{mode}` takes {_listed(widths)}; `null` in a JSON recipe leaves a role as it is",
        )
    if not _is_one_of(groups, group):
        raise UserError(
            f"{giver} {shown(group)} as group size", f"`{mode}` takes {_listed(groups)}"
        )
    return Quantization(bits, group, mode)


def _is_one_of(allowed: tuple[int, ...], value) -> bool:
    """Say whether a value is allowed; true and 4.0 equal integers and are none."""
    return type(value) is int and value in allowed


def _listed(allowed: tuple[int, ...]) -> str:
    return ", ".join(map(str, sorted(allowed)))


def shown(value) -> str:
    """Return a JSON value for a message: as it is written, or what kind it is."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = brief(json.dumps(value, ensure_ascii=False))
    return text if type(value) is int else f"`{text}`"
