"""What a network asks for beside the image and its noise level: a class, open or folded in."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sdedit.errors import OptionError
from sdedit.export.source import Source


def classes(count: int) -> dict[str, dict[str, Any]]:
    """The `conditions` of a network with this many classes; 0 for none."""
    return {"class_label": {"dtype": "int64", "count": count}} if count else {}


def with_class_label(source: Source, label: int | None) -> Source:
    """The source with this class folded in; None leaves it an input. Raises OptionError for a class it has not."""
    if label is None:
        return source
    count = source.conditions["class_label"]["count"] if "class_label" in source.conditions else 0
    if count == 0:
        raise OptionError(
            f"class label {label} was given, and the network is not class-conditional", hint="leave --class-label out"
        )
    if not 0 <= label < count:
        raise OptionError(
            f"class label {label} is not one of the network's {count} classes",
            hint=f"--class-label takes a whole number from 0 to {count - 1}",
        )
    return replace(source, net=FixedLabel(source.net, label), conditions={})


class FixedLabel(nn.Module):
    """A class-conditional network with its class folded in: net(x, t) -> net(x, t, class_label (B,) int64)."""

    def __init__(self, net: nn.Module, class_label: int) -> None:
        super().__init__()
        self.net, self.class_label = net, class_label

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.net(x, label, torch.full((x.shape[0],), self.class_label, dtype=torch.int64, device=x.device))
