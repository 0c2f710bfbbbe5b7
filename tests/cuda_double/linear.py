"""The double with the product's kernels, as this process's CUDA driver, and the linear network that runs on it."""

import os
import tempfile
from pathlib import Path

import numpy as np

from cuda_double import FOLDER, build, load
from sdedit.executor import Batch

double = load(build(Path(os.environ.get("SDEDIT_DOUBLE_FOLDER") or tempfile.mkdtemp()), [FOLDER / "device_loop.cpp"]))

LINEAR = np.dtype(
    [(n, np.uint64) for n in ("x", "sigma", "denoised")]
    + [(n, np.float32) for n in ("slope", "offset")]
    + [(n, np.uint32) for n in ("batch", "elements")]
)
SLOPE, OFFSET = np.float32(0.9), np.float32(0.05)


class LinearNetwork:
    """D = slope x + offset / (1 + sigma), as a kernel."""

    capturable, replays = True, False
    stream = None

    def __init__(self, driver, shape, *, slope=SLOPE, offset=OFFSET):
        self.driver, self.module = driver, driver.load(b"\x7fELF the double looks at no more than this")
        self.function = driver.function(self.module, "linear")
        self.edit = np.zeros(1, LINEAR)
        self.edit["slope"], self.edit["offset"] = slope, offset
        self.edit["batch"], self.edit["elements"] = shape[0], np.prod(shape[1:])

    def bind(self, x, sigma, denoised):
        self.edit["x"], self.edit["sigma"], self.edit["denoised"] = x, sigma, denoised

    def set_conditions(self, values, stream):
        pass

    def enqueue(self, stream):
        count = int(self.edit["batch"][0] * self.edit["elements"][0])
        self.driver.launch(self.function, (-(-count // 256), 1), 256, self.edit, stream)

    def close(self):
        self.driver.unload(self.module)


def linear(x, sigma):
    return SLOPE * x + (OFFSET / (1 + sigma)).reshape(-1, 1, 1, 1)


def edit(loop, guide, mask, seeds, table, *, repeats=1, on_step=None):
    """What the loop makes of this: x and pixels."""
    return loop.run(Batch(guide, mask, seeds, table, repeats), on_step)
