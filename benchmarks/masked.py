"""Strokes on a part of a photograph: what an edit changes outside its mask, which must be nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from samples import CHUNK, Cache, Guides, Pictures, Setting

import sdedit

COUNT = 100  # photographs


def collages(photos: Pictures, painted: Pictures) -> tuple[Pictures, NDArray[np.uint8]]:
    """Photographs whose masked part is strokes, and the masks (N, 64, 64): ellipses, 255 inside, 0 outside."""
    rng = np.random.default_rng(1)
    rows, columns = np.mgrid[:64, :64]
    masks = []
    for _ in range(len(photos)):
        (y, x), (b, a) = rng.uniform(20, 44, 2), rng.uniform(8, 20, 2)
        masks.append(((rows - y) / b) ** 2 + ((columns - x) / a) ** 2 <= 1)
    inside = np.stack(masks)
    return np.where(inside[..., None], painted, photos), np.where(inside, np.uint8(255), np.uint8(0))


def kept(cache: Cache, guides: Guides, setting: Setting) -> Path:
    """The file of what was measured."""
    return cache.folder / f"masked-{setting.name}-{min(COUNT, guides.count)}.json"


def measure(cache: Cache, guides: Guides, setting: Setting) -> dict[str, Any]:
    """The L2 between guide and result outside the mask, and inside; from the cache where it is there."""
    count, path = min(COUNT, guides.count), kept(cache, guides, setting)
    if path.exists():
        return dict(json.loads(path.read_text()))
    pictures, masks = collages(guides.photos[:count], cache.painted(guides)[:count])
    made = cache.editor.edit(list(pictures), mask=list(masks), batch=CHUNK, **setting.options())
    pixels = np.stack([one.pixels for one in made.results])
    outside, whole = sdedit.l2(pictures, pixels, mask=masks), sdedit.l2(pictures, pixels)
    found = {
        "photographs": count,
        "t0": setting.t0,
        "steps": setting.steps,
        "l2_outside_max": float(outside.max()),
        "l2_inside_mean": float(np.sqrt(whole**2 - outside**2).mean()),
    }
    path.write_text(json.dumps(found))
    return found
