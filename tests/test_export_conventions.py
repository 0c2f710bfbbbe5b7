"""D(x; σ) from what a network says, for every convention, against the formulas in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from sdedit import sde as schedules
from sdedit.errors import OptionError
from sdedit.export import schedules as published
from sdedit.export.denoiser import Convention, Denoiser, LevelIndex, TimeLabel

LINEAR = published.linear()
VP = schedules.VP(0.1, 20.0)
VE = schedules.VE(0.02, 100.0)
EDM = schedules.EDM(0.002, 80.0, 7.0)
SIGMAS = (0.011, 0.3, 1.0, 7.0, 60.0)


class Recorder(nn.Module):
    """Returns a fixed tensor with three further channels, and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = torch.randn(2, 6, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def forward(self, x, label):
        self.given = x, label
        return self.raw


def evaluate(convention: Convention, sigma: float):
    net = Recorder()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * (1 + sigma)
    denoised = Denoiser(net, convention)(x, torch.full((2,), sigma, dtype=torch.float64))
    return x, net.raw[:, :3], denoised, *net.given


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("predicts", ["eps", "score", "x0", "v"])
def test_a_vp_network_sees_the_vp_state_and_is_read_in_its_frame(predicts, sigma):
    x, raw, denoised, scaled, label = evaluate(Convention(VP, predicts, "continuous", 999.0), sigma)
    alpha = 1 / (1 + sigma**2)  # ᾱ
    state = alpha**0.5 * x
    torch.testing.assert_close(scaled, state)
    np.testing.assert_allclose(label, 999 * VP.time(sigma), rtol=1e-9)
    clean = {
        "eps": (state - (1 - alpha) ** 0.5 * raw) / alpha**0.5,
        "score": (state + (1 - alpha) * raw) / alpha**0.5,  # Tweedie
        "x0": raw,
        "v": alpha**0.5 * state - (1 - alpha) ** 0.5 * raw,  # Salimans and Ho 2022, appendix D
    }[predicts]
    torch.testing.assert_close(denoised, clean)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("predicts", ["eps", "score", "x0"])
def test_a_ve_network_on_unit_data_sees_half_of_everything(predicts, sigma):
    x, raw, denoised, scaled, label = evaluate(Convention(VE, predicts, "sigma", data_range=(0.0, 1.0)), sigma)
    own = sigma / 2
    torch.testing.assert_close(scaled, (x + 1) / 2)
    torch.testing.assert_close(label, torch.full_like(label, own))
    unit = {"eps": scaled - own * raw, "score": scaled + own**2 * raw, "x0": raw}[predicts]
    torch.testing.assert_close(denoised, 2 * unit - 1)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_edm_preconditioning_is_table_1(sigma):
    x, raw, denoised, scaled, label = evaluate(Convention(EDM, "edm", "log-sigma", 0.25, sigma_data=0.6), sigma)
    total = sigma**2 + 0.36
    torch.testing.assert_close(scaled, x / total**0.5)
    torch.testing.assert_close(label, torch.full_like(label, np.log(sigma) / 4))
    torch.testing.assert_close(denoised, 0.36 / total * x + sigma * 0.6 / total**0.5 * raw)


def test_a_denoiser_is_taken_as_it_is():
    x, raw, denoised, scaled, label = evaluate(Convention(LINEAR, "denoiser", "sigma"), 2.0)
    assert torch.equal(scaled, x)
    assert scaled is not x  # which the network could change
    assert label[0] == 2.0
    torch.testing.assert_close(denoised, raw)


@pytest.mark.parametrize("sde", [VP, VE, EDM, LINEAR], ids=lambda s: s.kind)
def test_continuous_time_is_the_schedules_inverse(sde):
    label = TimeLabel(Convention(sde, "eps", "continuous"))
    t = np.linspace(0.002, 1, 97)
    found = label(torch.from_numpy(sde.sigma(t)))
    np.testing.assert_allclose(found, t, atol=2e-7)


@pytest.mark.parametrize("sde", [LINEAR, published.cosine(), published.scaled_linear()])
def test_every_level_has_its_own_index_in_float32(sde):
    sigmas = sde.sigma(np.arange(1, 1001) / 1000).astype(np.float32)
    np.testing.assert_allclose(LevelIndex(sde)(torch.from_numpy(sigmas)), np.arange(1000), atol=1e-3)


def test_between_levels_log_alpha_is_linear_and_beyond_them_the_index_stays_at_the_end():
    t = np.linspace(0.0015, 0.9995, 211)
    found = LevelIndex(LINEAR)(torch.from_numpy(LINEAR.sigma(t)))
    np.testing.assert_allclose(found, 1000 * t - 1, atol=2e-3)
    assert LevelIndex(LINEAR)(torch.tensor([1e-4, 1e6])).tolist() == [0.0, 999.0]


def test_a_schedule_that_ends_without_signal_stops_at_its_last_finite_level():
    betas = np.linspace(1e-3, 0.2, 50)
    betas[-1] = 1.0
    sde = published.from_betas(betas)
    assert LevelIndex(sde)(torch.tensor([1e9])).item() == 48


def test_labels_are_rounded_on_request():
    sigma = float(LINEAR.sigma(0.50042))
    *_, label = evaluate(Convention(LINEAR, "eps", "index", round_time=True), sigma)
    assert label.tolist() == [499.0, 499.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"predicts": "noise"}, "predicts is 'noise'"),
        ({"time": "steps"}, "time is 'steps'"),
        ({"sde": VE}, "time index needs a schedule of levels, and the SDE is ve"),
        ({"sde": VE, "time": "sigma", "predicts": "v"}, "v prediction needs a VP schedule, and the SDE is ve"),
        ({"data_range": (0.0, 1.0)}, "data in [0, 1] is known of VE networks only"),
        ({"data_range": (0.0, 255.0)}, "data range is (0.0, 255.0)"),
    ],
)
def test_a_convention_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(OptionError) as caught:
        Convention(**{"sde": LINEAR} | fields)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ve:sigma_min=0.02,sigma_max=696", schedules.VE(0.02, 696.0)),
        ("vp", schedules.VP(0.1, 20.0)),
        ("edm:rho=5", schedules.EDM(0.002, 80.0, 5.0)),
        ("linear:steps=1000", LINEAR),
        ("cosine", published.cosine()),
    ],
)
def test_schedules_are_spelled_on_one_line(text, expected):
    assert published.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quadratic", "--sde quadratic: no schedule is called 'quadratic'"),
        ("ve", "--sde ve: missing 2 required positional arguments: 'sigma_min' and 'sigma_max'"),
        ("vp:beta=1", "--sde vp:beta=1: got an unexpected keyword argument 'beta'"),
        ("vp:beta_min", "--sde vp:beta_min: 'beta_min' is not name=value"),
        (
            "ve:sigma_min=5,sigma_max=1",
            "--sde ve:sigma_min=5,sigma_max=1: sde: sigma_min 5.0, sigma_max 1.0; wanted 0 < sigma_min < sigma_max",
        ),
    ],
)
def test_a_misspelled_schedule_is_refused_with_the_spelling(text, message):
    with pytest.raises(OptionError) as caught:
        published.parse(text)
    assert str(caught.value) == message
    assert "ve:sigma_min=0.02,sigma_max=696" in caught.value.hint
