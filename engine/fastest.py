"""The fastest way to run a network on this machine, among those that compute the same.

Tried are the artifact on every backend that works here, in every precision it can be run in there, and its companions:
the same network exported in another precision. Each is timed; the fastest whose results lie within the tolerance of
its precision is taken. What came out is kept for this machine, until anything it depends on changes.
"""

import hashlib
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import sdedit
from sdedit import cpu, verify
from sdedit.artifact import Artifact
from sdedit.backends import (
    AUTO_ORDER,
    BACKENDS,
    CPU,
    PRECISION_HINTS,
    Backend,
    open_backend,
    precisions,
    probe,
    require_known,
)
from sdedit.cache_folder import cache_folder
from sdedit.companions import companions
from sdedit.cpu import usable_cores
from sdedit.errors import BackendUnavailable, OptionError, SdeditError
from sdedit.loop import Array, Denoiser
from sdedit.operators import shipped

log = logging.getLogger(__name__)

FORMAT = 2  # of what is kept
MARGIN = 1.05  # as much faster than what `auto` takes must another be: less is noise, and no reason to round
WARM_UPS, LEAST_RUNS, MOST_RUNS, TIMED_SECONDS = 2, 3, 30, 0.4
BUSY = 0.5  # a load average above this, a core, is told of
AGAIN, CLOSE = 2, 2.0  # as often are those timed again that may be the fastest: other work disturbs some of the turns
PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class Trial:
    """One way to run the network, and how it came out here."""

    sha256: str  # of the artifact
    file: str  # its name, for the user
    backend: str
    precision: str
    evaluation_ms: float | None = None  # median, one image, of the best turn; None where it does not run
    error: float | None = None  # the worst of `verify`; None where it was not looked at: a faster one passed

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= verify.TOLERANCES.get(self.precision, 0.0)

    def __str__(self) -> str:
        return f"{self.backend}, {self.precision} ({self.file})"


def open_fastest(
    artifact: Artifact, *, backend: str = "auto", precision: str | None = None, threads: int | None = None
) -> tuple[Artifact, Backend, float]:
    """The artifact or a companion, opened on the fastest backend and precision that pass here; what the search took.

    backend, precision: narrow the choice. The first use on a machine takes the time of some hundred evaluations, and
    that in milliseconds is the last value; 0 where what was found earlier is used.
    Raises OptionError for an artifact that is not float32, BackendUnavailable where nothing passes.
    """
    if artifact.precision != "fp32":
        raise OptionError(
            f"{artifact.path.name} is {artifact.precision}; the fastest execution is looked for from fp32",
            hint="name the fp32 artifact, beside which others are found; or leave --fast out",
        )
    if precision is not None:
        require_known(precision)
    models = [artifact, *companions(artifact)]
    identity = _identity(models, backend, precision, threads)
    kept = _file(artifact, identity)
    trials = _read(kept, identity)
    searched, began = trials is None, time.perf_counter()
    if trials is None:
        log.info("fast: first use of %s on this machine, so what can run it is timed and verified", artifact.name)
        busy = _load()
        trials = _try_all(models, backend, precision, threads)
        if not trials:
            raise BackendUnavailable(
                f"nothing here runs {artifact.name} in {precision}",
                hint=PRECISION_HINTS.get(
                    precision or "", f"lay an export with --precision {precision} beside it, or leave --precision out"
                ),
            )
        if not any(trial.passed for trial in trials):
            raise BackendUnavailable(
                f"nothing that runs {artifact.name} here passed verification",
                hint="leave --fast out; see 'sdedit doctor'",
            )
        for model in models:
            model.require_unchanged()
        _keep(kept, identity, trials)
        if busy > BUSY and kept.exists():
            log.info(
                "fast: other work may have decided, the load average was %.1f a core; to look again, remove %s",
                busy,
                kept,
            )
    search_ms = 1e3 * (time.perf_counter() - began) if searched else 0.0
    best = min((trial for trial in trials if trial.passed), key=lambda trial: _cost(trial, trials))
    log.info("fast: %s", _verdict(best, trials))
    model = next(model for model in models if model.sha256 == best.sha256)
    return model, open_backend(best.backend, model, threads, precision=best.precision), search_ms


def _try_all(models: Sequence[Artifact], backend: str, precision: str | None, threads: int | None) -> list[Trial]:
    """Time every candidate, then verify them, the fastest first, until one passes."""
    by_sha256 = {model.sha256: model for model in models}
    trials = []
    for trial in _candidates(models, backend, precision):
        trials.append(_timed(trial, by_sha256[trial.sha256], threads))
        log.info("fast:   %s: %s", trial, _in_ms(trials[-1].evaluation_ms))
    for turn in range(AGAIN if len(trials) > 1 else 0):
        most = CLOSE * min((trial.evaluation_ms for trial in trials if trial.evaluation_ms is not None), default=0)
        ordinary = _ordinary(trials)
        for at in sorted(range(len(trials)), reverse=turn % 2 == 0):
            before = trials[at].evaluation_ms
            if before is None or (before > most and trials[at] != ordinary):
                continue
            now = _timed(trials[at], by_sha256[trials[at].sha256], threads).evaluation_ms
            if now is not None and now < before:
                trials[at] = replace(trials[at], evaluation_ms=now)
                log.info("fast:   %s: %s", trials[at], _in_ms(now))
    with _reference(models[0], threads) as right:
        for at in sorted(range(len(trials)), key=lambda at: _cost(trials[at], trials)):
            if trials[at].evaluation_ms is not None:
                trials[at] = _verified(trials[at], by_sha256[trials[at].sha256], threads, right)
            if trials[at].passed:
                break
    return trials


def _timed(trial: Trial, model: Artifact, threads: int | None) -> Trial:
    """With the median of one evaluation of one image, if it runs."""
    try:
        with closing(open_backend(trial.backend, model, threads, precision=trial.precision)) as opened:
            return replace(trial, evaluation_ms=_evaluation_ms(opened, model))
    except SdeditError:  # bfloat16 on ONNX Runtime's CPU, say
        return trial


def _evaluation_ms(opened: Backend, model: Artifact) -> float:
    evaluate = opened.bind(1, verify.any_conditions(model))
    x = np.random.default_rng(0).standard_normal((1, model.channels, model.height, model.width), np.float32)
    sigma = np.ones(1, np.float32)
    samples: list[float] = []
    for _ in range(WARM_UPS):
        evaluate(x, sigma)
    while len(samples) < LEAST_RUNS or (len(samples) < MOST_RUNS and sum(samples) < 1e3 * TIMED_SECONDS):
        began = time.perf_counter()
        evaluate(x, sigma)
        samples.append(1e3 * (time.perf_counter() - began))
    return statistics.median(samples)


def _verified(trial: Trial, model: Artifact, threads: int | None, right: verify.Bind) -> Trial:
    """With its worst error against `right`, unless that is no number."""
    guides, values = verify.guide_frames((), model.metadata["image"])[:2], verify.any_conditions(model)
    tolerance = verify.TOLERANCES.get(trial.precision, 0.0)
    try:
        with closing(open_backend(trial.backend, model, threads, precision=trial.precision)) as opened:
            bind = partial(opened.bind, conditions=values)
            report = verify.compare(right, bind, model.sde, guides, tolerance=tolerance)
    except SdeditError as error:
        log.info("fast:   %s: %s", trial, error)
        return trial
    worst = report.worst.error
    log.info("fast:   %s: error %.2g, tolerance %.2g", trial, worst, tolerance)
    return replace(trial, error=worst) if np.isfinite(worst) else trial


def _candidates(models: Sequence[Artifact], backend: str, precision: str | None) -> Iterator[Trial]:
    """Everything to try: what `auto` would take first. Raises BackendUnavailable for a backend that was named."""
    for name in (
        (*AUTO_ORDER, *(name for name in BACKENDS if name not in AUTO_ORDER)) if backend == "auto" else [backend]
    ):
        try:
            probe(name)
        except BackendUnavailable:
            if backend != "auto":
                raise
            continue
        for model in models:
            for runs_in in precisions(name, model):
                if precision in (None, runs_in):
                    yield Trial(model.sha256, model.path.name, name, runs_in)


@contextmanager
def _reference(artifact: Artifact, threads: int | None) -> Iterator[verify.Bind]:
    """The artifact in float32 on the CPU. What it says is remembered: every candidate is asked the same."""
    for name in CPU:
        try:
            right = open_backend(name, artifact, threads)
            break
        except BackendUnavailable as error:
            missing = error
    else:
        raise missing
    said: dict[bytes, Array] = {}

    def bind(batch: int) -> Denoiser:
        evaluate = right.bind(batch, verify.any_conditions(artifact))

        def remembered(x: Array, sigma: Array) -> Array:
            asked = hashlib.sha256(x.tobytes() + sigma.tobytes()).digest()
            if asked not in said:
                said[asked] = evaluate(x, sigma).copy()
            return said[asked]

        return remembered

    with closing(right):
        yield bind


def _cost(trial: Trial, trials: Sequence[Trial]) -> float:
    """Milliseconds, more for all but the first that runs as it was exported, which `auto` would take."""
    if trial.evaluation_ms is None:
        return np.inf
    return trial.evaluation_ms * (1 if trial == _ordinary(trials) else MARGIN)


def _ordinary(trials: Sequence[Trial]) -> Trial | None:
    return next((trial for trial in trials if trial.precision == "fp32" and trial.evaluation_ms is not None), None)


def _verdict(best: Trial, trials: Sequence[Trial]) -> str:
    told = f"{best}: {_in_ms(best.evaluation_ms)}, error {best.error:.2g} of at most "
    told += f"{verify.TOLERANCES[best.precision]:.2g}"
    ordinary = _ordinary(trials)
    if ordinary is None or ordinary == best:
        return told
    return f"{told}; {ordinary.backend} in fp32: {ordinary.evaluation_ms:.3g} ms"


def _in_ms(evaluation_ms: float | None) -> str:
    return "does not run it" if evaluation_ms is None else f"{evaluation_ms:.3g} ms an evaluation"


# --- what is kept ------------------------------------------------------------------------------------------------


def _identity(models: Sequence[Artifact], backend: str, precision: str | None, threads: int | None) -> dict[str, Any]:
    """All that timings and verdicts depend on."""
    return {
        "format": FORMAT,
        "engine": sdedit.__version__,
        "models": [models[0].sha256, *sorted(model.sha256 for model in models[1:])],
        "backend": backend,
        "precision": precision,
        "threads": threads,
        "cores": usable_cores(),
        "cpu": [sys.platform, platform.machine(), *cpu.identity()],
        "gpu": _gpu(),
        "packages": {name: _version(name) for name in PACKAGES},
        "operators": shipped.version() if shipped.usable_library() else None,
        "tolerances": verify.TOLERANCES,
    }


def _load() -> float:
    """The machine's load average of the last minute, a core; 0 where the system does not tell."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return 0.0


def _gpu() -> str | None:
    from sdedit.cuda.driver import open_driver

    try:
        gpu = open_driver().gpu
    except SdeditError:
        return None
    return f"{gpu.name}, driver {gpu.driver}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _file(artifact: Artifact, identity: Mapping[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache_folder("fastest") / f"{artifact.sha256[:12]}-{key[:24]}.json"


def _read(file: Path, identity: Mapping[str, Any]) -> list[Trial] | None:
    """What was kept for this identity; None where there is nothing, or nothing whole."""
    try:
        found = json.loads(file.read_text("utf-8"))
        trials = [Trial(**trial) for trial in found["trials"]]
        whole = found["identity"] == json.loads(json.dumps(identity)) and found["sha256"] == _digest(found["trials"])
        return trials if whole else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _keep(file: Path, identity: Mapping[str, Any], trials: Sequence[Trial]) -> None:
    """Write it whole or not at all: without it, the next use tries everything again."""
    told = [asdict(trial) for trial in trials]
    text = json.dumps({"identity": identity, "trials": told, "sha256": _digest(told)})
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=file.parent) as scratch:
            whole = Path(scratch) / file.name
            whole.write_text(text, "utf-8")
            os.replace(whole, file)
    except OSError as error:
        log.info("fast: what was found is not kept: %s; SDEDIT_CACHE names another folder", error.strerror or error)


def _digest(trials: Any) -> str:
    return hashlib.sha256(json.dumps(trials, sort_keys=True).encode()).hexdigest()
