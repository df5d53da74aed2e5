"""A recipe: how many bits each role gets. Knows roles and widths, no tensors and no files.

The roles are those of `inventory.py` without the ones that are never quantised (norms, router,
selection bias). `q4` and the other uniform recipes give what `mlx_lm.convert -q` gives; the
MTP module has 8 bits whatever the recipe, because drafts of a 4-bit one are hardly ever accepted.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from mlx_dsv3.checkpoint.format import Quantization
from mlx_dsv3.errors import UserError
from mlx_dsv3.json_files import read_json

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
ALLOWED = {  # mode -> (group sizes, bits); the first of each is mlx-lm's default
    "affine": ((64, 32, 128), (4, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}
DEFAULT = "q4"


@dataclass(frozen=True)
class Recipe:
    """Quantisation by role; None leaves the role in `dtype` (BF16, or F32 by widening)."""

    name: str
    by_role: dict[str, Quantization | None]
    dtype: str = "BF16"

    def quantization(self, role: str, width: int) -> Quantization | None:
        """Return how a matrix of `role` with rows of `width` is stored."""
        chosen = self.by_role.get(role)
        return chosen if chosen and chosen.fits(width) else None

    @property
    def default(self) -> Quantization | None:
        """Return what config.json names for every module; others are listed by path."""
        stored = [q for role, q in self.by_role.items() if q and role != "mtp"]
        return self.by_role["experts_gate_up"] or (stored[0] if stored else None)

    def as_dict(self) -> dict:
        """Return a form that `from_dict` reads and that a JSON recipe may have."""
        roles = {role: q.as_config() if q else None for role, q in self.by_role.items()}
        return {"name": self.name, "dtype": self.dtype, **roles}


def uniform(name: str, quantization: Quantization) -> Recipe:
    """Give every role the same quantisation, the MTP module 8 bits."""
    return Recipe(name, dict.fromkeys(ROLES, quantization) | {"mtp": Quantization(8)})


def mixed(name: str, expert_bits: int) -> Recipe:
    """Quantise routed experts to `expert_bits` and everything else to 8 bits."""
    low = dict.fromkeys(("experts_gate_up", "experts_down"), Quantization(expert_bits))
    return Recipe(name, dict.fromkeys(ROLES, Quantization(8)) | low)


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
}


def choose(
    recipe: str | None, bits: int | None, group_size: int | None, mode: str | None
) -> Recipe:
    """Return the recipe that the command line asks for; `--recipe` excludes the `--q-*` flags."""
    if bits is None and group_size is None and mode is None:
        return _named(recipe or DEFAULT)
    if recipe is not None:
        raise UserError("`--recipe` excludes `--q-bits`, `--q-group-size` and `--q-mode`")
    quantization = parse_quantization(
        {"bits": bits, "group_size": group_size, "mode": mode}, "the command line"
    )
    for known in RECIPES.values():
        if known == uniform(known.name, quantization):
            return known
    bits, group_size, mode = quantization
    return uniform(f"q{bits}-g{group_size}-{mode}", quantization)


def _named(name: str) -> Recipe:
    if name in RECIPES:
        return RECIPES[name]
    if name.endswith(".json") and Path(name).is_file():
        values = read_json(Path(name), hint='a recipe may be as short as `{"default": 4}`')
        return replace(from_dict(values, f"`{name}`"), name=Path(name).stem)
    raise UserError(
        f"there is no recipe `{name}`", f"choose one of {', '.join(RECIPES)}, or a JSON file"
    )


def from_dict(values: dict, where: str) -> Recipe:
    """Read a JSON recipe: role -> bits (or null), `default` for the roles that are not named.

    A role may be a number of bits, an object with `bits`, `group_size` and `mode`, or null. The
    MTP module does not follow `default`: it has 8 bits unless `mtp` says otherwise.
    """
    unknown = [key for key in values if key not in (*ROLES, "default", "name", "dtype")]
    if unknown:
        roles = ", ".join(("default", *ROLES))
        raise UserError(f"{where} has the unknown role `{unknown[0]}`", f"roles are {roles}")
    missing = [role for role in ROLES[:-1] if role not in values]
    if missing and "default" not in values:
        raise UserError(f"{where} names neither `{missing[0]}` nor `default`")
    by_role = {role: values.get(role, values.get("default")) for role in ROLES}
    by_role["mtp"] = values.get("mtp", 8)
    parsed = {role: parse_quantization(value, where) for role, value in by_role.items()}
    if (dtype := values.get("dtype", "BF16")) not in ("BF16", "F32"):
        raise UserError(f"{where} has `dtype` `{dtype}`; unquantised tensors are BF16 or F32")
    return Recipe(values.get("name", "custom"), parsed, dtype)


def parse_quantization(value: dict | int | None, where: str) -> Quantization | None:
    """Check one role's entry and fill in mlx-lm's defaults for the mode."""
    if value is None:
        return None
    entry = {"bits": value} if isinstance(value, int) else value
    if not isinstance(entry, dict) or not set(entry) <= {"bits", "group_size", "mode"}:
        raise UserError(f"{where} has `{value}` for a role; give bits, or bits, group_size, mode")
    mode = entry.get("mode") or "affine"
    if mode not in ALLOWED:
        raise UserError(f"{where} has mode `{mode}`", f"modes are {', '.join(ALLOWED)}")
    groups, widths = ALLOWED[mode]
    chosen = Quantization(
        entry.get("bits") or widths[0], entry.get("group_size") or groups[0], mode
    )
    if chosen.bits not in widths or chosen.group_size not in groups:
        raise UserError(
            f"{where} asks for {chosen.bits} bits in groups of {chosen.group_size}, mode `{mode}`",
            f"`{mode}` takes bits {sorted(widths)} and groups {sorted(groups)}",
        )
    return chosen
