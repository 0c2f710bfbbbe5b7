"""What was found: one row a case, whose fields are the columns of every format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CASE, MEASURED, SAMPLES, CONDITION = "case", "measured", "samples", "condition"


def column(part: str, heading: str = "", digits: int = 0, scale: float = 1.0) -> Any:
    """A field of Row. heading: above it in a table for people, which shows `digits` decimals of it / scale."""
    return field(metadata={"part": part, "heading": heading, "digits": digits, "scale": scale})


@dataclass(frozen=True)
class Row:
    """One case, measured. Times are milliseconds of one edit of `batch` pictures, on this host's clock.

    network_ms, device_ms and other_ms are medians. device_ms: the GPU's own clock (CUDA events), all steps, without
    the copies; network_ms: of the network alone, which only a loop on the host sees. other_ms: what is left of an edit.
    """

    model: str = column(CASE, "model")
    file: str = column(CASE, "file")  # as it was named
    backend: str = column(CASE, "backend")
    precision: str = column(CASE, "precision")
    threads: int = column(CASE, "threads")
    batch: int = column(CASE, "batch")
    steps: int = column(CASE, "steps")
    sampler: str = column(CASE, "sampler")
    t0: float = column(CASE, "t0", 2)
    spacing: str = column(CASE, "spacing")
    eta: float | None = column(CASE, "eta", 2)
    repeats: int = column(CASE, "repeats")

    runs: int = column(MEASURED, "runs")
    p50_ms: float = column(MEASURED, "p50 ms", 1)
    p90_ms: float = column(MEASURED, "p90 ms", 1)
    p99_ms: float = column(MEASURED, "p99 ms", 1)
    step_ms: float = column(MEASURED, "ms/step", 2)  # p50_ms / (steps · repeats)
    network_ms: float | None = column(MEASURED, "network ms", 1)
    device_ms: float | None = column(MEASURED, "device ms", 2)
    other_ms: float = column(MEASURED, "other ms", 2)
    images_per_s: float = column(MEASURED, "images/s", 2)
    load_ms: float = column(MEASURED, "load ms", 0)  # imports and loading, a new process
    first_edit_ms: float = column(MEASURED, "first edit ms", 0)
    peak_bytes: int | None = column(MEASURED, "peak MiB", 0, 2**20)  # of the process, on the host
    device_bytes: int | None = column(MEASURED, "GPU MiB", 0, 2**20)  # of the process, after its edits
    spread: float = column(MEASURED)  # (p90 - p10) / p50

    edit_samples_ms: Sequence[float] = column(SAMPLES)  # in the order they were taken
    network_samples_ms: Sequence[float] = column(SAMPLES)
    device_samples_ms: Sequence[float] = column(SAMPLES)
    load_samples_ms: Sequence[float] = column(SAMPLES)
    first_edit_samples_ms: Sequence[float] = column(SAMPLES)

    rounds: int = column(CONDITION)  # of all cases, this one's new processes
    warmup: int = column(CONDITION)  # edits of each that are not timed, after its first
    conditions: Mapping[str, float] = column(CONDITION)  # values of the model's further inputs
    provider: str = column(CONDITION)
    cpu: str = column(CONDITION)
    cores: int = column(CONDITION)
    gpu: str | None = column(CONDITION)
    noise: str | None = column(CONDITION)  # what made it, as sdedit.noise_maker says; None: the GPU
    graph: str | None = column(CONDITION)  # on a GPU: what a CUDA graph holds, "edit", "step", "network"; or "off"
    transfers: str = column(CONDITION)  # what of copies to and from the GPU is in the edit's times
    system: str = column(CONDITION)
    python: str = column(CONDITION)
    versions: Mapping[str, str] = column(CONDITION)
    model_sha256: str = column(CONDITION)
    commit: str | None = column(CONDITION)
    load_average: float | None = column(CONDITION)  # before anything was measured
    date: str = column(CONDITION)


def make_row(facts: Mapping[str, Any], visits: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> Row:
    """The row of a case. facts, visits: what sdedit.bench.visit returned of it; machine: from sdedit.bench.machine."""
    import numpy as np

    def median(values: Sequence[float]) -> float:
        return float(np.median(values))

    def of_edits(name: str) -> list[float]:
        return [edit[name] for visit in visits for edit in visit["edits"] if edit[name] is not None]

    def peak(name: str) -> int | None:
        return max((visit[name] for visit in visits if visit[name] is not None), default=None)

    edits, network, device = of_edits("total_ms"), of_edits("network_ms"), of_edits("device_ms")
    p10, p50, p90, p99 = (float(p) for p in np.percentile(edits, (10, 50, 90, 99)))
    inside = device or network
    loads, firsts = ([visit[name] for visit in visits] for name in ("load_ms", "first_edit_ms"))
    return Row(
        **facts,
        **machine,
        runs=len(edits),
        rounds=len(visits),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        step_ms=p50 / (facts["steps"] * facts["repeats"]),
        network_ms=median(network) if network else None,
        device_ms=median(device) if device else None,
        other_ms=median([whole - part for whole, part in zip(edits, inside, strict=True)]),
        images_per_s=1e3 * facts["batch"] / p50,
        load_ms=median(loads),
        first_edit_ms=median(firsts),
        peak_bytes=peak("peak_bytes"),
        device_bytes=peak("device_bytes"),
        spread=(p90 - p10) / p50,
        edit_samples_ms=edits,
        network_samples_ms=network,
        device_samples_ms=device,
        load_samples_ms=loads,
        first_edit_samples_ms=firsts,
        graph=visits[-1]["graph"],
        transfers="in and out" if facts["gpu"] else "none",
    )
