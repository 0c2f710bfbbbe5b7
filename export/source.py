"""What every family's loader returns: a raw network, and all that is needed to make it D(x; σ)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sdedit.artifact import MOST_PIXELS
from sdedit.errors import OptionError
from sdedit.export.denoiser import Convention


@dataclass(frozen=True)
class SourceOptions:
    """What the user says of a checkpoint that its file does not. None: not said."""

    family: str | None = None
    preset: str | None = None  # a published model, by name
    config: dict[str, Any] = field(default_factory=dict)  # the original's own option names
    size: int | None = None  # image height and width
    weights: str | None = None  # "ema" or "model", where a file holds both
    preconditioning: str | None = None  # EDM: vp, ve or edm
    class_label: int | None = None  # folded in; None keeps it as an input of a class-conditional network

    def preset_of(self, family: str, presets: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """What the preset says, nothing where there is none. Raises OptionError for one that the family has not."""
        if self.preset is not None and self.preset not in presets:
            hint = f"--preset takes {', '.join(presets)}" if presets else "leave --preset out: the source tells it all"
            raise OptionError(f"family {family} has no preset {self.preset!r}", hint=hint)
        return presets.get(self.preset or "", {})

    def config_without(self, sections: Sequence[str], passed_over: Sequence[str]) -> dict[str, Any]:
        """The config with the options of these sections beside the others, and without what is passed over."""
        flat: dict[str, Any] = {}
        for key, value in self.config.items():
            if key in sections and isinstance(value, Mapping):
                flat |= value
            else:
                flat[key] = value
        return {key: value for key, value in flat.items() if key not in passed_over}


@dataclass(frozen=True)
class Source:
    """A network as it was trained: net(x, label (B,), *conditions) -> (B, C or 2C, H, W), in eval mode, float32."""

    family: str
    summary: str  # one line for the user: architecture, SDE, which weights
    net: nn.Module
    convention: Convention
    channels: int
    height: int
    width: int
    multiple: int  # other sizes the network accepts are multiples of this
    weights: str  # "ema" or "model"
    conditions: dict[str, dict[str, Any]] = field(default_factory=dict)  # as `inputs` of the artifact's metadata
    sigma_range: tuple[float, float] | None = None  # trained noise levels, in our frame
    license: str | None = None
    name: str | None = None
    details: dict[str, Any] = field(default_factory=dict)  # kept in the metadata's `source`

    def __post_init__(self) -> None:
        if self.height * self.width > MOST_PIXELS:
            raise OptionError(f"size is {self.width}x{self.height}; more than {MOST_PIXELS} pixels", hint="--size 256")
        for size in (self.height, self.width):
            if size < 1 or size % self.multiple:
                raise OptionError(
                    f"size is {size}; the network takes multiples of {self.multiple}",
                    hint=f"--size {max(1, round(size / self.multiple)) * self.multiple}",
                )


Payload = Any  # a checkpoint as read: nested dicts and lists of tensors and plain values
Tensors = dict[str, Any]  # a state dict: name -> torch.Tensor
