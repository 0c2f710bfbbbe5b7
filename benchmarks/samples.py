"""Edits of many stroke guides, kept in a folder: what the studies of quality compare.

The guides are simulated stroke paintings of EuroSAT photographs that the bundled model never saw. Guides and results
are kept in chunks of 20, one file a chunk, written whole or not at all: a study that was stopped goes on where it was.
A cache belongs to one model, one choice of guides and one way to run them, which `made-by.json` in it names.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

import sdedit
from sdedit import strokes

CHUNK = 20  # guides a file
RUN_SEEDS = 2**32  # between the first seeds of run a, run b, …
MADE_BY = "made-by.json"

Pictures = NDArray[np.uint8]  # (N, 64, 64, 3)
Work = list[Future[Any]]  # of worker processes


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


def paint(photos: Pictures, colors: int) -> Pictures:
    """Their stroke paintings."""
    return np.stack([np.asarray(strokes(photo, colors=colors)) for photo in photos])


@dataclass(frozen=True)
class Cache:
    """A folder of results by one model (None: the bundled one), made by `workers` processes of one thread each.

    batch: images in a network call, a multiple of 20. Results depend on it as they do on the backend: by rounding.
    """

    folder: Path
    model: Path | None = None
    workers: int = 1
    backend: str = "ort-cpu"
    batch: int = CHUNK

    def __post_init__(self) -> None:
        """Raises OptionError."""
        if self.batch < CHUNK or self.batch % CHUNK:
            raise sdedit.OptionError(f"batch is {self.batch}; wanted a multiple of {CHUNK}", hint="--batch 100")

    @cached_property
    def editor(self) -> sdedit.Editor:
        """In this process."""
        return sdedit.load(self.model, backend=self.backend, threads=1)

    @cached_property
    def pool(self) -> ProcessPoolExecutor:
        """The worker processes, each with an editor: started when they are needed, and kept."""
        return pool(self.workers, _open, self.model, self.backend)

    def chunk(self, setting: Setting, number: int) -> Path:
        """The file of guides 20·number to 20·number + 19: uint8 (20, 64, 64, 3)."""
        return self.folder / setting.name / f"{number:03d}.npy"

    def missing(self, setting: Setting, guides: Guides) -> list[int]:
        """The chunks that are still to be made."""
        return [c for c in range(guides.count // CHUNK) if not self.chunk(setting, c).exists()]

    def painted(self, guides: Guides, colors: int = 6) -> Pictures:
        """The guides, painted once."""
        paths = [self.folder / f"guides-colors{colors}" / f"{c:03d}.npy" for c in range(guides.count // CHUNK)]
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        photos = [guides.photos[CHUNK * c :][:CHUNK] for c in range(len(paths))]
        todo = [(path, part, colors) for path, part in zip(paths, photos, strict=True) if not path.exists()]
        finish([self.pool.submit(_paint, *one) for one in todo])
        return np.concatenate([np.load(path) for path in paths])

    def claim(self, guides: Guides) -> dict[str, Any]:
        """What made the results in this cache, noted when it is new. Raises OptionError if it was something else."""
        model, backend = self.editor.artifact, self.editor.backend
        ours = {"sdedit-engine": sdedit.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
        claimed = {
            "model": {"name": model.name, "sha256": model.sha256},
            "photos_sha256": hashlib.sha256(guides.held_out.tobytes()).hexdigest(),
            "backend": backend.name,
            "precision": backend.precision,
            "batch": self.batch,
            "gpu": _gpu(),
            "versions": ours | dict(backend.versions),
        }
        path = self.folder / MADE_BY
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            _replace(path, json.dumps(claimed, indent=2).encode())
        made_by = json.loads(path.read_text())
        for name, value in claimed.items():
            if made_by.get(name) != value:
                raise sdedit.OptionError(
                    f"{path}: the results here were made with {name} {made_by.get(name)}, not {value}",
                    hint="name another --cache folder",
                )
        return claimed


def results(cache: Cache, setting: Setting, guides: Guides) -> Pictures:
    """A setting's results, (guides.count, 64, 64, 3): from the cache, and made now where they are not there yet."""
    cache.claim(guides)
    finish(_begin(cache, setting, guides))
    return np.concatenate([np.load(cache.chunk(setting, c)) for c in range(guides.count // CHUNK)])


def made(cache: Cache, settings: Iterable[Setting], guides: Guides, *, until: float | None = None) -> Iterator[Setting]:
    """Each setting once its results are in the cache, while those of the next are being made.

    until: by `time.monotonic`; what is not whole by then is left out, though its finished chunks are kept.
    """
    cache.claim(guides)
    underway: deque[tuple[Setting, Work]] = deque()
    for setting in settings:
        if until is not None and time.monotonic() >= until:
            break
        underway.append((setting, _begin(cache, setting, guides)))
        if len(underway) > 1:
            if not finish(underway[0][1], until):
                break
            yield underway.popleft()[0]
    while underway and finish(underway[0][1], until):
        yield underway.popleft()[0]
    for _, work in underway:
        for one in work:
            one.cancel()


def finish(work: Work, until: float | None = None) -> bool:
    """Wait for it, at most until then: whether it is done. Raises what it raised."""
    try:
        for one in work:
            one.result(None if until is None else max(0.0, until - time.monotonic()))
    except TimeoutError:
        return False
    return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every study of a cache is told; `opened` reads it."""
    cores = os.cpu_count() or 1
    parser.add_argument("photos", type=Path, metavar="EuroSAT_RGB.zip", help="the photographs, as they are published")
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="where results are kept")
    parser.add_argument("--features", type=Path, required=True, metavar="FILE", help="FID's Inception")
    parser.add_argument("--model", type=Path, metavar="MODEL.onnx", help="default: the bundled model")
    parser.add_argument("--backend", default="ort-cpu", metavar="NAME", help="of the edits (default ort-cpu)")
    parser.add_argument("--guides", type=int, default=1000, metavar="N", help="how many (default %(default)s)")
    parser.add_argument("--batch", type=int, default=CHUNK, metavar="B", help="images a network call (default 20)")
    parser.add_argument("--workers", type=int, default=cores, metavar="P", help="that edit; default: one a core")
    parser.add_argument("--feature-workers", type=int, default=cores, metavar="P", help="that measure; likewise")
    parser.add_argument("--minutes", type=float, metavar="M", help="make nothing new after so long, then report")
    parser.add_argument("--report", action="store_true", help="make nothing new: report what the cache has")
    parser.add_argument(
        "--redraw", type=Path, action=_Redraw, metavar="JSON", help="draw an earlier report anew; alone"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("results"), metavar="DIR")


def opened(arguments: argparse.Namespace) -> tuple[Cache, Guides]:
    """The cache and the guides that the arguments name, which belong together. SIGTERM then stops all processes."""
    signal.signal(signal.SIGTERM, _stop)
    cache = Cache(arguments.cache, arguments.model, arguments.workers, arguments.backend, arguments.batch)
    guides = Guides.load(arguments.photos, arguments.guides)
    cache.claim(guides)
    return cache, guides


def until(arguments: argparse.Namespace) -> float | None:
    """When --minutes are over, by `time.monotonic`; at once with --report."""
    if arguments.report:
        return time.monotonic()
    return None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes


def pool(workers: int, start: Callable[..., None], *arguments: Any) -> ProcessPoolExecutor:
    """So many processes, which begin with start(*arguments)."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start, arguments)


def save(path: Path, array: NDArray[Any]) -> None:
    """A .npy file, whole or not at all."""
    encoded = io.BytesIO()
    np.save(encoded, array)
    _replace(path, encoded.getvalue())


class _Redraw(argparse.Action):
    """Draws the JSON by the parser's default `draw` and ends, as --help would."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        draw: Callable[[Any, Path], None] = parser.get_default("draw")
        draw(json.loads(values.read_text()), values.parent)
        parser.exit()


def _stop(*_: Any) -> None:
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(128 + signal.SIGTERM)  # at once: every file of a cache is written whole or not at all


def _gpu() -> str | None:
    """Name and driver of the first, if there is one."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    asked = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return (subprocess.run(asked, capture_output=True, text=True, check=False).stdout.splitlines() or [None])[0]


def _begin(cache: Cache, setting: Setting, guides: Guides) -> Work:
    """Have the missing chunks made, as many neighbours at once as fill a network call."""
    if not (missing := cache.missing(setting, guides)):
        return []
    (cache.folder / setting.name).mkdir(exist_ok=True)
    painted = cache.painted(guides, setting.colors)
    calls: list[list[int]] = []
    for c in missing:
        if calls and c == calls[-1][-1] + 1 and len(calls[-1]) < cache.batch // CHUNK:
            calls[-1].append(c)
        else:
            calls.append([c])
    return [
        cache.pool.submit(
            _make, [cache.chunk(setting, c) for c in call], setting, painted[CHUNK * call[0] :][: CHUNK * len(call)],
            CHUNK * call[0],
        )
        for call in calls
    ]  # fmt: skip


_editor: sdedit.Editor  # of a worker process


def _open(model: Path | None, backend: str) -> None:
    global _editor
    _editor = sdedit.load(model, backend=backend, threads=1)


def _paint(path: Path, photos: Pictures, colors: int) -> None:
    save(path, paint(photos, colors))


def _make(paths: Sequence[Path], setting: Setting, guides: Pictures, first: int) -> None:
    """The chunks of guides that follow each other, of which `first` is the number of the first."""
    edited = _editor.edit(list(guides), batch=len(guides), seed=setting.seed(first), **setting.options())
    pixels = np.stack([one.pixels for one in edited.results])
    for path, part in zip(paths, np.split(pixels, len(paths)), strict=True):
        save(path, part)


def _replace(path: Path, content: bytes) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(content)
    os.replace(scratch, path)
