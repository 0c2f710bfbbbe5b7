"""What a network asks for beside the image and its noise level: a class, open or folded in."""

import torch
from torch import Tensor, nn

from sdedit.errors import OptionError


def check_class_label(label: int, count: int) -> None:
    """Raise OptionError unless `label` is one of a network's `count` classes (0: it has none)."""
    if count == 0:
        raise OptionError(
            f"class label {label} was given, and the network is not class-conditional", hint="leave --class-label out"
        )
    if not 0 <= label < count:
        raise OptionError(
            f"class label {label} is not one of the network's {count} classes",
            hint=f"--class-label takes a whole number from 0 to {count - 1}",
        )


class FixedLabel(nn.Module):
    """A class-conditional network with its class folded in: net(x, t) -> net(x, t, class_label (B,) int64)."""

    def __init__(self, net: nn.Module, class_label: int) -> None:
        super().__init__()
        self.net, self.class_label = net, class_label

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.net(x, label, torch.full((x.shape[0],), self.class_label, dtype=torch.int64, device=x.device))
