"""The one verb: load an artifact, edit pictures with it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdedit import artifact as artifacts
from sdedit import image
from sdedit.backends import Backend, open_backend
from sdedit.backends.ort import MOST_THREADS
from sdedit.budget import Budget, StepTimes, checked_max_ms
from sdedit.checks import whole
from sdedit.errors import OptionError
from sdedit.executor import Batch, Executor
from sdedit.image import Picture, Pixels, Placement, Source
from sdedit.lifetime import Lifetime
from sdedit.loop import Array, OnStep, Step
from sdedit.noise import result_seed
from sdedit.options import EditOptions, make_options
from sdedit.schedule import StepTable, plan

if TYPE_CHECKING:
    from sdedit.cuda.interop import GpuTensor
    from sdedit.tensorrt.plan import Plan

MOST_SHAPES = 64  # of edits with a budget, whose step times are remembered


@dataclass(frozen=True)
class Timings:
    """Milliseconds of one `edit` call on this machine's clock."""

    total_ms: float  # everything, from reading the guides to the last result
    loop_ms: float  # noise, network and updates
    network_ms: float | None  # of which the network; None on a GPU, where all of it is one CUDA graph
    evaluations: int  # network calls
    device_ms: float | None = None  # on a GPU: all steps by CUDA events, between the copies to and from the host


@dataclass(frozen=True)
class Result:
    """One edited picture and where it came from."""

    guide: Picture
    mask: Picture | None
    placement: Placement
    seed: int
    x: Array  # (C, H, W) float32 at model size, unclipped, before pasting
    pixels: Pixels  # (H, W, C) uint8: model size, or the guide's with a mask


@dataclass(frozen=True)
class EditResult:
    """What `Editor.edit` returns; result number j = guide index * samples + sample index."""

    results: tuple[Result, ...]
    options: EditOptions
    timings: Timings
    executor_notes: tuple[str, ...] = ()
    budget: Budget | None = None  # why these steps, where `max_ms` was given

    @property
    def images(self) -> list[Image.Image]:
        """The pictures, RGB (or L for a one-channel model)."""
        return [image.to_image(result.pixels) for result in self.results]

    @property
    def x(self) -> NDArray[np.float32]:
        """The raw model output, (B, C, H, W) float32, unclipped, before pasting."""
        return np.stack([result.x for result in self.results])

    @property
    def seeds(self) -> list[int]:
        return [result.seed for result in self.results]

    @property
    def notes(self) -> list[str]:
        """What was converted while reading the guides and masks, and what ran otherwise than it could."""
        pictures = [picture for result in self.results for picture in (result.guide, result.mask) if picture]
        read = [note for picture in pictures for note in picture.notes]
        return list(dict.fromkeys((*read, *self.executor_notes)))


@dataclass(frozen=True)
class Progress:
    """What `on_step` is given after every step. Return False from it to cancel."""

    done: int  # network evaluations so far, of `total`
    total: int
    step: Step
    _pictures: Callable[[Array], list[Pixels]] = field(repr=False)

    def preview(self) -> list[Image.Image]:
        """The network's current estimate of this batch's results, as `EditResult.images` would show them."""
        return [image.to_image(pixels) for pixels in self._pictures(self.step.denoised)]


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


class Editor:
    """A loaded artifact, ready to edit. Made by `sdedit.load`; may be shared between threads.

    `close`, or the end of a `with` block, frees what it took. From then on it raises ClosedError.
    """

    def __init__(self, artifact: artifacts.Artifact, backend: Backend) -> None:
        self.artifact = artifact
        self.backend = backend
        self.sde = artifact.sde
        self._times: dict[object, StepTimes] = {}  # of edits with a budget, by what decides the time of a step
        self._lifetime = Lifetime(f"the editor of {artifact.name}", "load the model again: sdedit.load")

    def __enter__(self) -> "Editor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the network, and on a GPU all memory. Edits that run are waited for, later ones refused.

        Results stay valid, those of `edit_tensor` too. Again is no error. Raises ClosedError from inside an edit: end
        that first, by returning False from `on_step`, say.
        """
        self._lifetime.close(self.backend.close)

    def warmup(self, *, masked: bool = False, **options: Any) -> None:
        """Do now what the first edit with these options would do and later ones would not.

        On a CPU one evaluation of the network: memory for `batch` images of `size`. On a GPU the whole edit: the plan
        for `batch` is found or built, memory allocated, and the CUDA graph made, which is one for each `batch`,
        `steps`, kind of sampler, and for edits with and without a mask. Each edit that runs at the same time on a GPU
        has memory and graph of its own; this makes one. options: the fields of EditOptions. Raises as `edit` does.
        """
        chosen = make_options(options).resolved(self.artifact.defaults)
        table = plan(self.sde, **chosen.schedule())
        width, height = self.artifact.frame(chosen.size)
        guide = np.zeros((chosen.batch, self.artifact.channels, height, width), np.float32)
        mask = np.ones((chosen.batch, 1, height, width), np.float32) if masked else None
        with self._executor(chosen) as executor:
            executor.warm_up(Batch(guide, mask, [0] * chosen.batch, table, chosen.repeats))

    @contextmanager
    def _executor(self, options: EditOptions) -> Iterator[Executor]:
        """Raises ClosedError."""
        with (
            self._lifetime.inside(),
            self.backend.executor(options.batch, options.conditions, options.size) as executor,
        ):
            yield executor

    def edit(
        self,
        guides: Source | Sequence[Source],
        *,
        mask: Source | Sequence[Source] | None = None,
        on_step: Callable[[Progress], bool | None] | None = None,
        max_ms: float | None = None,
        spent_ms: float = 0.0,
        **options: Any,
    ) -> EditResult:
        """Edit one guide, or each of a list: `samples` results a guide.

        guides, mask: a path, a file's bytes, a PIL image or a uint8 array (H, W, 3); a mask has its guide's size,
        white repaints, black keeps; one mask serves all guides, or give one each. options: the fields of
        EditOptions. max_ms: a budget in milliseconds from this call to the last result; `spent_ms` of it are gone
        already. As many steps run as fit into it, at most those there would be without it; `EditResult.budget` tells.
        Raises an SdeditError: ImageError, OptionError (a budget too small for one step, say), NetworkError, Cancelled.
        """
        began = time.perf_counter()
        chosen = make_options(options).resolved(self.artifact.defaults)
        jobs = self._jobs(_listed(guides), None if mask is None else _listed(mask), chosen)
        groups = [jobs[at : at + chosen.batch] for at in range(0, len(jobs), chosen.batch)]
        budget = None
        if max_ms is not None:
            times = self._step_times(chosen, groups[0])
            budget = self._budget(chosen, groups, times, checked_max_ms(max_ms), began - spent_ms / 1e3)
            chosen = replace(chosen, steps=budget.steps)
        table = plan(self.sde, **chosen.schedule())
        total = len(groups) * chosen.repeats * table.steps
        made: list[tuple[Job, Array, Pixels]] = []
        with self._executor(chosen) as executor:
            loop_began = time.perf_counter()
            for group in groups:
                report = None if on_step is None else _Report(on_step, executor, total, group)
                made.extend(_run(group, chosen, table, executor, report))
            loop_s = time.perf_counter() - loop_began
            notes = tuple(executor.notes)
        results = tuple(_result(*one) for one in made)
        total_ms = 1e3 * (time.perf_counter() - began)
        timings = Timings(
            total_ms, 1e3 * loop_s, executor.network_ms, executor.evaluations, device_ms=executor.device_ms
        )
        if budget is not None:
            times.step_ms.append((timings.loop_ms - len(groups) * budget.finish_ms) / total)
        return EditResult(results, chosen, timings, notes, budget)

    def prepare(self, guide: Source, options: EditOptions, *, seed: int = 0, mask: Source | None = None) -> Job:
        """Read a guide, and its mask, for `batches`; from any thread. options: resolved. Raises ImageError."""
        picture, omega_full, omega = image.read(guide, self.artifact.channels), None, None
        read_mask: Picture | None = None
        if mask is not None:
            omega_full, read_mask = image.read_mask(mask, picture)
        placement = image.place(picture, self.artifact.frame(options.size), options.fit, omega_full)
        if omega_full is not None:
            omega = image.mask_to_model(omega_full, placement)
        return Job(picture, read_mask, placement, image.to_model(picture, placement), omega, omega_full, seed)

    @contextmanager
    def batches(self, options: EditOptions) -> Iterator[Callable[[Sequence[Job]], list[Result]]]:
        """For the length of a `with` block, a function that edits up to `options.batch` prepared jobs at once.

        All of the jobs have a mask or none has; each keeps its own seed, and its table where it has one. A short batch
        is filled up, so a result does not depend on its neighbours. For one thread at a time. `close` waits for the
        block's end. options: resolved. Raises OptionError, NetworkError.
        """
        table = plan(self.sde, **options.schedule())
        with self._executor(options) as executor:
            yield lambda jobs: [_result(*made) for made in _run(list(jobs), options, table, executor, None)]

    def edit_tensor(
        self, guide: Any, *, mask: Any = None, stream: Any = None, **options: Any
    ) -> "GpuTensor | NDArray[np.float32]":
        """Edit a batch of tensors that lie where the network runs; none is copied on the way in.

        guide: float32 (B, C, H, W) in [-1, 1] at the model's size, mask: float32 (B, 1, H, W) in [0, 1], 1 = repaint.
        On a GPU any library's tensors with `__cuda_array_interface__` or `__dlpack__`, on a CPU NumPy's and any with
        `__array_interface__` or `__dlpack__`. options: t0, steps, sampler, eta, spacing, seed (image j has seed + j),
        repeats, conditions. Returns float32 (B, C, H, W), unclipped, with both protocols too; on a CPU a NumPy array.

        stream, on a GPU: the CUDA stream that guide and mask are written on and the result is read on: the edit is
        enqueued in its order, without waiting for the result and without looking for NaN in it. Without one, the
        result is finished. Raises OptionError, ImageError (the tensors), DeviceError, NetworkError.
        """
        from sdedit.tensors import edit_tensor

        with self._lifetime.inside():
            return edit_tensor(self.backend, self.artifact, guide, mask, stream, options)

    def _step_times(self, options: EditOptions, group: list[Job]) -> StepTimes:
        """What is known of how long the steps of such edits take; the caller adds to it."""
        omega = group[0].omega
        shape = None if omega is None else (group[0].guide.size, hash(omega.tobytes()))
        times = self._times.setdefault((options.batch, options.size, options.sampler, shape), StepTimes())
        if len(self._times) > MOST_SHAPES:
            del self._times[next(iter(self._times))]
        return times

    def _budget(
        self, options: EditOptions, groups: list[list[Job]], times: StepTimes, max_ms: float, began: float
    ) -> Budget:
        """The steps that fit, by what is known; where nothing is, or no step seems to fit, by what is timed now."""

        def pick() -> Budget:
            spent_ms = 1e3 * (time.perf_counter() - began)
            most = options.schedule()["steps"]
            return times.pick(max_ms, spent_ms, batches=len(groups), repeats=options.repeats, most_steps=most)

        if times.step_ms:
            with suppress(OptionError):
                return pick()
        made: list[Array] = []
        with self._executor(options) as executor:

            def run(steps: int) -> None:
                few = replace(options, steps=steps, repeats=1)
                made[:] = executor.run(_batch(groups[0], few, plan(self.sde, **few.schedule())), None)[0]

            times.calibrate(run, lambda: _pixels(groups[0], made), max_ms)
        return pick()

    def _jobs(self, guides: list[Source], masks: list[Source] | None, options: EditOptions) -> list[Job]:
        if not guides:
            raise OptionError("no guide to edit", hint="pass at least one picture")
        if masks is not None and len(masks) not in (1, len(guides)):
            raise OptionError(f"{len(masks)} masks for {len(guides)} guides", hint="give one mask for all, or one each")
        jobs = []
        for index, source in enumerate(guides):
            mask = None if masks is None else masks[index if len(masks) > 1 else 0]
            job = self.prepare(source, options, mask=mask)
            first = index * options.samples
            jobs += [replace(job, seed=result_seed(options.seed, first + n)) for n in range(options.samples)]
        return jobs


def load(
    model: str | Path | None = None,
    *,
    backend: str = "auto",
    precision: str | None = None,
    fast: bool = False,
    threads: int | None = None,
    provider_options: Mapping[str, str] | None = None,
) -> Editor:
    """Open a model on a backend: an artifact (.onnx file; None is the bundled 64x64 model) or a TensorRT plan (.plan).

    precision: what the network is executed in, one of fp32, fp16, bf16 and int8; None is the model's own, which most
    backends keep to. fast: the fastest execution that passes verification on this machine, in any precision and also
    by an artifact of the same network beside this one; the first use takes a while. What was taken is in
    `Editor.artifact` and `Editor.backend`.
    threads: CPU threads of the network; None uses every core this process may. provider_options: for the execution
    provider of ort-cuda and ort-tensorrt, in ONNX Runtime's own names.
    Raises ArtifactError, BackendUnavailable, OptionError.
    """
    if threads is not None:
        threads = whole("threads", threads, 1, MOST_THREADS, hint="leave it out for all cores")
    opened = open_model(model)
    if fast:
        from sdedit.fastest import open_fastest

        if not isinstance(opened, artifacts.Artifact):
            raise OptionError(
                f"{opened.path}: a plan is one execution, there is no faster one to choose", hint="leave fast out"
            )
        if provider_options:
            raise OptionError("the fastest execution is looked for without provider options", hint="leave one out")
        return Editor(*open_fastest(opened, backend=backend, precision=precision, threads=threads))
    artifact = opened if isinstance(opened, artifacts.Artifact) else opened.artifact
    return Editor(artifact, open_backend(backend, opened, threads, provider_options, precision))


def open_model(model: str | Path | None) -> "artifacts.Artifact | Plan":
    """What a model's file says, without a backend to run it. Raises ArtifactError."""
    path = artifacts.BUNDLED if model is None else Path(model)
    if path.suffix == ".plan":
        from sdedit.tensorrt import plan as plans

        return plans.read(path)
    return artifacts.read(path)


def _run(
    group: list[Job], options: EditOptions, table: StepTable, executor: Executor, on_step: OnStep | None
) -> list[tuple[Job, Array, Pixels]]:
    """One batch."""
    batch = _batch(group, options, table)
    xs, made = executor.run(batch, on_step)
    pixels = _pixels(group, xs) if made is None or batch.mask is not None else list(made)
    return list(zip(group, xs, pixels, strict=False))  # a batch that was filled up has more x than jobs


def _batch(group: list[Job], options: EditOptions, table: StepTable) -> Batch:
    """A short group is filled up, so that a result never depends on how many others there were."""
    full = group + [group[-1]] * (options.batch - len(group))
    guide = np.stack([job.x for job in full])
    mask = None if full[0].omega is None else np.stack([job.omega for job in full if job.omega is not None])
    tables = [job.table or table for job in full]
    same = all(np.array_equal(own.rows, tables[0].rows) for own in tables)
    table = tables[0] if same else StepTable.stack(tables)
    return Batch(guide, mask, [job.seed for job in full], table, options.repeats)


def _result(job: Job, x: Array, pixels: Pixels) -> Result:
    return Result(job.guide, job.mask, job.placement, job.seed, x, pixels)


class _Report:
    """What `on_step` is told of a step, in the words of a whole edit."""

    def __init__(
        self, on_step: Callable[[Progress], bool | None], executor: Executor, total: int, group: list[Job]
    ) -> None:
        self._on_step, self._executor, self._total, self._group = on_step, executor, total, group

    def __call__(self, step: Step) -> bool | None:
        done = self._executor.evaluations
        return self._on_step(Progress(done, self._total, step, partial(_pixels, self._group)))


def _pixels(jobs: Sequence[Job], xs: Sequence[Array] | Array) -> list[Pixels]:
    """The pictures of these jobs: the whole frame, or pasted into the guide where there is a mask."""
    return [
        image.to_pixels(x) if job.omega_full is None else image.paste(job.guide, job.omega_full, x, job.placement)
        for job, x in zip(jobs, xs, strict=False)
    ]


def _listed(sources: Source | Sequence[Source]) -> list[Source]:
    return list(sources) if isinstance(sources, list | tuple) else [sources]  # type: ignore[list-item]
