"""EDM's checkpoints become D(x; σ): every layout, every preconditioning, and no guess where the file does not tell."""

import io
import math
import re
import zlib
from collections import OrderedDict
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from test_export_pickles import Persistent, edm_pickle
from torch import Tensor, nn

from sdedit import sde
from sdedit.errors import OptionError
from sdedit.export import families, pickles, to_onnx
from sdedit.export.checkpoints import CheckpointError, tensor_names
from sdedit.export.denoiser import Convention, Denoiser
from sdedit.export.families import edm
from sdedit.export.source import Source, SourceOptions

Shapes = dict[str, tuple[int, ...]]
CHANNELS, RESOLUTION = 3, 8

# --- the published layout, as names and shapes -------------------------------------------------------------------


def layer(name: str, *shape: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def block(
    name: str, c_in: int, c_out: int, e: int, *, adm: bool, taps: int, resampled: bool = False, attention: bool = False
) -> Shapes:
    shapes = layer(f"{name}.norm0", c_in) | layer(f"{name}.conv0", c_out, c_in, 3, 3)
    shapes |= layer(f"{name}.affine", 2 * c_out if adm else c_out, e) | layer(f"{name}.norm1", c_out)
    shapes |= layer(f"{name}.conv1", c_out, c_out, 3, 3)
    if resampled:
        shapes[f"{name}.conv0.resample_filter"] = shapes[f"{name}.skip.resample_filter"] = (1, 1, taps, taps)
    if c_in != c_out or (resampled and not adm):
        shapes |= layer(f"{name}.skip", c_out, c_in, 1, 1)
    if attention:
        shapes |= layer(f"{name}.norm2", c_out) | layer(f"{name}.qkv", 3 * c_out, c_out, 1, 1)
        shapes |= layer(f"{name}.proj", c_out, c_out, 1, 1)
    return shapes


def layout(
    kind: str,
    *,
    width: int,
    mult: tuple[int, ...],
    attention: tuple[int, ...],
    classes: int = 0,
    taps: int = 2,
    fourier: bool = False,
    encoder: str = "standard",
    decoder: str = "standard",
    blocks: int = 1,
    channels: int = CHANNELS,
    out: int = CHANNELS,
) -> Shapes:
    """`kind` song or adm, at RESOLUTION; `attention`: resolutions."""
    adm, e, noise = kind == "adm", 4 * width, width * (2 if fourier else 1)
    shapes: Shapes = {"map_noise.freqs": (noise // 2,)} if fourier else {}
    if classes:
        shapes |= layer("map_label", e if adm else noise, classes, bias=not adm)
    shapes |= layer("map_layer0", e, noise) | layer("map_layer1", e, e)
    levels = [(RESOLUTION >> i, f"{RESOLUTION >> i}x{RESOLUTION >> i}", width * m) for i, m in enumerate(mult)]
    common: dict[str, Any] = {"adm": adm, "taps": taps}
    c = levels[0][2] if adm else width
    aux, kept = channels, []
    for i, (resolution, name, level_width) in enumerate(levels):
        if i == 0:
            shapes |= layer(f"enc.{name}_conv", c, channels, 3, 3)
        else:
            shapes |= block(f"enc.{name}_down", c, c, e, resampled=True, **common)
            if encoder == "skip":
                shapes |= {f"enc.{name}_aux_down.resample_filter": (1, 1, taps, taps)}
                shapes |= layer(f"enc.{name}_aux_skip", c, channels, 1, 1)
            if encoder == "residual":
                shapes |= layer(f"enc.{name}_aux_residual", c, aux, 3, 3)
                shapes |= {f"enc.{name}_aux_residual.resample_filter": (1, 1, taps, taps)}
                aux = c
        kept.append(c)
        for j in range(blocks):
            shapes |= block(f"enc.{name}_block{j}", c, level_width, e, attention=resolution in attention, **common)
            c = level_width
            kept.append(c)
    for i, (resolution, name, level_width) in reversed(list(enumerate(levels))):
        if i == len(levels) - 1:
            shapes |= block(f"dec.{name}_in0", c, c, e, attention=True, **common)
            shapes |= block(f"dec.{name}_in1", c, c, e, **common)
        else:
            shapes |= block(f"dec.{name}_up", c, c, e, resampled=True, **common)
        for j in range(blocks + 1):
            here = resolution in attention and (adm or j == blocks)
            shapes |= block(f"dec.{name}_block{j}", c + kept.pop(), level_width, e, attention=here, **common)
            c = level_width
        if not adm and (decoder == "skip" or i == 0):
            if decoder == "skip" and i < len(levels) - 1:
                shapes |= {f"dec.{name}_aux_up.resample_filter": (1, 1, taps, taps)}
            shapes |= layer(f"dec.{name}_aux_norm", c) | layer(f"dec.{name}_aux_conv", out, c, 3, 3)
    if adm:
        shapes |= layer("out_norm", c) | layer("out_conv", out, c, 3, 3)
    return shapes


def wave(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that look random and are the same everywhere, with a variance of 1."""
    index = np.arange(math.prod(shape), dtype=np.float64)
    return torch.from_numpy(math.sqrt(2) * np.sin(1.7 * index**1.1 + zlib.crc32(name.encode()) % 1000)).reshape(shape)


def weights(shapes: Shapes) -> dict[str, Tensor]:
    def values(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith(".resample_filter"):
            row = torch.tensor({2: [1.0, 1.0], 4: [1.0, 3.0, 3.0, 1.0]}[shape[-1]])
            return (torch.outer(row, row) / row.sum() ** 2)[None, None]
        if name == "map_noise.freqs":
            return wave(name, shape)
        if len(shape) > 1:
            return wave(name, shape) * 0.8 / math.sqrt(math.prod(shape[1:]))
        return wave(name, shape) * 0.3 + ("norm" in name and name.endswith("weight"))

    return {name: values(name, shape).float() for name, shape in shapes.items()}


CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> (preconditioning, layout)
    "ddpm++": ("edm", {"kind": "song", "width": 8, "mult": (1, 2), "attention": (4,)}),
    "ddpm++ of classes": (
        "vp",
        {"kind": "song", "width": 8, "mult": (1, 2, 2), "attention": (8, 2), "classes": 4, "blocks": 2},
    ),
    "ncsn++": (
        "ve",
        {"kind": "song", "width": 8, "mult": (1, 2, 2), "attention": (4,), "fourier": True, "taps": 4,
         "encoder": "residual"},
    ),
    "ncsn++ with both skips": (
        "ve",
        {"kind": "song", "width": 8, "mult": (1, 2, 2), "attention": (), "fourier": True, "taps": 4, "classes": 3,
         "encoder": "skip", "decoder": "skip"},
    ),
    "adm": ("edm", {"kind": "adm", "width": 32, "mult": (1, 4), "attention": (4,)}),
    "adm of classes": ("edm", {"kind": "adm", "width": 32, "mult": (2, 2), "attention": (8, 4), "classes": 5}),
    "one level": ("edm", {"kind": "song", "width": 8, "mult": (2,), "attention": ()}),
}  # fmt: skip
PUBLISHED = {"edm": "EDMPrecond", "vp": "VPPrecond", "ve": "VEPrecond"}


def case(name: str) -> tuple[dict[str, Tensor], str, int]:
    """State dict of the network alone, preconditioning, number of classes."""
    kind, described = CASES[name]
    return weights(layout(**described)), kind, described.get("classes", 0)


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def built(name: str, **options: Any) -> Source:
    tensors, kind, _ = case(name)
    said = SourceOptions(**{"preconditioning": kind} | options)
    return families.finish(edm.build(under("model.", tensors), said), said)


def original(name: str, **attributes: Any) -> bytes:
    """The case as EDM would have pickled it."""
    tensors, kind, _ = case(name)
    modules: dict[str, dict[str, Any]] = {}
    for path, tensor in tensors.items():
        parent, _, leaf = path.rpartition(".")
        modules.setdefault(parent, {})[leaf] = tensor

    def module(path: str, class_name: str, **state: Any) -> Persistent:
        own = modules.get(path, {})
        start = f"{path}." if path else ""
        inside = dict.fromkeys(p.removeprefix(start).partition(".")[0] for p in modules if p.startswith(start) and p)
        members = {
            "_parameters": {n: nn.Parameter(t) for n, t in own.items() if n in ("weight", "bias")} | {"none": None},
            "_buffers": {n: t for n, t in own.items() if n not in ("weight", "bias")},
            "_modules": OrderedDict((n, module(start + n, "Layer")) for n in inside),
        }
        return Persistent(class_name, "import os", **members, **state)

    network = module("", "SongUNet", _init_kwargs={"model_channels": 8})
    around = Persistent(PUBLISHED[kind], "import os", _modules=OrderedDict(model=network), **attributes)
    return edm_pickle({"ema": around, "loss_fn": Persistent("Loss", P_mean=-1.2), "augment_pipe": None})


def inputs(name: str, sigma: float, size: tuple[int, int] = (RESOLUTION, RESOLUTION)) -> tuple[Tensor, ...]:
    """x (2, 3, H, W), sigma (2,) and the class, if there are some."""
    classes = CASES[name][1].get("classes", 0)
    x = wave("image", (2, CHANNELS, *size)) * 0.4 + sigma * wave("noise", (2, CHANNELS, *size))
    sigmas = torch.tensor([sigma, 0.9 * sigma], dtype=torch.float64)
    return (x, sigmas, torch.tensor([1, classes - 1])) if classes else (x, sigmas)


def denoiser(source: Source) -> nn.Module:
    return Denoiser(source.net, source.convention).eval().double()


# --- the network -------------------------------------------------------------------------------------------------

KNOWN = {  # the noise at three places, the mean of its absolute value, its deviation
    "ddpm++": [-0.862160, 0.122418, 0.702279, 0.633436, 0.745088],
    "ddpm++ of classes": [-0.281107, -0.119559, 0.341102, 0.345076, 0.425121],
    "ncsn++": [0.016062, -0.500129, 0.227341, 0.564515, 0.737441],
    "ncsn++ with both skips": [-0.200865, -0.175505, -0.559500, 0.698151, 0.903251],
    "adm": [-0.617773, 0.230285, 0.268392, 0.616457, 0.709127],
    "adm of classes": [-0.662741, 0.250501, 0.240900, 0.589536, 0.680267],
    "one level": [-0.739092, 0.337714, 0.225496, 0.602636, 0.697939],
}


@torch.inference_mode()
@pytest.mark.parametrize("name", CASES)
def test_the_network_has_the_published_architecture(name: str) -> None:
    """Against values that the published implementation gives for the same weights, in float32."""
    x, sigma, *condition = inputs(name, 0.7)
    noise = (denoiser(built(name))(x, sigma, *condition) - x) / 0.7
    picked = [noise[0, 0, 0, 0], noise[0, 2, 7, 3], noise[1, 1, 4, 6], noise.abs().mean(), noise.std()]
    assert [value.item() for value in picked] == pytest.approx(KNOWN[name], rel=2e-5, abs=2e-5)


@torch.inference_mode()
@pytest.mark.parametrize("sigma", [0.002, 0.1, 1.0, 14.0, 80.0])
@pytest.mark.parametrize("name", ["ddpm++", "ddpm++ of classes", "ncsn++", "adm of classes"])
def test_the_denoiser_is_the_formula_around_the_network(name: str, sigma: float) -> None:
    x, sigmas, *condition = inputs(name, sigma)
    source = built(name)
    s = sigmas[:, None, None, None]
    match CASES[name][0]:
        case "edm":
            net = source.net.double()
            raw = net(x / (s**2 + 0.25).sqrt(), sigmas.log() / 4, *condition)
            expected = 0.25 / (s**2 + 0.25) * x + s * 0.5 / (s**2 + 0.25).sqrt() * raw
        case "vp":  # t(σ): the positive root of 19.9/2 t² + 0.1 t = ln(1 + σ²)
            net = source.net.double()
            t = (-0.1 + (0.01 + 2 * 19.9 * (1 + sigmas**2).log()).sqrt()) / 19.9
            expected = x - s * net(x / (1 + s**2).sqrt(), 999 * t, *condition)
        case _:
            net = source.net.net.double()
            expected = x + s * net(x, (0.5 * sigmas).log(), *condition)
    found = denoiser(source)(x, sigmas, *condition)
    assert (expected - x).abs().max() > 0.01 * sigma
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * sigma)


def test_the_conventions_are_those_of_table_1() -> None:
    vp, ve = built("ddpm++ of classes"), built("ncsn++")
    assert built("ddpm++").convention == Convention(
        sde.EDM(0.002, 80.0, 7), predicts="edm", time="log-sigma", time_scale=0.25, sigma_data=0.5
    )
    assert vp.convention == Convention(sde.VP(0.1, 20.0), predicts="eps", time="continuous", time_scale=999.0)
    assert ve.convention == Convention(sde.VE(0.02, 100.0), predicts="eps", time="sigma")
    assert built("ddpm++").sigma_range == (0.002, 80.0)
    assert vp.sigma_range == pytest.approx((0.0010005, 152.1672), rel=1e-5)
    assert ve.sigma_range == (0.02, 100.0)


@torch.inference_mode()
def test_other_sizes_are_denoised_too() -> None:
    for name in ("ddpm++", "ncsn++ with both skips", "adm"):
        x, sigma, *condition = inputs(name, 0.5, (16, 12))
        assert denoiser(built(name))(x, sigma, *condition).shape == x.shape
    assert (built("ncsn++", size=16).height, built("ncsn++", size=16).multiple) == (16, 4)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["ddpm++ of classes", "ncsn++", "adm"])
def test_the_traced_graph_is_the_network_at_other_batches_and_sizes(name: str) -> None:
    source = built(name)
    module = Denoiser(source.net, source.convention).eval()
    graph = to_onnx.trace(module, (CHANNELS, RESOLUTION, RESOLUTION), source.conditions, dynamic=True)
    assert {node.domain for node in graph.graph.node} == {""}
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    for sigma, size, count in ((0.3, (8, 8), 2), (5.0, (12, 16), 1)):
        given = [v[:count].float() if v.is_floating_point() else v[:count] for v in inputs(name, sigma, size)]
        (found,) = session.run(None, {n: v.numpy() for n, v in zip(names, given, strict=True)})
        torch.testing.assert_close(torch.from_numpy(found), module(*given), rtol=1e-4, atol=1e-4 * sigma)


# --- what the file tells -----------------------------------------------------------------------------------------


def test_names_and_shapes_tell_the_configuration() -> None:
    assert built("ncsn++ with both skips").details == {
        "architecture": "NCSN++",
        "precond": "ve",
        "config": {
            "img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 3, "model_channels": 8,
            "channel_mult": (1, 2, 2), "channel_mult_emb": 4, "num_blocks": 1, "attn_resolutions": (),
            "embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "skip", "decoder_type": "skip",
            "resample_filter": (1.0, 3.0, 3.0, 1.0), "sigma_min": 0.02, "sigma_max": 100.0,
        },
    }  # fmt: skip
    config = built("ddpm++ of classes").details["config"]
    assert (config["num_blocks"], config["attn_resolutions"]) == (2, (8, 2))
    assert (config["encoder_type"], config["decoder_type"]) == ("standard", "standard")
    assert built("ncsn++").details["config"]["encoder_type"] == "residual"
    config = built("adm of classes").details["config"]
    assert (config["model_channels"], config["channel_mult"], config["label_dim"]) == (32, (2, 2), 5)
    assert "encoder_type" not in config


def test_the_summary_says_what_it_is() -> None:
    source = built("adm of classes", size=16)
    assert re.fullmatch(
        r"ADM, \d\.\d M parameters, 16x16, 5 classes, edm preconditioning, model weights", source.summary
    )
    assert (source.family, source.channels, source.height, source.width, source.multiple) == ("edm", 3, 16, 16, 2)
    assert built("ddpm++").summary.startswith("DDPM++, 0.0 M parameters, 8x8, no classes")


@pytest.mark.parametrize("name", CASES)
def test_every_layout_bears_the_marks(name: str) -> None:
    payload = {"ema": under("model.", case(name)[0]), "step": 1}
    names = list(tensor_names(payload))
    assert all(any(re.search(marker, found) for found in names) for marker in edm.MARKERS)


@torch.inference_mode()
def test_the_same_network_comes_from_every_kind_of_file() -> None:
    tensors, kind, _ = case("ncsn++")
    expected = denoiser(built("ncsn++"))(*inputs("ncsn++", 0.5))
    record = pickles.load(io.BytesIO(original("ncsn++")))
    known, asked = SourceOptions(), SourceOptions(preconditioning=kind)
    for payload, options, used in (
        (tensors, asked, "model"),
        (under("ema.model.", tensors), asked, "ema"),
        ({"ema": tensors}, asked, "ema"),
        ({"ema": under("model.", tensors), "net": under("model.", case("ncsn++")[0]), "step": 3}, asked, "ema"),
        (record, known, "ema"),
        (record["ema"], known, "model"),
        (record["ema"].module("model"), asked, "model"),
        ({"ema": {"net": record["ema"]}}, known, "ema"),
    ):
        source = edm.build(payload, options)
        assert source.weights == used
        torch.testing.assert_close(denoiser(source)(*inputs("ncsn++", 0.5)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ddpm++", "ddpm++ of classes", "ncsn++"])
def test_the_class_in_a_pickle_tells_the_preconditioning(name: str) -> None:
    source = edm.build(pickles.load(io.BytesIO(original(name))), SourceOptions())
    assert source.convention == built(name).convention
    assert source.details == built(name).details


def test_the_numbers_in_a_pickle_count_and_the_users_count_more() -> None:
    payload = pickles.load(
        io.BytesIO(original("ddpm++", sigma_min=0, sigma_max=float("inf"), sigma_data=0.25, img_channels=3))
    )
    convention = edm.build(payload, SourceOptions()).convention
    assert (convention.sigma_data, convention.sde) == (0.25, sde.EDM(0.002, 80.0, 7))
    config = {"sigma_data": "1", "sigma_max": 200}
    convention = edm.build(payload, SourceOptions(config=config)).convention
    assert (convention.sigma_data, convention.sde) == (1.0, sde.EDM(0.002, 200.0, 7))
    payload = pickles.load(io.BytesIO(original("ddpm++ of classes", beta_d=9.9, beta_min=0.1, M=100)))
    convention = edm.build(payload, SourceOptions()).convention
    assert (convention.sde, convention.time_scale) == (sde.VP(0.1, 10.0), 99.0)


def test_the_augmentation_layer_is_dropped() -> None:
    tensors, kind, _ = case("ddpm++")
    tensors["map_augment.weight"] = torch.ones(8, 9)
    assert "map_augment.weight" not in edm.build(tensors, SourceOptions(preconditioning=kind)).net.state_dict()


def test_agreeing_with_the_tensors_is_no_error() -> None:
    config = {
        "channel_mult": "1,2", "attn_resolutions": [4], "resample_filter": [1, 1], "num_blocks": "1", "dropout": 0.1,
        "embedding_type": "positional", "precond": "edm", "label_dim": 0,
    }  # fmt: skip
    source = built("ddpm++", preconditioning=None, config=config)
    assert source.details == built("ddpm++").details


# --- classes -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("name", ["ddpm++ of classes", "ncsn++ with both skips", "adm of classes"])
def test_a_class_is_an_input_or_folded_in(name: str) -> None:
    x, sigma, classes = inputs(name, 0.5)
    source = built(name)
    assert source.conditions == {"class_label": {"dtype": "int64", "count": CASES[name][1]["classes"]}}
    free = denoiser(source)
    assert (free(x, sigma, classes) - free(x, sigma, torch.zeros_like(classes))).abs().max() > 1e-3
    folded = built(name, class_label=2)
    assert folded.conditions == {}
    assert torch.equal(denoiser(folded)(x, sigma), free(x, sigma, torch.full_like(classes, 2)))


def test_a_class_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(OptionError, match="class label 5 is not one of the network's 5 classes"):
        built("adm of classes", class_label=5)
    with pytest.raises(OptionError, match="the network is not class-conditional"):
        built("ddpm++", class_label=0)


# --- what is refused ---------------------------------------------------------------------------------------------


def refused(payload: Any, **options: Any) -> tuple[str, str]:
    """Message and hint."""
    said = SourceOptions(**{"preconditioning": "edm"} | options)
    with pytest.raises((CheckpointError, OptionError)) as error:
        families.finish(edm.build(payload, said), said)
    return str(error.value), error.value.hint


def test_a_preconditioning_that_the_file_does_not_tell_is_asked_for() -> None:
    tensors = case("ddpm++")[0]
    bare = pickles.load(io.BytesIO(original("ddpm++")))["ema"].module("model")
    for payload in (
        tensors,
        under("model.", tensors),
        bare,
        pickles.Record("OwnPrecond", {"_modules": {"model": bare}}),
    ):
        assert refused(payload, preconditioning=None) == (
            "the file does not tell how its network is preconditioned",
            "--preconditioning: published edm-* files: edm; baseline-*-vp: vp; baseline-*-ve: ve",
        )


def test_a_preconditioning_that_contradicts_the_file_is_refused() -> None:
    payload = pickles.load(io.BytesIO(original("ddpm++")))
    for options in ({"preconditioning": "vp"}, {"preconditioning": None, "config": {"precond": "vp"}}):
        assert refused(payload, **options) == (
            "preconditioning is 'vp', and the file's class is EDMPrecond",
            "leave --preconditioning out",
        )
    assert refused(payload, preconditioning="iddpm") == (
        "preconditioning is 'iddpm'",
        "--preconditioning takes edm, vp, ve",
    )


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        (
            {"channel_mult": "1,2,2"},
            "config channel_mult is '1,2,2'; the tensors say [1, 2]",
            "leave --config channel_mult out",
        ),
        ({"num_blocks": 4}, "config num_blocks is 4; the tensors say 1", "leave --config num_blocks out"),
        (
            {"attn_resolutions": 16},
            "config attn_resolutions is 16; the tensors say [4]",
            "leave --config attn_resolutions out",
        ),
        (
            {"resample_filter": [1, 3, 3, 1]},
            "config resample_filter is [1, 3, 3, 1]; the tensors say [1.0, 1.0]",
            "leave --config resample_filter out",
        ),
        ({"sigma_data": "a"}, "config sigma_data is 'a'; wanted a number above 0", "--config sigma_data=NUMBER"),
        ({"sigma_max": 0}, "config sigma_max is 0; wanted a number above 0", "--config sigma_max=NUMBER"),
        ({"sigma_data": [1]}, "config sigma_data is [1]; wanted a number above 0", "--config sigma_data=NUMBER"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(config: dict[str, Any], message: str, hint: str) -> None:
    assert refused(case("ddpm++")[0], config=config) == (message, hint)


def test_unknown_keys_and_presets_are_refused() -> None:
    tensors = case("ddpm++")[0]
    for key in ("nf", "beta_d"):
        message, hint = refused(tensors, config={key: 1})
        assert message == f"edm has no config key '{key}' for this network"
        assert hint.startswith("--config takes img_resolution, in_channels")
    assert refused(tensors, preset="cifar10") == (
        "family edm has no preset 'cifar10'",
        "leave --preset out: the source tells it all",
    )


def test_a_size_that_does_not_halve_is_refused() -> None:
    tensors = case("ncsn++")[0]
    assert refused(tensors, size=18) == ("size is 18; the network takes multiples of 4", "--size 16")
    assert refused(tensors, size=0) == ("size is 0; the network takes multiples of 4", "--size 4")


def test_weights_that_are_not_there_are_refused() -> None:
    tensors = case("ddpm++")[0]
    assert refused(tensors, weights="ema") == ("the file holds no ema weights", "--weights model, or leave it out")
    both = {"ema": tensors, "net": tensors}
    assert edm.build(both, SourceOptions(preconditioning="edm", weights="model")).weights == "model"
    assert refused({"one": tensors, "two": tensors})[0] == "the file holds several networks: one.*, two.*"


def test_the_networks_of_other_papers_are_refused_by_name() -> None:
    tensors = case("ddpm++")[0]
    other = "this network has iDDPM preconditioning, a table of noise levels, which is not read from this layout"
    doubled = weights(layout("adm", width=32, mult=(1, 2), attention=(4,), out=6))
    inside = pickles.load(io.BytesIO(original("ddpm++")))["ema"].state
    for payload in (
        under("model.", tensors) | {"u": torch.ones(1001)},
        doubled,
        {"ema": pickles.Record("iDDPMPrecond", inside)},
    ):
        message, hint = refused(payload)
        assert message == other
        assert "export that file" in hint
    second = {"unet.emb_fourier.freqs": torch.ones(4), "unet.enc.8x8_conv.weight": torch.ones(4, 4, 3, 3)}
    assert refused(second)[0] == "this is an EDM2 network (Karras et al. 2024), which is another architecture"


def changed(name: str, **tensors: Any) -> dict[str, Tensor]:
    """A case with some tensors replaced, or left out where None. `__` stands for a dot."""
    found = case(name)[0]
    for key, tensor in tensors.items():
        found.pop(key.replace("__", "."), None)
        if tensor is not None:
            found[key.replace("__", ".")] = tensor
    return found


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({}, "no tensor is called map_layer0.weight"),
        ({"map_layer0.weight": torch.ones(4, 4)}, "the layers' resolutions are not in their names; wanted each half"),
        (changed("ddpm++", enc__8x8_conv__weight=None), "the file has no enc.8x8_conv.weight"),
        (
            changed("ddpm++", enc__8x8_conv__weight=torch.ones(4)),
            "enc.8x8_conv.weight has shape [4]; wanted 4 dimensions",
        ),
        (changed("ddpm++", enc__32x32_conv__weight=torch.ones(4)), "the layers' resolutions are 32, 8, 4; wanted each"),
        (
            changed("ddpm++", enc__4x4_block0__conv0__weight=torch.ones(12, 8, 3, 3)),
            "enc.4x4_block0.conv0.weight has 12 channels, not a multiple of the network's 8",
        ),
        (
            changed("ddpm++", dec__4x4_in1__norm0__bias=None),
            "the checkpoint does not fit the network: 1 missing (dec.4x4_in1.norm0.bias)",
        ),
        (
            changed("ddpm++", extra=torch.ones(1)),
            "the checkpoint does not fit the network: 1 unexpected (extra)",
        ),
        (
            changed("ddpm++", dec__8x8_up__conv0__resample_filter=torch.ones(1, 1, 2, 2)),
            "the resample_filter buffers are not one separable filter with an even number of taps",
        ),
        (
            changed("ddpm++", enc__4x4_down__conv0__resample_filter=torch.eye(2)[None, None]),
            "the resample_filter buffers are not one separable filter with an even number of taps",
        ),
        (
            changed("ddpm++", enc__4x4_down__conv0__resample_filter=torch.ones(3)),
            "the resample_filter buffers are not one separable filter with an even number of taps",
        ),
        (
            weights(layout("adm", width=32, mult=(1, 2), attention=(), taps=4)),
            "the filter is [1.0, 3.0, 3.0, 1.0]; ADM's is [1, 1]",
        ),
        (
            weights(layout("song", width=8, mult=(1,), attention=(), channels=7)),
            "the network takes 7 channels and returns 3: not of images alone",
        ),
        (weights(layout("song", width=2, mult=(1,), attention=())), "map_layer0.weight takes 2 channels"),
        (weights(layout("song", width=5, mult=(1,), attention=())), "map_layer0.weight takes 5 channels, which"),
        (weights(layout("song", width=144, mult=(1,), attention=())), "no network has these channels: num_channels"),
        (weights(layout("adm", width=224, mult=(1,), attention=())), "no network has these channels: 3 heads"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(payload: Any, message: str) -> None:
    found, hint = refused(payload)
    assert found.startswith(message)
    assert hint
