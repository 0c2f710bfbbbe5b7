"""From process start to file written: `sdedit edit` with the bundled model, whole processes.

python benchmarks/cold_start.py [--runs 15] [--steps 20] [-o FILE.json]

Beyond what nobody can do without: the network's own evaluations (`network_ms` of the same process) and
`python -c "import numpy, PIL.Image, onnxruntime"`. Three cases, interleaved: without the graph cache, the first start
that fills it, and every later one. `written` is when the output had its name (the file's ctime), `exited` when the
process was gone. Files are in the disk cache and byte-compiled: one run of each case goes before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from arguments import output_file, positive, program
from conditions import conditions

GUIDE = Path(__file__).parents[1] / "examples" / "strokes.png"
IMPORTS = "import numpy, PIL.Image, onnxruntime"
CASES = ("without_cache", "first", "cached")


def start(command: list[str], environment: dict[str, str]) -> tuple[float, float, str]:
    """Wall-clock time of the start, milliseconds to the exit, what it printed."""
    wall, began = time.time(), time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    return wall, 1e3 * (time.perf_counter() - began), done.stdout.decode()


def edit(case: str, steps: int, folder: Path, environment: dict[str, str]) -> dict[str, float]:
    output = folder / "out.png"
    output.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        cache = {"SDEDIT_CACHE": fresh if case == "first" else str(folder / "cache")}
        if case == "without_cache":
            cache["SDEDIT_GRAPH_CACHE"] = "off"
        words = ["edit", str(GUIDE), "-o", str(output), "--steps", str(steps), "--json"]
        command = [sys.executable, "-c", "from sdedit.cli.main import command; command()", *words]
        wall, exited_ms, answer = start(command, environment | cache)
    timings = json.loads(answer)["timings"]
    written_ms = 1e3 * (output.stat().st_ctime - wall)
    return {
        "written_ms": written_ms,
        "exited_ms": exited_ms,
        "network_ms": timings["network_ms"],
        "load_ms": timings["load_ms"],
    }


def measure(runs: int, steps: int) -> dict[str, object]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    samples: dict[str, dict[str, list[float]]] = {case: {} for case in CASES}
    imports: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for run in range(runs + 1):
            imports_ms = start([sys.executable, "-c", IMPORTS], environment)[1]
            timed = {case: edit(case, steps, Path(folder), environment) for case in CASES}
            if run == 0:
                continue
            imports.append(imports_ms)
            for case, values in timed.items():
                values["beyond_ms"] = values["written_ms"] - values["network_ms"] - imports_ms
                for name, value in values.items():
                    samples[case].setdefault(name, []).append(value)
    return {
        "imports_ms": summary(imports),
        **{case: {name: summary(values) for name, values in rows.items()} for case, rows in samples.items()},
    }


def summary(samples: list[float]) -> dict[str, object]:
    return {
        "median": round(statistics.median(samples), 1),
        "min": round(min(samples), 1),
        "max": round(max(samples), 1),
        "samples": [round(value, 1) for value in samples],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=positive, default=15)
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("-o", "--output", type=output_file, help="write the JSON here too")
    arguments = parser.parse_args()
    results = {
        "conditions": conditions("pillow", "onnxruntime")
        | {"model": "bundled, fp32, batch 1", "steps": arguments.steps, "runs": arguments.runs}
        | {"disk": "warm", "interleaved": True},
        **measure(arguments.runs, arguments.steps),
    }
    text = json.dumps(results, indent=1)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", "utf-8")
    print(f"imports {results['imports_ms']['median']} ms")
    for case in CASES:
        print(case, {name: value["median"] for name, value in results[case].items()})


if __name__ == "__main__":
    program(main)
