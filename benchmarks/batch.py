"""What a folder of pictures costs beside its network: `sdedit batch` against images x steps x the network's own time.

python benchmarks/batch.py [-o RESULT.json] [--images 500] [--steps 20] [--batch N]

The guides are JPEGs of 256x256, cut from an example photograph: decoding, resizing, noise, PNGs, records and manifest
are all in the job's time; loading the model is not. The network alone is the same session on buffers of its own: first
at every batch size in turn, to find the best; then at that size after every tenth of the job, which waits for it (and
reads and writes up to ten pictures on the side: at most half a percent in its favour). The job's time is compared with
the mean of these; its tenths, each with the network just before and after it, do not end where batches do. Memory is
the resident set, looked at when a picture is done. One JSON object.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from arguments import output_file, positive, program
from conditions import conditions
from PIL import Image

import sdedit

PHOTO = Path(__file__).parents[1] / "examples" / "photo.png"
SIZES = (1, 2, 4, 8, 16)
SIDE = 256  # of a guide


def write_guides(folder: Path, count: int) -> None:
    """JPEGs, all different, in folders of a hundred."""
    with Image.open(PHOTO) as opened:
        photo = np.asarray(opened.convert("RGB").resize((SIDE, SIDE)))
    for number in range(count):
        path = folder / f"{number // 100:02d}" / f"{number:04d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.roll(photo, (7 * number, 3 * number), (0, 1))).save(path, quality=90)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)


class Network:
    """The editor's network by itself, bound once for each batch size."""

    def __init__(self, editor: sdedit.Editor) -> None:
        shape = editor.artifact.channels, editor.artifact.height, editor.artifact.width
        self._x = np.random.default_rng(0).standard_normal((max(SIZES), *shape)).astype(np.float32)
        self._sigma = np.ones(1, np.float32)
        self._bound = {size: editor.backend.bind(size, {}) for size in SIZES}

    def ms_an_image(self, size: int) -> float:
        """One evaluation an image, 32 images."""
        network, x, calls = self._bound[size], self._x[:size], 32 // size
        network(x, self._sigma)
        began = time.perf_counter()
        for _ in range(calls):
            network(x, self._sigma)
        return 1e3 * (time.perf_counter() - began) / (calls * size)


class Watch:
    """What `on_file` sees: the time of every tenth without the breaks, the network in the breaks, the resident set."""

    def __init__(self, network: Network, size: int, tenth: int) -> None:
        self._network, self._size, self._tenth = network, size, tenth  # of images
        self.tenth_ms: list[float] = []
        self.network_ms: list[float] = []
        self.memory_mb: list[float] = []
        self._began = 0.0

    def __call__(self, progress: sdedit.FolderProgress) -> None:
        self.memory_mb.append(resident_mb())
        if progress.done % self._tenth == 0:
            if progress.done:
                self.tenth_ms.append(1e3 * (time.perf_counter() - self._began))
            self.network_ms.append(statistics.median(self._network.ms_an_image(self._size) for _ in range(3)))
            self._began = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description="What a folder of pictures costs beside its network.")
    parser.add_argument("-o", "--output", type=output_file, help="write the result here too")
    parser.add_argument("--images", type=positive, default=500)
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--batch", type=positive, help="default: that of sdedit batch")
    arguments = parser.parse_args()
    if arguments.images % 10:
        parser.error(f"--images is {arguments.images}; wanted a multiple of 10: the job is timed in tenths")
    tenth = arguments.images // 10
    editor = sdedit.load(backend="ort-cpu")
    about, network = conditions("pillow", editor=editor), Network(editor)
    rounds = [{size: network.ms_an_image(size) for size in SIZES} for _ in range(6)][1:]
    medians = {size: statistics.median(one[size] for one in rounds) for size in SIZES}
    best = min(medians, key=lambda size: medians[size])
    options = {"steps": arguments.steps} | ({} if arguments.batch is None else {"batch": arguments.batch})
    watch = Watch(network, best, tenth)
    with tempfile.TemporaryDirectory() as guides, tempfile.TemporaryDirectory() as out:
        write_guides(Path(guides), arguments.images)
        result = sdedit.edit_folder(editor, guides, out, on_file=watch, **options)
    evaluations = tenth * arguments.steps
    ratios = [
        ms / (evaluations * (before + after) / 2)
        for ms, (before, after) in zip(watch.tenth_ms, pairwise(watch.network_ms), strict=True)
    ]
    first, last = max(watch.memory_mb[1 : tenth + 1]), max(watch.memory_mb[-tenth:])
    found = {
        "conditions": {
            **about,
            "images": arguments.images,
            "guides": f"JPEG {SIDE}x{SIDE}",
            "steps": arguments.steps,
            "batch": result.options.batch,
            "sampler": result.options.sampler,
            "noise": sdedit.noise_maker(),
        },
        "failed": len(result.failed),
        "best_batch": best,
        "network_ms_per_image_step": {str(size): round(value, 4) for size, value in medians.items()},
        "over_network_at_best_batch": round(
            sum(watch.tenth_ms) / (arguments.images * arguments.steps * statistics.fmean(watch.network_ms)), 4
        ),
        "tenths_over_network_at_best_batch": {
            "median": round(statistics.median(ratios), 4), "min": round(min(ratios), 4), "max": round(max(ratios), 4),
        },
        "memory_mb": {"first_tenth_peak": round(first, 1), "last_tenth_peak": round(last, 1)},
        "memory_last_over_first": round(last / first, 4),
        "samples": {
            "tenth_ms": [round(ms, 1) for ms in watch.tenth_ms],
            "network_ms_per_image_step_between": [round(ms, 4) for ms in watch.network_ms],
            "network_ms_per_image_step": [{str(size): round(ms, 4) for size, ms in one.items()} for one in rounds],
        },
    }  # fmt: skip
    text = json.dumps(found, indent=2)
    if arguments.output is not None:
        arguments.output.write_text(f"{text}\n", "utf-8")
    print(text)


if __name__ == "__main__":
    program(main)
