"""A time budget: how many steps an edit may take, from how long steps have taken here."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sdedit.checks import Number
from sdedit.errors import OptionError

REMEMBERED = 32  # measurements. The next is slower than the slowest of n with probability 1/(n + 1): here 3 %
FEW = 20  # measurements: with fewer, the slowest is taken to be slower still by what they differ, or by MARGIN
MARGIN = 0.05
CALIBRATION = (1, 2, 2)  # steps of the runs that are timed before the first edit; the first one also warms up
MOST_MS = 1e12  # a budget: thirty years
CALIBRATION_SHARE = 0.1  # of the budget: beyond that, what has been timed must do

Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Budget:
    """Why an edit took the steps it took. All times in milliseconds."""

    max_ms: float  # wanted
    spent_ms: float  # gone before the first step, or wanted after the last result: reading, calibrating, the caller's
    step_ms: float  # one step of one batch, as slow as it is expected to be
    finish_ms: float  # making a batch's pictures
    evaluations_per_step: int  # batches times repeats
    most_steps: int  # what would have run without a budget
    steps: int  # chosen


@dataclass
class StepTimes:
    """How long edits of one shape have taken: steps in a calibration, then in every edit; pictures in the first."""

    step_ms: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    finish_ms: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def calibrate(
        self,
        run: Callable[[int], object],
        finish: Callable[[], object],
        max_ms: float,
        most_steps: int,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Forget what was known. run: does that many steps; finish: makes their pictures. Slow ones are timed less."""
        new = StepTimes()  # in the old one's place once it is whole: other threads may be picking
        began = clock()
        for steps in (min(steps, most_steps) for steps in CALIBRATION):
            start = clock()
            run(steps)
            mid = clock()
            finish()
            new.step_ms.append(1e3 * (mid - start) / steps)
            new.finish_ms.append(1e3 * (clock() - mid))
            if 1e3 * (clock() - began) > CALIBRATION_SHARE * max_ms:
                break
        if len(new.step_ms) > 1:
            new.step_ms.popleft()  # the first run's: it also set things up
            new.finish_ms.popleft()
        self.step_ms, self.finish_ms = new.step_ms, new.finish_ms

    def pick(self, max_ms: float, spent_ms: float, *, batches: int, repeats: int, most_steps: int) -> Budget:
        """As many steps as fit, at most `most_steps`. Raises OptionError that says the least possible budget."""
        step_ms, finish_ms = _high(self.step_ms), _high(self.finish_ms)
        evaluations, before = batches * repeats, spent_ms + batches * finish_ms
        steps = math.floor(min(most_steps, (max_ms - before) / (evaluations * step_ms)))
        if steps < 1:
            least = math.ceil(before + evaluations * step_ms)
            raise OptionError(
                f"max_ms is {max_ms:g}; one step takes {evaluations * step_ms:.0f} ms beyond {before:.0f} ms for all "
                f"else: the least possible is {least}",
                hint=f"--max-ms {math.ceil(1.2 * least)}; or fewer samples and repeats, or a smaller model",
            )
        return Budget(max_ms, spent_ms, step_ms, finish_ms, evaluations, most_steps, steps)


def _high(samples: deque[float]) -> float:
    known = list(samples)  # other threads add to it
    slowest = max(known)
    return slowest if len(known) >= FEW else slowest + max(slowest - min(known), MARGIN * slowest)


def checked_max_ms(max_ms: object) -> float:
    """`max_ms` as a float. Raises OptionError."""
    if isinstance(max_ms, bool) or not isinstance(max_ms, Number) or not 0 < max_ms <= MOST_MS:
        raise OptionError(
            f"max_ms is {max_ms!r}; wanted milliseconds, above 0 and at most {MOST_MS:g}", hint="--max-ms 500"
        )
    return float(max_ms)


def checked_spent_ms(spent_ms: object) -> float:
    """`spent_ms` as a float. Raises OptionError."""
    if isinstance(spent_ms, bool) or not isinstance(spent_ms, Number) or not -MOST_MS <= spent_ms <= MOST_MS:
        raise OptionError(f"spent_ms is {spent_ms!r}; wanted milliseconds", hint="0 counts from the call")
    return float(spent_ms)
