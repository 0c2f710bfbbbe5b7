"""EuroSAT's RGB photographs as training data: the split, the stretch, the choice of those with something to see.

Helber et al. 2019, "EuroSAT: A Novel Dataset and Deep Learning Benchmark for Land Use and Land Cover
Classification". 27,000 Sentinel-2 pictures of 64x64 pixels in ten classes, MIT licence.
"""

import io
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LOW = np.array([23.0, 41.0, 64.0])  # what the stretch maps to black, per channel
HIGH = np.array([255.0, 239.0, 236.0])  # and to white
GAMMA = 0.8
SATURATION = 1.5
LEAST_DETAIL = 5.0  # mean absolute difference of neighbouring pixels' grey: nearly flat photographs are left out


def stretch(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Make the dull originals vivid. (..., 3) uint8 -> (..., 3) uint8."""
    x = np.clip((pixels - LOW) / (HIGH - LOW), 0, 1) ** GAMMA
    grey = x.mean(axis=-1, keepdims=True)
    x = np.clip(grey + SATURATION * (x - grey), 0, 1)
    return np.round(255 * x).astype(np.uint8)


def detail(pixels: NDArray[np.uint8]) -> float:
    """How much there is to see: the mean absolute difference of neighbours, in grey levels. (H, W, 3) uint8."""
    grey = pixels.mean(axis=-1)
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2


def is_held_out(name: str) -> bool:
    """Files whose number ends in 0 are never trained on: Residential_120.jpg."""
    return PurePosixPath(name).stem.endswith("0")


def load(archive: Path, held_out: bool) -> tuple[NDArray[np.uint8], list[str]]:
    """One side of the split: (N, 64, 64, 3) uint8, stretched and detailed, and the N file names, sorted by name."""
    with zipfile.ZipFile(archive) as files, ThreadPoolExecutor() as threads:

        def read(name: str) -> NDArray[np.uint8] | None:
            picture = stretch(np.asarray(Image.open(io.BytesIO(files.read(name))).convert("RGB")))
            return picture if detail(picture) >= LEAST_DETAIL else None

        names = sorted(name for name in files.namelist() if name.endswith(".jpg") and is_held_out(name) == held_out)
        pictures = dict(zip(names, threads.map(read, names), strict=True))
    chosen = {name: picture for name, picture in pictures.items() if picture is not None}
    return np.stack(list(chosen.values())), list(chosen)
