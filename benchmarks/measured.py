"""Features of pictures, kept beside the results in a cache: the network sees a picture once."""

import hashlib
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from samples import CHUNK, Cache, Pictures, Work, finish, pool, save

import sdedit

CALL = 5  # chunks that a worker process takes at once

Rows = NDArray[np.float32]  # (N, F)


class Features:
    """What a network (TorchScript or ONNX) makes of pictures, by their content, a chunk of 20 a file.

    Worker processes of one thread scale the pictures and run the network: on a GPU where PyTorch sees one.
    """

    def __init__(self, cache: Cache, network: Path, workers: int) -> None:
        self.path, self._workers = network, workers
        self.sha256 = hashlib.sha256(network.read_bytes()).hexdigest()
        self._folder = cache.folder / "features" / self.sha256[:12]
        self._folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, pictures: Pictures) -> Rows:
        """A row for each, in their order."""
        finish(self.begin(pictures))
        return np.concatenate([np.load(path) for path, _ in self._chunks(pictures)])

    def begin(self, pictures: Pictures) -> Work:
        """Have the missing rows computed."""
        missing = [(path, part) for path, part in self._chunks(pictures) if not path.exists()]
        calls = (missing[at : at + CALL] for at in range(0, len(missing), CALL))
        return [self._pool.submit(_extract, *zip(*call, strict=True)) for call in calls]

    def has(self, pictures: Pictures) -> bool:
        """Whether none is left to compute."""
        return all(path.exists() for path, _ in self._chunks(pictures))

    @cached_property
    def _pool(self) -> ProcessPoolExecutor:
        return pool(self._workers, _open, self.path)

    def _chunks(self, pictures: Pictures) -> list[tuple[Path, Pictures]]:
        parts = [pictures[at : at + CHUNK] for at in range(0, len(pictures), CHUNK)]
        return [(self._folder / f"{hashlib.sha256(part.tobytes()).hexdigest()[:32]}.npy", part) for part in parts]


_network: sdedit.FeatureNetwork  # of a worker process


def _open(path: Path) -> None:
    global _network
    import torch

    from sdedit.export.features import open_features

    torch.set_num_threads(1)
    _network = open_features(path)


def _extract(paths: tuple[Path, ...], parts: tuple[Pictures, ...]) -> None:
    rows = _network(np.concatenate(parts))
    ends = np.cumsum([len(part) for part in parts])[:-1]
    for path, some in zip(paths, np.split(rows, ends), strict=True):
        save(path, some)
