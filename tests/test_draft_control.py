"""The control on simulated steps: what it may lose, what it must win. No clock is read.

Times have noise and spikes; what is compared are the true times of the steps that were chosen.
"""

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import pytest

from mlx_dsv3.decoding.draft_control import (
    FIRST_STEPS,
    HOPELESS,
    MAX_DRAFTS,
    RAREST,
    TRIAL_EVERY,
    TRIAL_STEPS,
    DraftControl,
)

PLAIN_S = 0.01


@dataclass
class World:
    """How long a step takes and which drafts are accepted; both by context length."""

    step_s: Callable[[int, int], float]
    rate: Callable[[int], float]
    noise: float = 0.05  # standard deviation of a step's logarithm
    spikes: float = 0.01  # share of steps that take 3 or 10 times as long
    restart: float = 0.0  # what a plain step after one with drafts takes longer, in its own length
    warm_up: tuple[float, ...] = ()  # what the first draft steps after 40 plain ones take longer
    pause_every: int = 0  # plain steps; the reader of the tokens then pauses, and a step ends in it

    def run(self, control: DraftControl, tokens: int, seed: int = 0, context: int = 100) -> "Run":
        draw, run, before, in_row, cold = random.Random(seed), Run(), 0, 0, 0.0
        while run.tokens < tokens:
            n = context + run.tokens
            drafts = min(control.choose(n), tokens - run.tokens - 1)
            accepted = 0
            while accepted < drafts and draw.random() < self.rate(n):
                accepted += 1
            seconds = self.step_s(n, drafts)
            if before and not drafts:
                seconds *= 1 + self.restart
            if drafts and in_row < len(self.warm_up):
                seconds *= 1 + self.warm_up[in_row] * cold
            cold = min(cold + 1 / 40, 1.0) if not drafts else cold if in_row < 4 else 0.0
            before, in_row = drafts, in_row + 1 if drafts else 0
            disturbance = math.exp(draw.gauss(0, self.noise))
            if draw.random() < self.spikes:
                disturbance *= draw.choice([3, 10])
            run.steps[drafts] += 1
            run.chosen.append(drafts)
            if self.pause_every and not drafts and run.steps[0] % self.pause_every == 0:
                disturbance = 0.1
            control.observe(n, drafts, seconds * disturbance, accepted)
            run.seconds += seconds
            run.plain_s += sum(self.step_s(n + i, 0) for i in range(accepted + 1))
            run.tokens += accepted + 1
        return run

    def speed_ups(self, tokens: int, context: int = 100, seeds: int = 24) -> list[float]:
        return sorted(
            self.run(DraftControl(), tokens, seed, context).speed_up for seed in range(seeds)
        )

    def best(self, context: int = 100) -> float:
        """Return the speed-up of the best fixed number of drafts."""
        rate, plain = self.rate(context), self.step_s(context, 0)
        tokens = [sum(rate**i for i in range(k + 1)) for k in range(MAX_DRAFTS + 1)]
        return max(plain * tokens[k] / self.step_s(context, k) for k in range(MAX_DRAFTS + 1))


class Run:
    def __init__(self):
        self.seconds = self.plain_s = 0.0
        self.tokens = 0
        self.steps = [0] * (MAX_DRAFTS + 1)
        self.chosen: list[int] = []

    @property
    def lost(self) -> float:
        """Return what the run took beyond plain decoding, in plain steps of a constant world."""
        return (self.seconds - self.plain_s) / PLAIN_S

    @property
    def speed_up(self) -> float:
        return self.plain_s / self.seconds


def constant(ratio: float, rate: float, **options) -> World:
    """Return a world where each draft costs `ratio` - 1 plain steps."""
    return World(lambda n, k: PLAIN_S * (1 + (ratio - 1) * k), lambda n: rate, **options)


@pytest.mark.parametrize("ratio", [1.1, 1.2, 1.3, 1.5, 2.0, 2.5])
def test_a_module_that_is_noise_costs_at_most_3_percent(ratio):
    """Every draft in vain, first reply of a new control, 200 tokens."""
    speed_ups = constant(ratio, 0.0).speed_ups(200)
    assert speed_ups[0] >= 0.97


@pytest.mark.parametrize("ratio", [1.1, 1.5, 2.0])
def test_so_does_one_whose_trials_interrupt_double_buffering(ratio):
    """A plain step that could not begin early is a part of what a trial costs."""
    speed_ups = constant(ratio, 0.0, restart=0.8).speed_ups(1500, seeds=20)
    assert speed_ups[0] >= 0.98


@pytest.mark.parametrize("pause_every", [3, 4, 8, 16, 32, 33])
@pytest.mark.parametrize("ratio", [1.2, 1.5, 2.0])
def test_a_reader_that_pauses_earns_nothing(ratio, pause_every):
    """Steps that ran while nobody waited for them saved no time that drafts could lose."""
    world = constant(ratio, 0.0, noise=0, spikes=0, pause_every=pause_every)
    for seed in range(3):
        run = world.run(DraftControl(), 2000, seed)
        assert run.lost <= FIRST_STEPS * (ratio - 1) + 0.005 * 2000


@pytest.mark.parametrize("ratio, rate", [(1.3, 0.85), (1.5, 0.85), (1.65, 0.9)])
def test_drafts_that_pay_only_once_warm_are_found(ratio, rate):
    """First the waiting states are caught up; then the experts of the module are read."""
    world = constant(ratio, rate, warm_up=(1.2, 0.4, 0.15, 0.05), restart=0.8)
    assert median(world.speed_ups(1000)) >= 1 + 0.3 * (world.best() - 1)


def starts(run: Run, drafts: int) -> list[int]:
    """Return the steps at which a run of so many drafts began."""
    before = [None, *run.chosen]
    return [i for i, k in enumerate(run.chosen) if k == drafts != before[i]]


@pytest.mark.parametrize("ratio", [1.3, 1.5, 1.9])
def test_the_stated_bound_holds(ratio):
    """Where no draft is accepted, a trial is one step, and comes half as often after each."""
    run = constant(ratio, 0.0, noise=0, spikes=0).run(DraftControl(), 2000)
    at = starts(run, 1)
    waits = [b - a - 1 for a, b in zip(at, at[1:], strict=False)][1:]  # the first follows 3 steps
    assert waits[0] in (TRIAL_EVERY, 2 * TRIAL_EVERY) and waits[-1] == RAREST
    assert all(b == min(2 * a, RAREST) for a, b in zip(waits, waits[1:], strict=False))
    assert run.steps[1] == FIRST_STEPS + len(at) - 1 and not any(run.steps[2:])
    assert run.lost == pytest.approx(run.steps[1] * (ratio - 1))


@pytest.mark.parametrize("ratio", [2.1, 4.0, 9.0])
def test_what_cannot_win_is_hardly_tried(ratio):
    """Even if the draft were accepted, such a step would take longer than two plain ones."""
    for rate in 0.0, 0.9:
        run = constant(ratio, rate, noise=0, spikes=0).run(DraftControl(), 2000)
        first, *later = starts(run, 1)
        assert first == 0 and later[-1] >= HOPELESS  # its time may have been that of a slow start
        assert run.steps[1] <= FIRST_STEPS + 3 * 4


@pytest.mark.parametrize("ratio", [1.05, 1.3, 2.0, 4.0])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6])
def test_little_is_lost_where_little_is_accepted(ratio, rate):
    for tokens in (60, 200, 1000):
        for seed in range(10):
            run = constant(ratio, rate, noise=0, spikes=0).run(DraftControl(), tokens, seed)
            assert (
                run.lost
                <= (FIRST_STEPS * (ratio - 1) + 2) * (1 + tokens // HOPELESS) + 0.005 * tokens
            )


def test_a_trial_ends_with_the_first_rejected_draft():
    for outcomes in ([0], [1, 0], [1, 1, 0], [1] * TRIAL_STEPS):
        control = DraftControl()
        for k in 1, 1, 1, *[0] * (TRIAL_STEPS + 1):
            control.observe(100, k, PLAIN_S * (1 + 0.9 * k))
        while control.choose(100) == 0:
            control.observe(100, 0, PLAIN_S)
        wait = control.wait[1]
        for accepted in outcomes:
            assert control.choose(100) == 1 and control.current == 0
            control.observe(100, 1, PLAIN_S * 1.9, accepted)
        assert not control.trial_left and control.choose(100) == 0
        # It has lost; but where all were accepted the text may have become easier.
        assert control.wait[1] == (TRIAL_EVERY if all(outcomes) else 2 * wait)


def test_a_number_that_was_in_use_is_soon_tried_again():
    """However long it had to wait before: what paid once may pay again."""
    world, control = constant(1.5, 0.0, noise=0, spikes=0), DraftControl()
    world.run(control, 2000)
    assert control.wait[1] == RAREST
    world.rate = lambda n: 0.95
    world.run(control, 1000)
    world.rate = lambda n: 0.0
    run = world.run(control, 400)
    left, again, *_ = starts(run, 1)
    assert again - left <= 2 * TRIAL_EVERY


def test_plain_steps_too_are_tried_less_and_less():
    """Where drafts pay, each look at plain steps costs what drafts would have saved."""
    run = constant(1.4, 0.95, noise=0, spikes=0).run(DraftControl(), 4000)
    at = starts(run, 0)
    assert len(at) <= 8 and at[-1] - at[-2] > RAREST


def test_choose_changes_nothing():
    """With several machines one asks and tells the others; the step is asked for twice."""
    world, control = constant(1.3, 0.8), DraftControl()
    for seed in range(40):
        world.run(control, 7, seed)
        before = copy.deepcopy(vars(control))
        assert len({control.choose(context) for _ in range(3) for context in (90, 90)}) == 1
        control.choose(50_000)
        assert vars(control) == before


def test_what_is_lost_after_acceptance_ends_for_good():
    """Text that was guessed at 90 %, then none of it: the last 50 outcomes have to be outlived."""
    losses = []
    for seed in range(20):
        world = constant(1.3, 0.9, noise=0, spikes=0)
        control = DraftControl()
        before = world.run(control, 400, seed)
        world.rate = lambda n: 0.0
        losses.append(world.run(control, 400, seed, context=500).lost)
        assert losses[-1] < -before.lost
    assert max(losses) <= 60


@pytest.mark.parametrize("ratio", [1.1, 1.2, 1.3, 1.5])
@pytest.mark.parametrize("rate", [0.6, 0.85, 0.95])
def test_drafts_that_pay_are_used(ratio, rate):
    """Within 12 % of the best fixed number of drafts over 600 tokens, search included."""
    world = constant(ratio, rate)
    assert median(world.speed_ups(600)) >= 0.88 * world.best()


def test_a_control_that_lives_on_has_no_search_to_pay():
    world, control = constant(1.3, 0.0), DraftControl()
    world.run(control, 300)
    speed_ups = [world.run(control, 60, seed).speed_up for seed in range(20)]
    assert median(speed_ups) >= 0.985 and min(speed_ups) >= 0.96


def test_very_noisy_times():
    """A busy machine: 30 % noise, 5 % of the steps many times too long."""
    losing = constant(1.3, 0.0, noise=0.3, spikes=0.05).speed_ups(600)
    assert losing[0] >= 0.85 and median(losing) >= 0.97
    winning = constant(1.3, 0.85, noise=0.3, spikes=0.05)
    assert median(winning.speed_ups(600)) >= 0.85 * winning.best()


def test_spikes_in_the_first_measurements_do_not_decide_for_good():
    """One draft step of ten times its length, when there is nothing else to compare with."""

    class Disturbed(World):
        def run(self, control, tokens, seed=0, context=100):
            for drafts, seconds in ((1, 0.13), (1, 0.014)):
                control.choose(context)
                control.observe(context, drafts, seconds, 1)
            return super().run(control, tokens, seed, context)

    world = Disturbed(lambda n, k: PLAIN_S * (1 + 0.3 * k), lambda n: 0.85)
    assert world.speed_ups(600)[0] >= 1.2


def test_a_slow_start_does_not_decide_for_good():
    """The first steps read weights and compile, and nothing was accepted; then all became fast."""
    world = constant(1.5, 0.85)
    for seed in range(10):
        control = DraftControl()
        for k, seconds in (1, 0.03), (1, 0.03), (1, 0.03), (0, 0.014), (0, 0.012), (0, 0.01):
            control.observe(100, k, seconds)
        assert world.run(control, 2500, seed).speed_up >= 1.15


def test_context_growth_turns_drafts_off():
    """Verification pays attention for every row: a number that won at 2k loses at 30k."""
    world = World(lambda n, k: PLAIN_S + k * (0.002 + 0.01 * n / 4000), lambda n: 0.85)
    assert world.run(DraftControl(), 1500).steps[0] < 150
    late = [world.run(DraftControl(), 1500, seed, context=30000) for seed in range(20)]
    assert all(run.steps[0] > 1400 and run.speed_up > 0.95 for run in late)
    assert world.speed_ups(9000, seeds=3)[0] >= 1.03


def test_a_longer_context_is_compared_with_itself():
    """Everything takes longer there: neither side may be judged by times of a short context."""
    world = World(lambda n, k: PLAIN_S * (1 + n / 4000) * (1 + 0.3 * k), lambda n: 0.85)
    for seed in range(10):
        control = DraftControl()
        world.run(control, 300, seed)
        assert world.run(control, 300, seed, context=60000).speed_up >= 1.4


def test_acceptance_that_comes_and_goes():
    """Text that cannot be guessed, then text that can: the control finds back to drafts."""
    rise = World(lambda n, k: PLAIN_S * (1 + 0.3 * k), lambda n: 0.9 if n > 400 else 0.0)
    speed_ups = rise.speed_ups(1500)
    assert speed_ups[0] >= 1.0 and median(speed_ups) >= 1.35
    fall = World(lambda n, k: PLAIN_S * (1 + 0.3 * k), lambda n: 0.9 if n < 400 else 0.0)
    assert fall.speed_ups(1000)[0] >= 1.03


def test_a_machine_that_slows_down_for_a_while():
    """Twice as slow between 500 and 900 tokens: both sides, so nothing should change for long."""

    def step_s(n, k):
        return PLAIN_S * (1 if n < 500 or n > 900 else 2) * (1 + 0.3 * k)

    assert World(step_s, lambda n: 0.85).speed_ups(1500, seeds=15)[0] >= 1.25
    assert World(step_s, lambda n: 0.0).speed_ups(1500, seeds=15)[0] >= 0.97


def test_extra_reads_count():
    """Streamed experts: two rows read nearly twice as much, so a step takes 1.9 plain ones."""
    runs = [constant(1.9, 0.8).run(DraftControl(), 600, seed) for seed in range(40)]
    assert min(run.speed_up for run in runs) >= 0.97
    assert median(run.steps[0] for run in runs) > 500


def test_the_first_step_drafts_one_and_none_more_than_the_most():
    assert DraftControl().choose(100) == 1
    run = constant(1.01, 0.98).run(DraftControl(), 400)
    assert run.steps[MAX_DRAFTS] > 60 and len(run.steps) == MAX_DRAFTS + 1


@pytest.mark.parametrize("drafts", [0, 2])
def test_fixed_stays_fixed(drafts):
    control = DraftControl(fixed=drafts)
    assert constant(3.0, 0.0).run(control, 50).steps[drafts] >= 48


def test_replies_of_one_token_teach_nothing_and_break_nothing():
    """The last token of a budget is never drafted for, whatever the control wished."""
    world, control = constant(1.3, 0.85), DraftControl()
    for seed in range(30):
        world.run(control, 1, seed)
    assert world.run(control, 300).speed_up > 1.2


def test_compile_time_is_no_evidence():
    """The first step of each kind compiles its kernels: it must not set the time."""
    control = DraftControl()
    for k, accepted in (1, 0), (1, 0), (1, 0), (0, 0), (0, 0), (0, 0):
        control.observe(100, k, PLAIN_S * 1.2 if control.is_warm(k) else 100 * PLAIN_S, accepted)
    assert control.step_s(100, 0) == control.step_s(100, 1) == PLAIN_S * 1.2
    assert control.is_warm(1) and not control.is_warm(2)


def test_plain_time_is_known_for_the_statistics():
    control = DraftControl()
    constant(1.3, 0.85, spikes=0).run(control, 300)
    assert control.step_s(200, 0) == pytest.approx(PLAIN_S, rel=0.1)
