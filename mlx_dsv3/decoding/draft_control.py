"""How many drafts a step should make: decided by measured time, never by hope.

Verifying drafts costs reads and arithmetic, more so at long contexts and with experts on disk. So
the seconds of plain steps and of steps with 1, 2, ... drafts are measured, by context length, and
how often the draft at each position is accepted; the number is used whose seconds per token are
least. A number that was not tried yet is forecast: one draft more costs what the last one cost
more, and is accepted as often as the one before it.

What wrong guesses can cost is bounded by an account of *credit*, in plain steps: a draft step pays
what it took beyond plain steps for its tokens, or earns what it saved, and is taken only where the
credit covers it in vain. So beyond the first `FIRST_STEPS` steps, drafting loses at most LOSS_SHARE
of the time and `START_CREDIT` plain steps (or `MAX_CREDIT` of those that it saved before), whatever
was forecast, and what the last return to plain steps took, a step at most. Not charged is the part
of a step beyond twice what was expected, a disturbance of the machine, which says nothing about
drafts; nor is the first step with so many drafts, which compiles kernels.
"""

import math
from collections import deque
from statistics import median_low

from mlx_dsv3.errors import UserError

MAX_DRAFTS = 4
FIRST_STEPS = 2  # with one draft, before anything is known
FIRST_PLAIN = 6  # plain steps after them
TRIAL_STEPS = 2
MORE_STEPS = 8  # of a trial after plain steps, each while all drafts are accepted: they grow warm
TRIAL_EVERY = 32  # steps between trials
REFRESH_STEPS = 4  # plain steps in between, so that the comparison stays true,
REFRESH_EVERY = 160  # after so many steps with drafts,
REFRESH_FACTOR = 8  # or so many for each plain time known, if fewer
LOSS_SHARE = 0.01
START_CREDIT = 2.0
RESERVE_STEPS = 200  # so that a short first reply loses little
MAX_CREDIT = 6.0
WINDOW = 15  # times kept of each kind of step
ENOUGH = 2  # of them before they count: the first may have compiled kernels
FORGET = 0.96  # weight of an outcome after each later one: about the last 25 count
EXPECTED = 0.8  # acceptance before any was seen; weighs as one outcome
LEAST_COST = 0.05  # of a draft, in plain steps
WIN = 0.98  # drafts must be 2 % cheaper than none, and another number than the current one


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
    """`choose` a number of drafts, then `record` what the step took.

    `fixed` switches the choice off. One control may live as long as the model: what it has learnt
    holds for the next reply.
    """

    def __init__(self, fixed: int | None = None, max_drafts: int = MAX_DRAFTS):
        self.fixed, self.max_drafts = fixed, max_drafts
        self.times: dict[tuple[int, int], deque] = {}  # (bucket, drafts) -> seconds
        self.usual: dict[tuple[int, int], float] = {}  # their medians, once there are ENOUGH
        self.tried = [0.0] * MAX_DRAFTS  # outcomes at each position, later ones weighing more
        self.accepted = [0.0] * MAX_DRAFTS
        self.taken: set[int] = set()  # numbers of drafts of the steps so far
        self.credit, self.has_paid = START_CREDIT, False
        self.was_drafting, self.first_plain_s, self.last_plain_s = False, 0.0, 0.0
        self.current = 1
        self.trial, self.trial_left, self.more_steps = 1, FIRST_STEPS, 0
        self.steps = self.since_trial = self.since_plain = 0

    @staticmethod
    def bucket(context: int) -> int:
        """Return the power of two of the context, from 2,048 up."""
        return max(context, 1024).bit_length()

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

    def rate(self, position: int) -> float:
        """Return how often the draft at a position is accepted, once those before it were."""
        before = EXPECTED if position == 0 else self.rate(position - 1)
        return (self.accepted[position] + before) / (self.tried[position] + 1)

    def forecast(self, context: int) -> list[tuple[float, float]]:
        """Return (seconds, tokens) of a step by number of drafts; times of 0 and 1 are known.

        One number beyond those that were measured is extrapolated; more is out of reach for now.
        A draft is never free, whatever times of another hour say.
        """
        plain, chance = self.step_s(context, 0), self.rate(0)
        steps, is_known = [(plain, 1.0)], True
        for k in range(1, self.max_drafts + 1):
            last, tokens = steps[-1]
            seconds = self.step_s(context, k)
            if seconds is None:
                seconds = last + max(last - steps[-2][0], 0.0) if is_known else math.inf
                is_known = False
            if k > 1:
                chance *= self.rate(k - 1)
            steps.append((max(seconds, last + LEAST_COST * plain), tokens + chance))
        return steps

    def choose(self, context: int) -> int:
        """Return how many drafts the next step should make."""
        if self.fixed is not None:
            return self.fixed
        if not self.trial_left:
            self.more_steps = 0
            self.begin_trial(context)
        if self.trial_left:
            return self.trial
        steps = self.forecast(context)
        costs = [seconds / tokens for seconds, tokens in steps]
        costs[0] *= WIN
        costs[self.current] *= WIN if self.current else 1
        best = costs.index(min(costs))
        if best and self.risk(steps, best) > self.credit:
            best = 0
        self.current = best
        return best

    @staticmethod
    def risk(steps: list[tuple[float, float]], drafts: int) -> float:
        """Return what a step loses, in plain steps, where none of its drafts is accepted.

        Two for each draft at most: more is a disturbance, which must not deter for ever.
        """
        return min(max(steps[drafts][0] / steps[0][0] - 1, 0.0), 2.0 * drafts)

    def begin_trial(self, context: int) -> None:
        """Begin to measure what is due: plain steps, or a number of drafts next to the current."""
        plain = self.times.get((self.bucket(context), 0), ())
        if self.step_s(context, 1) is None:
            self.trial, self.trial_left = 1, FIRST_STEPS
        elif len(plain) < ENOUGH:
            self.trial, self.trial_left = 0, FIRST_PLAIN
        elif self.since_plain >= min(REFRESH_EVERY, REFRESH_FACTOR * len(plain)):
            self.trial, self.trial_left = 0, REFRESH_STEPS
        elif self.since_trial >= TRIAL_EVERY:
            self.begin_neighbour(context)

    def begin_neighbour(self, context: int) -> None:
        """Begin a trial of the neighbour known least, if the credit covers it.

        In the first RESERVE_STEPS, drafts that never paid may use what was earned since, not the
        credit they started with.
        """
        near = [k for k in (self.current + 1, self.current - 1) if 0 < k <= self.max_drafts]
        if not near:
            return
        k = min(near, key=lambda k: len(self.times.get((self.bucket(context), k), ())))
        reserve = 0.0 if self.has_paid or self.steps >= RESERVE_STEPS else START_CREDIT
        if self.credit - reserve < TRIAL_STEPS * self.risk(self.forecast(context), k):
            return
        self.trial, self.trial_left = k, TRIAL_STEPS
        if not self.current:
            self.more_steps = MORE_STEPS
            self.forget()

    def forget(self) -> None:
        """Let all outcomes so far weigh as one: the text may have become easier."""
        for position, tried in enumerate(self.tried):
            if tried > 1:
                self.accepted[position] /= tried
                self.tried[position] = 1.0

    def observe(self, context: int, drafts: int, seconds: float, accepted: int = 0) -> None:
        """Record what a step took and how many of its drafts were accepted.

        The time of the first step with so many drafts holds the compilation of its kernels: it
        charges nothing, and weighs as one of the ENOUGH measurements whose lower one counts.
        """
        self.steps += 1
        self.since_trial = 0 if self.trial_left else self.since_trial + 1
        self.trial_left -= self.trial_left > 0 and drafts == self.trial
        self.since_plain = self.since_plain + 1 if drafts else 0
        if self.is_warm(drafts):
            self.charge(context, drafts, seconds, accepted)
        self.taken.add(drafts)
        if self.more_steps and not self.trial_left and 0 < drafts == accepted:
            if self.risk(self.forecast(context), drafts) <= self.credit:
                self.trial_left, self.more_steps = 1, self.more_steps - 1
        for position in range(min(accepted + 1, drafts)):
            self.tried[position] = self.tried[position] * FORGET + 1
            self.accepted[position] = self.accepted[position] * FORGET + (position < accepted)
        key = self.bucket(context), drafts
        times = self.times.setdefault(key, deque(maxlen=WINDOW))
        times.append(seconds)
        if len(times) >= ENOUGH:
            self.usual[key] = median_low(times)

    def is_warm(self, drafts: int) -> bool:
        """Say whether a step with so many drafts was taken before: its kernels are compiled."""
        return drafts in self.taken

    def charge(self, context: int, drafts: int, seconds: float, accepted: int) -> None:
        """Book a step: drafts pay what they took beyond plain steps; time earns LOSS_SHARE.

        The first plain step after them may take longer: it could not begin while the step before
        still ran. As far as the last plain step before the next drafts is as much shorter (it had
        run when the one before it ended), nothing was lost; the rest is paid then. A short plain
        step elsewhere saves nothing: it ran while the reader of the tokens was busy.
        """
        plain = self.step_s(context, 0)
        if plain is not None and self.step_s(context, 1) is not None:
            expected = self.forecast(context)[drafts][0] if drafts else plain
            took = min(seconds, 2 * expected) / plain
            self.credit += LOSS_SHARE * took
            if drafts:
                self.credit += accepted + 1 - max(took, 1.0)
                if not self.was_drafting:
                    longer = min(self.first_plain_s / plain - 1, 1.0)
                    self.credit -= max(longer - max(1 - self.last_plain_s / plain, 0.0), 0.0)
                    self.first_plain_s = 0.0
            self.credit = min(self.credit, MAX_CREDIT)
            self.has_paid |= self.credit == MAX_CREDIT
        if not drafts:
            if self.was_drafting and plain is not None:  # not after the very first
                self.first_plain_s = seconds
            self.last_plain_s = seconds
        self.was_drafting = drafts > 0
