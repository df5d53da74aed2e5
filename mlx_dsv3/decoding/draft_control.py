"""How many drafts a step should make: decided by measured time, never by hope.

Verifying drafts costs reads and arithmetic, more so at long contexts and with experts on disk. So
the seconds of steps with 0, 1, 2, ... drafts are measured, by context length, and how often the
draft at each position is accepted. The number is used whose seconds per token are least.

Other numbers are measured in *trials*: of plain steps, and of one draft more than now. A trial ends
with its first rejected draft. A number is tried again `TRIAL_EVERY` steps after its last step. Each
trial that loses doubles that wait, up to `RAREST`, unless all its drafts were accepted. A number
that could not win if all its drafts were accepted waits `HOPELESS` steps, and is then measured
anew: its times may be those of a slow start.

The first step of each kind in a row is not timed. After plain steps a draft waits for the MTP cache
and for experts (with streamed ones it took 22 ms instead of 13), and a kernel may be compiled.

What that guarantees: where no draft is ever accepted, each trial is one step, and soon there is one
in `RAREST` steps. So drafting loses the extra time of three first steps, of about three trials, and
then of one step in 256; or of three in `HOPELESS`, where it could not win. It does not bound what
a change costs. A text that becomes easy is noticed after up to `RAREST` steps; one that becomes
hard after up to about 50 outcomes (`FORGET`), which loses up to 60 plain steps saved before.

It reads no clock: the caller says what a step took. With several machines one of them can decide.
"""

import math
from collections import deque
from statistics import median_low

from mlx_dsv3.errors import UserError

MAX_DRAFTS = 4
FIRST_STEPS = 3  # with one draft, before anything is known: the first one is not timed
TRIAL_STEPS = 4  # of a trial at most
TRIAL_EVERY = 32  # steps from the last one with a number of drafts to its trial,
RAREST = 256  # doubled up to this many by trials that lose
HOPELESS = 512  # for one that cannot win
WINDOW = 15  # times kept of each kind of step
ENOUGH = 2  # of them before they count: one may have been disturbed
FORGET = 0.98  # weight of an outcome after each later one: about the last 50 count
EXPECTED = 0.8  # acceptance before any was seen; weighs as one outcome
WIN = 0.99  # another number must be 1 % cheaper than the current one, and drafts than none


def fixed_drafts(drafts: str | int, has_mtp: bool = True) -> int | None:
    """Return the number of drafts that `--drafts` fixes, None for `auto`; refuse any other."""
    if str(drafts) not in ("auto", *map(str, range(MAX_DRAFTS + 1))):
        raise UserError(f"`--drafts` is `{drafts}`", f"choose auto or 0 to {MAX_DRAFTS}")
    if str(drafts) == "auto":
        return None
    if int(drafts) and not has_mtp:
        raise UserError(
            f"`--drafts {drafts}` needs the MTP module and the folder has no `mtp.safetensors`",
            "`python -m convert mtp SOURCE FOLDER` adds it from the original checkpoint",
        )
    return int(drafts)


class DraftControl:
    """`choose` a number of drafts, which changes nothing; then `observe` what the step took.

    `fixed` switches the choice off. One control may live as long as the model: what it has learnt
    holds for the next reply.
    """

    def __init__(self, fixed: int | None = None):
        self.fixed = fixed
        self.times: dict[tuple[int, int], deque] = {}  # (bucket, drafts) -> seconds
        self.usual: dict[tuple[int, int], float] = {}  # their medians, once there are ENOUGH
        self.tried = [0.0] * MAX_DRAFTS  # outcomes at each position, later ones weighing more
        self.accepted = [0.0] * MAX_DRAFTS
        self.current = self.trial = 1
        self.trial_left = FIRST_STEPS
        self.since = [1] * (MAX_DRAFTS + 1)  # steps since the last one, by number of drafts
        self.wait = [TRIAL_EVERY] * (MAX_DRAFTS + 1)  # so many until the next trial

    @staticmethod
    def bucket(context: int) -> int:
        """Return the power of two of the context, from 2,048 up."""
        return max(context, 1024).bit_length()

    def is_warm(self, drafts: int) -> bool:
        """Say whether a step with so many drafts was taken before: its kernels are compiled."""
        return any(k == drafts for _, k in self.times)

    def step_s(self, context: int, drafts: int) -> float | None:
        """Return the measured seconds of a step, None where it was not taken often ENOUGH.

        At a length without measurements, those of the nearest one, scaled as plain steps were.
        """
        here = self.bucket(context)
        if (here, drafts) in self.usual:
            return self.usual[here, drafts]
        known = [b for b, k in self.usual if k == drafts]
        if not known:
            return None
        nearest = min(known, key=lambda b: abs(b - here))
        plain, plain_there = self.usual.get((here, 0)), self.usual.get((nearest, 0))
        scale = plain / plain_there if plain and plain_there else 1.0
        return self.usual[nearest, drafts] * scale

    def costs(self, context: int) -> list[float]:
        """Return seconds per token by number of drafts, infinite where they are not known."""
        costs, tokens, chance, rate = [], 0.0, 1.0, EXPECTED
        for k in range(MAX_DRAFTS + 1):
            if k:
                rate = (self.accepted[k - 1] + rate) / (self.tried[k - 1] + 1)
                chance *= rate
            tokens += chance
            costs.append((self.step_s(context, k) or math.inf) / tokens)
        return costs

    def best(self, context: int) -> int:
        """Return the cheapest number of drafts; the current one and none have a small lead."""
        costs = self.costs(context)
        for k in {0, self.current}:
            costs[k] *= WIN
        return costs.index(min(costs))

    def choose(self, context: int) -> int:
        """Return how many drafts the next step should make."""
        if self.fixed is not None:
            return self.fixed
        return self.trial if self.trial_left else self.best(context)

    def observe(self, context: int, drafts: int, seconds: float, accepted: int = 0) -> None:
        """Learn from a step: what it took, and how many of its drafts were accepted."""
        for i in range(min(accepted + 1, drafts)):
            self.tried[i] = self.tried[i] * FORGET + 1
            self.accepted[i] = self.accepted[i] * FORGET + (i < accepted)
        key = self.bucket(context), drafts
        times = self.times.setdefault(key, deque(maxlen=WINDOW))
        if is_measured := self.since[drafts] == 0:
            times.append(seconds)
        if len(times) >= ENOUGH:
            self.usual[key] = median_low(times)
        self.since = [steps + 1 for steps in self.since]
        self.since[drafts] = 0
        if self.trial_left and drafts == self.trial:
            is_over = accepted < drafts or is_measured and not self.can_win(context, drafts)
            self.go_on(context, is_over and self.step_s(context, drafts) is not None)
        if not self.trial_left:
            self.plan(context)

    def go_on(self, context: int, is_over: bool) -> None:
        """Count a step of the trial; after its last one, say when the next one is due."""
        self.trial_left = 0 if is_over else self.trial_left - 1
        if not self.trial_left:
            costs, k = self.costs(context), self.trial
            is_lost = costs[k] > min(costs) and (is_over or not k)
            self.wait[k] = min(2 * self.wait[k], RAREST) if is_lost else TRIAL_EVERY

    def plan(self, context: int) -> None:
        """Settle on the best number, and begin the trial that is due, if one is."""
        self.current = self.best(context)
        for k in (0, self.current + 1):
            if k <= MAX_DRAFTS and self.is_due(context, k):
                if not self.can_win(context, k):  # its times may be those of a slower hour
                    self.times = {key: t for key, t in self.times.items() if key[1] != k}
                    self.usual = {key: t for key, t in self.usual.items() if key[1] != k}
                self.trial, self.trial_left = k, TRIAL_STEPS
                return

    def is_due(self, context: int, drafts: int) -> bool:
        """Say whether a number should be tried: at once where nothing is known of it.

        Plain steps are what all others are scaled by, so they are measured at every length.
        """
        is_known = (self.bucket(context), 0) in self.usual and self.step_s(context, drafts)
        least = 0 if self.can_win(context, drafts) else HOPELESS
        return not is_known or self.since[drafts] >= max(self.wait[drafts], least)

    def can_win(self, context: int, drafts: int) -> bool:
        """Say whether drafts could be cheapest if all were accepted; plain steps always may."""
        seconds = self.step_s(context, drafts) or 0.0
        return not drafts or seconds / (drafts + 1) < WIN * self.costs(context)[self.current]
