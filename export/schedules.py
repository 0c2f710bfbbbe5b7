"""The published β schedules as the levels ᾱ_0 … ᾱ_{T-1}, and schedules as the command line spells them."""

import json
import math

import numpy as np

from sdedit import sde
from sdedit.errors import ArtifactError, OptionError

MOST_LEVELS = 100_000
SPELLING = (
    "ve:sigma_min=0.02,sigma_max=696 · vp:beta_min=0.1,beta_max=20 · edm · "
    "linear, scaled-linear (beta_start=0.0001,beta_end=0.02,steps=1000) · cosine:steps=1000"
)


def linear(beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000) -> sde.VPDiscrete:
    """β linear in the level: Ho et al. 2020, section 4."""
    return from_betas(np.linspace(beta_start, beta_end, steps))


def scaled_linear(beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000) -> sde.VPDiscrete:
    """√β linear in the level: Rombach et al. 2022."""
    return from_betas(np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2)


def cosine(steps: int = 1000) -> sde.VPDiscrete:
    """s = 0.008, β at most 0.999: Nichol and Dhariwal 2021, eq. 17."""

    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return from_betas(np.array([min(1 - f((i + 1) / steps) / f(i / steps), 0.999) for i in range(steps)]))


def from_betas(betas: np.ndarray) -> sde.VPDiscrete:
    """ᾱ_i = Π (1 - β), float64."""
    return sde.VPDiscrete(tuple(map(float, np.cumprod(1 - np.asarray(betas, np.float64)))))


def as_metadata(schedule: sde.Sde) -> dict[str, object]:
    """The artifact's `sde` object, from which sdedit.sde.from_metadata makes the schedule again."""
    _, names = sde.FIELDS[schedule.kind]
    values = {name: getattr(schedule, name) for name in names}
    if "alphas_cumprod" in values:  # nine digits: float32's, and more than any training used
        values["alphas_cumprod"] = [float(f"{level:.9g}") for level in values["alphas_cumprod"]]
    return {"kind": schedule.kind, **values}


def parse(text: str) -> sde.Sde:
    """KIND[:name=value,…] -> schedule. Raises OptionError that shows the spelling."""
    kinds = {
        "ve": lambda sigma_min, sigma_max: sde.VE(sigma_min, sigma_max),
        "vp": lambda beta_min=0.1, beta_max=20.0: sde.VP(beta_min, beta_max),
        "edm": lambda sigma_min=0.002, sigma_max=80.0, rho=7.0: sde.EDM(sigma_min, sigma_max, rho),
        "linear": lambda beta_start=1e-4, beta_end=0.02, steps=1000: linear(beta_start, beta_end, int(steps)),
        "scaled-linear": lambda beta_start=0.00085, beta_end=0.012, steps=1000: scaled_linear(
            beta_start, beta_end, int(steps)
        ),
        "cosine": lambda steps=1000: cosine(int(steps)),
    }
    kind, _, rest = text.partition(":")
    try:
        given = {}
        for part in filter(None, rest.split(",")):
            name, separator, value = part.partition("=")
            if not separator:
                raise ValueError(f"{part!r} is not name=value")
            given[name.strip()] = float(json.loads(value))
        if not 2 <= given.get("steps", 2) <= MOST_LEVELS or given.get("steps", 2) % 1:
            raise ValueError(f"steps is {given['steps']:g}; wanted a whole number from 2 to {MOST_LEVELS}")
        return kinds[kind.strip()](**given)
    except ArtifactError as error:
        raise OptionError(f"--sde {text}: {error}", hint=SPELLING) from None
    except (KeyError, TypeError, ValueError) as error:
        reason = (
            f"no schedule is called {kind!r}" if isinstance(error, KeyError) else str(error).split(".<lambda>() ")[-1]
        )
        raise OptionError(f"--sde {text}: {reason}", hint=SPELLING) from None
