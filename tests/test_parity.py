"""The samplers are the published ones: whole trajectories against diffusers and k-diffusion's formula, same noise."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddpm

import sdedit

SHAPE = (2, 1, 3, 3)
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
SDE = sdedit.VPDiscrete(tuple(ALPHA_BAR))
SCHEDULES = {
    "ve": sdedit.VE(0.02, 60.0),
    "vp": sdedit.VP(0.1, 20.0),
    "vp-discrete": SDE,
    "edm": sdedit.EDM(0.002, 80.0, 7.0),
}
TOLERANCE = 1e-6  # of the largest value of a state, in the variance-exploding frame

# N steps of `stride` trained levels each, t0 = N · stride / 1000; level i, t = (i+1)/1000, is diffusers' timestep i.
every_grid = pytest.mark.parametrize(("steps", "stride"), [(1000, 1), (300, 1), (50, 20), (30, 10), (3, 125)])
every_prediction = pytest.mark.parametrize("prediction", ["epsilon", "sample"])

Array = np.ndarray


def denoiser(x: Array, sigma: Array | float) -> Array:
    """Smooth and bounded; neither linear in x nor the same at every σ."""
    sigma = np.reshape(sigma, (-1, 1, 1, 1))
    return np.tanh(x / (1 + sigma)) + 0.2 * np.cos(3 * x) / (1 + sigma**2)


def noise(step: int, repeat: int, stream: int) -> Array:
    return np.random.default_rng([step, repeat, stream]).standard_normal(SHAPE)


def engine_states(table: sdedit.StepTable) -> list[Array]:
    """x at every level of the table, and the result."""
    states: list[Array] = []

    def recording(x: Array, sigma: Array) -> Array:
        states.append(x.copy())
        return denoiser(x, sigma)

    guide = np.random.default_rng(0).uniform(-1, 1, SHAPE)
    states.append(sdedit.denoise(recording, sdedit.perturb(guide, table, noise), table, noise))
    return states


def diffusers_states(
    x: Array,
    steps: int,
    stride: int,
    prediction: str,
    step: Callable[[torch.Tensor, int, torch.Tensor, Array], torch.Tensor],
) -> list[Array]:
    """The states of `step(model_output, timestep, x_vp, z)` from x, all in the variance-exploding frame."""
    states = [x]
    for number, timestep in enumerate(range(steps * stride - 1, -1, -stride), start=1):
        alpha_bar, last = ALPHA_BAR[timestep], timestep < stride
        sigma = np.sqrt(1 / alpha_bar - 1)
        denoised = denoiser(x, sigma)
        output = denoised if prediction == "sample" else (x - denoised) / sigma
        x_vp = step(torch.tensor(output), timestep, torch.tensor(np.sqrt(alpha_bar) * x), noise(number, 0, 0))
        x = x_vp.numpy() / np.sqrt(1.0 if last else ALPHA_BAR[timestep - stride])
        states.append(x)
    return states


def in_float64(scheduler: Any) -> Any:
    """A scheduler with the very levels that the engine has; its own are float32."""
    scheduler.alphas_cumprod = torch.tensor(ALPHA_BAR)
    return scheduler


def assert_same(got: list[Array], wanted: list[Array], tolerance: float = TOLERANCE) -> None:
    assert len(got) == len(wanted)
    errors = [np.abs(g - w).max() / np.abs(w).max() for g, w in zip(got, wanted, strict=True)]
    assert max(errors) <= tolerance, f"first differs at state {np.argmax(np.array(errors) > tolerance)}: {max(errors)}"


@every_grid
@every_prediction
@pytest.mark.parametrize(("sampler", "variance"), [("ancestral", "fixed_small"), ("em", "fixed_large")])
def test_em_and_ancestral_equal_ddpm_step_by_step(
    monkeypatch: pytest.MonkeyPatch, sampler: str, variance: str, prediction: str, steps: int, stride: int
) -> None:
    config = {"variance_type": variance, "prediction_type": prediction, "clip_sample": False}
    ddpm = in_float64(DDPMScheduler(1000, 1e-4, 0.02, "linear", **config))
    ddpm.set_timesteps(timesteps=list(range(steps * stride - 1, -1, -stride)))

    def step(output: torch.Tensor, timestep: int, x_vp: torch.Tensor, z: Array) -> torch.Tensor:
        final = timestep < stride  # where the engine adds no noise, and DDPM does unless it ends at timestep 0
        drawn = torch.tensor(z * (not final))
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *shape, **options: drawn)
        return ddpm.step(output, timestep, x_vp).prev_sample

    states = engine_states(sdedit.plan(SDE, t0=steps * stride / 1000, steps=steps, sampler=sampler))
    assert_same(states, diffusers_states(states[0], steps, stride, prediction, step))


@every_grid
@every_prediction
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_equals_ddim_step_by_step(prediction: str, steps: int, stride: int, eta: float) -> None:
    config = {"prediction_type": prediction, "clip_sample": False, "set_alpha_to_one": True}
    ddim = in_float64(DDIMScheduler(1000, 1e-4, 0.02, "linear", timestep_spacing="trailing", **config))
    ddim.set_timesteps(1000 // stride)
    assert ddim.timesteps[-steps:].tolist() == list(range(steps * stride - 1, -1, -stride))

    def step(output: torch.Tensor, timestep: int, x_vp: torch.Tensor, z: Array) -> torch.Tensor:
        return ddim.step(output, timestep, x_vp, eta=eta, variance_noise=torch.tensor(z)).prev_sample

    states = engine_states(sdedit.plan(SDE, t0=steps * stride / 1000, steps=steps, sampler="ddim", eta=eta))
    assert_same(states, diffusers_states(states[0], steps, stride, prediction, step))


def dpmpp_2m_sde_states(x: Array, sigmas: Array, eta: float) -> list[Array]:
    """DPM-Solver++(2M) SDE, Lu et al. 2022, with k-diffusion's η and midpoint correction, in λ = −ln σ."""
    states = [x]
    previous = h_last = None
    for number, (sigma, sigma_next) in enumerate(pairwise(sigmas), start=1):
        denoised = denoiser(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            h = np.log(sigma) - np.log(sigma_next)
            towards = -np.expm1(-h - eta * h)
            x = sigma_next / sigma * np.exp(-eta * h) * x + towards * denoised
            if previous is not None:
                x = x + 0.5 * towards * (h / h_last) * (denoised - previous)
            x = x + sigma_next * np.sqrt(-np.expm1(-2 * eta * h)) * noise(number, 0, 0)
            previous, h_last = denoised, h
        states.append(x)
    return states


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("t0", "steps"), [(0.5, 1), (0.5, 2), (0.31, 20), (1.0, 100)])
def test_dpmpp_2m_sde_equals_the_k_diffusion_formula(kind: str, eta: float, t0: float, steps: int) -> None:
    sde = SCHEDULES[kind]
    states = engine_states(sdedit.plan(sde, t0=t0, steps=steps, sampler="dpmpp-2m-sde", eta=eta))
    sigmas = sde.sigma(t0 * np.arange(steps, -1, -1) / steps)
    assert_same(states, dpmpp_2m_sde_states(states[0], sigmas, eta))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize(("eta", "algorithm"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
@every_prediction
def test_dpmpp_2m_sde_equals_the_multistep_solver_of_diffusers(eta: float, algorithm: str, prediction: str) -> None:
    config = {"prediction_type": prediction, "algorithm_type": algorithm, "timestep_spacing": "trailing"}
    config |= {"solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero", "lower_order_final": True}
    solver = DPMSolverMultistepScheduler(1000, 1e-4, 0.02, "linear", **config)
    solver.set_timesteps(50)

    def step(output: torch.Tensor, timestep: int, x_vp: torch.Tensor, z: Array) -> torch.Tensor:
        return solver.step(output, timestep, x_vp, variance_noise=torch.tensor(z)).prev_sample

    states = engine_states(sdedit.plan(SDE, t0=1.0, steps=50, sampler="dpmpp-2m-sde", eta=eta))
    wanted = diffusers_states(states[0], 50, 20, prediction, step)
    assert_same(states, wanted, tolerance=2e-5)  # this scheduler works in float32
