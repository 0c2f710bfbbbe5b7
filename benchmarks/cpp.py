"""Time of one edit in the C++ programs of examples/cpp beside Python's: python benchmarks/cpp.py BUILD [-o RESULT.json]

BUILD is where CMake built them. Each figure is the first edit of a new process, bundled model, from the guide in memory
to the result's pixels; start-up, loading the model and files are not in it. The three take turns.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from arguments import output_file, positive, program
from conditions import conditions, cores
from PIL import Image

import sdedit

STROKES = Path(__file__).parents[1] / "examples" / "strokes.png"


def main() -> None:
    parser = argparse.ArgumentParser(description="One edit in C++ beside Python's.")
    parser.add_argument("build", type=Path)
    parser.add_argument("-o", "--output", type=output_file, help="write the result here too")
    parser.add_argument("--steps", type=positive, default=50)
    parser.add_argument("--runs", type=positive, default=15)
    arguments = parser.parse_args()
    editor = sdedit.load(backend="ort-cpu", threads=cores())
    about = conditions(editor=editor) | {"steps": arguments.steps, "runs": arguments.runs}
    threads, steps = str(cores()), str(arguments.steps)
    sdedit_command = [sys.executable, "-m", "sdedit.cli.main"]
    samples: dict[str, list[float]] = {"python": [], "edit_cpp": [], "step_cpp": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        guide, graph, table, out = (str(folder / one) for one in ("guide.png", "edit.onnx", "table.json", "out.png"))
        with Image.open(STROKES) as opened:
            opened.convert("RGB").resize((64, 64)).save(guide)
        model = str(editor.artifact.path)
        subprocess.run([*sdedit_command, "export", "--loop", "-o", graph, "--t0", "0.5", "--steps", steps], check=True)
        described = [*sdedit_command, "inspect", "--json", "--t0", "0.5", "--steps", steps]
        Path(table).write_bytes(subprocess.run(described, check=True, capture_output=True).stdout)
        commands = {
            "python": [*sdedit_command, "edit", guide, "-o", out, "--t0", "0.5", "--steps", steps, "--threads", threads,
                       "--backend", "ort-cpu", "--json", "--force"],
            "edit_cpp": [str(arguments.build / "edit_cpp"), graph, guide, out, "--threads", threads],
            "step_cpp": [str(arguments.build / "step_cpp"), model, table, guide, out, "--threads", threads],
        }  # fmt: skip
        for _ in range(arguments.runs):
            for program, command in commands.items():
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                ms = (
                    json.loads(said)["timings"]["loop_ms"]
                    if program == "python"
                    else re.search(r"in ([\d.]+) ms", said)
                )
                samples[program].append(float(ms[1] if isinstance(ms, re.Match) else ms))
    pairs = {
        program: [mine / theirs for mine, theirs in zip(values, samples["python"], strict=True)]
        for program, values in samples.items()
        if program != "python"
    }
    found = {
        "conditions": about,
        "median_ms": {program: round(statistics.median(values), 2) for program, values in samples.items()},
        "over_python": {program: round(statistics.median(ratios), 4) for program, ratios in pairs.items()},
        "samples_ms": {program: [round(value, 2) for value in values] for program, values in samples.items()},
    }  # fmt: skip
    text = json.dumps(found, indent=2)
    if arguments.output is not None:
        arguments.output.write_text(f"{text}\n", "utf-8")
    print(text)


if __name__ == "__main__":
    program(main)
