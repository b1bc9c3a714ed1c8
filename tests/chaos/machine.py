"""The state machine: Hypothesis chooses what users do and what breaks, real processes live with it. One seed, one plan.

A plan is replayed by its seed; what the processes make of it is not, so nothing is shrunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from chaos.episode import Episode
from chaos.steps import STEPS, Step
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

Make = Callable[[int, int, str], Episode]


@dataclass(slots=True, eq=False)
class Stage:
    """What outlives the machines of one plan: how an episode is made, and what went wrong in its own doing."""

    make: Make
    machines: int = 0
    error: BaseException | None = None


class Chaos(RuleBasedStateMachine):
    """One episode. The first that Hypothesis makes is the simplest there is, one rule over and over: it is left out."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self._stage = stage
        stage.machines += 1
        self._episode: Episode | None = None

    @initialize(dice=st.integers(0, 2**32), count=st.integers(2, 5), store=st.sampled_from(("s3", "s3", "files")))
    def begin(self, dice: int, count: int, store: str) -> None:
        if self._stage.machines == 2:
            with self._noted():
                self._episode = self._stage.make(dice, count, store).__enter__()

    @rule(step=STEPS)
    def step(self, step: Step) -> None:
        """Something happens, and some time passes."""
        if self._episode is not None and self._stage.error is None:
            with self._noted():
                step.do(self._episode)
                self._episode.go_on(step.after)

    def teardown(self) -> None:
        if self._episode is not None:
            try:
                with self._noted():
                    if self._stage.error is None:
                        self._episode.close()
            finally:
                self._episode.__exit__()

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Hypothesis would play a plan that fails again, to shrink it: it hears of nothing but an interrupt."""
        try:
            yield
        except Exception as error:
            self._stage.error = error
        except BaseException as error:
            self._stage.error = error
            raise


def play(number: int, steps: int, make: Make) -> None:
    """Play the plan of this seed, once. Raises what went wrong in the playing; what the checks found lies with the episode."""
    stage = Stage(make)
    options = settings(
        max_examples=2,
        stateful_step_count=steps,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seed(number)(partial(Chaos, stage)), settings=options)
    if stage.error is not None:
        raise stage.error
    assert stage.machines == 2, "one machine that is left out and one that plays"
