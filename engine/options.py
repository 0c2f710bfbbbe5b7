"""How to edit: one frozen dataclass, from keywords to resolved and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from sdedit.checks import whole
from sdedit.errors import OptionError
from sdedit.image import checked_fit
from sdedit.noise import checked_seed
from sdedit.region import checked_region
from sdedit.schedule import checked_spacing, checked_steps, checked_t0, resolve_eta

MOST_SIDE = 2**16
MOST = 10_000  # samples of a guide, repeats, images in a batch: more is a slip of the keyboard


@dataclass(frozen=True)
class EditOptions:
    """How to edit. None takes the artifact's default, else t0 0.5, 50 steps, `ancestral`, `uniform`.

    An artifact's spacing is meant for its sampler, where it has one: with another, None is `uniform`.
    """

    t0: float | None = None  # in (0, 1]: small is faithful to the guide, large is realistic
    steps: int | None = None  # denoising steps actually run, each one network evaluation
    sampler: str | None = None  # one of sdedit.SAMPLERS
    eta: float | None = None  # the share of fresh noise, for ddim and dpmpp-2m-sde
    spacing: str | None = None  # of the steps, one of sdedit.SPACINGS
    seed: int = 0  # of the first result; result j has seed + j
    samples: int = 1  # results per guide
    repeats: int = 1  # the paper's K: passes, each starting from the last one's result
    size: tuple[int, int] | None = None  # width, height of a model that takes any; None is its own
    fit: str = "crop"  # one of image.FITS: how a guide of another size or aspect enters the frame
    region: str = "full"  # with a mask: the whole frame, or "auto", windows around what is repainted (sdedit/region.py)
    batch: int = 1  # images per network call; a last, smaller group is filled up
    conditions: Mapping[str, float] = field(default_factory=dict)  # values of the model's extra inputs

    def resolved(self, defaults: Mapping[str, Any]) -> "EditOptions":
        """With every None replaced, and checked. Raises OptionError."""

        def count(name: str) -> int:
            return whole(name, getattr(self, name), 1, MOST, hint=f"leave {name} out for 1")

        sampler = defaults.get("sampler", "ancestral") if self.sampler is None else self.sampler
        meant_for = defaults.get("sampler", sampler)
        spacing = defaults.get("spacing", "uniform") if sampler == meant_for else "uniform"
        return replace(
            self,
            t0=checked_t0(defaults.get("t0", 0.5) if self.t0 is None else self.t0),
            steps=checked_steps(defaults.get("steps", 50) if self.steps is None else self.steps),
            sampler=sampler,
            eta=resolve_eta(sampler, self.eta),
            spacing=checked_spacing(spacing if self.spacing is None else self.spacing),
            seed=checked_seed(self.seed),
            size=_size(self.size),
            fit=checked_fit(self.fit),
            region=checked_region(self.region),
            conditions=_conditions(self.conditions),
            samples=count("samples"),
            repeats=count("repeats"),
            batch=count("batch"),
        )

    def schedule(self) -> dict[str, Any]:
        """The keywords of `sdedit.plan`."""
        return {name: getattr(self, name) for name in ("t0", "steps", "sampler", "eta", "spacing")}


def make_options(options: Mapping[str, Any]) -> EditOptions:
    """EditOptions from keywords. Raises OptionError for a name that is none of its fields."""
    names = [f.name for f in fields(EditOptions)]
    if unknown := set(options) - set(names):
        raise OptionError(f"unknown option {', '.join(sorted(unknown))}", hint=f"options are {', '.join(names)}")
    return EditOptions(**options)


def _size(given: object) -> tuple[int, int] | None:
    if given is None:
        return None
    hint = "width and height in pixels, such as 512x384; leave it out for the model's own"
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 2:
        raise OptionError(f"size is {given!r}; wanted width and height", hint=hint)
    width, height = (whole("size", side, 1, MOST_SIDE, hint=hint) for side in given)
    return width, height


def _conditions(given: Mapping[str, float] | None) -> dict[str, float]:
    if given is not None and not isinstance(given, Mapping):
        raise OptionError(f"conditions is {given!r}; wanted names and numbers", hint="conditions={'class_label': 3}")
    for name, value in (given or {}).items():
        if not isinstance(name, str):
            raise OptionError(f"conditions names {name!r}; wanted a word", hint="conditions={'class_label': 3}")
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            raise OptionError(
                f"conditions[{name!r}] is {value!r}; wanted a number", hint="conditions={'class_label': 3}"
            )
    try:
        return {name: float(value) for name, value in (given or {}).items()}
    except OverflowError:
        raise OptionError("a condition is too large a number", hint="conditions={'class_label': 3}") from None
