"""The optimizer of the bundled model's training: Muon (Jordan 2024) for weight matrices, Adam for the rest."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sdedit.export.networks.patch_unet import PatchUNet


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix as the update (Jordan 2024), convolutions flattened.

    Scaled so that an update has AdamW's usual size (Liu et al. 2025, section 2.2). Matrices of one shape are
    made orthogonal together: a step is a few large products, not thousands of small ones. All float32, whose
    cost is small beside the network's; torch.optim.Muon iterates in bfloat16, which CPUs emulate slowly.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = group["params"]
            gradients = [p.grad for p in parameters]
            momenta = [self.momentum(p) for p in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
            alike = defaultdict(list)
            for p, update in zip(parameters, updates, strict=True):
                alike[p.flatten(1).shape].append((p, update.flatten(1)))
            for shape, pairs in alike.items():
                orthogonal = orthogonalize(torch.stack([update for _, update in pairs]))
                size = 0.2 * max(shape) ** 0.5
                for (p, _), update in zip(pairs, orthogonal, strict=True):
                    p.sub_(update.view(p.shape), alpha=group["lr"] * size)

    def momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        return state["momentum"]


def orthogonalize(matrices: Tensor) -> Tensor:
    """U V^T of each singular value decomposition, nearly: five quintic Newton-Schulz iterations. (..., m, n)."""
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    gram, one = x @ x.mT, torch.eye(x.shape[-2], device=x.device)
    product = one
    for _ in range(5):  # every iterate is a polynomial of the first x x^T times x: only that is carried
        factor = 3.4445 * one - 4.7750 * gram + 2.0315 * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    x = product @ x
    return (x.mT if tall else x).contiguous()


class MuonAdam:
    """Muon for the weight matrices of hidden layers, Adam for everything else."""

    def __init__(self, net: PatchUNet, lr: float) -> None:
        hidden, rest = [], []
        for name, p in net.named_parameters():
            (hidden if p.ndim >= 2 and not name.startswith(("stem", "head")) else rest).append(p)
        self.optimizers = (Muon(hidden, lr), torch.optim.Adam(rest, lr / 2, betas=(0.9, 0.99)))
        self.rates = (lr, lr / 2)

    def step(self, scale: float) -> None:
        """One update at `scale` times the base rates; clears the gradients."""
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
