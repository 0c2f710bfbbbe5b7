"""The plan cache: each plan is built once on a machine, whoever asks, and found again while everything still fits.

One folder an entry, put in place by one rename: there is a whole plan or none. An entry that is being built has a
lock file, held by its builder; what a killed builder left is recognised by a lock that nobody holds.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdedit import output
from sdedit.artifact import Artifact
from sdedit.cache_folder import cache_folder
from sdedit.cuda.driver import Gpu, target_of
from sdedit.errors import ArtifactError, OutputError
from sdedit.tensorrt import plan as plans
from sdedit.tensorrt.build import OnProgress, build, checked_batch, flags
from sdedit.tensorrt.installed import Library
from sdedit.tensorrt.plan import Plan

FILE = "model.plan"  # in the entry's folder
LOCK, BUILDING = ".lock", ".building"
POLL_SECONDS = 0.1

Say = Callable[[str], object]
Identity = dict[str, Any]  # everything that a plan in the cache is kept for


@dataclass(frozen=True)
class CacheStatus:
    """The cache as `sdedit doctor` shows it."""

    folder: Path
    plans: int  # whole ones
    bytes: int  # of all that lies in the folder
    damaged: tuple[str, ...]  # what is wrong with the others; they are built again when needed


def folder() -> Path:
    """Where plans are kept: SDEDIT_CACHE, else the platform's cache folder."""
    return cache_folder("plans")


def find_or_build(
    artifact: Artifact,
    library: Library,
    *,
    gpu: Gpu | None,
    batch: tuple[int, int, int] = (1, 1, 1),
    say: Say = lambda text: None,
    on_progress: OnProgress | None = None,
) -> Plan:
    """The plan of this artifact for this library, GPU and driver: from the cache, or built into it.

    say: is told why a plan has to be built, of damaged entries, and of waiting for another process.
    Raises what `build` raises, and OutputError where the cache cannot be written.
    """
    wanted = identity(artifact, library, gpu, checked_batch(batch))
    entry = _entry(artifact, wanted)
    if found := _read(entry, wanted, say):
        return found
    with _keeping(entry.parent):
        entry.parent.mkdir(parents=True, exist_ok=True)
    with _locked(entry, lambda: say(f"{artifact.name}: another process is building this plan; waiting for it")):
        if found := _read(entry, wanted, say=lambda text: None):  # by whoever held the lock before
            return found
        _sweep(entry.parent, but=entry.name)
        say(f"{artifact.name}: building a plan with {library.name} {library.version}: {_why(entry, wanted)}")
        built = build(artifact, library, batch=batch, gpu=gpu, on_progress=on_progress)
        with _keeping(entry.parent):
            _put(entry, built.data, built.sidecar)
    return plans.read(entry / FILE)


def status() -> CacheStatus:
    """What is in the cache; every plan is read and checked."""
    at = folder()
    whole, size, damaged = 0, 0, []
    try:
        for entry in _entries(at):
            try:
                plans.read(entry / FILE)
                whole += 1
            except ArtifactError as error:
                damaged.append(str(error))
        size = sum(file.stat().st_size for file in at.rglob("*") if file.is_file())
    except OSError as error:  # a folder that may not be entered
        damaged.append(f"{at}: {error.strerror or error}")
    return CacheStatus(at, whole, size, tuple(damaged))


def identity(artifact: Artifact, library: Library, gpu: Gpu | None, batch: Sequence[int]) -> Identity:
    """All that has to be the same for a plan to be used again."""
    return {
        "plan format": plans.FORMAT,
        "artifact": artifact.sha256,
        "library": f"{library.name} {library.version}",
        "gpu": None if gpu is None else f"{gpu.name} ({gpu.target})",
        "driver": None if gpu is None else gpu.driver,
        "batch": ":".join(map(str, batch)),
        "precision": artifact.precision,
        "flags": json.dumps(flags(), sort_keys=True),
    }


def _identity_of(sidecar: Any) -> Identity | None:
    """The same, as a sidecar tells it; None where it does not."""
    try:
        gpu = sidecar["gpu"]
        return {
            "plan format": sidecar["format"],
            "artifact": sidecar["artifact"]["sha256"],
            "library": f"{sidecar['library']['name']} {sidecar['library']['version']}",
            "gpu": gpu and f"{gpu['name']} ({target_of(gpu['compute_capability'])})",
            "driver": gpu and gpu["driver"],
            "batch": ":".join(map(str, sidecar["profile"]["batch"])),
            "precision": sidecar["precision"],
            "flags": json.dumps(sidecar["flags"], sort_keys=True),
        }
    except (KeyError, TypeError, IndexError):
        return None


def _entry(artifact: Artifact, wanted: Identity) -> Path:
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", artifact.name)[:40].strip("-") or "model"
    return folder() / f"{readable}-{key[:24]}"


def _entries(at: Path) -> list[Path]:
    return sorted(one for one in at.glob("*") if one.is_dir() and not one.name.endswith(BUILDING))


def _read(entry: Path, wanted: Identity, say: Say) -> Plan | None:
    """The entry if it is whole and what was wanted; a damaged one is said aloud."""
    if not entry.is_dir():
        return None
    try:
        found = plans.read(entry / FILE)
        if _identity_of(found.sidecar) == wanted:
            return found
        say(f"{found.path}: its sidecar is of another plan; building it again")
    except ArtifactError as error:
        say(f"{error}; building it again")
    return None


def _why(entry: Path, wanted: Identity) -> str:
    """Why none of the cached plans will do: by the one that differs least."""
    if entry.is_dir():
        return "the cached one is damaged"
    nearest: list[str] | None = None
    namesake = False
    for other in _entries(entry.parent):
        try:
            sidecar = json.loads(plans.sidecar_path(other / FILE).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        had = _identity_of(sidecar)
        if had is None:
            continue
        if had["artifact"] != wanted["artifact"]:
            namesake |= other.name.rpartition("-")[0] == entry.name.rpartition("-")[0]
            continue
        differences = [_difference(name, had[name], wanted[name]) for name in wanted if had[name] != wanted[name]]
        if nearest is None or len(differences) < len(nearest):
            nearest = differences
    if nearest:
        return "; ".join(nearest)
    return "what is cached under its name is of another file" if namesake else "nothing is cached for this model"


def _difference(name: str, had: object, wanted: object) -> str:
    return f"the cached one has {name} {had or 'none'}, wanted {wanted or 'none'}"


def _put(entry: Path, data: bytes, sidecar: plans.Sidecar) -> None:
    """Write the entry, replacing a damaged one. Called with its lock held."""
    building = entry.with_name(entry.name + BUILDING)
    _remove(building)
    try:
        building.mkdir()
        plans.write(building / FILE, data, sidecar)
        _remove(entry)
        building.rename(entry)
    finally:
        _remove(building)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sweep(at: Path, *, but: str) -> None:
    """Remove what killed builders left: files and folders whose lock nobody holds."""
    names = {one.name.removesuffix(end) for end in (LOCK, BUILDING) for one in at.glob(f"*{end}")}
    for name in names - {but}:
        with suppress(OSError, OutputError, _Held), _locked(at / name, _refuse):
            _remove(at / f"{name}{BUILDING}")


@contextmanager
def _keeping(at: Path) -> Iterator[None]:
    """What goes wrong with the cache's own files, as an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{at}: plans cannot be kept there: {output.reason(error)}",
            hint="set SDEDIT_CACHE to a folder that you may write to",
        ) from error


class _Held(Exception):
    """Somebody else has the lock."""


def _refuse() -> None:
    raise _Held


@contextmanager
def _locked(entry: Path, on_wait: Callable[[], object]) -> Iterator[None]:
    """Hold the entry's lock file. on_wait is called once, before waiting for whoever holds it."""
    path = entry.with_name(entry.name + LOCK)
    told = False
    while True:
        with _keeping(path.parent):
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            held = _try_lock(file)
            if held and output.is_at(file, path):
                break
            if not held and not told:
                told = True
                on_wait()
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        if not held:
            time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        # first the name, then the lock: whoever opened the file before sees that it is no longer the one at the name
        with suppress(OSError):  # Windows removes no open file; there the next sweep does
            path.unlink()
        os.close(file)


def _try_lock(file: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
