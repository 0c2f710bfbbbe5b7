"""Train the bundled model: python -m sdedit.export.train EuroSAT_RGB.zip -o checkpoint.pt

Denoising score matching with EDM's weighting (Karras et al. 2022, table 1): the effective target of the
raw network has unit variance at every noise level. Convolutions and linear maps are updated by Muon
(Jordan 2024), the rest by Adam. The learning rate is constant, then falls linearly to zero over the
last part; weights are averaged (EMA).

Pictures, batches and losses stay on the device; the host waits for it at checkpoints only.

Resumable: what step n draws depends on the seed, n and the kind of device alone, so a run that was
interrupted (SIGTERM saves first) and started again with the same command continues as if nothing had
happened; on a CPU to the last bit. Choose --images before starting: the fall of the learning rate is placed
by it. With --minutes it is placed by the clock instead, and no two runs are the same.
"""

import argparse
import copy
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdedit.export import eurosat
from sdedit.export.muon import MuonAdam
from sdedit.export.networks.patch_unet import PatchUNet

# Of the noise levels trained on. Sampling with the cosine schedule visits ln σ with mean 0 and deviation π/2;
# a little lower, because edits start part of the way.
LOG_SIGMA_MEAN, LOG_SIGMA_STD = -0.3, 1.5
WARMUP_STEPS = 100
SAVE_SECONDS = 30


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sdedit.export.train", description="Train the bundled model on EuroSAT."
    )
    parser.add_argument("data", type=Path, help="EuroSAT_RGB.zip")
    parser.add_argument("-o", "--output", type=Path, required=True, help="checkpoint, written and resumed from")
    parser.add_argument("--weights", type=Path, help="checkpoint whose averaged weights to begin with")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--images", type=int, default=2_000_000, help="training length (default %(default)s)")
    length.add_argument("--minutes", type=float, help="training length by the clock, compilation not counted")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--widths", type=int, nargs="+", default=[48, 96, 192])
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.25, help="part of the run over which the rate falls")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the weight average, a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, metavar="STEPS", help=f"(default: every {SAVE_SECONDS} seconds)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"),
        help="of convolutions, matrix products and attention in training (default: bf16 on a GPU that has it)",
    )  # fmt: skip
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile the loss (default: on a GPU)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    options = parser.parse_args()
    gpu = torch.device(options.device).type == "cuda"
    if options.precision is None:
        options.precision = "bf16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if options.compile is None:
        options.compile = gpu
    return options


def draw_batch(pictures: Tensor, batch: int, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """What step `step` trains on, drawn where the pictures are: clean images, noise levels, unit noise.

    pictures: (N, S, S, 3) uint8. Each image is one of them under one of the square's eight symmetries, (3, S, S)
    float32 in [-1, 1]. The noise levels are stratified: one in each of `batch` parts of equal probability.
    """
    device = pictures.device
    mixed = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    generator = torch.Generator(device).manual_seed(int(mixed[0]))
    chosen = pictures[torch.randint(len(pictures), (batch,), generator=generator, device=device)]
    transposed, mirrored, upended = torch.randint(2, (3, batch, 1, 1, 1), generator=generator, device=device).bool()
    chosen = torch.where(transposed, chosen.transpose(1, 2), chosen)
    chosen = torch.where(mirrored, chosen.flip(2), chosen)
    chosen = torch.where(upended, chosen.flip(1), chosen)
    clean = (chosen.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)

    offset = torch.rand(batch, generator=generator, device=device)
    quantile = (torch.arange(batch, device=device) + offset) / batch
    normal = torch.special.ndtri(quantile.clamp(1e-6, 1 - 1e-6))
    noise = torch.randn(clean.shape, generator=generator, device=device)
    return clean, (LOG_SIGMA_MEAN + LOG_SIGMA_STD * normal).exp(), noise


def weighted_loss(net: PatchUNet, clean: Tensor, sigma: Tensor, noise: Tensor, precision: str) -> Tensor:
    """Karras et al. 2022, eq. 8: E[λ(σ) |D(x0 + σn; σ) - x0|²], a value.

    bf16 lowers convolutions, matrix products and attention; the rest, preconditioning included, is float32.
    """
    weight = (sigma**2 + net.sigma_data**2) / (sigma * net.sigma_data) ** 2
    with torch.autocast(clean.device.type, torch.bfloat16, enabled=precision == "bf16"):
        error = net(clean + sigma[:, None, None, None] * noise, sigma) - clean
    return (weight * error.square().mean(dim=(1, 2, 3))).mean()


def compiled(loss_of: Callable[..., Tensor], *arguments: object) -> Callable[..., Tensor]:
    """`loss_of` compiled and tried on `arguments`, there and back; where that fails, `loss_of` as it is."""
    fast = torch.compile(loss_of, dynamic=False)
    try:
        fast(*arguments).backward()
    except Exception as error:  # no C compiler, no triton, a defect of either: of many kinds
        print(f"not compiled, which is slower: {type(error).__name__}: {str(error).strip()[:500]}", flush=True)
        return loss_of
    return fast


def learning_rate_scale(step: int, over: float, decay: float) -> float:
    """Warm-up, constant, then linear to zero over the last `decay` of the run, of which `over` is done."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (1 - over) / max(decay, 1e-9))


@torch.no_grad()
def held_out_loss(net: PatchUNet, pictures: Tensor) -> float:
    """The weighted loss in float32 on 512 held-out pictures, the same noise every time."""
    parts = [weighted_loss(net, *draw_batch(pictures, 64, seed=1234, step=part), "fp32") for part in range(8)]
    return torch.stack(parts).mean().item()


class Training:
    """What a checkpoint holds: weights, their average, the optimizer, and how far they have come."""

    def __init__(self, widths: list[int], lr: float, device: str) -> None:
        self.widths, self.device = widths, device
        self.net = PatchUNet(widths=tuple(widths)).to(device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.net).requires_grad_(False)
        self.optimizer = MuonAdam(self.net, lr)
        self.step, self.images, self.seconds = 0, 0, 0.0

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.net.load_state_dict(state["model"])
        self.average.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.images, self.seconds = state["step"], state["images"], state["seconds"]

    def load_weights(self, path: Path) -> None:
        """Begin with the averaged weights of a checkpoint; its images count on, its steps do not."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.net.load_state_dict(state["ema"])
        self.average.load_state_dict(state["ema"])
        self.images = state["images"]

    def save(self, path: Path) -> None:
        state = {
            "model": self.net.state_dict(), "ema": self.average.state_dict(), "optimizer": self.optimizer.state_dict(),
            "step": self.step, "seconds": self.seconds, "widths": self.widths, "images": self.images,
        }  # fmt: skip
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def update(self, scale: float, ema: float) -> None:
        """One step along the gradients, at `scale` times the learning rate."""
        self.optimizer.step(scale)
        keep = min(ema, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.net.parameters()), 1 - keep)
        self.step += 1


def run(training: Training, pictures: Tensor, held_out: Tensor, options: argparse.Namespace) -> None:
    """Train to the end, or to a SIGTERM, saving on the way and then."""
    steps = max(1, options.images // options.batch)
    received = []
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))

    def over() -> float:
        """How much of the run is done, 0 to 1."""
        return min(1.0, training.seconds / (60 * options.minutes) if options.minutes else training.step / steps)

    loss_of: Callable[..., Tensor] = weighted_loss
    if options.compile:
        batch = draw_batch(pictures, options.batch, options.seed, training.step)
        loss_of = compiled(loss_of, training.net, *batch, options.precision)
        training.net.zero_grad()

    first, earlier, began = training.step, training.seconds, time.perf_counter()
    losses: list[Tensor] = []  # since the last checkpoint, which was written at `saved`
    saved = began
    while over() < 1:
        batch = draw_batch(pictures, options.batch, options.seed, training.step)
        loss = loss_of(training.net, *batch, options.precision)
        loss.backward()
        training.update(learning_rate_scale(training.step, over(), options.decay), options.ema)
        losses.append(loss.detach())
        training.images += options.batch
        if training.step == first + 1:  # it loads and builds: the clock starts behind it
            loss.item()
            began = saved = time.perf_counter()
        now = time.perf_counter()
        training.seconds = earlier + now - began
        due = training.step % options.save_every == 0 if options.save_every else now - saved >= SAVE_SECONDS
        if due or received or over() == 1:
            mean = torch.stack(losses).mean().item()
            rate = len(losses) * options.batch / (time.perf_counter() - saved)
            if not math.isfinite(mean):
                raise SystemExit(f"step {training.step}: the loss is {mean}. {options.output} is older; lower --lr.")
            training.save(options.output)
            print(
                f"step {training.step}  images {training.images}  loss {mean:.4f}  "
                f"held-out {held_out_loss(training.average, held_out):.4f}  {training.seconds / 60:.1f} min  "
                f"{rate:.0f} images/s",
                flush=True,
            )
            if received:
                raise SystemExit(128 + received[0])
            losses, saved = [], time.perf_counter()


def main() -> None:
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(options.seed)
    training = Training(options.widths, options.lr, options.device)
    pictures, held_out = (
        torch.from_numpy(eurosat.load(options.data, held_out=side)[0]).to(options.device) for side in (False, True)
    )
    if options.output.exists():
        training.load(options.output)
        print(f"resuming at step {training.step}", flush=True)
    elif options.weights:
        training.load_weights(options.weights)
        print(f"beginning with held-out {held_out_loss(training.average, held_out):.4f}", flush=True)
    parameters = sum(p.numel() for p in training.net.parameters())
    length = f"{options.minutes} minutes" if options.minutes else f"{options.images} images"
    print(
        f"{parameters} parameters, {len(pictures)} pictures, {length} in steps of {options.batch}, "
        f"{options.precision} on {options.device}",
        flush=True,
    )
    run(training, pictures, held_out, options)


if __name__ == "__main__":
    main()
