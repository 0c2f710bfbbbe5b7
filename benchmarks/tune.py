"""What a contact sheet of 6 t0 with 4 seeds costs over the network's time for its evaluations at its best batch size.

python benchmarks/tune.py > benchmarks/results/tune.json
"""

import argparse
import io
import json
import statistics
import time
from pathlib import Path

import numpy as np
from arguments import positive, program
from conditions import conditions
from PIL import Image

import sdedit

GUIDE = Path(__file__).parents[1] / "examples" / "strokes.png"
T0S = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
SEEDS = 4
BATCHES = (1, 2, 4, 6, 8, 12, 24)


def network_ms(editor: sdedit.Editor, batch: int, images: int) -> float:
    """Milliseconds an image, of one evaluation at this batch size."""
    artifact = editor.artifact
    denoiser = editor.backend.bind(batch=batch, conditions={})
    x = np.random.default_rng(0).standard_normal((batch, artifact.channels, artifact.height, artifact.width))
    x, sigma = x.astype(np.float32), np.ones(batch, np.float32)
    denoiser(x, sigma)
    calls = images // batch
    began = time.perf_counter()
    for _ in range(calls):
        denoiser(x, sigma)
    return 1e3 * (time.perf_counter() - began) / (calls * batch)


def sheet_ms(editor: sdedit.Editor, steps: int, batch: int | None) -> float:
    """Milliseconds from the guide's file to the sheet's PNG."""
    options = {} if batch is None else {"batch": batch}
    began = time.perf_counter()
    with sdedit.open_tuner(editor, [GUIDE], t0s=len(T0S), samples=SEEDS, steps=steps, **options) as tuner:
        trials = tuner.at(T0S)
        guide = Image.fromarray(tuner.guides[0])
    cells = [[guide, *(Image.fromarray(trial.pictures[0][n]) for trial in trials)] for n in range(SEEDS)]
    columns = ["guide", *(f"t0 = {t0:g}" for t0 in T0S)]
    sheet = sdedit.contact_sheet(cells, columns=columns, rows=[f"seed {n}" for n in range(SEEDS)])
    sheet.save(io.BytesIO(), "PNG", compress_level=1)
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=positive, default=9)
    parser.add_argument("--steps", type=positive, help="of an edit (default: the model's)")
    parser.add_argument("--batch", type=positive, help="of the sheet (default: as sdedit tune chooses it)")
    arguments = parser.parse_args()
    editor = sdedit.load(backend="ort-cpu")
    about = conditions("pillow", editor=editor)
    steps = int(arguments.steps or editor.artifact.defaults["steps"])
    batches: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for _ in range(3):
        for batch in BATCHES:
            batches[batch].append(network_ms(editor, batch, images=48))
    best = min(BATCHES, key=lambda batch: statistics.median(batches[batch]))
    sheet_ms(editor, 2, arguments.batch)  # to warm up
    network, sheets = [], []
    for _ in range(arguments.runs):
        network.append(network_ms(editor, best, images=20 * best))
        sheets.append(sheet_ms(editor, steps, arguments.batch))
    evaluations = len(T0S) * SEEDS * steps
    ratios = [sheet / (evaluations * one) for sheet, one in zip(sheets, network, strict=True)]
    result = {
        "conditions": about | {"runs": arguments.runs},
        "sheet": {"t0": T0S, "seeds": SEEDS, "steps": steps, "evaluations": evaluations},
        "network_ms_per_image_by_batch": {str(batch): [round(one, 3) for one in batches[batch]] for batch in BATCHES},
        "best_batch": best,
        "network_ms_per_image_before_each_sheet": [round(one, 3) for one in network],
        "sheet_ms": [round(one, 1) for one in sheets],
        "sheet_over_network": {
            "median": round(statistics.median(ratios), 4),
            "low": round(min(ratios), 4),
            "high": round(max(ratios), 4),
            "raw": [round(one, 4) for one in ratios],
        },
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    program(main)
