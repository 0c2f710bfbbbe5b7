"""A score_sde_pytorch checkpoint becomes D(x; σ) by its own conventions, or says what it lacks."""

import math
import re
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from sdedit.errors import OptionError
from sdedit.export import families
from sdedit.export.checkpoints import CheckpointError
from sdedit.export.denoiser import Denoiser
from sdedit.export.families import score_sde
from sdedit.export.networks.fir import Resample
from sdedit.export.source import Source, SourceOptions

Shapes = dict[str, tuple[int, ...]]

# --- the layout of the files, module by module ---------------------------------------------------------------------


def weight_and_bias(*shape: int) -> Shapes:
    return {"weight": shape, "bias": shape[:1]}


def within(name: str, shapes: Shapes) -> Shapes:
    return {f"{name}.{key}": shape for key, shape in shapes.items()}


def linear(c_in: int, c_out: int) -> Shapes:
    return weight_and_bias(c_out, c_in)


def conv(c_in: int, c_out: int, k: int = 3) -> Shapes:
    return weight_and_bias(c_out, c_in, k, k)


def norm(c: int) -> Shapes:
    return weight_and_bias(c)


def nin(c_in: int, c_out: int) -> Shapes:
    return {"W": (c_in, c_out), "b": (c_out,)}


def block(c_in: int, c_out: int, embedding: int, shortcut: str = "") -> Shapes:
    return {
        **within("GroupNorm_0", norm(c_in)),
        **within("Conv_0", conv(c_in, c_out)),
        **within("Dense_0", linear(embedding, c_out)),
        **within("GroupNorm_1", norm(c_out)),
        **within("Conv_1", conv(c_out, c_out)),
        **(within("Conv_2", conv(c_in, c_out, 1)) if shortcut == "Conv_2" else {}),
        **(within("NIN_0", nin(c_in, c_out)) if shortcut == "NIN_0" else {}),
    }


def attention(c: int) -> Shapes:
    shapes = within("GroupNorm_0", norm(c))
    for i in range(4):
        shapes |= within(f"NIN_{i}", nin(c, c))
    return shapes


def numbered(*modules: Shapes) -> Shapes:
    return {f"all_modules.{i}.{name}": shape for i, module in enumerate(modules) for name, shape in module.items()}


def ncsnpp_ve() -> Shapes:
    """nf 8, two levels (8 and 16 channels), one block each, attention at the coarser; the image at both sides."""
    return numbered(
        {"W": (8,)},
        linear(16, 32),
        linear(32, 32),
        conv(3, 8),
        block(8, 8, 32),
        block(8, 8, 32, "Conv_2"),  # halves
        within("Conv_0", conv(3, 8, 1)),
        block(8, 16, 32, "Conv_2"),
        attention(16),
        block(16, 16, 32),
        attention(16),
        block(16, 16, 32),
        block(16 + 16, 16, 32, "Conv_2"),
        block(16 + 8, 16, 32, "Conv_2"),
        attention(16),
        norm(16),
        conv(16, 3),
        block(16, 16, 32, "Conv_2"),  # doubles
        block(16 + 8, 8, 32, "Conv_2"),
        block(8 + 8, 8, 32, "Conv_2"),
        norm(8),
        conv(8, 3),
    )


def ncsnpp_vp() -> Shapes:
    """As above, with positional embedding, and the image beside the features on the way down only, by a convolution."""
    return numbered(
        linear(8, 32),
        linear(32, 32),
        conv(3, 8),
        block(8, 8, 32),
        block(8, 8, 32, "Conv_2"),  # halves
        within("Conv2d_0", conv(3, 8)),
        block(8, 16, 32, "Conv_2"),
        attention(16),
        block(16, 16, 32),
        attention(16),
        block(16, 16, 32),
        block(16 + 16, 16, 32, "Conv_2"),
        block(16 + 8, 16, 32, "Conv_2"),
        attention(16),
        block(16, 16, 32, "Conv_2"),  # doubles
        block(16 + 8, 8, 32, "Conv_2"),
        block(8 + 8, 8, 32, "Conv_2"),
        norm(8),
        conv(8, 3),
    )


def ddpm(nf: int = 8) -> Shapes:
    """The blocks of Ho et al. 2020; two levels of nf channels, one block each, no attention but in the middle."""
    return numbered(
        linear(nf, 4 * nf),
        linear(4 * nf, 4 * nf),
        conv(3, nf),
        block(nf, nf, 4 * nf),
        within("Conv_0", conv(nf, nf)),  # halves
        block(nf, nf, 4 * nf),
        block(nf, nf, 4 * nf),
        attention(nf),
        block(nf, nf, 4 * nf),
        block(2 * nf, nf, 4 * nf, "NIN_0"),
        block(2 * nf, nf, 4 * nf, "NIN_0"),
        within("Conv_0", conv(nf, nf)),  # doubles
        block(2 * nf, nf, 4 * nf, "NIN_0"),
        block(2 * nf, nf, 4 * nf, "NIN_0"),
        norm(nf),
        conv(nf, 3),
    )


VE = {
    "model": {"scale_by_sigma": True, "skip_rescale": True, "fir": True, "sigma_min": 0.01, "sigma_max": 348},
    "data": {"centered": False, "image_size": 8},
    "training": {"sde": "vesde", "continuous": True},
}
VP = {
    "model": {"scale_by_sigma": False, "skip_rescale": True},
    "data": {"centered": True, "image_size": 8},
    "training": {"sde": "vpsde", "continuous": True},
}
DDPM = {
    "model": {"scale_by_sigma": False, "skip_rescale": False, "num_scales": 1000},
    "data": {"centered": True, "image_size": 8},
    "training": {"sde": "vpsde", "continuous": False},
}


def scattered(count: int, seed: int) -> np.ndarray:
    """Numbers in [-1, 1) without visible order, the same everywhere."""
    v = np.sin(np.arange(count) * 12.9898 + (seed + 1) * 78.233) * 43758.5453
    return 2 * (v - np.floor(v)) - 1


def tensors(shapes: Shapes, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights that let the signal through: no layer is zero, and no two are alike."""
    filled = {}
    for i, (name, shape) in enumerate(shapes.items()):
        values = scattered(math.prod(shape), seed + i).reshape(shape)
        if name.endswith("0.W") and len(shape) == 1:
            values = 4 * values
        elif len(shape) > 1:
            values = values * math.sqrt(3 / math.prod(shape[1:]))
        else:
            values = 0.3 * values + (1.0 if "GroupNorm" in name and name.endswith("weight") else 0.0)
        filled[name] = torch.from_numpy(values).float()
    return filled


def checkpoint(shapes: Shapes, *, prefix: str = "module.", sigmas: tuple[float, float] | None = None) -> dict[str, Any]:
    """A training file: the model, and an average of it that differs."""
    model, average = tensors(shapes), tensors(shapes, seed=1000)
    shadow = [tensor for name, tensor in average.items() if name != "all_modules.0.W"]
    if sigmas is not None:
        levels = np.exp(np.linspace(math.log(sigmas[0]), math.log(sigmas[1]), 1000))
        model = {"sigmas": torch.from_numpy(levels), **model}
    return {
        "optimizer": {"state": {}},
        "model": {prefix + name: tensor for name, tensor in model.items()},
        "ema": {"decay": 0.999, "num_updates": 12, "shadow_params": shadow},
        "step": 12,
    }


def built(payload: dict[str, Any], config: dict[str, Any] | None = None, **options: Any) -> Source:
    said = SourceOptions(config=config or {}, **options)
    return families.finish(score_sde.build(payload, said), said)


def changed(config: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A flat copy of a configuration with some values changed."""
    return {key: value for section in config.values() for key, value in section.items()} | values


def picture(batch: int = 1, size: int = 8) -> torch.Tensor:
    return torch.from_numpy(scattered(batch * 3 * size**2, 5).reshape(batch, 3, size, size)).float()


def evaluate(net: torch.nn.Module, x: torch.Tensor, value: float) -> torch.Tensor:
    with torch.no_grad():
        return net(x, torch.full((len(x),), value, dtype=x.dtype))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- D is what the training's convention says ----------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.02, 0.5, 30.0, 696.0])
def test_a_ve_network_on_unit_data_sees_half_of_x_and_sigma_and_returns_the_score(sigma: float) -> None:
    source = built(checkpoint(ncsnpp_ve()), VE)
    x, own_sigma = picture() * (1 + sigma), sigma / 2
    own = (x + 1) / 2
    expected = 2 * (own + own_sigma**2 * evaluate(source.net, own, own_sigma)) - 1
    assert relative(evaluate(Denoiser(source.net, source.convention), x, sigma), expected) < 1e-5


@pytest.mark.parametrize("sigma", [0.01, 3.0, 348.0])
def test_a_ve_network_on_centered_data_sees_x_and_sigma_as_they_are(sigma: float) -> None:
    source = built(checkpoint(ncsnpp_ve()), changed(VE, centered=True))
    x = picture() * (1 + sigma)
    expected = x + sigma**2 * evaluate(source.net, x, sigma)
    assert relative(evaluate(Denoiser(source.net, source.convention), x, sigma), expected) < 1e-5
    assert source.sigma_range == (0.01, 348.0)


@pytest.mark.parametrize("t", [1e-4, 0.1, 0.5, 1.0])
def test_a_continuous_vp_network_sees_999_t_and_returns_the_noise(t: float) -> None:
    source = built(checkpoint(ncsnpp_vp()), VP)
    kept = math.exp(-0.1 * t - 0.5 * 19.9 * t**2)  # ᾱ
    sigma = math.sqrt((1 - kept) / kept)
    x = picture() * (1 + sigma)
    noise = evaluate(source.net, x * math.sqrt(kept), 999 * t)
    assert relative(evaluate(Denoiser(source.net, source.convention), x, sigma), x - sigma * noise) < 1e-5


@pytest.mark.parametrize("level", [0, 1, 400, 999])
def test_a_discrete_vp_network_sees_the_level_of_the_linear_schedule(level: int) -> None:
    source = built(checkpoint(ncsnpp_vp(), sigmas=(50.0, 0.01)), changed(VP, continuous=False))
    kept = math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(level + 1))
    sigma = math.sqrt((1 - kept) / kept)
    x = picture() * (1 + sigma)
    noise = evaluate(source.net, x * math.sqrt(kept), level)
    assert relative(evaluate(Denoiser(source.net, source.convention), x, sigma), x - sigma * noise) < 1e-5


def test_the_source_says_what_it_is() -> None:
    source = built(checkpoint(ncsnpp_ve()), VE)
    assert (source.family, source.channels, source.height, source.width, source.multiple) == ("score-sde", 3, 8, 8, 2)
    assert source.sigma_range == (0.02, 696.0)
    assert source.details["step"] == 12
    assert source.summary == "NCSN++ with 0.0 M parameters, ve, σ from 0.02 to 696, averaged weights (EMA)"
    assert built(checkpoint(ncsnpp_ve()), VE, size=12).height == 12
    low, high = built(checkpoint(ncsnpp_vp()), VP).sigma_range or (0, 0)
    assert (low, high) == (pytest.approx(1e-3, rel=1e-2), pytest.approx(152.2, rel=1e-3))


# --- the network ---------------------------------------------------------------------------------------------------

# Four values of the output, computed once in float64 from these weights by the networks' first implementation.
KNOWN = {
    "NCSN++ for VE": (ncsnpp_ve, VE, 0.7, (-0.4413430971, -0.1155409593, -0.6135816992, -0.2220240837)),
    "NCSN++ for VP": (ncsnpp_vp, VP, 123.0, (-0.03559350072, 0.3737364257, -0.02817929107, 0.5041926809)),
    "DDPM blocks": (ddpm, DDPM, 123.0, (-0.2441194529, -0.2542126732, 0.1406216537, -0.2524650724)),
}
PLACES = ((0, 0, 0), (1, 0, 7), (2, 4, 1), (1, 7, 6))


@pytest.mark.parametrize("case", KNOWN)
def test_the_network_returns_the_known_values(case: str) -> None:
    layout, config, label, expected = KNOWN[case]
    source = built(checkpoint(layout()), config, weights="model")
    found = evaluate(source.net.double(), picture().double(), label)[0]
    np.testing.assert_allclose([found[place].item() for place in PLACES], expected, rtol=1e-6)  # frequencies: float32's


@pytest.mark.parametrize(("up", "size"), [(True, 5), (False, 6)])
def test_the_filter_resamples_as_its_definition_says(up: bool, size: int) -> None:
    """Taps [1, 3, 3, 1]/8, after zeros between the samples or before every second is dropped; rows, then columns."""

    def along(v: np.ndarray) -> np.ndarray:
        if up:
            v = np.stack([v, np.zeros_like(v)], axis=-1).reshape(-1) * 2
            padded = np.pad(v, (2, 1))
        else:
            padded = np.pad(v, 1)
        filtered = np.array([padded[i : i + 4] @ [1, 3, 3, 1] / 8 for i in range(len(padded) - 3)])
        return filtered if up else filtered[::2]

    x = picture(size=size).double()
    expected = np.apply_along_axis(along, 2, np.apply_along_axis(along, 3, x.numpy()))
    np.testing.assert_allclose(Resample(3, up=up, taps=(1, 3, 3, 1))(x).numpy(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("layout", [ncsnpp_ve, ncsnpp_vp])
def test_the_exported_graph_is_the_network_for_any_batch_and_size(layout: Any, tmp_path: Any) -> None:
    source = built(checkpoint(layout()), VE if layout is ncsnpp_ve else VP)
    denoiser = Denoiser(source.net, source.convention).eval()
    axes = {name: {0: "B", 2: "H", 3: "W"} for name in ("x", "denoised")} | {"sigma": {0: "B"}}
    torch.onnx.export(
        denoiser,
        (picture(2), torch.ones(2)),
        tmp_path / "net.onnx",
        input_names=["x", "sigma"],
        output_names=["denoised"],
        dynamic_axes=axes,
        opset_version=18,
        dynamo=False,
    )
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for x in (picture(1), picture(3, size=12)):
        for sigma in (0.05, 2.0, 100.0):
            expected = evaluate(denoiser, x, sigma)
            (found,) = session.run(None, {"x": x.numpy(), "sigma": np.full(len(x), sigma, np.float32)})
            scale = max(expected.norm(), (x - expected).norm())
            assert float((torch.from_numpy(found) - expected).norm() / scale) < 1e-5


# --- which weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_the_average_is_taken_by_default_and_keeps_the_fourier_frequencies(prefix: str) -> None:
    payload = checkpoint(ncsnpp_ve(), prefix=prefix, sigmas=(348, 0.01))
    source = built(payload, VE)
    average = tensors(ncsnpp_ve(), seed=1000) | {"all_modules.0.W": tensors(ncsnpp_ve())["all_modules.0.W"]}
    state = source.net.state_dict()
    assert source.weights == "ema"
    assert state.keys() == average.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in average.items())


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_file_without_an_average_gives_the_model_and_says_so(wrapped: bool) -> None:
    model = checkpoint(ncsnpp_ve())["model"]
    source = built({"model": model} if wrapped else model, VE)
    assert source.weights == "model"
    assert source.summary.endswith("the model's own weights (the file holds no average)")
    assert torch.equal(source.net.state_dict()["all_modules.3.bias"], model["module.all_modules.3.bias"])


def test_the_models_own_weights_are_taken_when_asked_for() -> None:
    source = built(checkpoint(ncsnpp_ve()), VE, weights="model")
    assert source.weights == "model"
    assert torch.equal(source.net.state_dict()["all_modules.3.bias"], tensors(ncsnpp_ve())["all_modules.3.bias"])


def test_an_average_that_does_not_fit_is_refused() -> None:
    payload = checkpoint(ncsnpp_ve())
    shadow = payload["ema"]["shadow_params"]
    payload["ema"]["shadow_params"] = shadow[1:]
    with pytest.raises(
        CheckpointError, match=r"ema\.shadow_params has 159 tensors, the model 160 trained ones"
    ) as caught:
        built(payload, VE)
    assert caught.value.hint == "--weights model"
    payload["ema"]["shadow_params"] = [shadow[1], shadow[0], *shadow[2:]]
    expected = "in another order than the model: [32] in the place of all_modules.1.weight, [32, 16]"
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        built(payload, VE)
    with pytest.raises(CheckpointError, match=r"has no list ema\.shadow_params"):
        built({"model": payload["model"]}, VE, weights="ema")


# --- what the tensors tell, and what they do not -------------------------------------------------------------------


def test_the_tensors_tell_the_shape_of_the_network() -> None:
    config = built(checkpoint(ncsnpp_ve()), VE).details["config"]
    told = {
        "embedding_type": "fourier",
        "conditional": True,
        "nf": 8,
        "num_channels": 3,
        "ch_mult": (1, 2),
        "num_res_blocks": 1,
        "resblock_type": "biggan",
        "progressive": "output_skip",
        "progressive_input": "input_skip",
        "progressive_combine": "sum",
    }
    assert {key: config[key] for key in told} == told
    config = built(checkpoint(ncsnpp_vp()), VP).details["config"]
    told = {"embedding_type": "positional", "progressive": "none", "progressive_input": "residual", "fir": True}
    assert {key: config[key] for key in told} == told
    config = built(checkpoint(ddpm()), DDPM).details["config"]
    told = {"resblock_type": "ddpm", "resamp_with_conv": True, "fir": False, "progressive_input": "none"}
    assert {key: config[key] for key in told} == told


def test_the_ddpm_of_that_code_is_a_network_of_the_same_parts() -> None:
    config = {key: value for key, value in changed(DDPM, name="ddpm").items() if key != "skip_rescale"}
    source = built(checkpoint(ddpm(128)), config | {"embedding_type": "fourier"})  # an option it does not look at
    assert source.summary.startswith("DDPM with")
    assert source.details["config"]["skip_rescale"] is False


def test_the_files_own_noise_levels_are_taken_unless_the_user_knows_better() -> None:
    without = {key: value for key, value in changed(VE).items() if not key.startswith("sigma")}
    payload = checkpoint(ncsnpp_ve(), sigmas=(90.0, 0.02))
    assert built(payload, without).sigma_range == (0.04, 180.0)
    assert built(payload, without | {"sigma_max": 50}).sigma_range == (0.04, 100.0)
    with pytest.raises(CheckpointError, match="nothing tells sigma_min and sigma_max"):
        built(checkpoint(ncsnpp_ve()), without)


def test_the_originals_whole_configuration_is_accepted() -> None:
    config = {
        "seed": 42,
        "optim": {"lr": 2e-4, "anything": 1},
        "sampling": {"method": "pc"},
        "eval": {"batch_size": 1024},
        "training": {**VE["training"], "batch_size": 64, "n_iters": 2400001, "reduce_mean": True},
        "data": {**VE["data"], "dataset": "LSUN", "random_flip": True},
        "model": {
            **VE["model"],
            "name": "ncsnpp",
            "nonlinearity": "swish",
            "normalization": "GroupNorm",
            "ema_rate": 0.999,
            "dropout": 0.0,
            "fourier_scale": 16,
            "attn_resolutions": [4],
            "ch_mult": [1, 2],
            "fir_kernel": [1, 3, 3, 1],
        },
    }
    assert built(checkpoint(ncsnpp_ve()), config).convention == built(checkpoint(ncsnpp_ve()), changed(VE)).convention


def test_the_presets_are_complete_and_valid() -> None:
    for name, preset in score_sde.PRESETS.items():
        assert set(score_sde._NEEDED) <= preset.keys(), name
        assert score_sde._given(SourceOptions(config=preset)) == preset, name


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks in the place of the published ones."""
    ve = changed(VE, nf=8, ch_mult=(1, 2), embedding_type="fourier")
    vp = changed(VP, nf=8, ch_mult=(1, 2), embedding_type="positional")
    twins = {"faces": ve, "people": dict(ve), "churches": ve | {"sigma_max": 380.0}}
    monkeypatch.setattr(score_sde, "PRESETS", twins | {"small-vp": vp, "small-vp-discrete": vp | {"continuous": False}})


@pytest.mark.usefixtures("published")
def test_a_published_model_is_recognised_by_its_shapes_and_noise_levels() -> None:
    source = built(checkpoint(ncsnpp_ve(), sigmas=(380.0, 0.01)))
    assert (source.name, source.sigma_range) == ("churches", (0.02, 760.0))
    source = built(checkpoint(ncsnpp_ve(), sigmas=(348.0, 0.01)))
    assert (source.name, source.sigma_range) == (None, (0.02, 696.0))  # faces or people: the same network
    assert built(checkpoint(ncsnpp_ve()), preset="people").name == "people"


@pytest.mark.usefixtures("published")
def test_published_models_that_differ_only_in_what_the_file_does_not_tell_are_asked_for() -> None:
    with pytest.raises(CheckpointError) as caught:
        built(checkpoint(ncsnpp_ve()))
    assert str(caught.value) == (
        "the file does not tell sde, centered, scale_by_sigma, skip_rescale, fir, image_size: it may be "
        "faces (sigma_max 348), people (sigma_max 348), churches (sigma_max 380)"
    )
    assert "--preset faces" in caught.value.hint
    with pytest.raises(
        CheckpointError, match="may be small-vp, small-vp-discrete or a network trained with another SDE"
    ):
        built(checkpoint(ncsnpp_vp()))
    with pytest.raises(CheckpointError, match="and it is not a published model") as caught:
        built(checkpoint(ncsnpp_ve(), sigmas=(90.0, 0.01)))
    assert "--preset" in caught.value.hint
    assert "--config" in caught.value.hint


@pytest.mark.usefixtures("published")
def test_a_preset_that_the_file_contradicts_is_refused() -> None:
    payload = checkpoint(ncsnpp_ve(), sigmas=(380.0, 0.01))
    with pytest.raises(CheckpointError, match=r"sigma_max is 348 in the preset faces, and 380\.0 in") as caught:
        built(payload, preset="faces")
    assert """--config '{"sigma_max": 348}' insists""" in caught.value.hint
    assert built(payload, {"sigma_max": 348}, preset="faces").sigma_range == (0.02, 696.0)
    with pytest.raises(
        CheckpointError, match="embedding_type is positional in the preset small-vp, and fourier in the"
    ):
        built(payload, preset="small-vp")


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "config", "message"),
    [
        (ncsnpp_vp, changed(VP, sde="subvpsde"), "sde subvpsde is not supported"),
        (ncsnpp_vp, changed(VP, sde="vesde", continuous=False), "sde vesde with continuous false is not supported"),
        (ncsnpp_vp, changed(VP, centered=False), "sde vpsde with centered false is not supported"),
        (ncsnpp_vp, changed(VP, scale_by_sigma=True), "scale_by_sigma with embedding_type positional is not supported"),
        (ncsnpp_vp, changed(VP, continuous=False), "nothing tells num_scales, the number of levels"),
        (ddpm, changed(DDPM, name="ddpm"), "name ddpm with nf 8 is not supported"),
        (
            ddpm,
            changed(DDPM, fir=True),
            "fir is True in --config, and False by the file",
        ),
        (ncsnpp_ve, changed(VE, nf=16), "nf is 16 in --config, and 8 by the file's tensors"),
        (ncsnpp_ve, changed(VE, ch_mult=[1, 1]), "ch_mult is (1, 1) in --config, and (1, 2) by the file's tensors"),
        (ncsnpp_ve, changed(VE, name="ddpm"), "embedding_type is positional in --config, and fourier by the file's"),
        (
            ncsnpp_ve,
            changed(VE, attn_resolutions=[8]),
            "attn_resolutions is [8], and the tensors have attention at [4] if image_size is 8",
        ),
    ],
)
def test_an_unsupported_or_contradicted_configuration_is_refused(layout: Any, config: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        built(checkpoint(layout()), config)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (changed(VE, sigma_mx=3), {}, "score-sde has no option 'sigma_mx'"),
        (changed(VE, fir="yes"), {}, "fir is 'yes'; wanted true or false"),
        (changed(VE, sde="edm"), {}, "sde is 'edm'; wanted vesde or vpsde or subvpsde"),
        (changed(VE, nf=8.0), {}, "nf is 8.0; wanted a whole number above 0"),
        (changed(VE, sigma_max=math.inf), {}, "sigma_max is inf; wanted a number"),
        (changed(VE, ch_mult=2), {}, "ch_mult is 2; wanted a list of whole numbers above 0"),
        (changed(VE, fir_kernel=[1, 2, 1]), {}, "fir_kernel is (1, 2, 1); wanted an even number of symmetric taps"),
        (changed(VE, nonlinearity="elu"), {}, "nonlinearity is 'elu'; wanted swish"),
        (VE, {"preset": "kitchen-256"}, "score-sde has no preset 'kitchen-256'"),
        (VE, {"class_label": 3}, "class label 3 was given, and the network is not class-conditional"),
        (VE, {"preconditioning": "ve"}, "networks of family score-sde have no preconditioning"),
        (VE, {"size": 9}, "size is 9; the network takes multiples of 2"),
        ({k: v for k, v in changed(VE).items() if k != "image_size"}, {}, "nothing tells the size of the images"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(config: Any, options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)) as caught:
        built(checkpoint(ncsnpp_ve()), config, **options)
    assert caught.value.hint


def test_another_files_tensors_are_refused() -> None:
    order = "the modules all_modules.N are not in the order of NCSN++, DDPM++ or DDPM"
    for model in ({"conv.weight": torch.zeros(1)}, {"all_modules.0.weight": torch.zeros(4, 3, 3, 3)}):
        with pytest.raises(CheckpointError, match=re.escape(order)):
            built({"model": model}, VE)
    with pytest.raises(CheckpointError, match="the checkpoint has no `model` that maps names to tensors"):
        built({"model": "weights"}, VE)
    payload = checkpoint(ncsnpp_ve())
    del payload["ema"], payload["model"]["module.all_modules.4.Dense_0.bias"]
    with pytest.raises(CheckpointError, match=re.escape("1 missing (all_modules.4.Dense_0.bias)")):
        built(payload, VE)


def test_the_markers_find_the_family() -> None:
    names = [f"model.{name}" for name in checkpoint(ncsnpp_ve())["model"]]
    assert all(any(re.search(marker, name) for name in names) for marker in score_sde.MARKERS)
