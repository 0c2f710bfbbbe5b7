"""What a folder of pictures costs beside its network: `sdedit batch` against images x steps x the network's own time.

python benchmarks/batch.py [-o RESULT.json] [--images 500] [--steps 20] [--batch N] [--runs 2]

The guides are JPEGs of 256x256, cut from an example photograph: decoding, resizing, noise, PNGs, records and manifest
on the disk are all in the job's time; loading the model is not. First the network alone, bare ONNX Runtime on buffers
of its own, at every batch size in turn, several times; and again after every run of the job. Memory is the resident
set, looked at when a picture is done. One JSON object: conditions, ratios, raw samples.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
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
    """The model in ONNX Runtime by itself, input and output bound once for each batch size."""

    def __init__(self, editor: sdedit.Editor) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = editor.backend.threads
        model = str(editor.artifact.path)
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._shape = editor.artifact.channels, editor.artifact.height, editor.artifact.width
        self._bound = {size: self._bind(size) for size in SIZES}

    def _bind(self, size: int) -> tuple[Any, ...]:
        x = np.random.default_rng(0).standard_normal((size, *self._shape)).astype(np.float32)
        sigma, denoised = np.ones(size, np.float32), np.empty_like(x)
        binding = self._session.io_binding()
        binding.bind_input("x", "cpu", 0, np.float32, x.shape, x.ctypes.data)
        binding.bind_input("sigma", "cpu", 0, np.float32, sigma.shape, sigma.ctypes.data)
        binding.bind_output("denoised", "cpu", 0, np.float32, x.shape, denoised.ctypes.data)
        return binding, x, sigma, denoised

    def rounds(self, count: int) -> Iterator[dict[int, float]]:
        """Milliseconds an image at every batch size, 32 images each, one size after the other."""
        for _ in range(count):
            found = {}
            for size, (binding, *_) in self._bound.items():
                self._session.run_with_iobinding(binding)
                calls = 32 // size
                began = time.perf_counter()
                for _ in range(calls):
                    self._session.run_with_iobinding(binding)
                found[size] = 1e3 * (time.perf_counter() - began) / (calls * size)
            yield found


def run(editor: sdedit.Editor, guides: Path, options: dict[str, int]) -> tuple[sdedit.FolderResult, list[float]]:
    """The job, and the resident set after every picture in MB."""
    memory: list[float] = []
    with tempfile.TemporaryDirectory() as out:
        result = sdedit.edit_folder(editor, guides, out, on_file=lambda _: memory.append(resident_mb()), **options)
    return result, memory


def main() -> None:
    parser = argparse.ArgumentParser(description="What a folder of pictures costs beside its network.")
    parser.add_argument("-o", "--output", type=Path, help="write the result here too")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, help="default: that of sdedit batch")
    parser.add_argument("--runs", type=int, default=2)
    arguments = parser.parse_args()
    editor = sdedit.load(backend="ort-cpu")
    network = Network(editor)
    next(network.rounds(1))
    samples = [list(network.rounds(3))]
    options = {"steps": arguments.steps} | ({} if arguments.batch is None else {"batch": arguments.batch})
    jobs = []
    with tempfile.TemporaryDirectory() as folder:
        guides = Path(folder)
        write_guides(guides, arguments.images)
        for _ in range(arguments.runs):
            jobs.append(run(editor, guides, options))
            samples.append(list(network.rounds(3)))
    every = [one for group in samples for one in group]
    medians = {size: statistics.median(one[size] for one in every) for size in SIZES}
    best = min(medians, key=lambda size: medians[size])
    tenth = max(1, arguments.images // 10)
    rows = []
    for number, (result, memory) in enumerate(jobs):
        beside = statistics.median(one[best] for group in samples[number : number + 2] for one in group)
        wanted = arguments.images * arguments.steps * beside
        first, last = max(memory[1 : tenth + 1]), max(memory[-tenth:])
        rows.append(
            {
                "total_ms": round(result.total_ms, 1),
                "network_ms_per_image_step": round(beside, 4),
                "over_network_at_best_batch": round(result.total_ms / wanted, 4),
                "first_tenth_peak_mb": round(first, 1),
                "last_tenth_peak_mb": round(last, 1),
                "memory_last_over_first": round(last / first, 4),
                "failed": len(result.failed),
            }
        )
    found = {
        "conditions": {
            "machine": platform.machine(),
            "system": platform.platform(terse=True),
            "cores": os.cpu_count(),
            "load_average_at_end": round(os.getloadavg()[0], 2),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "sdedit-engine": sdedit.__version__,
            "threads": editor.backend.threads,
            **editor.backend.versions,
            "images": arguments.images,
            "guides": f"JPEG {SIDE}x{SIDE}",
            "steps": arguments.steps,
            "batch": jobs[0][0].options.batch,
            "sampler": jobs[0][0].options.sampler,
            "precision": editor.backend.precision,
        },
        "best_batch": best,
        "network_ms_per_image_step": {str(size): round(value, 4) for size, value in medians.items()},
        "over_network_at_best_batch": round(statistics.median(row["over_network_at_best_batch"] for row in rows), 4),
        "memory_last_over_first": max(row["memory_last_over_first"] for row in rows),
        "runs": rows,
        "network_samples": [{str(size): round(ms, 4) for size, ms in one.items()} for one in every],
    }
    text = json.dumps(found, indent=2)
    if arguments.output is not None:
        arguments.output.write_text(f"{text}\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()
