"""Edits of many stroke guides, kept in a folder: what the studies of quality compare.

The guides are simulated stroke paintings of EuroSAT photographs that the bundled model never saw. A setting's results
are made in chunks of 20 guides, one file a chunk, written whole or not at all: a study that was stopped goes on
where it was. A cache belongs to one model and one choice of guides, which `made-by.json` in it names.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

import sdedit
from sdedit import strokes

CHUNK = 20  # guides a file, and images a network call
RUN_SEEDS = 2**32  # between the first seeds of run a, run b, …
MADE_BY = "made-by.json"

Pictures = NDArray[np.uint8]  # (N, 64, 64, 3)


@dataclass(frozen=True)
class Setting:
    """How a guide is edited, and with which of the independent noises (run a, b, …)."""

    t0: float
    steps: int
    sampler: str
    spacing: str = "uniform"
    eta: float | None = None
    colors: int = 6  # of the guide
    repeats: int = 1
    run: str = "a"

    @property
    def name(self) -> str:
        """Of its folder in a cache."""
        eta = "" if self.eta is None else f"-eta{self.eta}"
        schedule = f"{self.sampler}-{self.steps}-{self.spacing}{eta}-t{self.t0}"
        return f"{schedule}-colors{self.colors}-repeats{self.repeats}-{self.run}"

    def options(self) -> dict[str, Any]:
        """The keywords of `Editor.edit`, without the seed."""
        return {name: value for name, value in asdict(self).items() if name not in ("colors", "run")}

    def seed(self, guide: int) -> int:
        """Of a guide's result: its index in run a, 2³² more in run b, …"""
        if len(self.run) != 1 or not "a" <= self.run <= "z":
            raise sdedit.OptionError(f"run is {self.run!r}; wanted a letter from a to z", hint="run a is the first")
        return (ord(self.run) - ord("a")) * RUN_SEEDS + guide


@dataclass(frozen=True)
class Guides:
    """Photographs in a fixed random order; guide i is the stroke painting of the i-th."""

    held_out: Pictures  # all photographs of the held-out side: the real pictures
    count: int

    @classmethod
    def load(cls, archive: Path, count: int) -> "Guides":
        """The first `count` guides of EuroSAT_RGB.zip, a multiple of 20. Raises OptionError."""
        from sdedit.export import eurosat

        held_out, _ = eurosat.load(archive, held_out=True)
        if not 0 < count <= len(held_out) or count % CHUNK:
            raise sdedit.OptionError(
                f"guides is {count}; wanted a multiple of {CHUNK} up to {len(held_out)}", hint="--guides 1000"
            )
        return cls(held_out, count)

    @cached_property
    def photos(self) -> Pictures:
        """The photographs that the guides were painted from."""
        order = np.random.default_rng(0).permutation(len(self.held_out))
        return np.asarray(self.held_out[order[: self.count]])

    def painted(self, colors: int = 6) -> Pictures:
        """The guides."""
        return paint(self.photos, colors)


def paint(photos: Pictures, colors: int) -> Pictures:
    """Their stroke paintings."""
    return np.stack([np.asarray(strokes(photo, colors=colors)) for photo in photos])


@dataclass(frozen=True)
class Cache:
    """A folder of results by one model (None: the bundled one), made by `workers` processes of one thread each."""

    folder: Path
    model: Path | None = None
    workers: int = 1

    @cached_property
    def _editor(self) -> sdedit.Editor:
        return sdedit.load(self.model, backend="ort-cpu", threads=1)

    def chunk(self, setting: Setting, number: int) -> Path:
        """The file of guides 20·number to 20·number + 19: uint8 (20, 64, 64, 3)."""
        return self.folder / setting.name / f"{number:03d}.npy"

    def missing(self, setting: Setting, guides: Guides) -> list[int]:
        """The chunks that are still to be made."""
        return [c for c in range(guides.count // CHUNK) if not self.chunk(setting, c).exists()]

    def claim(self, guides: Guides) -> dict[str, Any]:
        """What made the results in this cache, noted when it is new. Raises OptionError if it was something else."""
        model, backend = self._editor.artifact, self._editor.backend
        identity = {
            "model": {"name": model.name, "sha256": model.sha256},
            "photos_sha256": hashlib.sha256(guides.held_out.tobytes()).hexdigest(),
        }
        path = self.folder / MADE_BY
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            ours = {"sdedit-engine": sdedit.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
            versions = ours | dict(backend.versions)
            made_by = identity | {"backend": backend.name, "batch": CHUNK, "versions": versions}
            _replace(path, json.dumps(made_by, indent=2).encode())
        made_by = json.loads(path.read_text())
        for name, value in identity.items():
            if made_by.get(name) != value:
                raise sdedit.OptionError(
                    f"{path}: the results here were made with {name} {made_by.get(name)}, not {value}",
                    hint="name another --cache folder",
                )
        return dict(made_by)


def results(cache: Cache, setting: Setting, guides: Guides) -> Pictures:
    """A setting's results, (guides.count, 64, 64, 3): from the cache, and made now where they are not there yet."""
    cache.claim(guides)
    if missing := cache.missing(setting, guides):
        _make(cache, setting, guides, missing)
    return np.concatenate([np.load(cache.chunk(setting, c)) for c in range(guides.count // CHUNK)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every study of a cache is told; `opened` reads it."""
    parser.add_argument("photos", type=Path, metavar="EuroSAT_RGB.zip", help="the photographs, as they are published")
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="where results are kept")
    parser.add_argument("--model", type=Path, metavar="MODEL.onnx", help="default: the bundled model")
    parser.add_argument("--guides", type=int, default=1000, metavar="N", help="how many (default 1000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="P", help="default: one a core")


def opened(arguments: argparse.Namespace) -> tuple[Cache, Guides]:
    """The cache and the guides that the arguments name. SIGTERM then stops the study, its worker processes too."""
    signal.signal(signal.SIGTERM, _stop)
    return Cache(arguments.cache, arguments.model, arguments.workers), Guides.load(arguments.photos, arguments.guides)


@contextmanager
def workers(count: int, start: Callable[..., None], *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """That many processes, which begin with start(*arguments)."""
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), start, arguments)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def save(path: Path, array: NDArray[Any]) -> None:
    """A .npy file, whole or not at all."""
    encoded = io.BytesIO()
    np.save(encoded, array)
    _replace(path, encoded.getvalue())


def _stop(*_: Any) -> None:
    for child in multiprocessing.active_children():
        child.terminate()
    sys.exit(128 + signal.SIGTERM)


def _make(cache: Cache, setting: Setting, guides: Guides, chunks: Sequence[int]) -> None:
    (cache.folder / setting.name).mkdir(exist_ok=True)
    with workers(min(cache.workers, len(chunks)), _open, cache.model) as pool:
        parts = ((cache.chunk(setting, c), setting, guides.photos[CHUNK * c :][:CHUNK], CHUNK * c) for c in chunks)
        for made in pool.map(_make_chunk, *zip(*parts, strict=True)):
            print(made.relative_to(cache.folder), file=sys.stderr, flush=True)


_editor: sdedit.Editor  # of a worker process


def _open(model: Path | None) -> None:
    global _editor
    _editor = sdedit.load(model, backend="ort-cpu", threads=1)


def _make_chunk(path: Path, setting: Setting, photos: Pictures, first: int) -> Path:
    guides = list(paint(photos, setting.colors))
    edited = _editor.edit(guides, batch=CHUNK, seed=setting.seed(first), **setting.options())
    save(path, np.stack([one.pixels for one in edited.results]))
    return path


def _replace(path: Path, content: bytes) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(content)
    os.replace(scratch, path)
