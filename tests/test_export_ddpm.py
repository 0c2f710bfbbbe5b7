"""SDEdit's .ckpt and its kin: any container, the architecture from the shapes, and the network of the paper out of it.

Checkpoints are made here from a list of names and shapes, and the network they stand for is written down once more
below, as plain functions of that list.
"""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sdedit.errors import OptionError
from sdedit.export import families
from sdedit.export.checkpoints import CheckpointError
from sdedit.export.denoiser import Denoiser
from sdedit.export.families import ddpm
from sdedit.export.source import SourceOptions
from sdedit.export.to_onnx import trace

Tensors = dict[str, Tensor]
NONE = SourceOptions()


def layout(
    ch: int = 32, mult: tuple[int, ...] = (1, 2), blocks: int = 1, attention: tuple[int, ...] = (1,), out: int = 3
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def block(name: str, c_in: int, c_out: int) -> None:
        layer(f"{name}.norm1", c_in)
        layer(f"{name}.conv1", c_out, c_in, 3, 3)
        layer(f"{name}.temb_proj", c_out, 4 * ch)
        layer(f"{name}.norm2", c_out)
        layer(f"{name}.conv2", c_out, c_out, 3, 3)
        if c_in != c_out:
            layer(f"{name}.nin_shortcut", c_out, c_in, 1, 1)

    def attend(name: str, c: int) -> None:
        layer(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", c, c, 1, 1)

    layer("temb.dense.0", 4 * ch, ch)
    layer("temb.dense.1", 4 * ch, 4 * ch)
    layer("conv_in", ch, 3, 3, 3)
    c, kept, last = ch, [ch], len(mult) - 1
    for level, m in enumerate(mult):
        for j in range(blocks):
            block(f"down.{level}.block.{j}", c, m * ch)
            c = m * ch
            kept.append(c)
            if level in attention:
                attend(f"down.{level}.attn.{j}", c)
        if level < last:
            layer(f"down.{level}.downsample.conv", c, c, 3, 3)
            kept.append(c)
    block("mid.block_1", c, c)
    attend("mid.attn_1", c)
    block("mid.block_2", c, c)
    for level in range(last, -1, -1):
        for j in range(blocks + 1):
            block(f"up.{level}.block.{j}", c + kept.pop(), mult[level] * ch)
            c = mult[level] * ch
            if level in attention:
                attend(f"up.{level}.attn.{j}", c)
        if level:
            layer(f"up.{level}.upsample.conv", c, c, 3, 3)
    layer("norm_out", c)
    layer("conv_out", out, c, 3, 3)
    return shapes


def checkpoint(seed: int = 0, **changes: Any) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (0.7 / np.prod(shape[1:]) ** 0.5 if len(shape) > 1 else 0.5)
        for name, shape in layout(**changes).items()
    }


def published(t: Tensors, x: Tensor, label: Tensor) -> Tensor:
    """The network that a checkpoint stands for: Ho et al. 2020, appendix B."""

    def conv(name: str, x: Tensor, padding: int = 1, stride: int = 1) -> Tensor:
        return F.conv2d(x, t[f"{name}.weight"], t[f"{name}.bias"], padding=padding, stride=stride)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, t[f"{name}.weight"], t[f"{name}.bias"], eps=1e-6)

    def block(name: str, x: Tensor) -> Tensor:
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)))
        h = h + linear(f"{name}.temb_proj", F.silu(e))[:, :, None, None]
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)))
        return h + (conv(f"{name}.nin_shortcut", x, 0) if f"{name}.nin_shortcut.weight" in t else x)

    def attend(name: str, x: Tensor) -> Tensor:
        if f"{name}.q.weight" not in t:
            return x
        h = norm(f"{name}.norm", x)
        q, k, v = (conv(f"{name}.{part}", h, 0).flatten(2) for part in "qkv")  # (B, C, H*W)
        weights = (torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5).softmax(dim=2)
        return x + conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape), 0)

    half = t["conv_in.weight"].shape[0] // 2
    phase = label[:, None] * 10000 ** (-torch.arange(half, dtype=torch.float64) / (half - 1))
    e = torch.cat([phase.sin(), phase.cos()], dim=1).to(x.dtype)
    e = linear("temb.dense.1", F.silu(linear("temb.dense.0", e)))
    levels = [name.split(".")[1] for name in t if name.startswith("down.") and name.endswith("block.0.conv1.weight")]
    blocks = sum(name.startswith("down.0.block.") and name.endswith("conv1.weight") for name in t)
    h = conv("conv_in", x)
    kept = [h]
    for level in levels:
        for j in range(blocks):
            h = attend(f"down.{level}.attn.{j}", block(f"down.{level}.block.{j}", h))
            kept.append(h)
        if level != levels[-1]:
            h = conv(f"down.{level}.downsample.conv", F.pad(h, (0, 1, 0, 1)), 0, stride=2)
            kept.append(h)
    h = block("mid.block_2", attend("mid.attn_1", block("mid.block_1", h)))
    for level in reversed(levels):
        for j in range(blocks + 1):
            h = torch.cat([h, kept.pop()], dim=1)
            h = attend(f"up.{level}.attn.{j}", block(f"up.{level}.block.{j}", h))
        if level != levels[0]:
            h = conv(f"up.{level}.upsample.conv", h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    return conv("conv_out", F.silu(norm("norm_out", h)))


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return checkpoint()


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


# --- what comes out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"mult": (1, 1, 2), "blocks": 2, "attention": (2,)},
        {"mult": (1, 2, 2, 2), "attention": (1,)},
        {"mult": (1, 2), "attention": (0, 1)},
        {"mult": (1, 3), "attention": (), "out": 6},
        {"mult": (1,), "attention": (0,), "ch": 64},
    ],
    ids=str,
)
def test_the_network_is_the_one_of_the_paper(shape: dict[str, Any]) -> None:
    tensors = checkpoint(**shape)
    net = ddpm.build(tensors, SourceOptions(size=16)).net
    x, label = images(2, 3, 16, 24), torch.tensor([0.0, 731.5])
    with torch.no_grad():
        close(net(x, label), published(tensors, x, label), 2e-5)
        net, tensors = net.double(), {name: tensor.double() for name, tensor in tensors.items()}
        close(net(x.double(), label.double()), published(tensors, x.double(), label.double()), 1e-6)  # float32 rates


def test_d_is_the_closed_formula_on_the_linear_schedule(tensors: Tensors) -> None:
    source = ddpm.build(tensors, NONE)
    denoiser, x = Denoiser(source.net, source.convention), images(1, 3, 32, 32)
    levels = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    assert len(source.convention.sde.alphas_cumprod) == 1000
    for i in (0, 1, 300, 700, 999):
        sigma = float(np.sqrt((1 - levels[i]) / levels[i]))
        noisy = x * (1 + sigma**2) ** 0.5
        with torch.no_grad():
            eps = published(tensors, x, torch.tensor([float(i)]))
            close(denoiser(noisy, torch.tensor([sigma])), noisy - sigma * eps, 2e-5 * (1 + sigma))


@pytest.mark.parametrize("found", ["model", "ema"])
def test_the_weights_are_found_in_every_container(found: str) -> None:
    model, ema = checkpoint(0), checkpoint(1)
    wrapped = {f"module.{name}": tensor for name, tensor in model.items()}
    optimizer = {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 1e-3}]}
    containers: dict[str, list[Any]] = {
        "model": [
            model,
            wrapped,
            [wrapped, optimizer, 3, 4],
            [wrapped, optimizer, 3, 4, {}],
            {"model": model},
            {"state_dict": {f"model.{name}": tensor for name, tensor in model.items()}},
        ],
        "ema": [
            [wrapped, optimizer, 3, 4, ema],
            [wrapped, optimizer, 3, 4, {"decay": 0.999, "shadow": ema}],
            {"model": wrapped, "ema": ema, "step": 4},
            {"model": wrapped, "averaged": {"shadow": ema}},
            {**model, "ema": ema},
            {"state_dict": {f"{p}.{n}": t for p, w in (("net", model), ("net_ema", ema)) for n, t in w.items()}},
            {"ema": ema},
        ],
    }
    for container in containers[found]:
        source = ddpm.build(container, NONE)
        assert source.weights == found
        bias = source.net.unet.conv_in.bias
        assert torch.equal(bias, (model if found == "model" else ema)["conv_in.bias"])


def test_either_weights_can_be_asked_for() -> None:
    both = {"model": checkpoint(0), "ema": checkpoint(1)}
    for weights in ("model", "ema"):
        for container in (both, {**both["model"], "ema": both["ema"]}):
            source = ddpm.build(container, SourceOptions(weights=weights))
            assert torch.equal(source.net.unet.conv_in.bias, both[weights]["conv_in.bias"])
            assert f"{weights} weights" in source.summary


def test_the_size_follows_from_where_attention_is() -> None:
    for mult, level, size in (((1, 2), 1, 32), ((1, 1, 1), 2, 64), ((1, 1), 0, 16)):
        tensors = checkpoint(mult=mult, attention=(level,))
        source = ddpm.build(tensors, NONE)
        assert (source.channels, source.height, source.width) == (3, size, size)
        assert source.multiple == 2 ** (len(mult) - 1)
        assert ddpm.build(tensors, SourceOptions(size=48)).height == 48
        config = {"model": {"attn_resolutions": [8]}}
        assert ddpm.build(tensors, SourceOptions(config=config)).height == size // 2


def test_betas_in_the_file_are_its_schedule_unless_the_user_says_another(tensors: Tensors) -> None:
    payload = {"state_dict": {f"model.{n}": t for n, t in tensors.items()} | {"betas": torch.tensor([0.1, 0.2])}}
    assert ddpm.build(payload, NONE).convention.sde.alphas_cumprod == pytest.approx((0.9, 0.72))
    config = {"num_diffusion_timesteps": 10}
    assert len(ddpm.build(payload, SourceOptions(config=config)).convention.sde.alphas_cumprod) == 10
    payload["state_dict"]["betas"] = torch.tensor([0.1, -0.2])
    refused(
        payload, "config: no noise schedule follows from the file's betas", "--config: beta_schedule linear or quad"
    )


def test_two_levels_with_attention_need_their_resolutions() -> None:
    tensors = checkpoint(mult=(1, 1, 1), attention=(1, 2))
    refused(tensors, "the picture's size does not follow from attention at levels [1, 2]", "--size")
    for config in ({"model": {"attn_resolutions": [16, 8]}}, {"image_size": 32}):
        assert ddpm.build(tensors, SourceOptions(config=config)).height == 32


def test_a_variance_beside_the_noise_is_dropped() -> None:
    source = ddpm.build(checkpoint(out=6), NONE)
    with torch.no_grad():
        assert source.net(images(1, 3, 32, 32), torch.ones(1)).shape == (1, 6, 32, 32)
        assert Denoiser(source.net, source.convention)(images(1, 3, 32, 32), torch.ones(1)).shape == (1, 3, 32, 32)


def test_the_original_configuration_is_understood_whole(tensors: Tensors) -> None:
    original = {
        "data": {"dataset": "LSUN", "category": "church_outdoor", "image_size": 32, "channels": 3, "rescaled": True}
        | {"logit_transform": False, "uniform_dequantization": False, "random_flip": True, "num_workers": 32},
        "model": {"type": "simple", "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}
        | {"attn_resolutions": [16], "dropout": 0.0, "var_type": "fixedsmall", "ema": True, "resamp_with_conv": True},
        "diffusion": {"beta_schedule": "quad", "beta_start": 1e-3, "beta_end": 1e-2, "num_diffusion_timesteps": 50},
        "sampling": {"batch_size": 8, "last_only": True},
        "training": {"n_epochs": 3},
    }
    flat = {name: value for section in ("data", "model", "diffusion") for name, value in original[section].items()}
    levels = np.cumprod(1 - np.linspace(1e-3**0.5, 1e-2**0.5, 50) ** 2)
    for config in (original, flat):
        source = ddpm.build(tensors, SourceOptions(config=config))
        np.testing.assert_allclose(source.convention.sde.alphas_cumprod, levels, rtol=1e-12)
        assert source.height == 32


@pytest.mark.parametrize("preset", [name for name in ddpm.PRESETS if name.startswith("sdedit-")])
def test_a_preset_is_the_published_architecture(preset: str) -> None:
    with torch.device("meta"):  # no memory: only names and shapes are looked at
        shapes = layout(ch=128, mult=(1, 1, 2, 2, 4, 4), blocks=2, attention=(4,))
        shape = ddpm.Shape({name: torch.empty(s) for name, s in shapes.items()})
    settings = ddpm._settings(SourceOptions(preset=preset))
    ddpm._compare(shape, settings, preset)
    assert shape.size(settings) == shape.size({}) == 256
    unet = ddpm.unet_on_meta(shape.unet_config())
    renamed = ddpm.rename({name: torch.empty(s, device="meta") for name, s in shapes.items()}, shape.levels)
    assert {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in unet.state_dict().items()}
    assert sum(t.numel() for t in renamed.values()) == 113_673_219


def test_a_file_is_recognised_and_a_preset_names_its_source(tmp_path: Any) -> None:
    tensors = checkpoint(ch=32, mult=(1, 2, 2, 2), blocks=2)
    torch.save([{f"module.{n}": t for n, t in tensors.items()}, {}, 1, 2, tensors], tmp_path / "ckpt.pth")
    source = families.load(str(tmp_path / "ckpt.pth"), NONE)
    assert (source.family, source.weights, source.name) == ("ddpm", "ema", None)
    with pytest.raises(OptionError, match="ch is 128, and the file's tensors say 32"):
        families.load(str(tmp_path / "ckpt.pth"), SourceOptions(preset="ddpm-cifar10"))


def test_the_graph_is_plain(tensors: Tensors) -> None:
    source = ddpm.build(tensors, NONE)
    model = trace(Denoiser(source.net, source.convention), (3, 32, 32), dynamic=True)
    kinds = {node.op_type for node in model.graph.node}
    assert {"Conv", "MatMul", "Softmax", "Resize"} <= kinds
    assert kinds.isdisjoint({"Einsum", "Loop", "If", "Range", "Scan"})


# --- what is refused ---------------------------------------------------------------------------------------------


def refused(payload: Any, text: str, hint: str = "", **options: Any) -> None:
    with pytest.raises((CheckpointError, OptionError)) as caught:
        families.finish(ddpm.build(payload, SourceOptions(**options)), SourceOptions(**options))
    assert text in str(caught.value)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"ch": 64}, "config: ch is 64, and the file's tensors say 32"),
        ({"model": {"ch_mult": [1, 1]}}, "config: ch_mult is [1, 1], and the file's tensors say [1, 2]"),
        ({"num_res_blocks": 2}, "config: num_res_blocks is 2, and the file's tensors say 1"),
        ({"out_ch": 6}, "config: out_ch is 6, and the file's tensors say 3"),
        ({"data": {"channels": 1}}, "config: channels is 1, and the file's tensors say 3"),
        (
            {"image_size": 64, "attn_resolutions": [16]},
            "config: attention at [16] of 64 pixels, and the file has it at",
        ),
        ({"image_size": "big"}, "config: image_size and attn_resolutions must be whole numbers above 0"),
        ({"attn_resolutions": 16}, "config: image_size and attn_resolutions must be whole numbers above 0"),
        ({"image_size": 0}, "config: image_size and attn_resolutions must be whole numbers above 0"),
        ({"rescaled": False}, "config: only networks for pictures scaled to [-1, 1] are supported"),
        ({"logit_transform": True}, "config: only networks for pictures scaled to [-1, 1] are supported"),
        ({"beta_schedule": "jsd"}, "config: no noise schedule follows from {'beta_schedule': 'jsd'}"),
        ({"diffusion": {"beta_start": 0.1}}, "config: no noise schedule follows from {'beta_start': 0.1}"),
        ({"num_diffusion_timesteps": 10**9}, "config: no noise schedule follows from"),
        ({"beta_end": None}, "config: no noise schedule follows from {'beta_end': None}"),
        ({"chs": 64}, "config: family ddpm does not know 'chs'"),
        ({"modle": {"ch": 64}}, "config: family ddpm does not know 'modle'"),
        ({"model.ch": 64}, "config: family ddpm does not know 'model.ch'"),
        ({"model": 3}, "config: family ddpm does not know 'model'"),
    ],
    ids=str,
)
def test_a_configuration_that_is_unknown_or_contradicts_the_tensors_is_refused(
    tensors: Tensors, config: dict[str, Any], text: str
) -> None:
    refused(tensors, text, "--config", config=config)


def test_options_that_do_not_apply_are_refused(tensors: Tensors) -> None:
    refused(tensors, "the file holds no ema weights", "--weights model", weights="ema")
    refused(tensors, "family ddpm has no preset 'church'", "sdedit-church-256", preset="church")
    refused(tensors, "the network is not class-conditional", "--class-label", class_label=1)
    refused(tensors, "ch is 128, and the file's tensors say 32", "not this file's", preset="sdedit-church-256")


def test_other_architectures_are_refused(tensors: Tensors) -> None:
    refused(
        checkpoint(attention=()), "the picture's size does not follow from no attention before the middle", "--size"
    )
    refused(checkpoint(out=4), "3 channels in and 4 out: not an unconditional denoiser")
    refused(checkpoint(mult=(2, 2)), "ch_mult begins with 2; supported is 1")
    refused(checkpoint(ch=48), "48 channels: networks of this family have multiples of 32")
    pooled = {name: tensor for name, tensor in tensors.items() if "sample" not in name}
    refused(pooled, "resamp_with_conv: false is not supported")
    wide = dict(tensors)
    wide["down.1.block.0.conv_shortcut.weight"] = torch.zeros(64, 32, 3, 3)
    del wide["down.1.block.0.nin_shortcut.weight"]
    refused(wide, "down_blocks.1.resnets.0.conv_shortcut.weight has shape [64, 32, 3, 3]")


def test_damaged_checkpoints_are_refused(tensors: Tensors) -> None:
    refused({"a": torch.zeros(1)}, "no tensor is called temb.dense.0.weight", "--family")
    refused(3, "no tensor is called temb.dense.0.weight")
    for name in ("conv_in.weight", "conv_out.weight", "down.1.block.0.conv1.weight"):
        without = {n: t for n, t in tensors.items() if n != name}
        refused(without, f"the file has no {name}", "whole")
        refused(without | {name: torch.zeros(3)}, f"{name} has shape [3]; wanted 4 dimensions", "whole")
    without = {n: t for n, t in tensors.items() if n != "mid.attn_1.k.bias"}
    refused(without, "the checkpoint does not fit the network: 1 missing (mid_block.attentions.0.to_k.bias)")
    refused(tensors | {"logvar": torch.zeros(9)}, "the checkpoint does not fit the network: 1 unexpected (logvar)")


def test_no_name_of_a_checkpoint_is_lost_or_doubled() -> None:
    for mult, attention in itertools.product(((1,), (1, 2), (1, 2, 3)), ((), (0,), (0, 1, 2))):
        names = layout(mult=mult, attention=attention)
        assert len(ddpm.rename({name: torch.empty(0) for name in names}, len(mult))) == len(names)
