"""What a replay may differ by: one table, by recipe, arithmetic and dtype, and the verdict.

Each row is one source of difference alone; the bound of a replay adds those that apply, squares
for errors. Rows hold for the free and for the teacher-forced replay, and for texts of any length:
as long as routers choose as golden's did, differences are alike everywhere. Where one chose
otherwise, a position is another computation, and those that attend to it notice: that gives room
(`REROUTED`, `DISTURBED`), and so does a short text, whose mean is one of few tokens (`text_bound`).

All rows come from the demo model (`benchmarks/bench_parity.py`; figures in `docs/parity.md`): the
largest value seen, times 1.5, rounded up. Where those were too narrow for the judge, whose layers
and text differ, they are wider: `FORCED`, the perplexity of q3, and other experts of q8, q6,
q3-mixed and q2-mixed. They are not for q2, which more than doubles the judge's perplexity. A larger
model has not been measured; for more stages than the demo has, bounds grow with the root of the
depth, a guess.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from mlx_dsv3.errors import UserError
from mlx_dsv3.json_files import brief
from mlx_dsv3.parity.differences import Stage, TokenDifferences
from mlx_dsv3.parity.replay import Result

DEMO_STAGES = 14
LEAST_TOKENS = 20  # of a recording; bounds were measured from there up
FLAT_TOKENS = 900  # over their doubt: the bound of perplexity was measured at these


class Bound(NamedTuple):
    """Largest differences: of a stage, of routing, and of text.

    `error`, `worst` and `channel` are as in `differences.Stage`. `tie` is the router margin below
    which another choice is not a difference; `rerouted` is the share of other choices above it.
    `kl` is the mean divergence in nats, `perplexity` the relative difference of perplexities, which
    sees a wrong row of the head that golden's likely tokens do not touch.
    """

    error: float
    worst: float
    channel: float
    tie: float
    rerouted: float
    kl: float
    perplexity: float


NOTHING = Bound(0, 0, 0, 0, 0, 0, 0)
FLOAT32 = Bound(1e-4, 1e-4, 1e-4, 1e-5, 0, 1e-4, 1e-4)
RECIPES = {  # error, worst, channel, tie, rerouted, kl, perplexity
    "float32": FLOAT32,
    "bf16": FLOAT32,  # the same numbers, stored narrower
    "q8": Bound(0.0125, 0.02, 0.025, 0.01, 4e-3, 4e-4, 3e-3),
    "q6": Bound(0.04, 0.075, 0.07, 0.02, 4e-3, 1.8e-3, 0.012),
    "q4": Bound(0.15, 0.28, 0.26, 0.04, 0.03, 0.02, 0.035),
    "q3": Bound(0.3, 0.55, 0.65, 0.04, 0.08, 0.1, 0.2),
    "q2": Bound(0.65, 0.95, 1.5, 0.04, 0.25, 0.5, 0.25),
    "mxfp4": Bound(0.2, 0.32, 0.4, 0.04, 0.03, 0.04, 0.06),
    "q4-mixed": Bound(0.12, 0.17, 0.15, 0.04, 2e-3, 4e-3, 0.015),
    "q3-mixed": Bound(0.26, 0.35, 0.32, 0.04, 0.02, 0.02, 0.03),
    "q2-mixed": Bound(0.55, 0.7, 0.7, 0.04, 0.1, 0.1, 0.15),
}
ARITHMETIC = {
    "float32": NOTHING,
    "bf16": Bound(0.025, 0.15, 0.08, 0.01, 0.005, 1e-3, 5e-3),
    "fp8": Bound(0.04, 0.08, 0.07, 0.02, 5e-3, 3.5e-3, 8e-3),
}
ACTIVATIONS = {
    "float32": NOTHING,
    # Of MLX's CPU backend: the difference of q8 and q6 between both dtypes. No GPU was measured.
    "bfloat16": Bound(0.08, 0.3, 0.12, 0.01, 0.02, 0.02, 0.055),
}
# How much wider for half-layers that are forced: they add little to some rows and channels, and
# errors are relative to that. The judge needed 1.3, 1.9 and 1.7 of attention, 1.2 of an MLP.
FORCED = {"attention": {"error": 1.6, "worst": 2.5, "channel": 2.5}, "MLP": {"worst": 1.6}}
# What other experts do: to a stage with such a row, and to one whose rows attended to such a row.
REROUTED = NOTHING._replace(error=0.22)
DISTURBED = NOTHING._replace(error=0.22, worst=0.65, channel=0.6)
# To a text: nats that K such positions move KL and the loss by in all, for each root of K.
REROUTED_KL, REROUTED_LOSS = 1.25, 1.5
# A golden state is rounded to BF16 once more after a stage that does little else.
ROUNDING = Bound(5e-3, 1e-2, 1e-2, 0, 0, 0, 0)
EXPERT_ROLES = {"experts_gate_up", "experts_down"}
HEAD = "the head"
NORMS = ("final norm", "MTP norm")  # never quantised
UNQUANTIZED = ("embedding", "MTP input", *NORMS)  # no FP8 in the original arithmetic


@dataclass(frozen=True)
class Sources:
    """Where a replay may differ from: recipe, arithmetic of the golden file, our activations."""

    recipe: str
    arithmetic: str
    activations: str
    teacher_forced: bool = False

    def bound(self, stage: str = "") -> Bound:
        """Return the bound of a stage, or of the text; forced stages answer for themselves."""
        recipe, arithmetic = RECIPES[self.recipe], ARITHMETIC[self.arithmetic]
        if self.teacher_forced and stage in UNQUANTIZED and self.arithmetic != "float32":
            arithmetic = ROUNDING
        if self.teacher_forced and stage in NORMS:
            recipe = FLOAT32
        bound = combine(recipe, arithmetic, ACTIVATIONS[self.activations])
        wider = FORCED.get(stage.split(" ")[-1], {}) if self.teacher_forced else {}
        return bound._replace(**{what: by * getattr(bound, what) for what, by in wider.items()})


def recipe_of(conversion: dict | None, config: dict) -> str:
    """Return the name of the row that fits a folder, by its fewest bits: names say nothing.

    `conversion` is the contents of conversion.json, None for a folder converted elsewhere, which
    config.json describes: a default, and paths that differ. Raises `UserError` where no row is
    near.
    """
    recipe = {} if conversion is None or conversion["layout"] == "mtp" else conversion["recipe"]
    places, default = recipe, config.get("quantization")
    if not recipe and isinstance(default, dict):
        places = {"default": default, **default}
    packed = {place: packing(entry) for place, entry in places.items() if isinstance(entry, dict)}
    if not packed:
        return "float32" if recipe.get("dtype") == "F32" else "bf16"
    bits, mode = min(packed.values())
    name = f"q{bits}" if mode == "affine" else mode
    coarse = {place for place, (bits, _) in packed.items() if bits < 8}
    if coarse <= EXPERT_ROLES and f"{name}-mixed" in RECIPES:
        name += "-mixed"
    if name not in RECIPES:
        raise no_bounds(name)
    return name


def packing(entry: dict) -> tuple[int, str]:
    """Return bits and mode of a role or path."""
    bits, mode = entry.get("bits"), entry.get("mode", "affine")
    if type(bits) is not int or not isinstance(mode, str):
        raise no_bounds(brief(entry))
    return bits, mode


def no_bounds(quantization: str) -> UserError:
    return UserError(
        f"there are no bounds for quantisation `{quantization}`",
        f"`--bounds NAME` takes those of one of {', '.join(RECIPES)}",
    )


def combine(*rows: Bound) -> Bound:
    """Return the bound where all these sources of difference apply."""
    columns = Bound(*zip(*rows, strict=True))
    square = [math.hypot(*column) for column in columns]
    return Bound(*square)._replace(
        tie=max(columns.tie),
        rerouted=sum(columns.rerouted),
        kl=sum(columns.kl),
    )


@dataclass(frozen=True)
class Breach:
    """One number that left its bound; `where` is a stage, or whose text."""

    where: str
    what: str
    value: float
    bound: float

    def __str__(self) -> str:
        return f"{self.where} left its bound: {self.what} {self.value:.2g} (bound {self.bound:.2g})"


class Verdict:
    """A result against what its sources of difference allow."""

    def __init__(self, result: Result, sources: Sources):
        self.result, self.sources = result, sources
        self.breaches = [breach for stage in result.stages.values() for breach in self.judge(stage)]
        # The teacher's text is that of golden's final states: it tells of the head alone.
        texts = {HEAD: result.head, "the text": result.text}
        texts |= {"the MTP module's text": result.mtp_text}
        for name, text in texts.items():
            if text is not None and text.losses:
                where = HEAD if sources.teacher_forced else name
                self.breaches += self.judge_text(where, text)

    @property
    def num_tokens(self) -> int:
        return len(self.result.text.divergences)

    @property
    def is_too_short(self) -> bool:
        """Say whether the text proves nothing where it shows nothing."""
        return self.num_tokens < LEAST_TOKENS

    def bound(self, name: str) -> Bound:
        """Return a stage's bound, grown with the root of the depth beyond the demo's."""
        stage, bound, growth = self.result.stages[name], self.sources.bound(name), self.growth(name)
        if stage.is_disturbed or not all(stage.is_alike):
            bound = combine(bound, DISTURBED if stage.is_disturbed else REROUTED)
        if num := stage.num_choices(bound.tie):  # of few choices a few more may be other ones
            room = 3 + 2 * math.sqrt(bound.rerouted * num)
            bound = bound._replace(rerouted=bound.rerouted + room / num)
        return bound._replace(**{what: growth * getattr(bound, what) for what in STAGE_MEASURES})

    def text_bound(self, text: TokenDifferences) -> Bound:
        """Return the bound of a text: the fewer its tokens, the more one of them may move a mean.

        While routers agree, a loss differs by the recipe's own number times 1 - p, where golden
        gives the token p; so the mean over n differs by that times sqrt(doubt / n). A rerouted
        position moves one loss by up to a nat.
        """
        bound, n = self.sources.bound(), len(text.losses)
        spread = bound.perplexity * math.sqrt(max(1, FLAT_TOKENS * text.doubt / n))
        room = math.sqrt(text.num_rerouted) / n
        return bound._replace(
            kl=bound.kl + REROUTED_KL * room,
            perplexity=math.hypot(spread, REROUTED_LOSS * room),
        )

    def growth(self, name: str) -> float:
        depth = list(self.result.stages).index(name)
        is_free = not self.sources.teacher_forced
        return math.sqrt(depth / DEMO_STAGES) if is_free and depth > DEMO_STAGES else 1.0

    @property
    def is_provisional(self) -> bool:
        """Say whether bounds are a guess: nothing deeper than the demo model was measured."""
        return any(self.growth(name) > 1 for name in self.result.stages)

    def judge(self, stage: Stage) -> list[Breach]:
        """Return what of a stage is out of bounds."""
        bound, values = self.bound(stage.name), {}
        agreement = stage.agreement(bound.tie)
        for what in STAGE_MEASURES[:3]:
            values[what] = getattr(stage, what)
        values["rerouted"] = 0.0 if agreement is None else 1 - agreement
        return breaches(stage.name, values, bound)

    def judge_text(self, where: str, text: TokenDifferences) -> list[Breach]:
        """Return what of the logits' numbers is out of bounds."""
        ours, golden = text.perplexities
        values = {"kl": text.kl, "perplexity": abs(ours / golden - 1)}
        return breaches(where, values, self.text_bound(text))


def breaches(where: str, values: dict[str, float], bound: Bound) -> list[Breach]:
    return [
        Breach(where, LONG_NAMES[what], value, getattr(bound, what))
        for what, value in values.items()
        if not value <= getattr(bound, what)
    ]


STAGE_MEASURES = ("error", "worst", "channel", "rerouted")
LONG_NAMES = {
    "error": "mean row error",
    "worst": "worst row error",
    "channel": "worst channel error",
    "rerouted": "other experts outside ties",
    "kl": "mean KL divergence",
    "perplexity": "relative difference of perplexity",
}
