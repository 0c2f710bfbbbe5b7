"""Proposition 1 of Meng et al. 2022 beside what is measured.

If ‖s(x, t)‖² ≤ C for all x and t, then with probability 1 − δ

    ‖g − SDEdit(g; t0)‖² ≤ σ²(t0)·(C·σ²(t0) + d + 2√(−d·ln δ) − 2·ln δ),   d the number of values of g.

C is not known. Here it is the largest ‖s‖² = ‖(D − x)/σ²‖² that these edits meet. The proof bounds ‖x(t0) − x(0)‖,
not ‖g − x(0)‖, and adds the squares of noise and drift without their cross term: read it as an order of magnitude.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from samples import Cache, Guides, Setting

import sdedit

COUNT = 20  # guides
DELTA = 0.05


def kept(cache: Cache, setting: Setting) -> Path:
    """The file of what was measured."""
    return cache.folder / f"bound-{setting.name}-{COUNT}.json"


def measure(cache: Cache, guides: Guides, setting: Setting) -> dict[str, Any]:
    """The bound and the ‖g − x‖² of COUNT guides, for values in [-1, 1]; from the cache where it is there."""
    path = kept(cache, setting)
    if path.exists():
        return dict(json.loads(path.read_text()))
    editor = cache.editor
    guide = np.float32(cache.painted(guides, setting.colors)[:COUNT].transpose(0, 3, 1, 2) / 127.5 - 1)
    table = sdedit.plan(
        editor.sde, t0=setting.t0, steps=setting.steps, sampler=setting.sampler, spacing=setting.spacing
    )
    noise = sdedit.Noise([setting.seed(i) for i in range(len(guide))], guide.shape[1:], steps=table.steps)
    network = editor.backend.bind(len(guide), {})
    scores = []  # largest ‖s‖² of every step

    def watched(x: Any, sigma: Any) -> Any:
        denoised = network(x, sigma)
        square = ((denoised - x) ** 2).sum(axis=(1, 2, 3), dtype=np.float64)
        scores.append(float((square / np.float64(sigma) ** 4).max()))
        return denoised

    x = sdedit.denoise(watched, sdedit.perturb(guide, table, noise), table, noise)
    change = ((guide - x) ** 2).sum(axis=(1, 2, 3), dtype=np.float64)
    sigma, d, c = float(table.column("sigma")[0]), guide[0].size, max(scores)
    noise_term = d + 2 * np.sqrt(-d * np.log(DELTA)) - 2 * np.log(DELTA)
    found = {
        "t0": setting.t0,
        "steps": setting.steps,
        "guides": len(guide),
        "sigma": sigma,
        "delta": DELTA,
        "largest_score": c,
        "bound": sigma**2 * (c * sigma**2 + noise_term),
        "bound_of_noise": sigma**2 * noise_term,
        "measured_mean": float(change.mean()),
        "measured_max": float(change.max()),
    }
    path.write_text(json.dumps(found))
    return found
