"""Measure edits: cases, each in processes of its own, in interleaved rounds.

    from sdedit.bench import Bench, Effort, expand

    bench = Bench(expand([None], {"steps": [20, 50], "threads": [1, 2]}), Effort(runs=15))
    for done in bench.visits():
        print(f"{done} of {bench.total}")
    for row in bench.rows():
        print(row.steps, row.threads, row.p50_ms)

A time is the host's clock around one edit of `batch` pictures, uint8 arrays in and out, so on a GPU the copies to and
from it are inside. `device_ms` is the GPU's own time, by CUDA events between those copies.
"""

from sdedit.bench.cases import AXES, Case, expand
from sdedit.bench.effort import Effort
from sdedit.bench.rounds import Bench
from sdedit.bench.rows import Row

__all__ = ["AXES", "Bench", "Case", "Effort", "Row", "expand"]
