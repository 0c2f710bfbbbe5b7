"""The graph cache: what ONNX Runtime's CPU provider makes of an artifact before it can run it, kept for the next start.

Optimising a graph takes longer than all the rest of opening it. One folder an entry: the optimised graph, its weights
in a file of their own that is mapped and not read, and what both must be, by SHA-256. An entry is written aside and put
in place by one rename; it is found by all that shaped it and checked whole before it is used. Whatever goes wrong with
the cache, the artifact itself is opened. SDEDIT_GRAPH_CACHE=off does without.
"""

import hashlib
import json
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from sdedit import cpu
from sdedit.artifact import Artifact
from sdedit.backends import ort_fusion
from sdedit.backends.ort_graph import GRAPH, WEIGHTS, Open, keep, know_operators, open_fused
from sdedit.cache_folder import cache_folder
from sdedit.operators import shipped

FORMAT = 2  # of the entries; another when the options of `keep` change
VARIABLE = "SDEDIT_GRAPH_CACHE"
LEAST_BYTES = 2**20  # a smaller artifact is opened sooner than it is looked up, or looked through for operators
MOST_BYTES = 4 * 2**30  # of all entries; the least recently used ones go first, and half of it is too much for one
STALE_SECONDS = 3600  # what a killed process left half-written goes after this
ENTRY, SCRATCH = "entry.json", ".new-"
FILES = (GRAPH, WEIGHTS)

Identity = dict[str, Any]
Fuse = Callable[..., tuple[Any, Exception | None]]  # open_fused with the rest of its arguments, and what failed in it

log = logging.getLogger(__name__)


def takes(artifact: Artifact) -> bool:
    """Whether the artifact is of a size that is worth the cache and this package's operators, and has room there."""
    return LEAST_BYTES <= artifact.size_bytes <= MOST_BYTES // 2


def open_session(
    artifact: Artifact, open_with: Open, *, half: str | None = None, kept: bool = True
) -> tuple[Any, bool]:
    """A session of the artifact, from the cache where it can be, and whether it has this package's operators.

    half: "fp16" or "bf16", of those; the session is None where there is none. kept: whether the cache is used at all.
    Raises what `open_with` raises for the artifact, ArtifactError where its file was replaced meanwhile, OptionError
    where SDEDIT_OPERATORS is wrong.
    """
    shipped.usable_library()  # for its error
    if not takes(artifact):
        return open_with(None, None), False
    opened = None
    fuse = partial(_attempted, partial(open_fused, artifact, open_with, half=half))
    plainly = None if half else open_with
    if kept and (found := _entry(artifact, half)) is not None:
        entry, identity = found
        opened = _opened_whole(entry, identity, open_with)
        opened = opened or _opened_and_kept(entry, identity, artifact, fuse, plainly)
    if opened is None:
        opened = _opened_alone(artifact, fuse, plainly)
    artifact.require_unchanged()
    return opened


def _opened_and_kept(
    entry: Path, identity: Identity, artifact: Artifact, fuse: Fuse, plainly: Open | None
) -> tuple[Any, bool] | None:
    """None where it cannot be kept, or not be opened."""
    with suppress(OSError):
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=entry.parent, ignore_cleanup_errors=True) as scratch:
            made = Path(scratch) / "fused"
            session, failure = fuse(Path(scratch), made)
            if failure is not None:  # it may pass, so nothing is kept: the next start may have what this one has not
                return None if isinstance(failure, OSError) else _opened_plainly(artifact, plainly, failure)
            fused = session is not None
            if not fused:
                if plainly is None:
                    return None, False
                made = Path(scratch) / "own"
                session, failure = _attempted(plainly, None, keep(made))
                if failure is not None:
                    return None
            artifact.require_unchanged()
            with suppress(OSError):
                _put(made, entry, identity, fused)
            return session, fused
    return None


def _opened_alone(artifact: Artifact, fuse: Fuse, plainly: Open | None) -> tuple[Any, bool]:
    """Where nothing is kept."""
    session = failure = None
    try:
        with tempfile.TemporaryDirectory(prefix="sdedit-", ignore_cleanup_errors=True) as scratch:
            session, failure = fuse(Path(scratch))
    except OSError as error:  # no room, or no folder for what passes
        failure = error
    return (session, True) if session is not None else _opened_plainly(artifact, plainly, failure)


def _opened_plainly(artifact: Artifact, plainly: Open | None, failure: Exception | None) -> tuple[Any, bool]:
    """Without this package's operators; failure: why, if that is worth a word."""
    if plainly is None:
        return None, False
    session = plainly(None, None)
    if failure is not None:
        reason = " ".join(str(failure).split()) or type(failure).__name__
        log.warning("ort-cpu runs %s without this package's operators, more slowly: %s", artifact.name, reason)
    return session, False


def _attempted(work: Callable[..., Any], *given: Any) -> tuple[Any, Exception | None]:
    """What came of it, and what failed: a full disk as well as a broken artifact, which says so when opened plainly."""
    try:
        return work(*given), None
    except Exception as error:
        return None, error


def _entry(artifact: Artifact, half: str | None) -> tuple[Path, Identity] | None:
    """The folder of its entry, and all that shapes an optimised graph.

    None where none is kept, or ONNX Runtime could not be told the folder's name, which must be text.
    """
    import onnxruntime

    if os.environ.get(VARIABLE) == "off":
        return None
    identity = {
        "format": FORMAT,
        "artifact": artifact.sha256,
        "onnxruntime": [onnxruntime.__version__, onnxruntime.get_build_info()],
        "operators": [shipped.version(), ort_fusion.FORMAT, half] if shipped.usable_library() else None,
        "cpu": [sys.platform, platform.machine(), *cpu.identity()],
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", artifact.name)[:40].strip("-") or "model"
    try:
        entry = cache_folder("graphs").absolute() / f"{readable}-{key[:24]}"
        str(entry).encode()
    except (OSError, UnicodeEncodeError):
        return None
    return entry, identity


def _opened_whole(entry: Path, identity: Identity, open_with: Open) -> tuple[Any, bool] | None:
    """A session of the entry, if every byte of it is what was written for this identity; else None.

    ONNX Runtime itself would notice a file that is too short, but not weights that are others. They are hashed while
    it opens the graph, which was first.
    """
    if (told := _description(entry, identity, (GRAPH,))) is None:
        return None
    whole: list[object] = []
    hashing = Thread(target=lambda: whole.append(_description(entry, identity, (WEIGHTS,))))
    hashing.start()
    session, failure = _attempted(open_with, str(entry / GRAPH), _take_as_it_is)
    hashing.join()
    if failure is not None or whole != [told]:
        return None
    with suppress(OSError):  # a cache that may only be read
        os.utime(entry / ENTRY)
    return session, told["fused"]


def _description(entry: Path, identity: Identity, names: Sequence[str] = FILES) -> dict[str, Any] | None:
    """What was written about the entry, if these files of it are what was written, for this identity; else None."""
    try:
        told = json.loads((entry / ENTRY).read_text("utf-8"))
        here = {name: told["sha256"].get(name) for name in names}
        right = told["identity"] == identity and here == _hashes(entry, names) and isinstance(told["fused"], bool)
        return told if right else None
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None


def _hashes(entry: Path, names: Sequence[str] = FILES) -> dict[str, str | None]:
    """SHA-256 of each; None of one that is not there: a small network has no file of weights."""
    return {name: _sha256(entry / name) if (entry / name).exists() else None for name in names}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _take_as_it_is(options: Any) -> None:
    import onnxruntime

    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    know_operators(options)


def _put(made: Path, entry: Path, identity: Identity, fused: bool) -> None:
    """Put a finished entry in its place, unless another process was first; a damaged one is replaced."""
    (made / ENTRY).write_text(json.dumps({"identity": identity, "fused": fused, "sha256": _hashes(made)}), "utf-8")
    if os.path.lexists(entry) and _description(entry, identity) is None:
        if entry.is_symlink() or not entry.is_dir():
            entry.unlink()
        shutil.rmtree(entry, ignore_errors=True)
    if not entry.exists():
        made.rename(entry)
    _shrink(entry)


def _shrink(but: Path) -> None:
    """Remove the least recently used entries beyond MOST_BYTES, and what killed processes left."""
    used: list[tuple[float, int, Path]] = []
    for one in but.parent.iterdir():
        with suppress(OSError):
            if one.name.startswith(SCRATCH):
                if time.time() - one.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(one, ignore_errors=True)
                continue
            size = sum(file.stat().st_size for file in one.iterdir())
            used.append(((one / ENTRY).stat().st_mtime, size, one))
    total = sum(size for _, size, _ in used)
    for _, size, one in sorted(used):
        if total > MOST_BYTES and one != but:
            shutil.rmtree(one, ignore_errors=True)
            total -= size
