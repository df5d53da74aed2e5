"""How many drafts a step should make: decided by measured time, never by hope.

Verifying drafts costs reads and arithmetic, more so at long contexts and with experts on disk.
The gate keeps the seconds per token of plain steps and of steps with 1, 2, ... drafts, by context
length, and uses the cheapest. What it may lose by trying is bounded: after the first trial of
`FIRST_TRIAL` steps, a trial is made only while all time lost to trials stays below `LOSS_SHARE`
of the time spent.
"""

from collections import defaultdict, deque
from statistics import median

MAX_DRAFTS = 4
FIRST_TRIAL = 3  # steps with one draft before the first plain burst
TRIAL_STEPS = 2
PLAIN_BURST = 16  # plain steps between decisions: they are double-buffered, one alone is not
LOSS_SHARE = 0.015
WINDOW = 12  # measurements kept for each number of drafts
WIN = 0.98  # a challenger must be 2 % cheaper


class Gate:
    """`choose` a number of drafts, then `record` what the step took.

    `fixed` switches the choice off. One gate may live as long as the model: what it has learnt
    holds for the next reply.
    """

    def __init__(self, fixed: int | None = None, max_drafts: int = MAX_DRAFTS):
        self.fixed, self.max_drafts = fixed, max_drafts
        self.steps = defaultdict(lambda: deque(maxlen=WINDOW))  # (bucket, k) -> (s, tokens)
        self.total_s = self.lost_s = 0.0
        self.trial: tuple[int, int] | None = None  # (drafts, steps left)
        self.since_trial = 0
        self.skip_next = True  # the first step of all compiles and pages in

    @staticmethod
    def bucket(context: int) -> int:
        """Return the power of two of the context, from 2,048 up."""
        return max(context, 1024).bit_length()

    def cost(self, context: int, drafts: int) -> float | None:
        """Return the measured seconds per token, None without measurements."""
        steps = self.steps.get((self.bucket(context), drafts))
        if not steps:
            return None
        seconds = median(s for s, _ in steps)
        return seconds * len(steps) / sum(tokens for _, tokens in steps)

    def best(self, context: int) -> int:
        """Return the cheapest number of drafts among the measured ones."""
        costs = {k: self.cost(context, k) for k in range(self.max_drafts + 1)}
        known = {k: cost * (1 if k == 0 else 1 / WIN) for k, cost in costs.items() if cost}
        return min(known, key=known.get) if known else 1

    def choose(self, context: int) -> int:
        """Return how many drafts the next step should make."""
        if self.fixed is not None:
            return self.fixed
        if self.trial and self.trial[1] > 0:
            return self.trial[0]
        self.trial = None
        if self.cost(context, 1) is None:
            self.trial = (1, FIRST_TRIAL)
            return 1
        if self.cost(context, 0) is None:
            return 0
        best = self.best(context)
        challenger = self.challenger(context, best)
        if challenger is not None:
            self.trial, self.since_trial = (challenger, TRIAL_STEPS), 0
            return challenger
        return best

    def challenger(self, context: int, best: int) -> int | None:
        """Return a neighbour of the best worth trying now, None while that could cost too much."""
        neighbours = [k for k in (best + 1, best - 1) if 0 <= k <= self.max_drafts]
        unknown = [k for k in neighbours if self.cost(context, k) is None]
        if self.since_trial < PLAIN_BURST:
            return None
        choice = (unknown or [neighbours[(self.since_trial // PLAIN_BURST) % len(neighbours)]])[0]
        cost, known = self.cost(context, best), self.cost(context, choice)
        # An unknown number of drafts is taken to be as dear as its steps would be in vain.
        loss = (known - cost if known else cost) * TRIAL_STEPS * (1 + choice)
        if self.lost_s + max(loss, 0) > LOSS_SHARE * self.total_s:
            return None
        return choice

    def record(self, context: int, drafts: int, seconds: float, tokens: int) -> None:
        """Record one step (or a plain burst's average step): its time and tokens emitted."""
        self.total_s += seconds
        self.since_trial += 1
        if self.skip_next:
            self.skip_next = False
            return
        best = self.cost(context, 0 if self.trial is None else self.best(context))
        if self.trial and best is not None:
            self.lost_s += max(0.0, seconds - tokens * best)
        if self.trial:
            self.trial = (self.trial[0], self.trial[1] - 1)
        self.steps[self.bucket(context), drafts].append((seconds, tokens))
