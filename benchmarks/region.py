"""Masked edits in windows against masked edits of the whole frame: time, and how far the pictures lie apart.

python benchmarks/region.py MODEL.onnx PHOTO… [--t0 0.3,0.5,0.7] [--side 0.3125] [--steps 20] [--rounds 3] [--places 4]

MODEL takes any size (`sdedit export --dynamic`). In each photograph a square (of 0.3125 x 0.3125 of the frame, 9.8 % of
it) is replaced by its mean colour and repainted, at several places, with region="full", with "auto", and with "full"
and another seed: the distance between two seeds is the scale for the distance between full and auto. Distances are
root mean squares over the repainted pixels, in 8-bit levels; a seam is the mean absolute difference across the square's
edge. Runs are interleaved; one JSON object.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np
from arguments import file_here, numbers, output_file, positive, program
from conditions import conditions
from PIL import Image

import sdedit


def blanked(photo: np.ndarray, left: int, top: int, side: int) -> np.ndarray:
    guide = photo.copy()
    guide[top : top + side, left : left + side] = photo[top : top + side, left : left + side].mean((0, 1))
    return guide


def seam(picture: np.ndarray, mask: np.ndarray) -> float:
    """Mean absolute difference of neighbours of which one is repainted and one is not."""
    x, inside = picture.astype(float), mask > 0
    across = [np.abs(np.diff(x, axis=axis)).mean(-1)[np.diff(inside, axis=axis)] for axis in (0, 1)]
    return float(np.concatenate(across).mean())


def distance(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a.astype(float) - b)[mask > 0] ** 2)))


def summary(samples: list[float]) -> dict[str, float]:
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Windows against whole frames.")
    parser.add_argument("model", type=Path)
    parser.add_argument("photos", type=file_here, nargs="+")
    parser.add_argument("--t0", type=numbers, default="0.3,0.5,0.7", metavar="T0,T0…")
    parser.add_argument("--side", type=float, default=0.3125, help="of the repainted square, as a part of the frame's")
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--places", type=int, default=4, help="squares a photograph, for the distances (0: only time)")
    parser.add_argument("--rounds", type=positive, default=3, help="of the timing")
    parser.add_argument("-o", "--output", type=output_file)
    arguments = parser.parse_args()

    editor = sdedit.load(arguments.model, backend="ort-cpu")
    about = conditions(editor=editor)
    frame = editor.artifact.width, editor.artifact.height
    side = round(arguments.side * min(frame))
    if not editor.artifact.metadata["image"].get("dynamic"):
        parser.error(f"{arguments.model} has one size; wanted a model of any (sdedit export --dynamic)")
    if not 0 < side <= min(frame):
        parser.error(f"--side is {arguments.side:g}; wanted a part of the frame, such as 0.3125")
    photos = [np.asarray(Image.open(path).convert("RGB").resize(frame)) for path in arguments.photos]
    rng = np.random.default_rng(0)

    def edit(guide: np.ndarray, mask: np.ndarray, **options: object) -> sdedit.EditResult:
        return editor.edit(guide, mask=mask, steps=arguments.steps, **options)

    def square() -> tuple[int, int, np.ndarray]:
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in frame)
        mask = np.zeros(frame[::-1], np.uint8)
        mask[top : top + side, left : left + side] = 255
        return left, top, mask

    quality = {}
    for t0 in arguments.t0 if arguments.places else ():
        rows = []
        for number, photo in enumerate(photos * arguments.places):
            left, top, mask = square()
            guide = blanked(photo, left, top, side)
            full, auto, other = (
                np.asarray(edit(guide, mask, t0=t0, seed=seed, region=region).images[0])
                for seed, region in ((number, "full"), (number, "auto"), (number + 10**6, "full"))
            )
            assert np.array_equal(auto[mask == 0], guide[mask == 0])
            rows.append(
                (distance(full, auto, mask), distance(full, other, mask), *(seam(p, mask) for p in (full, auto, photo)))
            )
        names = ("auto_to_full", "seed_to_seed", "seam_full", "seam_auto", "seam_photograph")
        quality[t0] = {n: round(float(v), 2) for n, v in zip(names, np.mean(rows, axis=0), strict=True)}

    left, top, mask = square()
    times: dict[str, list[float]] = {"full": [], "auto": []}
    for number in range(arguments.rounds + 1):
        for region, samples in times.items():
            guide = blanked(photos[0], left, top, side)
            samples.append(edit(guide, mask, seed=number, region=region, t0=0.5).timings.total_ms)
    ratios = [full / auto for full, auto in zip(times["full"][1:], times["auto"][1:], strict=True)]
    result = {
        "conditions": {
            **about,
            "frame": frame,
            "square": side,
            "repainted_share": round(side**2 / (frame[0] * frame[1]), 4),
            "steps": arguments.steps,
            "edits": len(photos) * arguments.places,
        },
        "levels_by_t0": quality,
        "ms_an_edit": {region: summary(samples[1:]) for region, samples in times.items()},
        "full_over_auto": summary(ratios),
        "samples_ms": {region: samples[1:] for region, samples in times.items()},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    program(main)
