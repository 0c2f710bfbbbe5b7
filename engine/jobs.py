"""Jobs and batches: what results are to be made, which of them share a network call, and how they come back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from sdedit import image, region
from sdedit.executor import Batch, Executor, Windows
from sdedit.image import Picture, Pixels, Placement
from sdedit.loop import Array, OnStep, Step
from sdedit.options import EditOptions
from sdedit.results import Progress, Result
from sdedit.schedule import StepTable


@dataclass(frozen=True)
class Job:
    """One result to make: a guide in the model's frame, and the seed. Made by `Editor.prepare`."""

    guide: Picture
    mask: Picture | None
    placement: Placement
    x: image.Floats  # (C, H, W)
    omega: image.Floats | None  # (1, H, W)
    omega_full: image.Floats | None  # (H, W) at the guide's size
    seed: int
    table: StepTable | None = None  # another than the batch's: another t0, as many steps
    window: region.Window | None = None  # what the network sees of the frame; None is all of it

    @property
    def notes(self) -> list[str]:
        """What was converted while reading its pictures, and whether they were enlarged."""
        read = [note for picture in (self.guide, self.mask) if picture is not None for note in picture.notes]
        return [*read, *self.placement.notes(self.guide)]

    def windowed(self, multiple: int) -> list["Job"]:
        """One for each window that is cheaper than the whole frame, or only itself. See region.windows."""
        found = [] if self.omega is None else region.windows(self.omega[0], multiple)
        return [replace(self, window=window) for window in found] or [self]

    def seen(self, planes: Array) -> Array:
        """The window of (…, H, W)."""
        return planes if self.window is None else region.crop(planes, self.window.box)

    def framed(self, x: Array) -> Array:
        """x of the window in the frame, with the guide around it."""
        return x if self.window is None else region.assemble(self.x, [(self.window, x)])


@dataclass(frozen=True)
class Group:
    """The jobs of one network call."""

    size: tuple[int, int] | None  # (width, height) that the network runs at; None is the model's own
    jobs: list[Job]


def grouped(jobs: Sequence[Job], options: EditOptions) -> list[Group]:
    """Jobs of one size share batches; groups of one size follow each other."""
    alike: dict[tuple[int, int] | None, list[Job]] = {}
    for job in jobs:
        alike.setdefault(options.size if job.window is None else job.window.size, []).append(job)
    batch = options.batch
    return [Group(size, same[at : at + batch]) for size, same in alike.items() for at in range(0, len(same), batch)]


@dataclass(frozen=True)
class Made:
    """What a batch made of one job."""

    job: Job
    x: Array  # of the job's window
    pixels: Pixels | None  # where they were made on the way


def run(
    group: Sequence[Job], options: EditOptions, table: StepTable, executor: Executor, on_step: OnStep | None = None
) -> list[Made]:
    """One batch. Raises NetworkError, Cancelled."""
    batch = make_batch(group, options, table)
    xs, pixels = executor.run(batch, on_step)
    drawn = None if batch.mask is not None or pixels is None else list(pixels)
    return [Made(job, xs[n], None if drawn is None else drawn[n]) for n, job in enumerate(group)]


def make_batch(group: Sequence[Job], options: EditOptions, table: StepTable) -> Batch:
    """A short group is filled up, so that a result never depends on how many others there were."""
    full = [*group, *[group[-1]] * (options.batch - len(group))]
    guide = np.stack([job.seen(job.x) for job in full])
    mask = None if full[0].omega is None else np.stack([job.seen(job.omega) for job in full if job.omega is not None])
    tables = [job.table or table for job in full]
    same = all(np.array_equal(own.rows, tables[0].rows) for own in tables)
    boxes = [job.window.box for job in full if job.window is not None]
    return Batch(
        guide,
        mask,
        [job.seed for job in full],
        tables[0] if same else StepTable.stack(tables),
        options.repeats,
        Windows(full[0].x.shape, boxes) if boxes else None,
    )


def result(job: Job, made: Sequence[Made]) -> Result:
    """The result of a job from what was made of it: one x, or those of its windows."""
    x, drawn = made[0].x, made[0].pixels
    if windows := [(one.job.window, one.x) for one in made if one.job.window is not None]:
        x = region.assemble(job.x, windows)
    (pixels,) = pictures([job], [x]) if drawn is None else (drawn,)
    return Result(job.guide, job.mask, job.placement, job.seed, x, pixels)


def pictures(jobs: Sequence[Job], xs: Sequence[Array] | Array) -> list[Pixels]:
    """The pictures of these jobs: the whole frame, or pasted into the guide where there is a mask."""
    return [
        image.to_pixels(x)
        if job.omega_full is None
        else image.paste(job.guide, job.omega_full, job.framed(x), job.placement)
        for job, x in zip(jobs, xs, strict=False)  # a batch that was filled up has more x than jobs
    ]


class Report:
    """What `on_step` is told of a step, in the words of a whole edit."""

    def __init__(
        self, on_step: Callable[[Progress], bool | None] | None, executor: Executor, before: int, total: int
    ) -> None:
        """before: evaluations of other executors; total: of the whole edit."""
        self._on_step, self._executor, self._before, self._total = on_step, executor, before, total

    def of(self, jobs: Sequence[Job]) -> OnStep | None:
        """For the steps of a batch of these jobs; None where nobody listens."""
        if (on_step := self._on_step) is None:
            return None

        def tell(step: Step) -> bool | None:
            done = self._before + self._executor.evaluations
            return on_step(Progress(done, self._total, step, partial(pictures, jobs)))

        return tell
