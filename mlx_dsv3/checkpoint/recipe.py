"""A recipe: how many bits each role gets. Knows roles and widths, no tensors and no files.

The roles are those of the converter's inventory without the ones that are never quantised (norms,
router, selection bias). `q4` and the other uniform recipes give what `mlx_lm.convert -q` gives; the
MTP module has 8 bits whatever the recipe, because drafts of a 4-bit one are hardly ever accepted.

A recipe is known by its content. A name is what the user sees, and conversion.json may hold the
name of one recipe with the content of another.
"""

from dataclasses import dataclass

from mlx_dsv3.checkpoint.format import Quantization

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
        """Return the form of conversion.json, which a JSON recipe may have too."""
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


def known_name(values: dict | None) -> str | None:
    """Return the name of the built-in recipe that has the content of this `as_dict`, or None."""
    content = {key: value for key, value in (values or {}).items() if key != "name"}
    for name, known in RECIPES.items():
        if known.as_dict() == {"name": name} | content:
            return name
    return None
