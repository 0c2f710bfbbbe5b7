"""The contestants of gpu_peers.py: PyTorch on a GPU in the ways that it is used there, and sdedit on ort-cuda.

PyTorch's loops are lean: coefficients are made once, noise is drawn on the device, nothing is waited for before the
picture comes down; only the row that says "diffusers" has that library's scheduler, which is what most people run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from peer_networks import BUNDLED, CONFIGURATIONS, LEVELS, SIZES, ddpm_alphas_cumprod, weights_of

import sdedit

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Setting:
    """What all contestants are asked to do."""

    network: str  # a name of peer_networks, or BUNDLED
    device: str  # cuda, or cpu to try the script without one
    fp32: Path | None  # artifacts; None where there is none
    fp16: Path | None
    steps: int
    t0: float
    sigmas: list[float]  # from σ(t0) to 0: steps + 1
    variance_preserving: bool

    @property
    def size(self) -> int:
        return SIZES[self.network]


class Contestant(Protocol):
    def edit(self, picture: Picture, batch: int) -> Picture:
        """(H, W, 3) to (batch, H, W, 3), on the host both."""
        ...

    def check(self, picture: Picture) -> dict[str, NDArray[np.float32]]:
        """What is compared with ort-cpu: the "edit" of seed 0, or the "network" at a σ of `network_input`."""
        ...

    def said(self) -> dict[str, Any]:
        """What else belongs in the row."""
        ...


def network_input(setting: Setting) -> tuple[NDArray[np.float32], float]:
    """x (1, 3, H, W) and a σ that is one of the trained levels."""
    sigma = float(levels()[300])
    x = np.random.default_rng(1).standard_normal((1, 3, setting.size, setting.size), np.float32)
    return x * np.float32(math.hypot(sigma, 0.5)), sigma


def levels() -> NDArray[np.float64]:
    """σ of the trained levels, in the frame where x = data + σ · noise."""
    abar = ddpm_alphas_cumprod()
    return np.sqrt((1 - abar) / abar)


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def denoiser(setting: Setting, kind: Any, *, channels_last: bool) -> Any:
    """D(x, σ, t) as a module, in float32 outside the network: x (B, 3, H, W), σ and t (B,)."""
    import torch
    from torch import nn

    layout = torch.channels_last if channels_last else torch.contiguous_format

    def plain(made: torch.Tensor) -> torch.Tensor:
        """One layout at every step: torch.compile would make kernels for another."""
        return made.to(torch.float32, memory_format=torch.contiguous_format)

    class Eps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            import diffusers

            torch.manual_seed(0)
            size = setting.size
            net = diffusers.UNet2DModel(
                sample_size=size, in_channels=3, out_channels=3, **CONFIGURATIONS[setting.network]
            )
            if setting.fp32 is not None:
                net.load_state_dict(weights_of(setting.fp32, net.state_dict(), "net.unet."))
            self.net = net.to(kind)

        def forward(self, x: torch.Tensor, sigma: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            sigma = sigma[:, None, None, None]
            given = (x * torch.rsqrt(1 + sigma**2)).to(kind, memory_format=layout)
            return x - sigma * plain(self.net(given, t, return_dict=False)[0])

    class Cast(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(kind)

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            from sdedit.export.networks.patch_unet import PatchUNet

            net = PatchUNet()
            net.load_state_dict(weights_of(setting.fp32 or Path(), net.state_dict(), ""))
            frequencies, embed = net.frequencies.clone(), net.embed
            self.net = net.to(kind)
            self.net.embed = nn.Sequential(embed.float(), Cast())  # the noise level is for float32
            self.net.frequencies = frequencies

        def forward(self, x: torch.Tensor, sigma: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            net, data = self.net, self.net.sigma_data
            level = torch.clamp(sigma, *net.sigma_range).log() / 4
            sigma = sigma[:, None, None, None]
            variance = sigma**2 + data**2
            made = plain(net.raw((x * torch.rsqrt(variance)).to(kind, memory_format=layout), level))
            return data**2 / variance * x + sigma * data * torch.rsqrt(variance) * made

    module = Patches() if setting.network == BUNDLED else Eps()
    return module.eval().requires_grad_(False).to(setting.device).to(memory_format=layout)


class Torch:
    """compile: a mode of torch.compile; "default" is its own. graph: a step is a CUDA graph, made by hand."""

    def __init__(
        self, setting: Setting, dtype: str = "float32", *, channels_last: bool = True, compile: str | None = None,
        graph: bool = False, diffusers: bool = False, tf32: bool = True,
    ) -> None:  # fmt: skip
        import torch

        self._torch, self._setting, self._graph, self._diffusers = torch, setting, graph, diffusers
        self._cuda = setting.device == "cuda"
        if self._cuda and not torch.cuda.is_available():
            raise LookupError("PyTorch sees no GPU")
        if diffusers and setting.network == BUNDLED:
            raise LookupError("the bundled network is not one of diffusers'")
        torch.backends.cudnn.allow_tf32 = tf32  # PyTorch's default for convolutions
        torch.backends.cuda.matmul.allow_tf32 = tf32
        self._module = denoiser(setting, getattr(torch, dtype), channels_last=channels_last)
        self._cudagraphs = compile == "reduce-overhead"
        if compile is not None:
            self._module = torch.compile(self._module, mode=compile, dynamic=False)
        self._steps: dict[int, Callable[[Any], Any]] = {}
        self._levels: dict[int, list[tuple[Any, ...]]] = {}
        self._said = {"tf32": tf32, "cudnn": torch.backends.cudnn.version() if self._cuda else None}
        of_all, sigmas = levels(), np.array(setting.sigmas[:-1])
        at = np.interp(np.log(sigmas), np.log(of_all), np.arange(LEVELS))
        self._sigma, self._t = (
            torch.tensor(values, dtype=torch.float32, device=setting.device) for values in (sigmas, at)
        )
        self._keep, self._noise = coefficients(setting)
        if compile is not None:  # kernels are made here, beside others; tried out by itself later
            with torch.no_grad():
                x = torch.zeros((1, 3, setting.size, setting.size), device=setting.device)
                self._module(x, self._sigma[:1], self._t[:1])
                if self._cuda:
                    torch.cuda.synchronize()
        torch.backends.cudnn.benchmark = True

    def edit(self, picture: Picture, batch: int) -> Picture:
        torch = self._torch
        with torch.no_grad():
            guide = torch.from_numpy(picture).to(self._setting.device).permute(2, 0, 1)[None]
            guide = (guide.float() / 127.5 - 1).expand(batch, -1, -1, -1).contiguous()
            x = self._with_scheduler(guide) if self._diffusers else self._loop(guide)
            pixels = (x * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
            return np.asarray(pixels.cpu().numpy())

    def check(self, picture: Picture) -> dict[str, NDArray[np.float32]]:
        torch, device = self._torch, self._setting.device
        x, sigma = network_input(self._setting)
        with torch.no_grad():
            sigmas, ts = (torch.full((1,), value, device=device) for value in (sigma, 300.0))
            made = self._module(torch.from_numpy(x).to(device), sigmas, ts)
        return {"network": made.cpu().numpy().astype(np.float32)}

    def said(self) -> dict[str, Any]:
        return self._said

    def _loop(self, guide: Any) -> Any:
        torch = self._torch
        x = guide + self._setting.sigmas[0] * torch.randn_like(guide)
        batch = len(guide)
        if self._graph:
            if batch not in self._steps:
                self._steps[batch] = self._captured(guide)
            return self._steps[batch](x)
        if batch not in self._levels:
            self._levels[batch] = [
                tuple(value.repeat(batch) for value in one) for one in zip(self._sigma, self._t, strict=True)
            ]
        for (sigma, t), keep, noise in zip(self._levels[batch], self._keep, self._noise, strict=True):
            if self._cudagraphs:
                torch.compiler.cudagraph_mark_step_begin()
            x = torch.lerp(self._module(x, sigma, t), x, keep)
            if noise > 0:
                x.add_(torch.randn_like(x), alpha=noise)
        return x

    def _captured(self, guide: Any) -> Callable[[Any], Any]:
        """All steps from x on: one step as a graph, replayed; which one it is, is counted on the device."""
        torch, batch = self._torch, len(guide)
        x, number = torch.zeros_like(guide), torch.zeros(batch, dtype=torch.int64, device=guide.device)
        keep, noise = (
            torch.tensor(values, dtype=torch.float32, device=guide.device) for values in (self._keep, self._noise)
        )

        def step() -> None:
            sigma, t = (values.index_select(0, number) for values in (self._sigma, self._t))
            denoised = self._module(x, sigma, t)
            kept, added = (values.index_select(0, number)[:, None, None, None] for values in (keep, noise))
            x.copy_(torch.lerp(denoised, x, kept) + added * torch.randn_like(x))
            number.add_(1)

        replay = step
        if self._cuda:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # libraries choose their kernels
                    number.zero_()
                    step()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            replay = graph.replay

        def run(start: Any) -> Any:
            x.copy_(start)
            number.zero_()
            for _ in self._keep:
                replay()
            return x

        return run

    def _with_scheduler(self, guide: Any) -> Any:
        """add_noise, then the scheduler's steps from t0 on: what diffusers' img2img pipelines do."""
        import diffusers

        torch = self._torch
        scheduler = diffusers.DDPMScheduler(timestep_spacing="trailing", clip_sample=False)
        scheduler.set_timesteps(round(self._setting.steps / self._setting.t0))
        timesteps = scheduler.timesteps[-self._setting.steps :]
        x = scheduler.add_noise(guide, torch.randn_like(guide), timesteps[:1])
        for t in timesteps:
            x = scheduler.step(self._module.net(x, t, return_dict=False)[0], t, x).prev_sample
        return x


def coefficients(setting: Setting) -> tuple[list[float], list[float]]:
    """Of every step x = lerp(D, x, keep) + noise · normals: ancestral for a VP network, else Euler-Maruyama."""
    keep, noise = [], []
    for sigma, following in pairwise(setting.sigmas):
        ratio = (following / sigma) ** 2
        added = following**2 * (1 - ratio) if setting.variance_preserving else sigma**2 - following**2
        keep.append(ratio)
        noise.append(math.sqrt(added) if following > 0 else 0.0)
    return keep, noise


# --- ours ------------------------------------------------------------------------------------------------------------


class Ours:
    """`sdedit.load` and `Editor.edit`, on a GPU or, to try the script, on the CPU."""

    def __init__(self, setting: Setting, precision: str = "fp32", backend: str = "ort-cuda", **options: Any) -> None:
        source = setting.fp16 if precision == "fp16" else setting.fp32
        if source is None:
            raise LookupError(f"no {precision} artifact of {setting.network} was given")
        gpu = setting.device == "cuda"
        run_in = {"precision": "tf32"} if gpu and precision == "tf32" else {}
        options = {"provider_options": options} if gpu and options else {}
        self._editor = sdedit.load(source, backend=backend if gpu else "ort-cpu", **run_in, **options)
        self._setting, self._seed = setting, 0
        self._said: dict[str, Any] = {}

    def edit(self, picture: Picture, batch: int) -> Picture:
        self._seed += batch
        return np.stack([np.asarray(image) for image in self._run(picture, batch).images])

    def check(self, picture: Picture) -> dict[str, NDArray[np.float32]]:
        self._seed = 0
        self._run(picture, 1)
        found = self._run(picture, 1).x  # with all graphs made
        self._said["device_loop_graph"] = graph_of(self._editor)
        return {"edit": found}

    def said(self) -> dict[str, Any]:
        return self._said

    def _run(self, picture: Picture, batch: int) -> sdedit.EditResult:
        used = self._setting
        sampler = "ancestral" if used.variance_preserving else "em"
        made = self._editor.edit(
            picture, t0=used.t0, steps=used.steps, sampler=sampler, seed=self._seed, samples=batch, batch=batch
        )
        self._said |= {"device_ms": made.timings.device_ms, "notes": made.notes}
        return made


def graph_of(editor: sdedit.Editor) -> str | None:
    """DeviceLoop.graph of the loop that edits have used; None off the GPU."""
    backend = editor.backend.on_gpu()
    if backend is None:
        return None
    with backend.driver.current(), backend.device_loop(1, {}) as loop:
        return str(loop.graph)


SCHEDULER, OURS = "torch eager fp32, diffusers' scheduler", "sdedit fp32"
CONTESTANTS: dict[str, tuple[Callable[..., Contestant], dict[str, Any]]] = {
    SCHEDULER: (Torch, {"channels_last": False, "diffusers": True}),
    "torch eager fp32": (Torch, {"channels_last": False}),
    "torch eager fp32, no TF32": (Torch, {"channels_last": False, "tf32": False}),
    "torch channels-last fp32": (Torch, {}),
    "torch fp16": (Torch, {"dtype": "float16"}),
    "torch bf16": (Torch, {"dtype": "bfloat16"}),
    "torch fp32 graph": (Torch, {"graph": True}),
    "torch fp16 graph": (Torch, {"dtype": "float16", "graph": True}),
    "torch fp16 compile reduce-overhead": (Torch, {"dtype": "float16", "compile": "reduce-overhead"}),
    "torch fp16 compile graph": (Torch, {"dtype": "float16", "compile": "default", "graph": True}),
    OURS: (Ours, {}),
    "sdedit fp32 TF32": (Ours, {"precision": "tf32"}),
    "sdedit fp16": (Ours, {"precision": "fp16"}),
    "sdedit fp16 NHWC": (Ours, {"precision": "fp16", "prefer_nhwc": "1"}),
    "sdedit fp32 TensorRT": (Ours, {"backend": "tensorrt"}),
    "sdedit fp16 TensorRT": (Ours, {"precision": "fp16", "backend": "tensorrt"}),
}
