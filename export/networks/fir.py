"""Resampling by a symmetric FIR filter (Zhang 2019), each channel by the outer product of the taps.

Plain depthwise convolutions, which every runtime has fast: enlarging is four filters at the small size, one for each
pixel of a 2x2 block (polyphase), and not a transposed convolution, which some compilers take apart group by group.
"""

from torch import Tensor, nn
from torch.nn import functional as F

Taps = tuple[float, ...]


def smooth(x: Tensor, channels: int, taps: Taps, *, stride: int, padding: int) -> Tensor:
    """(B, C, H, W) filtered, with zeros outside; stride 2 halves the size."""
    row = [tap / sum(taps) for tap in taps]
    kernel = x.new_tensor([[outer(row, row)]] * channels)  # (C, 1, taps, taps)
    return F.conv2d(x, kernel, stride=stride, padding=padding, groups=channels)


def enlarge(x: Tensor, channels: int, taps: Taps) -> Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W): zeros between the pixels, then the filter with gain 4. An even number of taps."""
    reach = len(taps) // 4
    before = len(taps) // 2 - 1 + 2 * reach  # of the tap on the first pixel in reach, for even results
    padded = [0.0] * len(taps) + [2 * tap / sum(taps) for tap in taps] + [0.0] * len(taps)
    even, odd = ([padded[len(taps) + first - 2 * i] for i in range(2 * reach + 1)] for first in (before, before + 1))
    kernels = [[outer(rows, columns)] for rows in (even, odd) for columns in (even, odd)]
    filtered = F.conv2d(x, x.new_tensor(kernels * channels), padding=reach, groups=channels)  # (B, 4C, H, W)
    return F.pixel_shuffle(filtered, 2)


def outer(rows: list[float], columns: list[float]) -> list[list[float]]:
    return [[row * column for column in columns] for row in rows]


class Resample(nn.Module):
    """(B, C, H, W) -> twice or half the size, without weights. No taps, or two: nearest neighbour, the mean of four."""

    def __init__(self, channels: int, *, up: bool, taps: Taps) -> None:
        super().__init__()
        self.channels, self.up, self.taps = channels, up, taps

    def forward(self, x: Tensor) -> Tensor:
        if len(set(self.taps)) <= 1 and len(self.taps) in (0, 2):
            return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.avg_pool2d(x, 2)
        if self.up:
            return enlarge(x, self.channels, self.taps)
        return smooth(x, self.channels, self.taps, stride=2, padding=len(self.taps) // 2 - 1)
