"""Features of what a cache holds, kept beside it: the network sees a picture once."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from samples import CHUNK, Cache, Guides, Pictures, Setting, results

import sdedit


@dataclass(frozen=True)
class Features:
    """A feature network (TorchScript or ONNX) and the rows that it has given, in a folder of the cache."""

    cache: Cache
    path: Path
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha256", hashlib.sha256(self.path.read_bytes()).hexdigest())

    @cached_property
    def _network(self) -> "sdedit.FeatureNetwork":
        if self.path.suffix == ".onnx":
            return sdedit.open_features(self.path)
        from sdedit.export.features import open_features  # torch

        return open_features(self.path)

    def of_results(self, setting: Setting, guides: Guides) -> NDArray[np.float32]:
        """(guides.count, F). Results that are not there yet are made."""
        pixels = results(self.cache, setting, guides)
        return self._rows(setting.name, len(pixels), lambda at: pixels[at : at + CHUNK])

    def of_real(self, guides: Guides) -> NDArray[np.float32]:
        """(M, F) of all held-out photographs."""
        return self._rows("real", len(guides.held_out), lambda at: guides.held_out[at : at + CHUNK])

    def of_guides(self, guides: Guides, colors: int) -> NDArray[np.float32]:
        """(guides.count, F) of the stroke paintings themselves."""
        pixels = guides.painted(colors)
        return self._rows(f"guides-colors{colors}", len(pixels), lambda at: pixels[at : at + CHUNK])

    def _rows(self, name: str, count: int, pixels: Callable[[int], Pictures]) -> NDArray[np.float32]:
        folder = self.cache.folder / "features" / self.sha256[:12] / name
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for at in range(0, count, CHUNK):
            path = folder / f"{at // CHUNK:03d}.npy"
            if not path.exists():
                scratch = path.with_name(f".{path.name}.{os.getpid()}")
                with scratch.open("wb") as file:
                    np.save(file, self._network(pixels(at)))
                os.replace(scratch, path)
            rows.append(np.load(path))
        return np.concatenate(rows)
