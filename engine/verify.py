"""Are two denoisers the same function? At noise levels across the schedule, and along a real edit.

The error of one evaluation is ‖ΔD‖ / max(‖D‖, ‖x - D‖): at large σ a trained D is the small difference of two
large numbers, and rounding in the larger one must not be held against it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdedit import image
from sdedit.artifact import BUNDLED, Artifact
from sdedit.errors import OptionError
from sdedit.loop import Array, Denoiser, denoise, perturb
from sdedit.noise import Noise
from sdedit.schedule import LARGEST_SIGMA, plan
from sdedit.sde import Sde

TOLERANCES = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 5e-3, "bf16": 3e-2, "int8": 5e-2}  # one evaluation
TIMES = (0.001, 0.01, 0.05, 0.15, 0.35, 0.6, 0.8, 1.0)
EDIT_T0 = 0.48  # its eighths are levels of schedules of 50 n: halfway between two, a table's answer is up to rounding

IMAGE_STEPS = 50
GUIDES = tuple(BUNDLED.with_name(f"{name}.png") for name in ("strokes", "collage", "photo"))


@dataclass(frozen=True)
class Evaluation:
    """One comparison: at a point of the schedule, or at a step of an edit."""

    where: str  # "schedule" or "edit"
    t: float
    sigma: float
    error: float


@dataclass(frozen=True)
class ImageDistance:
    """How far the final pictures of full edits lie apart, in 8-bit levels (1/255)."""

    steps: int
    mean: float
    percentile_99_9: float


@dataclass(frozen=True)
class Report:
    """What was compared, and how it came out."""

    evaluations: tuple[Evaluation, ...]
    tolerance: float
    images: ImageDistance | None = None

    @property
    def worst(self) -> Evaluation:
        return max(self.evaluations, key=lambda e: np.inf if np.isnan(e.error) else e.error)

    @property
    def within(self) -> bool:
        return bool(self.worst.error <= self.tolerance)  # not for NaN

    def as_json(self) -> dict[str, Any]:
        """JSON has no NaN and no infinity: they are null."""
        return {
            "within": self.within,
            "tolerance": finite(self.tolerance),
            "worst": asdict(self.worst) | {"error": finite(self.worst.error)},
            "evaluations": [asdict(e) | {"error": finite(e.error)} for e in self.evaluations],
            "images": None if self.images is None else asdict(self.images),
        }


def finite(value: float) -> float | None:
    """The number, or None for one that JSON cannot say."""
    return value if np.isfinite(value) else None


Bind = Callable[[int], Denoiser]  # the denoiser for batches of this size, as Backend.bind


def compare(
    reference: Bind,
    candidate: Bind,
    sde: Sde,
    guides: Array,
    *,
    tolerance: float,
    with_images: bool = False,
    on_evaluation: Callable[[int, int], None] | None = None,
) -> Report:
    """Compare two denoisers at TIMES and along an edit of `guides` (2, C, H, W) in [-1, 1].

    The reference sees one of each in a batch: the second guide at a level of TIMES, and a step of the first guide's
    edit; the candidate sees the same images in batches of one and three, so that a frozen batch shows. So does a choice
    that was made once by the first image's level.
    with_images also runs a whole edit of the first guide, IMAGE_STEPS long, with each denoiser. on_evaluation is told
    how many of how many network calls are done. Raises NetworkError where the reference is not finite.
    """
    times = times_of(sde)
    t0 = min(0.5, max(times))
    parts = [
        range(2 * len(times))[at : at + size]
        for pair in range(0, 2 * len(times), 4)
        for at, size in ((pair, 1), (pair + 1, 3))
    ]
    parts = [part for part in parts if part]
    progress = _Progress(len(times) + len(parts) + (2 * IMAGE_STEPS if with_images else 0), on_evaluation)
    in_pairs = progress.counted(reference(2))

    z = Noise([1], guides.shape[1:])(0, 0, 0)
    levels = [sde.sigma([t]).astype(np.float32) for t in times]
    seen: list[tuple[str, np.float32, Array, Array]] = []  # where, σ, x, D of the reference

    def step_and_level(x: Array, sigma: Array) -> Array:
        level = levels[len(seen) // 2]
        pair, sigmas = np.concatenate([guides[1:2] + level * z, x]), np.concatenate([level, sigma])
        wanted = in_pairs(pair, sigmas).copy()
        seen.extend(zip(("schedule", "edit"), sigmas, pair, wanted, strict=True))
        return wanted[1:]

    visited(step_and_level, sde, guides[:1], t0=min(EDIT_T0, t0), steps=len(times))
    evaluations = []
    for part in parts:  # in batches of one and three, where the reference had two
        images_of_part = [seen[i] for i in part]
        xs, sigmas = (np.stack([image[k] for image in images_of_part]) for k in (2, 1))
        found = progress.counted(candidate(len(part)))(xs, sigmas)
        evaluations += [
            Evaluation(where, float(sde.time(sigma)), float(sigma), relative_error(x, wanted, d))
            for (where, sigma, x, wanted), d in zip(images_of_part, found, strict=True)
        ]
    images = None
    if with_images:
        wanted, found = (
            _pixels(visited(progress.counted(bind(1)), sde, guides[:1], t0=t0, steps=IMAGE_STEPS)[-1][2])
            for bind in (reference, candidate)
        )
        apart = np.abs(wanted - found)
        images = ImageDistance(IMAGE_STEPS, float(apart.mean()), float(np.percentile(apart, 99.9)))
    evaluations.sort(key=lambda e: (e.where != "schedule", e.t))
    return Report(tuple(evaluations), tolerance, images)


def times_of(sde: Sde) -> list[float]:
    """Those of TIMES at which the schedule has a noise level. Raises OptionError where it has none."""
    if times := [t for t in TIMES if sde.sigma(t) <= LARGEST_SIGMA]:
        return times
    raise OptionError("this schedule has no noise level to compare at", hint="correct the schedule's numbers")


def visited(denoiser: Denoiser, sde: Sde, guides: Array, *, t0: float, steps: int) -> list[tuple[Array, Array, Array]]:
    """What the network sees and says in an edit: x, sigma and D of every step. The last D is the result."""
    visits: list[tuple[Array, Array, Array]] = []

    def recorded(x: Array, sigma: Array) -> Array:
        denoised = denoiser(x, sigma).copy()
        visits.append((x.copy(), np.asarray(sigma, np.float32).copy(), denoised))
        return denoised

    table, noise = plan(sde, t0=t0, steps=steps), Noise(range(len(guides)), guides.shape[1:])
    denoise(recorded, perturb(guides, table, noise), table, noise)
    return visits


class _Progress:
    """Tells how many of how many network calls are done."""

    def __init__(self, total: int, tell: Callable[[int, int], None] | None) -> None:
        self._done, self._total, self._tell = 0, total, tell

    def counted(self, denoiser: Denoiser) -> Denoiser:
        def evaluate(x: Array, sigma: Array) -> Array:
            denoised = denoiser(x, sigma)
            self._done += 1
            if self._tell is not None:
                self._tell(self._done, self._total)
            return denoised

        return evaluate


def _pixels(xs: Array) -> Array:
    return np.stack([image.to_pixels(x) for x in xs]).astype(np.float64)


def guide_frames(guides: Sequence[Path], size: Mapping[str, Any]) -> Array:
    """Pictures in the model's frame, three bundled ones if none are given: (at least 2, C, H, W) float32.

    size: the artifact's `image` object. Raises ImageError.
    """
    channels, frame = size["channels"], (size["width"], size["height"])
    read_as = channels if channels in (1, 3) else 3
    pictures = [image.read(guide, read_as) for guide in guides or GUIDES]
    frames = np.stack([image.to_model(picture, image.place(picture, frame, "crop")) for picture in pictures])
    if channels != read_as:
        frames = np.take(frames, np.arange(channels) % read_as, axis=1)
    return np.ascontiguousarray(np.concatenate([frames, frames[:1]]) if len(frames) == 1 else frames)


def any_conditions(artifact: Artifact) -> dict[str, float]:
    """Values that its further inputs can take."""
    return {name: float(min(1, (declared.count or 2) - 1)) for name, declared in artifact.extra_inputs.items()}


def relative_error(x: Array, wanted: Array, found: Array) -> float:
    """‖ΔD‖ / max(‖D‖, ‖x - D‖) of one image, in float64."""
    x, wanted, found = (np.asarray(v, np.float64).ravel() for v in (x, wanted, found))
    scale = max(np.linalg.norm(wanted), np.linalg.norm(x - wanted), np.finfo(np.float64).tiny)
    return float(np.linalg.norm(found - wanted) / scale)
