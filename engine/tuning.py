"""The choice of t0 (Meng et al. 2022, section 3): the same guides and seeds from several t0, and the search for one.

From a larger t0 a result is more real and less like its guide. Both are measured here (metrics.py): L2 to the guide
grows with t0, KID to real pictures falls.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from sdedit.noise import result_seed
from sdedit.options import MOST, EditOptions, make_options
from sdedit.results import Result
from sdedit.schedule import latest_t0, plan

EARLIEST = 0.02  # a search begins here: below, an edit is its guide
DIGITS = 4  # of a t0 that is searched for, so that it can be repeated as it is printed
EDITS = 8
TOLERANCE = 0.02
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
    pictures: tuple[tuple[Pixels, ...], ...]  # of the first SHOWN guides, seed by seed


@dataclass(frozen=True)
class Found:
    """What a search returns."""

    trial: Trial  # of those not above the wanted value, the nearest
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

    masks: one for each guide. t0s: how many t0 will be tried at a time. options: the fields of EditOptions; `batch`
    is chosen for them where it is not given. Result number j has the seed it has in `Editor.edit`. Raises ImageError,
    OptionError.
    """
    guides, masks = listed(guides), None if masks is None else listed(masks)
    if not guides:
        raise OptionError("no guide to tune", hint="pass at least one picture")
    if masks is not None and len(masks) != len(guides):
        raise OptionError(f"{len(masks)} masks for {len(guides)} guides", hint="give one mask for each guide")
    chosen = make_options(options).resolved(editor.artifact.defaults)
    if "batch" not in options:
        edits = whole("t0s", t0s, 1, MOST, hint="how many t0 are tried at a time") * len(guides) * chosen.samples
        chosen = replace(chosen, batch=math.ceil(edits / math.ceil(edits / BATCH)))
    jobs = []
    for index, guide in enumerate(guides):
        job = editor.prepare(guide, chosen, mask=None if masks is None else masks[index])
        first = index * chosen.samples
        jobs += [replace(job, seed=result_seed(chosen.seed, first + n)) for n in range(chosen.samples)]
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
    value: L2 is nearly a power of t0 where t0 is small. Raises OptionError where no t0 has that value.
    """
    if measure not in ("l2", "kid"):
        raise OptionError(f"unknown measure {measure!r}", hint="choose one of l2, kid")
    wanted = real(measure, wanted, 0, 1e9, with_low=False, hint="a number above 0, such as 12.5 for l2")
    trials: list[Trial] = []

    def value(trial: Trial) -> float:
        found = getattr(trial, measure)
        if found is None:
            raise OptionError("trials have no KID", hint="Tuner.compare_with tells them of real pictures")
        return float(found)

    def off(t0: float) -> float:
        """How far the value at t0 is above the middle of what is accepted; negative below."""
        (trial,) = tuner.at([t0])
        trials.append(trial)
        if on_trial is not None:
            on_trial(trial)
        ratio = min(max(value(trial) / wanted, 1 / FAR), FAR)
        return math.log(ratio / (1 - TOLERANCE / 2))

    def within() -> bool:
        return (1 - TOLERANCE) * wanted <= value(trials[-1]) <= wanted

    ends = EARLIEST, tuner.latest
    one = round(ends[1] / 2, DIGITS)
    y_one = off(one)
    if not within():
        other = ends[1] if (y_one < 0) == (measure == "l2") else ends[0]
        y_other = off(other)
        if not within() and (y_one < 0) == (y_other < 0):
            off(ends[0] if other == ends[1] else ends[1])
            low, high = sorted((trial for trial in trials if trial.t0 != one), key=lambda trial: trial.t0)
            raise OptionError(
                f"no t0 has {measure.upper()} {wanted:g}: from t0 {low.t0:g} to {high.t0:g} it goes "
                f"from {value(low):.4g} to {value(high):.4g}",
                hint="ask for a value between them; L2 grows with t0, and KID falls where guides are not real pictures",
            )
    last = 0
    while not within() and len(trials) < EDITS:
        x, x_other = math.log(one), math.log(other)
        t0 = round(math.exp((x * y_other - x_other * y_one) / (y_other - y_one)), DIGITS)
        if any(trial.t0 == t0 for trial in trials):
            break  # as near as DIGITS let it come
        y = off(t0)
        if (y < 0) == (y_one < 0):
            one, y_one = t0, y
            y_other /= 2 if last == 1 else 1  # the end that stays counts half
            last = 1
        else:
            other, y_other = t0, y
            y_one /= 2 if last == -1 else 1
            last = -1
    best = max((trial for trial in trials if value(trial) <= wanted), key=value)
    return Found(best, (1 - TOLERANCE) * wanted <= value(best), tuple(trials))


def _seen(job: Job) -> Pixels:
    """A guide at its results' size."""
    return image.to_pixels(job.x) if job.omega_full is None else job.guide.pixels
