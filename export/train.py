"""Train the bundled model: python -m sdedit.export.train EuroSAT_RGB.zip -o checkpoint.pt

Denoising score matching with EDM's weighting (Karras et al. 2022, table 1): the effective target of the
raw network has unit variance at every noise level. Convolutions and linear maps are updated by Muon
(Jordan 2024), the rest by Adam. The learning rate is constant, then falls linearly to zero over the
last part; weights are averaged (EMA).

Resumable and deterministic: what step n draws depends on the seed and n alone, so a run that was
interrupted and started again with the same command continues as if nothing had happened. Choose --images
before starting: the fall of the learning rate is placed by it.
"""

import argparse
import copy
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdedit.export import eurosat
from sdedit.export.networks.patch_unet import PatchUNet

LOG_SIGMA_MEAN, LOG_SIGMA_STD = -0.4, 1.3  # of the noise levels trained on
WARMUP_STEPS = 100


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sdedit.export.train", description="Train the bundled model on EuroSAT."
    )
    parser.add_argument("data", type=Path, help="EuroSAT_RGB.zip")
    parser.add_argument("-o", "--output", type=Path, required=True, help="checkpoint, written and resumed from")
    parser.add_argument("--images", type=int, default=2_000_000, help="training length (default %(default)s)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--widths", type=int, nargs="+", default=[48, 96, 192])
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.25, help="part of the run over which the rate falls")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the weight average, a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250, metavar="STEPS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    return parser.parse_args()


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_batch(pictures: np.ndarray, batch: int, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """What step `step` trains on: clean images, noise levels, unit noise. Rotated and flipped at random."""
    rng = np.random.default_rng((seed, step))
    chosen = pictures[rng.integers(len(pictures), size=batch)]
    turns, flips = rng.integers(4, size=batch), rng.integers(2, size=batch)
    chosen = np.stack([np.rot90(p, k)[:, :: 1 - 2 * f] for p, k, f in zip(chosen, turns, flips, strict=True)])
    sigma = torch.from_numpy(np.exp(rng.normal(LOG_SIGMA_MEAN, LOG_SIGMA_STD, batch)).astype(np.float32))
    clean = to_tensor(chosen)
    return clean, sigma, torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))


def weighted_loss(net: nn.Module, clean: Tensor, sigma: Tensor, noise: Tensor, sigma_data: float) -> Tensor:
    """Karras et al. 2022, eq. 8: E[λ(σ) |D(x0 + σn; σ) - x0|²], a value."""
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    error = net(clean + sigma[:, None, None, None] * noise, sigma) - clean
    return (weight * error.square().mean(dim=(1, 2, 3))).mean()


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix as the update (Jordan 2024), convolutions flattened.

    Scaled so that an update has AdamW's usual size (Liu et al. 2025, section 2.2). torch.optim.Muon
    iterates in bfloat16, which CPUs without it emulate many times slower than float32.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(buffer, group["momentum"]).flatten(1))
                size = 0.2 * max(update.shape) ** 0.5
                p.sub_(update.reshape(p.shape), alpha=group["lr"] * size)


def orthogonalize(matrix: Tensor) -> Tensor:
    """U V^T of the singular value decomposition, nearly: five quintic Newton-Schulz iterations."""
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    gram, one = x @ x.T, torch.eye(len(x), device=x.device)
    product = one
    for _ in range(5):  # every iterate is a polynomial of the first x x^T times x: only that is carried
        factor = 3.4445 * one - 4.7750 * gram + 2.0315 * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    x = product @ x
    return x.T if tall else x


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


def learning_rate_scale(step: int, steps: int, decay: float) -> float:
    """Warm-up, constant, then linear to zero over the last `decay` of the run."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / max(1.0, decay * steps))


@torch.no_grad()
def held_out_loss(net: nn.Module, pictures: np.ndarray, sigma_data: float, device: str) -> float:
    """The weighted loss on 512 held-out pictures, the same noise every time."""
    losses = []
    for part in range(8):
        clean, sigma, noise = (v.to(device) for v in draw_batch(pictures, 64, seed=1234, step=part))
        losses.append(weighted_loss(net, clean, sigma, noise, sigma_data).item())
    return float(np.mean(losses))


def main() -> None:
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    net = PatchUNet(widths=tuple(options.widths)).to(options.device, memory_format=torch.channels_last)
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = MuonAdam(net, options.lr)
    start, seconds = 0, 0.0
    if options.output.exists():
        state = torch.load(options.output, map_location=options.device, weights_only=True)
        net.load_state_dict(state["model"])
        average.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["step"], state["seconds"]
        print(f"resuming at step {start}", flush=True)

    steps = options.images // options.batch
    training, _ = eurosat.load(options.data, held_out=False)
    held_out, _ = eurosat.load(options.data, held_out=True)
    parameters = sum(p.numel() for p in net.parameters())
    print(f"{parameters} parameters, {len(training)} pictures, {steps} steps of {options.batch}", flush=True)

    def save(step: int) -> None:
        state = {
            "model": net.state_dict(), "ema": average.state_dict(), "optimizer": optimizer.state_dict(),
            "step": step, "seconds": seconds, "widths": list(options.widths), "images": step * options.batch,
        }  # fmt: skip
        partial = options.output.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, options.output)

    smooth, began = None, time.perf_counter()
    for step in range(start, steps):
        clean, sigma, noise = (v.to(options.device) for v in draw_batch(training, options.batch, options.seed, step))
        loss = weighted_loss(net, clean, sigma, noise, net.sigma_data)
        loss.backward()
        optimizer.step(learning_rate_scale(step, steps, options.decay))
        with torch.no_grad():
            keep = min(options.ema, (step + 1) / (step + 10))
            for averaged, current in zip(average.parameters(), net.parameters(), strict=True):
                averaged.lerp_(current, 1 - keep)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if (step + 1) % options.save_every == 0 or step + 1 == steps:
            seconds += time.perf_counter() - began
            began = time.perf_counter()
            save(step + 1)
            measured = held_out_loss(average, held_out, net.sigma_data, options.device)
            print(
                f"step {step + 1}  images {(step + 1) * options.batch}  loss {smooth:.4f}  "
                f"held-out {measured:.4f}  {seconds / 60:.1f} min",
                flush=True,
            )


if __name__ == "__main__":
    main()
