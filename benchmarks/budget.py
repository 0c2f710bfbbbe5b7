"""How often an edit with a time budget finishes within it, and how much of it is used. Bundled model.

python benchmarks/budget.py [--runs 50] [--command-runs 50] [-o FILE.json]

`editor`: runs of `Editor.edit(max_ms=…)` on one editor, budgets interleaved, from the call to the return; the first
run of the editor, which calibrates, is one of them. `command`: `sdedit edit --max-ms`, whole processes, until the
output has its name (its ctime).
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cold_start
import numpy as np
from arguments import output_file, positive, program
from conditions import conditions

import sdedit

EDITOR_BUDGETS_MS = (60, 150, 300)
COMMAND_BUDGETS_MS = (500, 800)
STEPS = 50  # wanted


def in_process(runs: int) -> dict[int, list[tuple[float, int]]]:
    """(milliseconds, steps) of every run, by budget."""
    editor = sdedit.load()
    guide = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    taken: dict[int, list[tuple[float, int]]] = {budget: [] for budget in EDITOR_BUDGETS_MS}
    for seed in range(runs):
        for budget in EDITOR_BUDGETS_MS:
            began = time.perf_counter()
            try:
                steps = editor.edit(guide, steps=STEPS, max_ms=budget, seed=seed).options.steps
            except sdedit.OptionError:  # not even one step was thought possible
                steps = 0
            taken[budget].append((1e3 * (time.perf_counter() - began) if steps else float("inf"), steps))
    return taken


def whole_processes(runs: int) -> dict[int, list[tuple[float, int]]]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    taken: dict[int, list[tuple[float, int]]] = {budget: [] for budget in COMMAND_BUDGETS_MS}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.png"
        words = ["edit", str(cold_start.GUIDE), "-o", str(output), "--json", "--steps", str(STEPS), "--max-ms"]
        command = [sys.executable, "-c", "from sdedit.cli.main import command; command()", *words]
        for run in range(-1, runs):
            for budget in COMMAND_BUDGETS_MS:
                output.unlink(missing_ok=True)
                given = str(budget if run >= 0 else 1e5)  # the first run fills the graph cache
                try:
                    wall, _, answer = cold_start.start(
                        [*command, given], environment | {"SDEDIT_CACHE": str(Path(folder) / "cache")}
                    )
                except subprocess.CalledProcessError:  # refused
                    taken[budget].append((float("inf"), 0))
                    continue
                if run >= 0:
                    written_ms = 1e3 * (output.stat().st_ctime - wall)
                    taken[budget].append((written_ms, json.loads(answer)["options"]["steps"]))
    return taken


def rows(taken: dict[int, list[tuple[float, int]]]) -> list[dict[str, object]]:
    return [
        {
            "budget_ms": budget,
            "runs": len(runs),
            "refused": sum(steps == 0 for _, steps in runs),
            "within": round(sum(ms <= budget for ms, _ in runs) / len(runs), 3),
            "median_ms": finite(statistics.median(ms for ms, _ in runs)),  # null: most were refused
            "worst_ms": finite(max((ms for ms, steps in runs if steps), default=math.inf)),
            "steps": sorted({steps for _, steps in runs}),
            "median_steps": statistics.median(steps for _, steps in runs),
            "samples": [[round(ms, 1) if steps else None, steps] for ms, steps in runs],
        }
        for budget, runs in taken.items()
    ]


def finite(ms: float) -> float | None:
    """As JSON has it."""
    return round(ms, 1) if math.isfinite(ms) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=positive, default=50)
    parser.add_argument("--command-runs", type=positive, default=50)
    parser.add_argument("-o", "--output", type=output_file, help="write the JSON here too")
    arguments = parser.parse_args()
    asked = {"steps": STEPS, "runs": arguments.runs, "command_runs": arguments.command_runs}
    results = {
        "conditions": conditions("pillow", "onnxruntime")
        | {"model": "bundled, fp32, batch 1", **asked, "disk": "warm", "interleaved": True},
        "editor": rows(in_process(arguments.runs)),
        "command": rows(whole_processes(arguments.command_runs)),
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results) + "\n", "utf-8")
    for kind in ("editor", "command"):
        for row in results[kind]:
            print(kind, {name: value for name, value in row.items() if name != "samples"})


if __name__ == "__main__":
    program(main)
