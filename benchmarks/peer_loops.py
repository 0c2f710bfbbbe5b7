"""What a user would write, or take, to edit a picture with SDEdit: each function opens one way and returns its edit.

An edit is uint8 (H, W, 3) in, uint8 (H, W, 3) out. All of them run the same network from the same level in the same
number of steps: `ancestral` ones for a VP network, Euler-Maruyama for a VE one, sdedit by the sampler asked for. Their
noise is their own library's.
"""

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peer_networks import BUNDLED, LEVELS, VP, Network, ddpm_alphas_cumprod, weights_of

import sdedit

Picture = NDArray[np.uint8]
Edit = Callable[[Picture], Picture]


@dataclass
class Clock:
    """How long the network itself took, since the last reset."""

    network_s: float = 0.0

    def timed(self, network: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = network(*arguments)
            self.network_s += time.perf_counter() - began
            return result

        return evaluate


@dataclass
class Setting:
    """What all peers are asked to do; looked at anew in every edit."""

    network: Network
    steps: int
    t0: float
    sigmas: Sequence[float]  # the levels, from σ(t0) to 0: steps + 1
    sampler: str  # of our own edits; the other loops are ancestral, or Euler-Maruyama for a VE network
    spacing: str
    clock: Clock = field(default_factory=Clock)
    ran: str | None = None  # what our own edit ran on, where it was free to choose

    @contextmanager
    def shortened(self) -> Iterator[None]:
        """Two steps only, for the length of a `with` block: to warm up."""
        steps, sigmas = self.steps, self.sigmas
        self.steps, self.sigmas = 2, [sigmas[0], sigmas[-2] / 2, 0.0]
        try:
            yield
        finally:
            self.steps, self.sigmas = steps, sigmas


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def torch_network(network: Network) -> Any:
    """What is called with (x, t, return_dict=False), and returns a tuple of eps, or of the score for a VE network."""
    if network.name != BUNDLED:
        import diffusers

        return diffusers.UNet2DModel.from_pretrained(network.folder / "unet").eval()
    import torch

    from sdedit.export.networks.patch_unet import PatchUNet

    class Eps(torch.nn.Module):
        """The bundled network at level t of its schedule, as diffusers' networks are called."""

        def __init__(self) -> None:
            super().__init__()
            self.net = PatchUNet()
            self.net.load_state_dict(weights_of(network.artifact, self.net.state_dict(), ""))
            abar = torch.from_numpy(alphas_cumprod(network))
            self.register_buffer("sigmas", ((1 - abar) / abar).sqrt().float())

        def forward(self, x: torch.Tensor, t: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
            sigma = self.sigmas[t].expand(len(x)).to(x.dtype)
            level = sigma[:, None, None, None]
            x = x * (1 + level**2).sqrt()  # to the frame where x = data + σ · noise
            return ((x - self.net(x, sigma)) / level,)

    return Eps().eval()


@cache
def alphas_cumprod(network: Network) -> NDArray[np.float64]:
    """ᾱ of a VP network's thousand levels."""
    if network.name != BUNDLED:
        return ddpm_alphas_cumprod()
    opened = sdedit.load(network.artifact, backend="ort-cpu", threads=1)
    return np.array(opened.artifact.metadata["sde"]["alphas_cumprod"], np.float64)


def betas_of(network: Network) -> NDArray[np.float64]:
    return np.asarray(-np.expm1(np.diff(np.log(alphas_cumprod(network)), prepend=0)))


def torch_edit(setting: Setting, *, channels_last: bool, compiled: bool, dtype: str, autocast: bool = False) -> Edit:
    """diffusers' network and scheduler in the usual image-to-image loop."""
    import torch

    if compiled:
        from torch._inductor import config

        config.freezing = True  # weights become constants, laid out once
    kind = getattr(torch, dtype)
    net = torch_network(setting.network).to(kind)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    module = torch.compile(net) if compiled else net

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            x = x.to(kind, memory_format=torch.channels_last if channels_last else torch.preserve_format)
            return module(x, t, return_dict=False)[0].float()

    predict = setting.clock.timed(predict)
    loop = diffusers_loop if setting.network.kind == VP else torch_ve_loop

    @torch.no_grad()
    def edit(picture: Picture) -> Picture:
        guide = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
        return to_picture(loop(setting, predict, guide).numpy())

    return edit


def diffusers_loop(setting: Setting, predict: Callable[..., Any], guide: Any) -> Any:
    """add_noise, then the scheduler's steps from t0 on: what diffusers' img2img pipelines do."""
    import diffusers
    import torch

    if setting.network.name == BUNDLED:
        betas = betas_of(setting.network)
        scheduler = diffusers.DDPMScheduler(trained_betas=betas, timestep_spacing="trailing", clip_sample=False)
    else:
        scheduler = diffusers.DDPMScheduler.from_pretrained(setting.network.folder / "scheduler")
    scheduler.set_timesteps(round(setting.steps / setting.t0))
    timesteps = scheduler.timesteps[-setting.steps :]
    x = scheduler.add_noise(guide, torch.randn(guide.shape), timesteps[:1])
    for t in timesteps:
        x = scheduler.step(predict(x, t), t, x).prev_sample
    return x


def torch_ve_loop(setting: Setting, predict: Callable[..., Any], guide: Any) -> Any:
    """Euler-Maruyama with the score, in the network's own frame of [0, 1] data (Song et al. 2021)."""
    import torch

    sigmas = torch.tensor(setting.sigmas) / 2  # ours are of [-1, 1] data
    x = (guide + 1) / 2 + sigmas[0] * torch.randn(guide.shape)
    for sigma, sigma_next in pairwise(sigmas):
        gained = sigma**2 - sigma_next**2
        x = x + gained * predict(x, sigma.expand(len(x)))
        if sigma_next > 0:
            x = x + gained.sqrt() * torch.randn(x.shape)
    return 2 * x - 1


def paper_edit(setting: Setting) -> Edit:
    """The paper's pipeline as its authors ran it: every one of the trained levels below t0, PyTorch, eager.

    Written anew from the paper (appendix C) and the way their code works: coefficients are tensors that are computed
    and looked up in every step, and the mask, here one that repaints everything, is applied in every step.
    """
    import torch

    net = torch_network(setting.network)
    predict = setting.clock.timed(lambda x, t: net(x, t, return_dict=False)[0])
    betas = torch.from_numpy(betas_of(setting.network)).float()

    def at(values: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return values[t].reshape(-1, 1, 1, 1)

    @torch.no_grad()
    def edit(picture: Picture) -> Picture:
        guide = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
        repaint = torch.ones_like(guide)
        total = round(setting.t0 * LEVELS)
        abar = (1 - betas).cumprod(0)
        x = abar[total - 1].sqrt() * guide + (1 - abar[total - 1]).sqrt() * torch.randn(guide.shape)
        for level in reversed(range(total)):
            t = torch.full((len(x),), level)
            abar = (1 - betas).cumprod(0)
            before = torch.cat([torch.ones(1), abar[:-1]])
            mean = (x - at(betas / (1 - abar).sqrt(), t) * predict(x, t)) / at((1 - betas).sqrt(), t)
            variance = at(betas * (1 - before) / (1 - abar), t)
            made = mean + (t > 0).float().reshape(-1, 1, 1, 1) * variance.sqrt() * torch.randn(x.shape)
            kept = at(before.sqrt(), t) * guide + at((1 - before).sqrt(), t) * torch.randn(x.shape)
            x = torch.where(repaint > 0, made, kept)
        return to_picture(x.numpy())

    return edit


# --- a runtime with a loop in NumPy ----------------------------------------------------------------------------------


def onnxruntime_edit(setting: Setting) -> Edit:
    import onnxruntime

    session = onnxruntime.InferenceSession(setting.network.artifact, providers=["CPUExecutionProvider"])

    def denoise(x: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
        return session.run(None, {"x": x, "sigma": np.full(len(x), sigma, np.float32)})[0]

    return numpy_edit(setting, denoise)


def openvino_edit(setting: Setting, *, precision: str) -> Edit:
    import openvino

    source = setting.network.file(int8=precision == "int8")
    hints = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32", "PERFORMANCE_HINT": "LATENCY"}
    core = openvino.Core()
    model = core.read_model(source)
    size = setting.network.size
    model.reshape({"x": [1, 3, size, size], "sigma": [1]})
    compiled = core.compile_model(model, "CPU", hints)
    request = compiled.create_infer_request()

    def denoise(x: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
        found = request.infer({"x": x, "sigma": np.full(len(x), sigma, np.float32)}, share_inputs=True)
        return found["denoised"]

    return numpy_edit(setting, denoise)


def numpy_edit(setting: Setting, denoise: Callable[..., Any]) -> Edit:
    denoise = setting.clock.timed(denoise)
    rng = np.random.default_rng()
    variance_preserving = setting.network.kind == VP

    def edit(picture: Picture) -> Picture:
        guide = np.ascontiguousarray(picture.transpose(2, 0, 1)[None], np.float32) / 127.5 - 1
        sigmas = setting.sigmas
        x = guide + sigmas[0] * rng.standard_normal(guide.shape, np.float32)
        for sigma, sigma_next in pairwise(sigmas):
            r2 = (sigma_next / sigma) ** 2
            noise = math.sqrt(sigma_next**2 * (1 - r2) if variance_preserving else sigma**2 - sigma_next**2)
            x = r2 * x + (1 - r2) * denoise(x, sigma)
            if sigma_next > 0:
                x = x + noise * rng.standard_normal(x.shape, np.float32)
        return to_picture(x)

    return edit


def to_picture(x: NDArray[Any]) -> Picture:
    """(1, 3, H, W) in [-1, 1] -> uint8 (H, W, 3)."""
    return (np.clip(x[0].transpose(1, 2, 0) * 127.5 + 127.5, 0, 255) + 0.5).astype(np.uint8)


# --- ours ------------------------------------------------------------------------------------------------------------


def our_edit(setting: Setting, *, backend: str, int8: bool = False, **options: Any) -> Edit:
    """`sdedit.load` and `Editor.edit`."""
    source = setting.network.file(int8=int8)
    if unknown := set(options) - set(inspect.signature(sdedit.load).parameters):
        raise LookupError(f"this sdedit has no {', '.join(unknown)}")
    editor = sdedit.load(source, backend=backend, **options)
    if options.get("fast"):
        setting.ran = f"{editor.backend.name}, {editor.backend.precision}, {editor.artifact.path.name}"
    seed = 0

    def edit(picture: Picture) -> Picture:
        nonlocal seed
        seed += 1
        used = {"t0": setting.t0, "steps": setting.steps, "sampler": setting.sampler, "spacing": setting.spacing}
        out = editor.edit(picture, seed=seed, **used)
        setting.clock.network_s += (out.timings.network_ms or 0.0) / 1e3
        return np.asarray(out.images[0])

    return edit


OURS = "sdedit"
PAPER = "original loop"
PEERS: dict[str, tuple[Callable[..., Edit], dict[str, Any]]] = {
    "torch eager": (torch_edit, {"channels_last": False, "compiled": False, "dtype": "float32"}),
    "torch channels-last": (torch_edit, {"channels_last": True, "compiled": False, "dtype": "float32"}),
    "torch compile": (torch_edit, {"channels_last": True, "compiled": True, "dtype": "float32"}),
    "torch bf16 autocast": (
        torch_edit, {"channels_last": True, "compiled": False, "dtype": "float32", "autocast": True},
    ),
    "torch bf16": (torch_edit, {"channels_last": True, "compiled": False, "dtype": "bfloat16"}),
    "torch bf16 compile": (torch_edit, {"channels_last": True, "compiled": True, "dtype": "bfloat16"}),
    PAPER: (paper_edit, {}),
    "onnxruntime": (onnxruntime_edit, {}),
    "openvino fp32": (openvino_edit, {"precision": "fp32"}),
    "openvino bf16": (openvino_edit, {"precision": "bf16"}),
    "openvino int8": (openvino_edit, {"precision": "int8"}),
    OURS: (our_edit, {"backend": "ort-cpu"}),
    "sdedit fp16": (our_edit, {"backend": "ort-cpu", "precision": "fp16"}),
    "sdedit bf16": (our_edit, {"backend": "ort-cpu", "precision": "bf16"}),
    "sdedit int8": (our_edit, {"backend": "ort-cpu", "int8": True}),
    "sdedit openvino": (our_edit, {"backend": "openvino"}),
    "sdedit openvino bf16": (our_edit, {"backend": "openvino", "precision": "bf16"}),
    "sdedit openvino int8": (our_edit, {"backend": "openvino", "int8": True}),
    "sdedit --fast": (our_edit, {"backend": "auto", "fast": True}),
}  # fmt: skip
