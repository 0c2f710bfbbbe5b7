"""Any score network as D(x; σ): the conventions that a checkpoint's family leaves unsaid, made explicit.

Frame: x = x0 + σ z with data in [-1, 1]. What a network takes (its time label, its input scaling, its data
range) and what it returns (eps, score, x0, v, or EDM's F) is a Convention; Denoiser applies it. The same code
wraps a PyTorch module and, traced by itself, somebody else's ONNX graph.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdedit import sde as schedules
from sdedit.errors import OptionError

PREDICTS = ("eps", "score", "x0", "v", "edm", "denoiser")
TIMES = ("index", "continuous", "sigma", "log-sigma")
DATA_RANGES = ((-1.0, 1.0), (0.0, 1.0))


@dataclass(frozen=True)
class Convention:
    """How to read a network. `sde`: the schedule in our frame, which also decides the input scaling.

    predicts  eps: the unit noise; score: ∇ log p of the network's own noisy input; x0: the clean image;
              v: √ᾱ eps - √(1-ᾱ) x0 (VP only); edm: F of Karras et al. 2022, table 1, with its c_in, c_skip, c_out;
              denoiser: D itself, of x as it is
    time      index: level of a vp-discrete schedule, 0 … T-1, fractions between levels; continuous: t in [0, 1];
              sigma: σ in the network's own data range; log-sigma: ln of it. Multiplied by time_scale.
    """

    sde: schedules.Sde
    predicts: str = "eps"
    time: str = "index"
    time_scale: float = 1.0
    round_time: bool = False  # for networks that look the label up in a table
    data_range: tuple[float, float] = (-1.0, 1.0)
    sigma_data: float = 0.5  # with predicts="edm"

    def __post_init__(self) -> None:
        def require(name: str, value: object, wanted: tuple[object, ...]) -> None:
            if value not in wanted:
                raise OptionError(f"{name} is {value!r}", hint=f"choose one of {', '.join(map(str, wanted))}")

        require("predicts", self.predicts, PREDICTS)
        require("time", self.time, TIMES)
        require("data range", self.data_range, DATA_RANGES)
        if not 0 < self.sigma_data < math.inf:
            raise OptionError(f"sigma data is {self.sigma_data}; wanted a number above 0", hint="0.5 is the usual one")
        if not self.time_scale or not math.isfinite(self.time_scale):
            raise OptionError(
                f"time scale is {self.time_scale}; wanted a finite number, not 0", hint="leave it out for 1"
            )
        if self.time == "index" and not isinstance(self.sde, schedules.VPDiscrete):
            raise OptionError(
                f"time index needs a schedule of levels, and the SDE is {self.sde.kind}",
                hint="--sde linear, scaled-linear or cosine, or --time continuous",
            )
        if self.predicts == "v" and not self.sde.variance_preserving:
            raise OptionError(f"v prediction needs a VP schedule, and the SDE is {self.sde.kind}", hint="--sde vp")
        if self.data_range != (-1.0, 1.0) and (self.sde.variance_preserving or self.predicts in ("edm", "denoiser")):
            raise OptionError("data in [0, 1] is known of VE networks only", hint="leave the data range out")


def usual_label(sde: schedules.Sde, predicts: str) -> tuple[str, float]:
    """`time` and `time_scale` of most networks trained on this kind of schedule."""
    if predicts == "edm":
        return "log-sigma", 0.25  # c_noise of Karras et al. 2022, table 1
    return {"vp-discrete": "index", "vp": "continuous", "ve": "sigma", "edm": "log-sigma"}[sde.kind], 1.0


class Denoiser(nn.Module):
    """D(x; σ) of a network: x (B, C, H, W), sigma (B,), further conditions -> (B, C, H, W).

    net(x, label (B,), *conditions) -> (B, C or 2C, H, W); channels beyond C (a learned variance) are dropped.
    """

    def __init__(self, net: nn.Module, convention: Convention) -> None:
        super().__init__()
        self.net, self.before, self.after = net, Before(convention), After(convention)

    def forward(self, x: Tensor, sigma: Tensor, *conditions: Tensor) -> Tensor:
        scaled, label = self.before(x, sigma)
        own = scaled.clone() if scaled is x else scaled  # the network may change it in place
        return self.after(x, sigma, self.net(own, label, *conditions))


class Before(nn.Module):
    """(x, σ) -> what the network takes: its scaled input and its time label (B,)."""

    def __init__(self, convention: Convention) -> None:
        super().__init__()
        self.convention = convention
        if convention.time == "index":
            self.label: nn.Module = LevelIndex(convention.sde)
        else:
            self.label = TimeLabel(convention)

    def forward(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        c = self.convention
        s = sigma[:, None, None, None]
        if c.predicts == "edm":
            scaled = x / (s**2 + c.sigma_data**2).sqrt()
        elif c.predicts == "denoiser":
            scaled = x
        elif c.sde.variance_preserving:
            scaled = x / (1 + s**2).sqrt()  # the VP state √ᾱ x
        elif c.data_range == (0.0, 1.0):
            scaled = (x + 1) / 2
        else:
            scaled = x
        label = self.label(sigma) * c.time_scale
        return scaled, label.round() if c.round_time else label


class After(nn.Module):
    """(x, σ, what the network returned) -> D."""

    def __init__(self, convention: Convention) -> None:
        super().__init__()
        self.convention = convention

    def forward(self, x: Tensor, sigma: Tensor, raw: Tensor) -> Tensor:
        c = self.convention
        s = sigma[:, None, None, None]
        raw = raw[:, : x.shape[1]]
        unit = c.data_range == (0.0, 1.0)
        match c.predicts:
            case "eps":
                return x - s * raw
            case "score" if c.sde.variance_preserving:  # of the state √ᾱ x: -eps / √(1-ᾱ)
                return x + s * (s / (1 + s**2).sqrt()) * raw
            case "score":  # a [0, 1] network sees σ/2, and half a change of D
                return x + s**2 * raw * (0.5 if unit else 1.0)
            case "x0":
                return 2 * raw - 1 if unit else raw
            case "denoiser":
                return raw
            case "v":  # √ᾱ (√ᾱ x) - √(1-ᾱ) v
                return x / (1 + s**2) - s / (1 + s**2).sqrt() * raw
            case _:  # Karras et al. 2022, table 1
                variance = s**2 + c.sigma_data**2
                return c.sigma_data**2 / variance * x + s * c.sigma_data / variance.sqrt() * raw


class TimeLabel(nn.Module):
    """σ (B,) -> t, σ or ln σ, in the network's own data range."""

    def __init__(self, convention: Convention) -> None:
        super().__init__()
        self.convention = convention

    def forward(self, sigma: Tensor) -> Tensor:
        c = self.convention
        own = sigma / 2 if c.data_range == (0.0, 1.0) else sigma
        match c.time, c.sde:
            case "sigma", _:
                return own
            case "log-sigma", _:
                return own.log()
            case _, schedules.VP(beta_min, beta_max):
                decay = log1p(sigma**2)  # -log ᾱ
                root = (beta_min**2 + 2 * (beta_max - beta_min) * decay).sqrt()
                return 2 * decay / (beta_min + root)
            case _, schedules.VE(sigma_min, sigma_max):
                return (sigma / sigma_min).log() / torch.tensor(sigma_max / sigma_min, dtype=torch.float64).log().item()
            case _, schedules.EDM(sigma_min, sigma_max, rho):
                low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
                return (sigma ** (1 / rho) - low) / (high - low)
            case _, schedules.VPDiscrete(levels):
                return (LevelIndex(c.sde)(sigma) + 1) / len(levels)
        raise AssertionError(c.sde.kind)


class LevelIndex(nn.Module):
    """σ (B,) -> the level i of ᾱ_i, 0 … T-1; between levels log ᾱ is linear in i. Exact at the levels."""

    def __init__(self, sde: schedules.Sde) -> None:
        super().__init__()
        assert isinstance(sde, schedules.VPDiscrete)
        steps = len(sde.alphas_cumprod)
        sigmas = torch.from_numpy(sde.sigma((torch.arange(steps, dtype=torch.float64).numpy() + 1) / steps))
        sigmas = sigmas[sigmas.isfinite()]
        self.register_buffer("sigmas", sigmas.float(), persistent=False)
        decay = torch.log1p(sigmas**2)
        self.register_buffer("spacings", (decay[1:] - decay[:-1]).float(), persistent=False)

    def forward(self, sigma: Tensor) -> Tensor:
        top = len(self.spacings) - 1
        below = (sigma[:, None] >= self.sigmas[None, :]).sum(dim=1) - 1
        below = below.clamp(0, top)
        low = self.sigmas[below]
        beyond = log1p((sigma - low) * (sigma + low) / (1 + low**2))  # log of (1+σ²)/(1+σ_low²)
        return (below + beyond / self.spacings[below]).clamp(0, top + 1)


def log1p(v: Tensor) -> Tensor:
    """log(1 + v), accurate for small v also where the runtime computes it as log of a sum (Goldberg 1991)."""
    w = 1 + v
    return torch.where(w == 1, v, w.log() * (v / torch.where(w == 1, torch.ones_like(w), w - 1)))
