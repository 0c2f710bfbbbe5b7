"""The one verb: load an artifact, edit pictures with it."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial, wraps
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from sdedit import artifact as artifacts
from sdedit import image
from sdedit.backends import Backend, open_backend
from sdedit.backends.ort import MOST_THREADS
from sdedit.budget import CALIBRATION, Budget, StepTimes, checked_max_ms, checked_spent_ms
from sdedit.checks import whole
from sdedit.errors import ArtifactError, OptionError
from sdedit.executor import Batch, DeviceExecutor, Executor
from sdedit.image import Picture, Source
from sdedit.jobs import Group, Job, Made, Report, grouped, pictures, result, run
from sdedit.lifetime import Lifetime
from sdedit.noise import result_seed
from sdedit.options import EditOptions, make_options
from sdedit.results import EditResult, Progress, Result, Timings
from sdedit.schedule import plan

if TYPE_CHECKING:
    from sdedit.cuda.interop import GpuTensor
    from sdedit.tensorrt.plan import Plan

MOST_SHAPES = 64  # of edits with a budget, whose step times are remembered
Method = TypeVar("Method", bound=Callable[..., Any])


def _while_open(method: Method) -> Method:
    """The method of an editor that `close` waits for, from its beginning to its end. It raises ClosedError."""

    @wraps(method)
    def held(self: "Editor", *given: Any, **named: Any) -> Any:
        with self._lifetime.inside():
            return method(self, *given, **named)

    return cast(Method, held)


class Editor:
    """A loaded artifact, ready to edit. Made by `sdedit.load`; may be shared between threads.

    `close`, or the end of a `with` block, frees what it took. From then on it raises ClosedError.
    """

    def __init__(self, artifact: artifacts.Artifact, backend: Backend, search_ms: float = 0.0) -> None:
        self.artifact = artifact
        self.backend = backend
        self.search_ms = search_ms  # that it took to find the fastest execution, at its first use on this machine
        self.sde = artifact.sde
        self._times: dict[object, StepTimes] = {}  # of edits with a budget, by what decides the time of a step
        self._times_lock = Lock()
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
        with self._executor(chosen, chosen.size) as executor:
            executor.warm_up(Batch(guide, mask, [0] * chosen.batch, table, chosen.repeats))

    @contextmanager
    def _executor(self, options: EditOptions, size: tuple[int, int] | None) -> Iterator[Executor]:
        """The backend's, which `close` waits for. Raises ClosedError."""
        with self._lifetime.inside(), self.backend.executor(options.batch, options.conditions, size) as executor:
            yield executor

    @_while_open
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
        if on_step is not None and not callable(on_step):
            raise OptionError(f"on_step is {on_step!r}; wanted a function", hint="on_step=lambda progress: None")
        spent_ms = checked_spent_ms(spent_ms)
        chosen = make_options(options).resolved(self.artifact.defaults)
        jobs = self.prepare_all(listed(guides), None if mask is None else listed(mask), chosen)
        groups = grouped(self._windowed(jobs, chosen), chosen)
        budget = None
        if max_ms is not None:
            largest = max(groups, key=lambda group: math.prod(self.artifact.frame(group.size)))
            times = self._step_times(chosen, largest)
            before = began - spent_ms / 1e3
            budget = self._budget(chosen, largest, len(groups), times, checked_max_ms(max_ms), before)
            chosen = replace(chosen, steps=budget.steps)
        table = plan(self.sde, **chosen.schedule())
        total = len(groups) * chosen.repeats * table.steps
        made: dict[int, list[Made]] = {job.seed: [] for job in jobs}
        used: list[Executor] = []
        loop_s = 0.0
        for size, alike in groupby(groups, key=attrgetter("size")):
            with self._executor(chosen, size) as executor:
                done = sum(other.evaluations for other in used)
                report = Report(on_step, executor, done, total)
                loop_began = time.perf_counter()
                for group in alike:
                    for one in run(group.jobs, chosen, table, executor, report.of(group.jobs)):
                        made[one.job.seed].append(one)
                loop_s += time.perf_counter() - loop_began
                used.append(executor)
        results = tuple(result(job, made[job.seed]) for job in jobs)
        timings = Timings(
            1e3 * (time.perf_counter() - began),
            1e3 * loop_s,
            _sum(executor.network_ms for executor in used),
            sum(executor.evaluations for executor in used),
            device_ms=_sum(executor.device_ms for executor in used),
        )
        if budget is not None:
            times.step_ms.append(timings.loop_ms / total)
        notes = dict.fromkeys(note for executor in used for note in executor.notes)
        if chosen.region != "full" and (mask is None or not self._takes_windows):
            why = "there is no mask, so the" if mask is None else f"{self.artifact.name} has one size here, so its"
            notes[f"region {chosen.region}: {why} whole frame was run"] = None
        return EditResult(results, chosen, timings, tuple(notes), budget)

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

    def prepare_all(self, guides: Sequence[Source], masks: Sequence[Source] | None, options: EditOptions) -> list[Job]:
        """Every guide with each of its seeds; one mask serves all guides, or each has its own.

        options: resolved. Raises ImageError, OptionError.
        """
        if not guides:
            raise OptionError("no guide to edit", hint="pass at least one picture")
        if masks is not None and len(masks) not in (1, len(guides)):
            raise OptionError(f"{len(masks)} masks for {len(guides)} guides", hint="give one mask for all, or one each")
        if any(mask is None for mask in masks or ()):
            raise OptionError("one of the masks is None", hint="edit guides without a mask in a call of their own")
        jobs = []
        for index, source in enumerate(guides):
            mask = None if masks is None else masks[index if len(masks) > 1 else 0]
            job = self.prepare(source, options, mask=mask)
            first = index * options.samples
            jobs += [replace(job, seed=result_seed(options.seed, first + n)) for n in range(options.samples)]
        return jobs

    @contextmanager
    def batches(self, options: EditOptions) -> Iterator[Callable[[Sequence[Job]], list[Result]]]:
        """For the length of a `with` block, a function that edits up to `options.batch` prepared jobs at once.

        All of the jobs have a mask or none has; each keeps its own seed, and its table where it has one. A short batch
        is filled up, so a result does not depend on its neighbours. For one thread at a time. `close` waits for the
        block's end. options: resolved; region is full. Raises OptionError, NetworkError.
        """
        if options.region != "full":
            raise OptionError("prepared jobs are edited as whole frames", hint="leave region out")
        table = plan(self.sde, **options.schedule())
        executor = partial(self.backend.executor, options.batch, options.conditions, options.size)

        def run_batch(jobs: Sequence[Job]) -> list[Result]:
            with executor() as opened:  # for this batch alone: others' edits may come between
                return [result(one.job, [one]) for one in run(jobs, options, table, opened)]

        with self._lifetime.inside():
            with executor():
                pass  # what is wrong with the options shows now
            yield run_batch

    @_while_open
    def edit_tensor(
        self, guide: Any, *, mask: Any = None, stream: Any = None, **options: Any
    ) -> "GpuTensor | NDArray[np.float32]":
        """Edit a batch of tensors that lie where the network runs; none is copied on the way in.

        guide: float32 (B, C, H, W) in [-1, 1] at the model's size, mask: float32 (B, 1, H, W) in [0, 1], 1 = repaint;
        both in C order. What a mask keeps comes out close to the guide and is not pasted from it.
        On a GPU any library's tensors with `__cuda_array_interface__` or `__dlpack__`, on a CPU NumPy's and any with
        `__array_interface__` or `__dlpack__`. options: t0, steps, sampler, eta, spacing, seed (image j has seed + j),
        repeats, conditions. Returns float32 (B, C, H, W), unclipped, with both protocols too; on a CPU a NumPy array.

        stream, on a GPU: the CUDA stream that guide and mask are written on and the result is read on: the edit is
        enqueued in its order, without waiting for the result and without looking for NaN in it. Without one, the
        result is finished. Raises OptionError, ImageError (the tensors), DeviceError, NetworkError.
        """
        from sdedit.tensors import edit_tensor

        return edit_tensor(self.backend, self.artifact, guide, mask, stream, options)

    def _step_times(self, options: EditOptions, group: Group) -> StepTimes:
        """What is known of how long the steps of such edits take; the caller adds to it."""
        job = group.jobs[0]
        shape = None if job.omega is None else (job.guide.size, hash(job.omega.tobytes()))
        with self._times_lock:
            times = self._times.setdefault((options.batch, group.size, options.sampler, shape), StepTimes())
            if len(self._times) > MOST_SHAPES:
                del self._times[next(iter(self._times))]
        return times

    def _budget(
        self, options: EditOptions, group: Group, groups: int, times: StepTimes, max_ms: float, began: float
    ) -> Budget:
        """The steps that fit, by what is known; where nothing is, or no step seems to fit, by what is timed now.

        group: the slowest of so many.
        """
        most = options.schedule()["steps"]

        def pick() -> Budget:
            spent_ms = 1e3 * (time.perf_counter() - began)
            return times.pick(max_ms, spent_ms, batches=groups, repeats=options.repeats, most_steps=most)

        if times.step_ms:
            with suppress(OptionError):
                return pick()
        jobs, made = group.jobs, list[Made]()
        with self._executor(options, group.size) as executor:

            def calibrate(steps: int) -> None:
                few = replace(options, steps=steps, repeats=1)
                made[:] = run(jobs, few, plan(self.sde, **few.schedule()), executor)

            if isinstance(executor, DeviceExecutor):
                calibrate(min(CALIBRATION[-1], most))  # chooses kernels and captures: no measure of a step
            times.calibrate(calibrate, lambda: pictures(jobs, [one.x for one in made]), max_ms, most)
        return pick()

    def _windowed(self, jobs: list[Job], options: EditOptions) -> list[Job]:
        """Windows instead of whole frames, where that is asked for, possible, and cheaper."""
        if options.region == "full" or not self._takes_windows:
            return jobs
        multiple = int(self.artifact.metadata["image"].get("multiple", 1))
        return [piece for job in jobs for piece in job.windowed(multiple)]

    @property
    def _takes_windows(self) -> bool:
        return bool(self.artifact.metadata["image"].get("dynamic")) and self.backend.takes_windows


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

    precision: what the network is executed in, one of fp32, tf32, fp16, bf16 and int8; None is the model's own, which
    most backends keep to. fast: the fastest execution that passes verification on this machine, in any precision and
    also by an artifact of the same network beside this one; the first use takes a while. What was taken is in
    `Editor.artifact` and `Editor.backend`.
    threads: CPU threads of the network; None uses every core this process may. provider_options: for the execution
    provider of ort-cuda and ort-tensorrt, in ONNX Runtime's own names.
    Raises ArtifactError, BackendUnavailable, OptionError.
    """
    if not isinstance(backend, str):
        raise OptionError(f"backend is {backend!r}; wanted a name", hint="backend='auto'")
    if threads is not None:
        threads = whole("threads", threads, 1, MOST_THREADS, hint="leave it out for all cores")
    if fast:
        return _load_fastest(model, backend, precision, threads, provider_options)
    opened = open_model(model)
    artifact = opened if isinstance(opened, artifacts.Artifact) else opened.artifact
    if artifact is opened:
        artifact.hash_ahead()
    return _sealed(Editor(artifact, open_backend(backend, opened, threads, provider_options, precision)))


def _load_fastest(
    model: str | Path | None,
    backend: str,
    precision: str | None,
    threads: int | None,
    provider_options: Mapping[str, str] | None,
) -> Editor:
    from sdedit.fastest import open_fastest

    path = _path(model)
    if path.suffix == ".plan":
        raise OptionError(f"{path}: a plan is one execution, there is no faster one to choose", hint="leave fast out")
    if provider_options:
        raise OptionError("the fastest execution is looked for without provider options", hint="leave one out")
    return _sealed(Editor(*open_fastest(artifacts.read(path), backend=backend, precision=precision, threads=threads)))


def _sealed(editor: Editor) -> Editor:
    """The editor, of a file that was the same from its reading to the end of its opening. Raises ArtifactError."""
    try:
        editor.artifact.seal()
    except ArtifactError:
        editor.close()
        raise
    return editor


def open_model(model: str | Path | None) -> "artifacts.Artifact | Plan":
    """What a model's file says, without a backend to run it. Raises ArtifactError."""
    path = _path(model)
    if path.suffix == ".plan":
        from sdedit.tensorrt import plan as plans

        return plans.read(path)
    return artifacts.read(path)


def _path(model: str | Path | None) -> Path:
    """Of the model's file. Raises ArtifactError."""
    if model is None:
        return artifacts.BUNDLED
    if not isinstance(model, str | os.PathLike) or not os.fspath(model):
        raise ArtifactError(f"the model is {model!r}; wanted a path", hint="name an .onnx artifact or a .plan")
    return Path(model)


def _sum(values: Iterable[float | None]) -> float | None:
    """None where a value is not known."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def listed(sources: Source | Sequence[Source]) -> list[Source]:
    """One or several, as a list."""
    return list(sources) if isinstance(sources, list | tuple) else [sources]  # type: ignore[list-item]
