"""What the engine adds to the network: time per step outside it, and the start-up of the command.

python benchmarks/lean.py [MODEL.onnx ...] [--runs 15] [-o RESULT.json]

Steps are measured with the bundled model and with those that are named, with compiled noise and with NumPy's. One JSON
object: conditions, medians, spread (minimum and maximum) and ratios. Runs are interleaved.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from arguments import output_file, positive, program
from conditions import conditions

import sdedit


def milliseconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return 1e3 * (time.perf_counter() - began)


def summary(samples: list[float]) -> dict[str, float]:
    return {
        name: round(float(value), 4)
        for name, value in (("median", statistics.median(samples)), ("min", min(samples)), ("max", max(samples)))
    }


def start_up(runs: int) -> dict[str, object]:
    """`sdedit -h` beside `import numpy`, whole processes."""
    commands = {
        "help_ms": [sys.executable, "-c", "from sdedit.cli.main import main; main(['-h'])"],
        "import_numpy_ms": [sys.executable, "-c", "import numpy"],
        "python_ms": [sys.executable, "-c", "pass"],
    }
    samples: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs + 1):
        for name, command in commands.items():
            samples[name].append(milliseconds(command))
    medians = {name: summary(values[1:]) for name, values in samples.items()}  # the first run warms the disk cache
    return {
        **medians,
        "help_over_import_numpy": round(medians["help_ms"]["median"] / medians["import_numpy_ms"]["median"], 3),
    }


def overhead(model: Path | None, runs: int, steps: int) -> dict[str, object]:
    """Edits of one picture, `ancestral` (noise in every step): time outside the network."""
    editor = sdedit.load(model)
    size = (editor.artifact.height, editor.artifact.width, editor.artifact.channels)
    guide = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    timings: dict[str, list[sdedit.Timings]] = {sdedit.noise_maker(): [], "numpy": []}
    for seed in range(runs + 2):
        for noise, taken in timings.items():
            os.environ["SDEDIT_NOISE"] = noise
            taken.append(editor.edit(guide, steps=steps, seed=seed, sampler="ancestral").timings)
    del os.environ["SDEDIT_NOISE"]
    return {
        "backend": editor.backend.name,
        "threads": editor.backend.threads,
        **editor.backend.versions,
        "steps": steps,
        "noise": {noise: outside_network(taken[2:]) for noise, taken in timings.items()},
    }


def outside_network(timings: list[sdedit.Timings]) -> dict[str, object]:
    """Noise that NumPy draws beside the network's first evaluation is in the network's time: the loop's has it all."""
    outside = [(t.loop_ms - t.network_ms) / t.evaluations for t in timings]
    network = [t.network_ms / t.evaluations for t in timings]
    return {
        "loop_ms_per_step": summary([t.loop_ms / t.evaluations for t in timings]),
        "network_ms_per_step": summary(network),
        "outside_ms_per_step": summary(outside),
        "outside_share_of_step": summary([o / (o + n) for o, n in zip(outside, network, strict=True)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What the engine adds to the network.")
    parser.add_argument("models", metavar="MODEL.onnx", type=Path, nargs="*", help="beside the bundled one")
    parser.add_argument("-o", "--output", type=output_file, help="write the result here too")
    parser.add_argument("--runs", type=positive, default=15)
    parser.add_argument("--steps", type=positive, default=50)
    arguments = parser.parse_args()
    results = {
        "conditions": conditions() | {"runs": arguments.runs},
        "loop": {
            "bundled" if model is None else model.stem: overhead(model, arguments.runs, arguments.steps)
            for model in (None, *arguments.models)
        },
        "start_up": start_up(arguments.runs),
    }
    text = json.dumps(results, indent=2)
    if arguments.output is not None:
        arguments.output.write_text(f"{text}\n", "utf-8")
    print(text)


if __name__ == "__main__":
    program(main)
