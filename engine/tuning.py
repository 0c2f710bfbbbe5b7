"""The choice of t0 (Meng et al. 2022, section 3): the same guides and seeds from several t0, and the search for one.

From a larger t0 a result is more real and less like its guide. Both are measured here (metrics.py): L2 to the guide
grows with t0, KID to real pictures falls.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdedit import image
from sdedit.checks import real, whole
from sdedit.editor import Editor, listed
from sdedit.errors import ImageError, OptionError
from sdedit.image import Pixels, Source
from sdedit.jobs import Job
from sdedit.metrics import SUBSET_SIZE, kid, l2
from sdedit.options import MOST, EditOptions, make_options
from sdedit.results import Result
from sdedit.schedule import latest_t0, plan

EARLIEST = 0.02  # a search begins here: below, an edit is its guide
DIGITS = 4  # of a t0 that is searched for, so that it can be repeated as it is printed
EDITS = 8
TOLERANCE = 0.02
INNER = (0.75, 0.25)  # of the largest t0: where a KID that falls and rises again is looked for
FAR = 20  # times the wanted value or a part of it: what is further away counts as this far
BATCH = 8  # pictures in a network call where the caller does not say
LEAST_FOR_KID = 3
SHOWN = 8  # guides whose results are kept as pictures, however many are measured

Measure = Callable[[Pixels], NDArray[Any]]  # (N, H, W, 3) uint8 -> features (N, F)


@dataclass(frozen=True)
class Trial:
    """Every guide and seed, edited from one t0."""

    t0: float
    l2: float  # the mean over all results of √Σ(guide - result)², values in [0, 1]
    kid: float | None  # of all results to the real pictures, where there are some
    pictures: tuple[tuple[Pixels, ...], ...] = field(repr=False)  # of the first SHOWN guides, seed by seed


@dataclass(frozen=True)
class Found:
    """What a search returns."""

    trial: Trial  # of those not above the wanted value: from the largest t0, or for KID the smallest
    within: bool  # whether it is within TOLERANCE of the wanted value
    trials: tuple[Trial, ...]  # in the order they were made


class Tuner:
    """Guides that are read once and edited from any t0. Made by `open_tuner`."""

    def __init__(
        self, editor: Editor, jobs: Sequence[Job], options: EditOptions, run: Callable[[Sequence[Job]], list[Result]]
    ) -> None:
        self.options = options  # resolved; every trial has a t0 of its own
        self.sde = editor.sde
        self.latest = math.floor(10**DIGITS * latest_t0(editor.sde)) / 10**DIGITS  # the largest t0 to try
        self._jobs, self._run = jobs, run
        self._features: Measure | None = None
        self._real: NDArray[Any] = np.empty((0, 0))

    @property
    def guides(self) -> list[Pixels]:
        """The first SHOWN guides as results have them: in the model's frame, or whole where there are masks."""
        return [_seen(job) for job in self._jobs[:: self.options.samples][:SHOWN]]

    @property
    def notes(self) -> list[str]:
        """What was converted and enlarged on the way, for the user."""
        return list(dict.fromkeys(note for job in self._jobs for note in job.notes))

    def compare_with(self, features: Measure, real_pictures: NDArray[Any]) -> None:
        """From now on trials have a KID: to real pictures, given as their features (N, F). Raises OptionError."""
        if min(len(self._jobs), len(real_pictures)) < LEAST_FOR_KID:
            raise OptionError(
                f"KID needs {LEAST_FOR_KID} results and {LEAST_FOR_KID} real pictures; there are {len(self._jobs)} and "
                f"{len(real_pictures)}",
                hint="more guides, more samples (-n) or more real pictures; a hundred of each say something",
            )
        self._features, self._real = features, real_pictures

    def at(self, t0s: Sequence[float], on_batch: Callable[[int, int], None] | None = None) -> list[Trial]:
        """A trial of each t0; different t0 share batches. on_batch is told how many edits are done, of how many.

        Raises OptionError, NetworkError.
        """
        if np.ndim(t0s) != 1:
            raise OptionError(f"t0s is {t0s!r}; wanted a list of numbers", hint="one t0 is a list too: at([0.5])")
        tables = [plan(self.sde, **{**self.options.schedule(), "t0": t0}) for t0 in t0s]
        todo = [replace(job, table=table) for table in tables for job in self._jobs]
        distances: list[float] = []
        features: list[NDArray[Any]] = []
        pictures: list[Pixels] = []
        each, kept = len(self._jobs), SHOWN * self.options.samples
        for at in range(0, len(todo), self.options.batch):
            if on_batch is not None:
                on_batch(at, len(todo))
            group = todo[at : at + self.options.batch]
            made = np.stack([result.pixels for result in self._run(group)])
            distances += l2(np.stack([_seen(job) for job in group]), made).tolist()
            if self._features is not None:
                features.extend(self._features(made))
            pictures += [pixels for number, pixels in enumerate(made, start=at) if number % each < kept]
        if on_batch is not None:
            on_batch(len(todo), len(todo))
        kept = min(kept, each)
        return [
            self._trial(
                t0,
                distances[n * each : (n + 1) * each],
                features[n * each : (n + 1) * each],
                pictures[n * kept : (n + 1) * kept],
            )
            for n, t0 in enumerate(t0s)
        ]

    def _trial(self, t0: float, distances: list[float], features: list[NDArray[Any]], pictures: list[Pixels]) -> Trial:
        realism = None
        if features:
            size = min(SUBSET_SIZE, len(features), len(self._real))
            realism = kid(np.stack(features), self._real, subset_size=size).value
        seeds = self.options.samples
        by_guide = (tuple(pictures[at : at + seeds]) for at in range(0, len(pictures), seeds))
        return Trial(t0, float(np.mean(distances)), realism, tuple(by_guide))


@contextmanager
def open_tuner(
    editor: Editor,
    guides: Source | Sequence[Source],
    *,
    masks: Source | Sequence[Source] | None = None,
    t0s: int = 1,
    **options: Any,
) -> Iterator[Tuner]:
    """For the length of a `with` block, a Tuner of a guide, or of a list of them.

    masks: one for all guides, or one for each. t0s: how many t0 will be tried at a time. options: the fields of
    EditOptions; `batch` is chosen for them where it is not given. Result number j has the seed it has in `Editor.edit`.
    Raises ImageError, OptionError.
    """
    guides, masks = listed(guides), None if masks is None else listed(masks)
    chosen = make_options(options).resolved(editor.artifact.defaults)
    jobs = editor.prepare_all(guides, masks, chosen)
    if "batch" not in options:
        edits = whole("t0s", t0s, 1, MOST, hint="how many t0 are tried at a time") * len(jobs)
        chosen = replace(chosen, batch=math.ceil(edits / math.ceil(edits / BATCH)))
    if masks is not None and len({job.guide.size for job in jobs}) > 1:
        first_of_another = next(job for job in jobs if job.guide.size != jobs[0].guide.size)
        sizes = ["{}x{}".format(*job.guide.size) for job in (jobs[0], first_of_another)]
        raise ImageError(
            f"{jobs[0].guide.label}: is {sizes[0]}, and {first_of_another.guide.label} is {sizes[1]}",
            hint="with masks, results have their guides' sizes: tune guides of one size together",
        )
    with editor.batches(chosen) as run:
        yield Tuner(editor, jobs, chosen, run)


def search_t0(tuner: Tuner, measure: str, wanted: float, *, on_trial: Callable[[Trial], None] | None = None) -> Found:
    """The largest t0 whose L2 to the guides is at most `wanted`, or the smallest t0 whose KID is.

    measure: "l2" or "kid". In at most EDITS trials, by regula falsi (Illinois) on the logarithms of t0 and of the
    value: L2 is nearly a power of t0 where t0 is small. L2 is taken to grow with t0; where KID rises again, it is met
    where it falls. Raises OptionError where no t0 that was tried keeps to `wanted`.
    """
    if measure not in ("l2", "kid"):
        raise OptionError(f"unknown measure {measure!r}", hint="choose one of l2, kid")
    wanted = real(measure, wanted, 0, 1e9, with_low=False, hint="a number above 0, such as 12.5 for l2, 0.02 for kid")
    search = _Search(tuner, measure, wanted, on_trial)
    one, other = search.bracket()
    y_one, y_other = search.off[one], search.off[other]
    last = 0
    while not search.ended and len(search.trials) < EDITS:
        x, x_other = math.log(one), math.log(other)
        t0 = round(math.exp((x * y_other - x_other * y_one) / (y_other - y_one)), DIGITS)
        if t0 in search.off:
            break  # as near as DIGITS let it come
        y = search.attempt(t0)
        if (y < 0) == (y_one < 0):
            one, y_one = t0, y
            y_other /= 2 if last == 1 else 1  # the end that stays counts half
            last = 1
        else:
            other, y_other = t0, y
            y_one /= 2 if last == -1 else 1
            last = -1
    best = search.best()
    return Found(best, search.accepts(best), tuple(search.trials))


class _Search:
    """The trials of one search, and how far off their values are."""

    def __init__(self, tuner: Tuner, measure: str, wanted: float, on_trial: Callable[[Trial], None] | None) -> None:
        self._tuner, self._measure, self._wanted, self._on_trial = tuner, measure, wanted, on_trial
        self.trials: list[Trial] = []
        self._wished = tuner.latest if measure == "l2" else EARLIEST  # the best t0 if every t0 kept to it
        self.off: dict[float, float] = {}  # t0 -> log of its value over the middle of what is accepted

    def value(self, trial: Trial) -> float:
        """Raises OptionError: it has none."""
        found = getattr(trial, self._measure)
        if found is None:
            raise OptionError("trials have no KID", hint="Tuner.compare_with tells them of real pictures")
        return float(found)

    def accepts(self, trial: Trial) -> bool:
        return (1 - TOLERANCE) * self._wanted <= self.value(trial) <= self._wanted

    @property
    def ended(self) -> bool:
        """Whether the last trial will do: near to what is wanted, or below it where no t0 is better."""
        last = self.trials[-1]
        return self.accepts(last) or (last.t0 == self._wished and self.value(last) <= self._wanted)

    def best(self) -> Trial:
        """The largest or smallest t0 of those that keep to what is wanted."""
        kept = [trial for trial in self.trials if self.value(trial) <= self._wanted]
        return min(kept, key=lambda trial: abs(trial.t0 - self._wished))

    def attempt(self, t0: float) -> float:
        """How far off this t0 is."""
        (trial,) = self._tuner.at([t0])
        self.trials.append(trial)
        if self._on_trial is not None:
            self._on_trial(trial)
        ratio = min(max(self.value(trial) / self._wanted, 1 / FAR), FAR)
        self.off[t0] = math.log(ratio / (1 - TOLERANCE / 2))
        return self.off[t0]

    def bracket(self) -> tuple[float, float]:
        """Two t0 with `wanted` between their values, or twice one that ended the search. Raises OptionError."""
        for t0 in self._starts():
            self.attempt(t0)
            if self.ended:
                return t0, t0
            if (other := self._across(t0)) is not None:
                return t0, other
        raise self._out_of_reach()

    def _starts(self) -> Iterator[float]:
        latest = self._tuner.latest
        middle = round(latest / 2, DIGITS)
        if self._measure == "l2":
            yield middle
            yield latest if self.off[middle] < 0 else EARLIEST
        else:
            yield from (EARLIEST, middle, latest, *(round(part * latest, DIGITS) for part in INNER))

    def _across(self, t0: float) -> float | None:
        """The nearest t0 whose value is on the other side of `wanted`; a smaller one if there is any."""
        others = [other for other, y in self.off.items() if (y < 0) != (self.off[t0] < 0)]
        return min(others, key=lambda other: (other > t0, abs(other - t0)), default=None)

    def _out_of_reach(self) -> OptionError:
        in_order = sorted(self.trials, key=lambda trial: trial.t0)
        values = ", ".join(f"{self.value(trial):.4g} at {trial.t0:g}" for trial in in_order)
        return OptionError(
            f"no t0 that was tried has {self._measure.upper()} <= {self._wanted:g}: it is {values}",
            hint=f"ask for {min(map(self.value, self.trials)):.4g} or more",
        )


def _seen(job: Job) -> Pixels:
    """A guide at its results' size."""
    return image.to_pixels(job.x) if job.omega_full is None else job.guide.pixels
