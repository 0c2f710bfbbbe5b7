"""An exported artifact is the network it came from, and says what it needs to."""

from pathlib import Path

import numpy as np
import pytest
import torch

import sdedit
from sdedit import artifact
from sdedit.export import bundled, schedules
from sdedit.export.networks.patch_unet import PatchUNet
from sdedit.export.to_onnx import write_artifact

WIDTHS = (16, 16, 32)


@pytest.fixture(scope="module")
def network() -> PatchUNet:
    torch.manual_seed(0)
    net = PatchUNet(widths=WIDTHS)
    for parameter in net.parameters():  # the zero-initialised layers too, or much of the network would not count
        torch.nn.init.normal_(parameter, std=0.05)
    return net


def described(net: PatchUNet) -> dict:
    return bundled.metadata({"images": 0}, net)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sigma", [0.002, 0.5, 40.0, 1e4])
def test_the_artifact_is_the_network(network: PatchUNet, tmp_path: Path, batch: int, sigma: float) -> None:
    write_artifact(network, tmp_path / "net.onnx", described(network))
    x = (sigma + 0.5) * np.random.default_rng(0).standard_normal((batch, 3, 64, 64)).astype(np.float32)
    sigmas = np.full(batch, sigma, np.float32)
    denoised = sdedit.load(tmp_path / "net.onnx", backend="ort-cpu").backend.bind(batch, {})(x, sigmas)
    with torch.no_grad():
        expected = network.eval()(torch.from_numpy(x), torch.from_numpy(sigmas)).numpy()
    # D = x - σ·noise cancels at large σ: measured against the larger of the two
    scale = max(np.linalg.norm(expected), np.linalg.norm(x - expected))
    assert np.linalg.norm(denoised - expected) / scale < 1e-5


def test_half_weights_halve_the_file_and_cost_their_rounding_only(network: PatchUNet, tmp_path: Path) -> None:
    for name, half in (("whole", False), ("half", True)):
        write_artifact(network, tmp_path / f"{name}.onnx", described(network), half_weights=half)
    whole, half = (artifact.read(tmp_path / f"{name}.onnx") for name in ("whole", "half"))
    assert half.size_bytes < 0.65 * whole.size_bytes
    x = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)
    results = [
        sdedit.load(a.path, backend="ort-cpu").backend.bind(1, {})(x, np.ones(1, np.float32)) for a in (whole, half)
    ]
    assert 0 < np.abs(results[1] - results[0]).max() < 5e-3


def test_the_metadata_survives_the_round_trip(network: PatchUNet, tmp_path: Path) -> None:
    write_artifact(network, tmp_path / "net.onnx", described(network))
    opened = artifact.read(tmp_path / "net.onnx")
    assert opened.metadata == described(network)
    assert opened.opset == 18


def test_the_cosine_schedule_has_its_published_ends() -> None:
    sde = schedules.cosine()
    assert len(sde.alphas_cumprod) == 1000
    np.testing.assert_allclose(sde.sigma(0.5), 1.0, rtol=0.02)  # half signal, half noise, halfway
    assert np.isfinite(sde.sigma(1.0))
    assert sde.sigma(0.999) > 100


def test_the_network_is_nearly_the_identity_without_noise(network: PatchUNet) -> None:
    x = torch.rand(2, 3, 32, 64) * 2 - 1
    with torch.no_grad():
        denoised = network(x, torch.full((2,), 1e-4))
    assert denoised.shape == x.shape
    assert (denoised - x).abs().max() < 1e-2
