"""What TensorRT made of a network: its kernels, and the memory they need, from its log or its engine inspector."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

Log = Sequence[tuple[str, str]]  # severity, text


@dataclass(frozen=True)
class Kernel:
    """One kernel of a plan: a layer of the network, or several fused."""

    name: str
    kind: str  # TensorRT's word for what generates it: correlation, gemm, kgen …
    operators: tuple[str, ...]  # what a fused one computes, in the compiler's short words

    @property
    def label(self) -> str:
        """What it computes, without moves and casts: "GroupNorm + SiLU"."""
        told = dict.fromkeys(WORDS.get(one, one) for one in self.operators if one not in MOVES)
        return " + ".join(sorted(told, key=str.lower)) or "data movement"


WORDS = {
    "Corr": "Conv", "correlation": "Conv", "gemm": "MatMul", "Gnor": "GroupNorm", "Inor": "InstanceNorm",
    "Silu": "SiLU", "Resi": "Resize", "signal": "stream synchronisation", "wait": "stream synchronisation",
}  # fmt: skip
MOVES = {"Cast", "Conc", "Copy", "Move", "Resh", "Slic", "Tran", "shape_call"}


def activation_bytes(log: Log) -> list[int] | None:
    """Device memory beside the weights, one number for our one profile; None where the log does not say."""
    found = [int(number) for _, text in log for number in re.findall(r"Total Activation Memory: (\d+) bytes", text)]
    return found[-1:] or None


def logged(log: Log) -> tuple[Kernel, ...]:
    """From the list that TensorRT ends a build with, at VERBOSE and with detailed names."""
    lists = [text for _, text in log if text.startswith("Layers:")]
    return listed(lists[-1]) if lists else ()


def listed(text: str) -> tuple[Kernel, ...]:
    """Kernels of a text with one line each: `Name: …, LayerType: …`. The compiler's names spell what is fused."""
    kernels = []
    for name, kind in re.findall(r"^Name: (.+?), LayerType: ([^,\n]+)", text, re.MULTILINE):
        fused = re.match(r"__myl_([A-Z]\w*?)_myl\d+_\d+$", name)
        kernels.append(Kernel(name, kind, tuple(re.findall(r"[A-Z][a-z]*", fused[1])) if fused else (kind,)))
    return tuple(kernels)
