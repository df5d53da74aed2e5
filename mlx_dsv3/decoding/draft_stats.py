"""What drafting did in one reply: steps, drafts, acceptance, speed. Counts only; knows no model."""

from dataclasses import dataclass, field, replace

from mlx_dsv3.decoding.draft_control import MAX_DRAFTS

LEAST_TOKENS = 64  # of a reply that say how fast drafting was


@dataclass
class DraftStats:
    """What the control chose and what came of it, in one reply.

    `steps` counts main forwards by the number of drafts made; `lengths` those with drafts by the
    number accepted; `unseen` counts the tokens that were chosen and not yielded, yet or ever. The
    `warm` ones leave out the first step of each kind, which compiles kernels. `plain_step_s` is the
    control's own measurement, None until it has one.
    """

    steps: list[int] = field(default_factory=lambda: [0] * (MAX_DRAFTS + 1))
    drafted: list[int] = field(default_factory=lambda: [0] * MAX_DRAFTS)
    accepted: list[int] = field(default_factory=lambda: [0] * MAX_DRAFTS)
    lengths: list[int] = field(default_factory=lambda: [0] * (MAX_DRAFTS + 1))
    unseen: int = 0
    seconds: float = 0.0
    warm_tokens: int = 0
    warm_s: float = 0.0
    plain_step_s: float | None = None

    def copy(self) -> "DraftStats":
        lists = ("steps", "drafted", "accepted", "lengths")
        return replace(self, **{name: list(getattr(self, name)) for name in lists})

    def observe(self, drafts: int, accepted: int, seconds: float, is_warm: bool) -> None:
        self.steps[drafts] += 1
        self.lengths[accepted] += drafts > 0
        self.seconds += seconds
        if is_warm:
            self.warm_tokens += accepted + 1
            self.warm_s += seconds
        for i in range(drafts):
            self.drafted[i] += 1
            self.accepted[i] += i < accepted

    @property
    def draft_steps(self) -> int:
        return sum(self.steps[1:])

    @property
    def tokens(self) -> int:
        """Return the tokens that the reply got from these steps."""
        return sum(self.steps) + sum(self.accepted) - self.unseen

    @property
    def acceptance(self) -> list[float]:
        """Return the share accepted of the drafts made, by position."""
        return [a / d for a, d in zip(self.accepted, self.drafted, strict=True) if d]

    @property
    def mean_accepted(self) -> float:
        """Return the mean number of drafts accepted in a step that made some."""
        return sum(self.accepted) / max(self.draft_steps, 1)

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / max(sum(self.steps), 1)

    @property
    def speed_up(self) -> float | None:
        """Return what plain steps would have taken over what the warm steps took.

        None where that is not known, or from fewer tokens than say anything about it.
        """
        tokens = self.warm_tokens - self.unseen
        if self.plain_step_s is None or not self.draft_steps or tokens < LEAST_TOKENS:
            return None
        return self.plain_step_s * tokens / max(self.warm_s, 1e-9)
