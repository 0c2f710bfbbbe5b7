"""Folders of results, ours or any method's, measured side by side: KID, L2, LPIPS, and what changed outside masks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdedit import metrics
from sdedit.errors import OptionError
from sdedit.features import DistanceNetwork, FeatureNetwork
from sdedit.metrics import Kid
from sdedit.pairing import PictureFolder, chunks, open_folder, require_pairs, require_size

CHUNK = 64  # pictures read at a time
GUIDES = "guides"

Rows = NDArray[np.float32]
OnPictures = Callable[[int, int], None]


@dataclass(frozen=True)
class Mean:
    """The mean of one distance over pictures, its standard error (None for a single picture), and the largest."""

    value: float
    standard_error: float | None
    largest: float


@dataclass(frozen=True)
class Measures:
    """One method's row. None: not measured, for want of a network, of real pictures or of masks."""

    method: str
    kid: Kid | None
    l2: Mean
    lpips: Mean | None
    masked_lpips: Mean | None  # of pictures that are grey in their repainted part
    outside: Mean | None  # L2 over pixels whose mask is 0, of masks that have some


@dataclass(frozen=True)
class Inputs:
    """What was compared, opened and checked. Made by `open_inputs`."""

    guides: PictureFolder
    methods: Mapping[str, PictureFolder]
    real: PictureFolder | None
    masks: PictureFolder | None
    size: tuple[int, int]  # width, height of every picture; guides of another are fitted as the engine fits them

    @property
    def names(self) -> list[str]:
        return list(self.guides.files)


def open_inputs(
    guides: str | Path,
    methods: Sequence[str | Path] = (),
    *,
    real: str | Path | None = None,
    masks: str | Path | None = None,
) -> Inputs:
    """Folders of guides, of each method's results and of masks, paired by name, and of real pictures.

    Raises ImageError (no folder, no pictures, names without partner), OptionError.
    """
    opened = open_folder(Path(guides))
    labels = [Path(method).resolve().name for method in methods]
    if len({GUIDES, *labels}) <= len(labels):  # folders of one name: by path
        labels = [str(method) for method in methods]
    if len({GUIDES, *labels}) <= len(labels):
        raise OptionError("a method is named twice, or 'guides'", hint="give each method a folder of its own name")
    found = {label: open_folder(Path(method)) for label, method in zip(labels, methods, strict=True)}
    opened_masks = None if masks is None else open_folder(Path(masks))
    for other in (*found.values(), *([] if opened_masks is None else [opened_masks])):
        require_pairs(opened, other)
    opened_real = None if real is None else open_folder(Path(real))
    size = next((folder.size for folder in found.values()), opened.size)
    for folder in (*found.values(), opened_real, opened_masks):
        if folder is not None:
            require_size(folder, size)
    return Inputs(opened, found, opened_real, opened_masks, size)


def evaluate(
    inputs: Inputs,
    *,
    features: FeatureNetwork | None = None,
    lpips: DistanceNetwork | None = None,
    subset_size: int = metrics.SUBSET_SIZE,
    subsets: int = metrics.SUBSETS,
    seed: int = 0,
    on_pictures: OnPictures | None = None,
) -> list[Measures]:
    """The guides' own row, then one a method. subset_size, subsets, seed: of `kid`, the same for all methods.

    on_pictures: told (done, total) as networks see pictures, once for each network. Every picture is read, and its
    size checked, before a network runs. Raises ImageError, OptionError (too few pictures for KID; features without real
    pictures), ArtifactError.
    """
    if features is not None:
        if inputs.real is None:
            raise OptionError("KID compares with real pictures; there are none", hint="name their folder with --real")
        metrics.require_subsets(len(inputs.guides), len(inputs.real), subset_size, subsets, seed)
    folders = {GUIDES: inputs.guides, **inputs.methods}
    plain = {label: _l2(inputs, folder) for label, folder in folders.items()}
    if inputs.real is not None:
        for names in chunks(list(inputs.real.files), CHUNK):
            inputs.real.read(names)
    pictures = len(folders) * len(inputs.guides)
    of_features = 0 if features is None or inputs.real is None else pictures + len(inputs.real)
    seen = _Seen(of_features + (0 if lpips is None else pictures), on_pictures)
    rows = None if features is None or inputs.real is None else _features(inputs.real, inputs.size, features, seen)
    made = []
    for label, folder in folders.items():
        kid = None
        if features is not None and rows is not None:
            own = _features(folder, inputs.size, features, seen)
            kid = metrics.kid(own, rows, subset_size=subset_size, subsets=subsets, seed=seed)
        whole, kept = (None, None) if lpips is None else _lpips(inputs, folder, lpips, seen)
        l2, outside = plain[label]
        made.append(Measures(label, kid, l2, whole, kept, outside))
    return made


class _Seen:
    def __init__(self, total: int, tell: OnPictures | None) -> None:
        self._done, self._total, self._tell = 0, total, tell

    def more(self, count: int) -> None:
        self._done += count
        if self._tell is not None:
            self._tell(self._done, self._total)


def _l2(inputs: Inputs, folder: PictureFolder) -> tuple[Mean, Mean | None]:
    whole, outside = [], []
    for names in chunks(inputs.names, CHUNK):
        pair = [one.read(names, frame=inputs.size) for one in (inputs.guides, folder)]
        whole.append(metrics.l2(*pair))
        if inputs.masks is not None:
            masks = _read_masks(inputs, names)
            keep = (masks == 0).any(axis=(1, 2))  # a mask that keeps no pixel says nothing
            outside.append(metrics.l2(*pair, mask=masks)[keep])
    return _mean(whole), _mean(outside) if sum(map(len, outside)) else None


def _lpips(inputs: Inputs, folder: PictureFolder, distance: DistanceNetwork, seen: _Seen) -> tuple[Mean, Mean | None]:
    whole, kept = [], []
    for names in chunks(inputs.names, CHUNK):
        pair = [one.read(names, frame=inputs.size) for one in (inputs.guides, folder)]
        whole.append(distance(*pair))
        if inputs.masks is not None:
            kept.append(distance(*pair, mask=_read_masks(inputs, names)))
        seen.more(len(names))
    return _mean(whole), _mean(kept) if kept else None


def _features(folder: PictureFolder, size: tuple[int, int], network: FeatureNetwork, seen: _Seen) -> Rows:
    rows = []
    for names in chunks(list(folder.files), CHUNK):
        rows.append(network(folder.read(names, frame=size)))
        seen.more(len(names))
    return np.concatenate(rows)


def _read_masks(inputs: Inputs, names: Sequence[str]) -> NDArray[np.uint8]:
    assert inputs.masks is not None
    return inputs.masks.read(names, masks=True)[..., 0]


def _mean(parts: Sequence[NDArray[np.floating]]) -> Mean:
    values = np.concatenate(parts).astype(np.float64)
    error = None if len(values) < 2 else float(values.std(ddof=1) / np.sqrt(len(values)))
    return Mean(float(values.mean()), error, float(values.max()))
