"""Making plans: the artifact's graph, strongly typed, one optimization profile, and what TensorRT made of it.

Precision is the artifact's own: TensorRT goes by the types in the graph, and float32 means float32 (no TF32).
"""

import hashlib
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from sdedit import output
from sdedit.artifact import Artifact
from sdedit.cuda.driver import Gpu
from sdedit.errors import ArtifactError, BackendUnavailable, Cancelled, OptionError
from sdedit.protobuf import Tensor
from sdedit.tensorrt.installed import Library, gpu_here, plain
from sdedit.tensorrt.kernels import Kernel, activation_bytes, listed, logged
from sdedit.tensorrt.plan import FORMAT, Sidecar

PROGRESS_STEPS = 100
MOST_IMAGES = 10_000
BATCH_HINT = "--batch 1:1:4 is least, tuned for, most; --batch 1 pins it, which is fastest"

OnProgress = Callable[[int, int, str], bool | None]  # done, total, what it is at; False cancels


@dataclass(frozen=True)
class Built:
    """A plan, still in memory, and how it came about."""

    data: bytes = field(repr=False)
    sidecar: Sidecar = field(repr=False)
    kernels: tuple[Kernel, ...]  # as TensorRT lists them; empty unless built with verbose
    activation_bytes: tuple[int, ...] | None  # device memory of each profile beside the weights, where TensorRT says
    log: tuple[tuple[str, str], ...] = field(repr=False)  # severity, text

    @property
    def kinds(self) -> dict[str, int]:
        """How many kernels of each kind, the most frequent first."""
        return dict(Counter(kernel.kind for kernel in self.kernels).most_common())

    @property
    def labels(self) -> dict[str, int]:
        """How many kernels compute what, the most frequent first."""
        return dict(Counter(kernel.label for kernel in self.kernels).most_common())


def build(
    artifact: Artifact,
    library: Library,
    *,
    targets: Sequence[str] = ("current",),
    batch: tuple[int, int, int] = (1, 1, 1),
    workspace_bytes: int | None = None,
    timing_cache: Path | None = None,
    gpu: Gpu | None = None,
    on_progress: OnProgress | None = None,
    verbose: bool = False,
) -> Built:
    """Build a plan of `artifact`, for its own height and width.

    targets: ("current",) is the GPU here; TensorRT-RTX also builds for others: ("sm_86", "sm_89"). batch: least,
    tuned for, most. timing_cache: a file that TensorRT reads and extends. gpu: the one here, where the caller knows
    it. verbose: keep kernel names, so that `Built.kernels` is known. An interrupt, or False from on_progress, stops
    the builder before it leaves this function.
    Raises OptionError, ArtifactError for a network that TensorRT does not take, BackendUnavailable, Cancelled.
    """
    checked_batch(batch)
    if workspace_bytes is not None and workspace_bytes < 1:
        raise OptionError(f"workspace is {workspace_bytes} bytes; wanted at least 1", hint="leave it out")
    if timing_cache is not None and library.ahead_of_time:
        raise OptionError(f"{library.name} keeps no timing cache: it times nothing", hint="leave --timing-cache out")
    if "current" in targets or not library.ahead_of_time:
        gpu = gpu or gpu_here()
    chosen = _targets(library, targets, gpu)
    job = _Job(artifact, library, chosen, batch, workspace_bytes, timing_cache, verbose)
    began = time.perf_counter()
    built = datetime.now(UTC)
    with _watched(on_progress) as run:
        data = run(job)
    log = tuple(job.log.messages)
    sidecar: Sidecar = {
        "format": FORMAT,
        "artifact": {
            "name": artifact.name,
            "sha256": artifact.sha256,
            "size": artifact.size_bytes,
            "opset": artifact.opset,
        },
        "library": {"name": library.name, "version": library.version},
        "gpu": None if gpu is None else as_json(gpu),
        "targets": list(chosen),
        "profile": {
            "batch": list(batch),
            "shapes": {t.name: [_shape(artifact, t.name, images) for images in batch] for t in artifact.inputs},
        },
        "precision": artifact.precision,
        "metadata": artifact.metadata,
        "inputs": [_described(tensor) for tensor in artifact.inputs],
        "outputs": [_described(tensor) for tensor in artifact.outputs],
        "plan": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "flags": flags(workspace_bytes, verbose),
        "activation_bytes": activation_bytes(log),
        "built": built.isoformat(timespec="seconds"),
        "build_seconds": round(time.perf_counter() - began, 3),
    }
    artifact.require_unchanged()  # since its hash was taken, which the sidecar names
    kernels = logged(log) or (_inspected(library, data) if verbose and gpu else ())
    activation = sidecar["activation_bytes"]
    return Built(data, sidecar, kernels, None if activation is None else tuple(activation), log)


def flags(workspace_bytes: int | None = None, verbose: bool = False) -> dict[str, Any]:
    """What the sidecar says of how a plan was built, beside the artifact, the library, the GPU and the profile."""
    return {
        "strongly_typed": True,
        "tf32": False,
        "user_allocation": True,
        "workspace_bytes": workspace_bytes,
        "detailed": verbose,
    }


def as_json(gpu: Gpu) -> dict[str, Any]:
    """A GPU as sidecars describe it."""
    return {"name": gpu.name, "compute_capability": list(gpu.compute_capability), "driver": gpu.driver}


def checked_batch(batch: Sequence[int]) -> tuple[int, int, int]:
    """`batch`, if it is three rising numbers of images. Raises OptionError."""
    if len(batch) != 3 or not 1 <= batch[0] <= batch[1] <= batch[2] <= MOST_IMAGES:
        shown = ":".join(map(str, batch))
        raise OptionError(
            f"batch is {shown}; wanted MIN:OPT:MAX, rising, from 1 to {MOST_IMAGES} images", hint=BATCH_HINT
        )
    return batch[0], batch[1], batch[2]


def _targets(library: Library, targets: Sequence[str], gpu: Gpu | None) -> tuple[str, ...]:
    """`targets` with "current" as the GPU here. Raises OptionError, BackendUnavailable."""
    here = None if gpu is None else gpu.target
    chosen = tuple(dict.fromkeys(here if one == "current" and here else one for one in targets))
    if not chosen:
        raise OptionError("no target to build for", hint="--target current")
    about = f"{library.name} {library.version}"
    for target in chosen:
        if not library.ahead_of_time:
            if target != here:
                raise OptionError(
                    f"{about} builds only for the GPU it runs on: {target} was asked for, this GPU is {here}",
                    hint="build on that machine, or ahead of time: --backend tensorrt-rtx",
                )
        elif target not in library.ahead_of_time_targets:
            known = ", ".join(library.ahead_of_time_targets)
            message = f"{about} builds for {known}; not for {target}"
            if re.fullmatch(r"sm_(90|10\d)", target):
                message += ", a data-centre GPU"
            hint = "--backend tensorrt builds on that GPU itself"
            if "current" in targets and target == here:
                raise BackendUnavailable(message, hint=hint)
            raise OptionError(message, hint=hint)
    return chosen


def _shape(artifact: Artifact, name: str, images: int) -> list[int]:
    return [images, artifact.channels, artifact.height, artifact.width] if name == "x" else [images]


def _described(tensor: Tensor) -> dict[str, Any]:
    shape = None if tensor.shape is None else list(tensor.shape)
    return {"name": tensor.name, "dtype": tensor.element, "shape": shape}


class _Job:
    """One run of the builder: call it with the progress to report to."""

    def __init__(
        self,
        artifact: Artifact,
        library: Library,
        targets: tuple[str, ...],
        batch: tuple[int, int, int],
        workspace_bytes: int | None,
        timing_cache: Path | None,
        verbose: bool,
    ) -> None:
        self._artifact, self._library, self._targets, self._batch = artifact, library, targets, batch
        self._workspace_bytes, self._timing_cache, self._verbose = workspace_bytes, timing_cache, verbose
        self._about = f"{library.name} {library.version}"
        self.log = library.logger("VERBOSE" if verbose else "INFO")

    def __call__(self, progress: "_Progress") -> bytes:
        try:
            return self._build(progress)
        except BaseException as error:
            # its traceback would keep the builder until the garbage collector comes, perhaps to a thread in which a
            # later builder holds TensorRT's lock and writes to the log: the first one's end would wait for that lock
            traceback.clear_frames(error.__traceback__)
            raise

    def _build(self, progress: "_Progress") -> bytes:
        trt = self._library.module
        try:
            builder = trt.Builder(self.log)
        except (TypeError, RuntimeError) as error:  # how its bindings say that there is none
            reason = self.log.last_error() or str(error)
            raise BackendUnavailable(f"{self._about}: cannot start: {reason}", hint="sdedit doctor") from error
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self._parse(network)
        config = self._configured(builder, network)
        config.progress_monitor = _monitor(trt, progress)
        serialized = builder.build_serialized_network(network, config)
        progress.require_going()
        if serialized is None:
            raise self._failed()
        self._keep_timings(config)
        return bytes(serialized)

    def _parse(self, network: Any) -> None:
        parser = self._library.module.OnnxParser(network, self.log)
        path = str(self._artifact.path)
        try:
            path.encode()
        except UnicodeEncodeError:
            raise ArtifactError(f"{path}: TensorRT opens only names that are text", hint="rename the file") from None
        if parser.parse_from_file(path):  # by name, not as bytes: external data lies beside the file
            return
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reason = self.log.last_error() or "it does not say why"
        where = ""
        if errors:
            reason = plain(errors[0].desc())
            if errors[0].node_name() or errors[0].node_operator():
                where = f" node {errors[0].node_name() or '?'} ({errors[0].node_operator() or '?'}):"
            if len(errors) > 1:
                reason += f" (and {len(errors) - 1} more)"
        hint = "write it again; opset 18 to 22 is safe"
        if self._artifact.precision == "int8":
            hint = "export it with --precision fp16: TensorRT takes no int8 artifacts, whose biases are int32"
        raise ArtifactError(f"{self._artifact.path}: {self._about} cannot read it:{where} {reason}", hint=hint)

    def _configured(self, builder: Any, network: Any) -> Any:
        trt = self._library.module
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        if self._library.ahead_of_time:  # or it may allocate while it runs, which no CUDA graph takes
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if self._verbose:
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if self._workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self._workspace_bytes)
        profile = builder.create_optimization_profile()
        for name in (network.get_input(i).name for i in range(network.num_inputs)):
            profile.set_shape(name, *(tuple(_shape(self._artifact, name, images)) for images in self._batch))
        if config.add_optimization_profile(profile) < 0:
            raise self._failed()
        if self._library.ahead_of_time:
            config.num_compute_capabilities = len(self._targets)
            for i, target in enumerate(self._targets):
                capability = trt.ComputeCapability.__members__[target.replace("sm_", "SM")]
                if not config.set_compute_capability(capability, i):
                    raise self._failed()
        if self._timing_cache is not None:
            known = self._timing_cache.read_bytes() if self._timing_cache.exists() else b""
            cache = config.create_timing_cache(known)
            # TensorRT says so of a file that it cannot read, and then goes on with an empty cache in its place
            said = " ".join(text for _, text in self.log.messages)
            refused = known and re.search("deserialize timing cache", said, re.IGNORECASE)
            if refused or cache is None or not config.set_timing_cache(cache, False):
                raise OptionError(
                    f"{self._timing_cache}: not a timing cache of {self._about} on this GPU",
                    hint="--timing-cache with another name starts a new one",
                )
        return config

    def _keep_timings(self, config: Any) -> None:
        if self._timing_cache is None:
            return
        timings = bytes(config.get_timing_cache().serialize())

        def put(file: IO[bytes]) -> None:
            file.write(timings)

        output.write_all([(self._timing_cache, put)], force=True)

    def _failed(self) -> ArtifactError | BackendUnavailable:
        reason = self.log.last_error() or "it does not say why"
        message = f"{self._artifact.path}: {self._about} could not build a plan: {reason}"
        if re.search(r"out of ?memory|insufficient memory|bad_alloc|OutOfMemory", reason, re.IGNORECASE):
            return BackendUnavailable(
                message, hint="free memory (other programs on the GPU), --batch with fewer images, or --workspace lower"
            )
        if "workspace" in reason.lower():
            return BackendUnavailable(message, hint="a larger --workspace, or leave it out")
        return ArtifactError(message, hint="export it with opset 18 to 22; 'sdedit build --explain' shows more")


class _Progress:
    """TensorRT's nested phases as one number that only rises. Written by the builder's thread, read by the caller's."""

    def __init__(self) -> None:
        self.cancelled = False
        self.phase = ""
        self.done = 0  # of PROGRESS_STEPS
        self._open: dict[str, tuple[str | None, int]] = {}  # phase -> the one around it, number of steps
        self._steps: dict[str, int] = {}  # phase -> steps completed

    def require_going(self) -> None:
        """Raise Cancelled once the caller has said so."""
        if self.cancelled:
            raise Cancelled("building was cancelled", hint="run it again to build the plan")

    def start(self, name: str, around: str | None, steps: int) -> None:
        self._open[name], self._steps[name] = (around, max(steps, 1)), 0
        self.phase = name

    def step(self, name: str, number: int) -> None:
        if name in self._open:
            self._steps[name] = number + 1
        part, at, seen = 0.0, self.phase if self.phase in self._open else name, set[str]()
        while at in self._open and at not in seen:  # from the innermost phase outwards
            seen.add(at)
            around, steps = self._open[at]
            part = min(1.0, (self._steps[at] + part) / steps)
            at = around or ""
        self.done = max(self.done, int(part * PROGRESS_STEPS))

    def finish(self, name: str) -> None:
        around, _ = self._open.pop(name, (None, 1))
        self.phase = around or ""


def _monitor(trt: Any, progress: _Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, name: str, around: str | None, steps: int) -> None:
            progress.start(name, around, steps)

        def step_complete(self, name: str, number: int) -> bool:
            progress.step(name, number)
            return not progress.cancelled

        def phase_finish(self, name: str) -> None:
            progress.finish(name)

    return Monitor()


@contextmanager
def _watched(on_progress: OnProgress | None) -> Iterator[Callable[[_Job], bytes]]:
    """Run a job in a thread of its own, so that Ctrl-C and the caller's errors never pass through TensorRT: they
    reach this thread, the builder is told to stop at its next step, and they go on when it has.
    """
    progress = _Progress()

    def run(job: _Job) -> bytes:
        future = pool.submit(job, progress)
        told = -1
        while not future.done():
            wait([future], timeout=0.05)
            if on_progress is not None and progress.done > told:
                told = progress.done
                if on_progress(told, PROGRESS_STEPS, progress.phase) is False:
                    progress.cancelled = True
        data = future.result()
        if (
            on_progress is not None
            and told < PROGRESS_STEPS
            and on_progress(PROGRESS_STEPS, PROGRESS_STEPS, "") is False
        ):
            progress.cancelled = True
        progress.require_going()  # also where the answer came when the builder had just finished
        return data

    with ThreadPoolExecutor(1, thread_name_prefix="tensorrt") as pool:  # leaving it waits for the builder
        try:
            yield run
        except BaseException:
            progress.cancelled = True
            raise


def _inspected(library: Library, data: bytes) -> tuple[Kernel, ...]:
    """The kernels from the engine inspector, which needs the GPU: for a TensorRT whose log lists none."""
    trt = library.module
    engine = trt.Runtime(library.logger()).deserialize_cuda_engine(data)
    if engine is None:
        return ()
    inspector = engine.create_engine_inspector()
    return listed(inspector.get_engine_information(trt.LayerInformationFormat.ONELINE))
