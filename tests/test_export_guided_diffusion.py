"""Guided diffusion's files become D(x; σ): architecture from the tensors, the rest from a preset or --config.

Checkpoints are made here from a list of names and shapes, and the network they stand for is written down once more
below, as plain functions of that list.
"""

import math
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sdedit.errors import OptionError, SdeditError
from sdedit.export import families
from sdedit.export.checkpoints import CheckpointError
from sdedit.export.denoiser import Denoiser
from sdedit.export.families import guided_diffusion
from sdedit.export.networks.adm import Attention
from sdedit.export.source import Source, SourceOptions
from sdedit.export.to_onnx import trace

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

SIZE = 16
BASE: dict[str, Any] = {  # a network by the original's flags; channel_mult and attention (factors) as numbers
    "num_channels": 32,
    "channel_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "attention": (2,),
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "conv_resample": True,
    "learn_sigma": False,
    "classes": 0,
    "channels": 3,
}
UNTOLD: dict[str, Any] = {  # what no tensor tells
    "image_size": SIZE,
    "num_heads": 2,
    "use_new_attention_order": False,
    "noise_schedule": "linear",
    "diffusion_steps": 1000,
}

# --- the published layout, as names and shapes -------------------------------------------------------------------


def layout(**flags: Any) -> Shapes:
    k = BASE | flags
    ch, mult, blocks = k["num_channels"], k["channel_mult"], k["num_res_blocks"]
    shapes: Shapes = {}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def residual(name: str, c_in: int, c_out: int) -> None:
        layer(f"{name}.in_layers.0", c_in)
        layer(f"{name}.in_layers.2", c_out, c_in, 3, 3)
        layer(f"{name}.emb_layers.1", 2 * c_out if k["use_scale_shift_norm"] else c_out, 4 * ch)
        layer(f"{name}.out_layers.0", c_out)
        layer(f"{name}.out_layers.3", c_out, c_out, 3, 3)
        if c_in != c_out:
            layer(f"{name}.skip_connection", c_out, c_in, 1, 1)

    def attention(name: str, c: int) -> None:
        layer(f"{name}.norm", c)
        layer(f"{name}.qkv", 3 * c, c, 1)
        layer(f"{name}.proj_out", c, c, 1)

    layer("time_embed.0", 4 * ch, ch)
    layer("time_embed.2", 4 * ch, 4 * ch)
    if k["classes"]:
        shapes["label_emb.weight"] = (k["classes"], 4 * ch)
    c = int(mult[0] * ch)
    layer("input_blocks.0.0", c, k["channels"], 3, 3)
    kept, n = [c], 1
    for level, m in enumerate(mult):
        for _ in range(blocks):
            residual(f"input_blocks.{n}.0", c, int(m * ch))
            c = int(m * ch)
            if 2**level in k["attention"]:
                attention(f"input_blocks.{n}.1", c)
            kept.append(c)
            n += 1
        if level < len(mult) - 1:
            if k["resblock_updown"]:
                residual(f"input_blocks.{n}.0", c, c)
            elif k["conv_resample"]:
                layer(f"input_blocks.{n}.0.op", c, c, 3, 3)
            kept.append(c)
            n += 1
    residual("middle_block.0", c, c)
    attention("middle_block.1", c)
    residual("middle_block.2", c, c)
    n = 0
    for level, m in reversed(list(enumerate(mult))):
        for i in range(blocks + 1):
            residual(f"output_blocks.{n}.0", c + kept.pop(), int(m * ch))
            c, last = int(m * ch), 1
            if 2**level in k["attention"]:
                attention(f"output_blocks.{n}.1", c)
                last = 2
            if level and i == blocks:
                if k["resblock_updown"]:
                    residual(f"output_blocks.{n}.{last}", c, c)
                elif k["conv_resample"]:
                    layer(f"output_blocks.{n}.{last}.conv", c, c, 3, 3)
            n += 1
    layer("out.0", c)
    layer("out.2", 2 * k["channels"] if k["learn_sigma"] else k["channels"], c, 3, 3)
    return shapes


def checkpoint(seed: int = 0, **flags: Any) -> Tensors:
    """Random weights for every name, those too that training starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in layout(**flags).items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 10
        tensors[name] = torch.randn(shape, generator=generator) / fan_in**0.5
    return tensors


# --- the network that such a list stands for ---------------------------------------------------------------------


def network(t: Tensors, x: Tensor, label: Tensor, class_label: Tensor | None = None, **flags: Any) -> Tensor:
    """Section 3 of Dhariwal and Nichol 2021, read off the names; float64."""
    k = BASE | UNTOLD | {"num_heads_upsample": -1, "num_head_channels": -1} | flags
    t = {name: tensor.double() for name, tensor in t.items()}

    def norm(name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, 32, t[f"{name}.weight"], t[f"{name}.bias"], 1e-5)

    def conv(name: str, h: Tensor, **how: int) -> Tensor:
        weight = t[f"{name}.weight"]
        return F.conv2d(h, weight, t[f"{name}.bias"], padding=weight.shape[-1] // 2, **how)

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def half(h: Tensor) -> Tensor:
        return (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4

    def double(h: Tensor) -> Tensor:
        return h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    def residual(name: str, x: Tensor, resample: Any = lambda h: h) -> Tensor:
        h = conv(f"{name}.in_layers.2", resample(F.silu(norm(f"{name}.in_layers.0", x))))
        e = linear(f"{name}.emb_layers.1", F.silu(embedding))[:, :, None, None]
        c = h.shape[1]
        if k["use_scale_shift_norm"]:
            h = norm(f"{name}.out_layers.0", h) * (1 + e[:, :c]) + e[:, c:]
        else:
            h = norm(f"{name}.out_layers.0", h + e)
        skip = f"{name}.skip_connection"
        x = resample(x)
        return (conv(skip, x) if f"{skip}.weight" in t else x) + conv(f"{name}.out_layers.3", F.silu(h))

    def attention(name: str, x: Tensor, heads: int) -> Tensor:
        c = x.shape[1]
        heads = heads if k["num_head_channels"] == -1 else c // k["num_head_channels"]
        part = c // heads
        qkv = linear_1d(f"{name}.qkv", norm(f"{name}.norm", x).flatten(2))
        parts = []
        for head in range(heads):
            if k["use_new_attention_order"]:
                q, key, v = (qkv[:, i * c + head * part : i * c + (head + 1) * part] for i in range(3))
            else:
                q, key, v = qkv[:, 3 * head * part : 3 * (head + 1) * part].split(part, dim=1)
            weights = (q.transpose(1, 2) @ key / part**0.5).softmax(-1)  # [query, key]
            parts.append(v @ weights.transpose(1, 2))
        return x + linear_1d(f"{name}.proj_out", torch.cat(parts, dim=1)).view_as(x)

    def linear_1d(name: str, h: Tensor) -> Tensor:
        return torch.einsum("oi,bin->bon", t[f"{name}.weight"][:, :, 0], h) + t[f"{name}.bias"][:, None]

    half_channels = k["num_channels"] // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half_channels, dtype=torch.float32) / half_channels)
    phase = label.double()[:, None] * frequencies.double()  # float32's, as training rounded them
    embedding = linear("time_embed.0", torch.cat([phase.cos(), phase.sin()], dim=1))
    embedding = linear("time_embed.2", F.silu(embedding))
    if class_label is not None:
        embedding = embedding + t["label_emb.weight"][class_label]

    h = conv("input_blocks.0.0", x.double())
    kept, n, levels = [h], 1, len(k["channel_mult"])
    for level in range(levels):
        for _ in range(k["num_res_blocks"]):
            h = residual(f"input_blocks.{n}.0", h)
            if 2**level in k["attention"]:
                h = attention(f"input_blocks.{n}.1", h, k["num_heads"])
            kept.append(h)
            n += 1
        if level < levels - 1:
            if k["resblock_updown"]:
                h = residual(f"input_blocks.{n}.0", h, half)
            else:
                h = conv(f"input_blocks.{n}.0.op", h, stride=2) if k["conv_resample"] else half(h)
            kept.append(h)
            n += 1
    h = residual("middle_block.0", h)
    h = attention("middle_block.1", h, k["num_heads"])
    h = residual("middle_block.2", h)
    n, heads = 0, k["num_heads"] if k["num_heads_upsample"] == -1 else k["num_heads_upsample"]
    for level in reversed(range(levels)):
        for i in range(k["num_res_blocks"] + 1):
            h = residual(f"output_blocks.{n}.0", torch.cat([h, kept.pop()], dim=1))
            has_attention = 2**level in k["attention"]
            if has_attention:
                h = attention(f"output_blocks.{n}.1", h, heads)
            if level and i == k["num_res_blocks"]:
                last = f"output_blocks.{n}.{2 if has_attention else 1}"
                if k["resblock_updown"]:
                    h = residual(last, h, double)
                else:
                    h = conv(f"{last}.conv", double(h)) if k["conv_resample"] else double(h)
            n += 1
    return conv("out.2", F.silu(norm("out.0", h)))


# --- claims ------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what tensors tell, what they do not
    "plain": ({}, {}),
    "residual up and down, new order": (
        {"resblock_updown": True, "learn_sigma": True},
        {"num_head_channels": 16, "use_new_attention_order": True},
    ),
    "residual up and down, old order": ({"resblock_updown": True, "attention": (1, 4)}, {"num_head_channels": 16}),
    "added embedding, other heads up": ({"use_scale_shift_norm": False}, {"num_heads": 4, "num_heads_upsample": 2}),
    "no convolution in the resampling": ({"conv_resample": False, "num_res_blocks": 2}, {}),
    "half width at first": ({"num_channels": 64, "channel_mult": (0.5, 1), "attention": ()}, {"num_heads": 1}),
    "one level": ({"channel_mult": (1,), "attention": (1,)}, {}),
    "classes": ({"classes": 7, "learn_sigma": True}, {}),
    "grey": ({"channels": 1}, {}),
}


def build(tensors: Any, **options: Any) -> Source:
    """With the config of UNTOLD under the one given."""
    config = UNTOLD | options.pop("config", {})
    said = SourceOptions(config=config, **options)
    return families.finish(guided_diffusion.build(tensors, said), said)


def refused(tensors: Any, kind: type[SdeditError] = CheckpointError, **options: Any) -> tuple[str, str]:
    with pytest.raises(kind) as caught:
        families.finish(guided_diffusion.build(tensors, SourceOptions(**options)), SourceOptions(**options))
    return str(caught.value), caught.value.hint


def relative(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    assert got.isfinite().all()
    assert wanted.isfinite().all()
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_tensors_tell_the_architecture_and_the_network_is_the_papers(kind: str) -> None:
    flags, untold = KINDS[kind]
    tensors = checkpoint(**flags)
    source = build(tensors, config=untold)
    x = torch.randn(2, source.channels, SIZE, 8, dtype=torch.float64)
    label = torch.tensor([3.0, 712.0], dtype=torch.float64)
    classes = [torch.tensor([0, 6])] if source.conditions else []
    expected = network(tensors, x, label, *classes, **flags, **untold)
    assert relative(source.net.double()(x, label, *classes), expected) < 1e-12
    assert source.multiple == 2 ** (len((BASE | flags)["channel_mult"]) - 1)


def test_the_two_attention_orders_and_the_number_of_heads_are_not_the_same_network() -> None:
    tensors, x, label = checkpoint(), torch.randn(1, 3, SIZE, SIZE), torch.tensor([5.0])
    outputs = [
        build(tensors, config=config).net(x, label)
        for config in ({}, {"use_new_attention_order": True}, {"num_heads": 4}, {"num_head_channels": 8})
    ]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert relative(one, other) > 1e-4


@pytest.mark.parametrize("predict_xstart", [False, True])
@pytest.mark.parametrize(
    ("schedule", "steps", "rescaled"), [("linear", 1000, False), ("cosine", 1000, False), ("linear", 250, True)]
)
def test_d_is_the_closed_formula_of_the_raw_output(
    schedule: str, steps: int, rescaled: bool, predict_xstart: bool
) -> None:
    config = {
        "noise_schedule": schedule, "diffusion_steps": steps, "rescale_timesteps": rescaled,
        "predict_xstart": predict_xstart,
    }  # fmt: skip
    tensors = checkpoint(learn_sigma=True)
    source = build(tensors, config=config)
    if schedule == "linear":
        betas = np.linspace(1e-4 * 1000 / steps, 0.02 * 1000 / steps, steps)
    else:
        f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    levels = np.cumprod(1 - betas)
    np.testing.assert_allclose(source.convention.sde.alphas_cumprod, levels, rtol=1e-12)

    D = Denoiser(source.net, source.convention).double()
    for i in (0, 1, steps // 3, steps // 2, steps - 2, steps - 1):
        alpha = levels[i]
        sigma = math.sqrt((1 - alpha) / alpha)
        x = (1 + sigma) * torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
        label = torch.full((2,), i * 1000 / steps if rescaled else float(i), dtype=torch.float64)
        raw = network(tensors, math.sqrt(alpha) * x, label, learn_sigma=True)[:, :3]  # the variance is dropped
        expected = raw if predict_xstart else x - sigma * raw
        got = D(x, torch.full((2,), sigma, dtype=torch.float64))
        # the label is found among float32 σ, to 2e-5 of a level at worst; at that label D is exact to 1e-15
        assert relative(got, expected) < 1e-6, i


def test_a_class_is_an_input_or_folded_in() -> None:
    tensors = checkpoint(classes=7)
    open_label, folded = build(tensors), build(tensors, class_label=4)
    assert open_label.conditions == {"class_label": {"dtype": "int64", "count": 7}}
    assert folded.conditions == {}
    x, label = torch.randn(2, 3, SIZE, SIZE), torch.tensor([10.0, 20.0])
    wanted = open_label.net(x, label, torch.tensor([4, 4]))
    assert torch.equal(folded.net(x, label), wanted)
    assert relative(open_label.net(x, label, torch.tensor([4, 5]))[1], wanted[1]) > 1e-4


@pytest.mark.parametrize(
    ("kind", "class_label"), [("classes", None), ("classes", 3), ("residual up and down, new order", None)]
)
def test_the_graph_is_the_network_at_every_size_and_batch(kind: str, class_label: int | None) -> None:
    flags, untold = KINDS[kind]
    source = build(checkpoint(**flags), config=untold, class_label=class_label)
    D = Denoiser(source.net, source.convention).eval()
    model = trace(D, (3, SIZE, SIZE), source.conditions, dynamic=True)
    assert {node.domain for node in model.graph.node} == {""}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, height, width in ((1, SIZE, SIZE), (3, 8, 24)):
        x, sigma = 2 * torch.randn(batch, 3, height, width), torch.full((batch,), 1.7)
        extra = [torch.arange(batch)] if source.conditions else []
        feeds = dict(zip(("x", "sigma", *source.conditions), (x, sigma, *extra), strict=True))
        (got,) = session.run(None, {name: value.numpy() for name, value in feeds.items()})
        assert relative(torch.from_numpy(got), D(x, sigma, *extra)) < 1e-5


def test_a_single_head_needs_no_order_and_a_thousand_steps_no_rescaling() -> None:
    config = {"image_size": SIZE, "num_heads": 1, "noise_schedule": "cosine", "diffusion_steps": 1000}
    source = guided_diffusion.build(checkpoint(), SourceOptions(config=config))
    assert source.convention.time_scale == 1
    tensors, x, label = checkpoint(), torch.randn(1, 3, SIZE, SIZE), torch.tensor([5.0])
    assert relative(source.net(x, label), network(tensors, x, label, num_heads=1).float()) < 1e-5


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: {f"module.{name}": v for name, v in t.items()},
        lambda t: {"state_dict": t, "step": 3},
        lambda t: {"model": {f"module.{name}": v for name, v in t.items()}, "opt": {"state": {0: torch.zeros(3)}}},
        lambda t: {name: v.half() for name, v in t.items()},
    ],
    ids=["module prefix", "state_dict", "model and optimizer", "float16"],
)
def test_repacked_files_hold_the_same_network(wrap: Any) -> None:
    tensors = {name: tensor.half().float() for name, tensor in checkpoint().items()}
    source = build(wrap(tensors))
    assert source.weights == "model"
    x, label = torch.randn(1, 3, SIZE, SIZE), torch.tensor([5.0])
    assert source.net(x, label).dtype == torch.float32
    assert torch.equal(source.net(x, label), build(tensors).net(x, label))


def test_ema_weights_are_taken_unless_the_others_are_asked_for() -> None:
    model, ema = checkpoint(1), checkpoint(2)
    both = {"model": model, "ema": ema}
    x, label = torch.randn(1, 3, SIZE, SIZE), torch.tensor([5.0])
    for wanted, weights, tensors in ((None, "ema", ema), ("ema", "ema", ema), ("model", "model", model)):
        source = build(both, weights=wanted)
        assert source.weights == weights
        assert torch.equal(source.net(x, label), build(tensors).net(x, label))
    assert refused(model, OptionError, weights="ema") == (
        "the file holds no ema weights",
        "--weights model, or leave it out",
    )


def test_the_whole_config_of_the_training_may_be_given_as_the_original_spells_it() -> None:
    config = {
        "image_size": "16", "num_channels": "32", "channel_mult": "1,2,2", "num_res_blocks": 1.0,
        "attention_resolutions": "8", "num_heads": 2, "num_heads_upsample": -1, "num_head_channels": -1,
        "use_scale_shift_norm": "True", "resblock_updown": "false", "class_cond": False, "learn_sigma": False,
        "dropout": 0.1, "use_fp16": True, "timestep_respacing": "250", "use_kl": False, "use_checkpoint": False,
        "rescale_learned_sigmas": False, "predict_xstart": False, "rescale_timesteps": False,
    }  # fmt: skip
    x, label = torch.randn(1, 3, SIZE, SIZE), torch.tensor([5.0])
    tensors = checkpoint()
    assert torch.equal(build(tensors, config=config).net(x, label), build(tensors).net(x, label))


@pytest.mark.parametrize(
    ("config", "tensor", "told", "wanted"),
    [
        ({"num_channels": 64}, "time_embed.0.weight", [128, 32], [256, 64]),
        ({"learn_sigma": True}, "out.2.weight", [3, 32, 3, 3], [6, 32, 3, 3]),
        ({"use_scale_shift_norm": False}, "input_blocks.1.0.emb_layers.1.weight", [64, 128], [32, 128]),
        ({"channel_mult": "1,2,3"}, "input_blocks.5.0.in_layers.2.weight", [64, 64, 3, 3], [96, 64, 3, 3]),
    ],
)
def test_a_config_that_the_tensors_contradict_is_named_with_both_shapes(
    config: dict[str, Any], tensor: str, told: list[int], wanted: list[int]
) -> None:
    text, hint = refused(checkpoint(), config=UNTOLD | config)
    assert text.startswith(f"the checkpoint does not fit the network: {tensor} has shape {told}")
    assert str(wanted) in text
    assert hint == "correct --preset or --config: what the tensors tell may be left out; another picture size is --size"


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"class_cond": True}, "1 missing (label_emb.weight)"),
        ({"attention_resolutions": "16,8"}, "missing (input_blocks.1.1.norm.weight"),
        ({"attention_resolutions": "4"}, "unexpected (input_blocks.3.1.norm.weight"),
        ({"resblock_updown": True}, "unexpected (input_blocks.2.0.op.weight"),
        ({"num_res_blocks": 2}, "missing (input_blocks.2.0.in_layers.0.weight"),
    ],
)
def test_a_config_of_other_layers_names_what_is_missing_or_too_much(config: dict[str, Any], part: str) -> None:
    text, _ = refused(checkpoint(), config=UNTOLD | config)
    assert part in text


def test_a_preset_of_another_model_is_refused() -> None:
    text, _ = refused(checkpoint(), preset="imagenet-64")
    assert text.startswith("the checkpoint does not fit the network: time_embed.0.weight has shape [128, 32]")
    assert "[768, 192]" in text


def test_what_the_tensors_do_not_tell_is_asked_for() -> None:
    text, hint = refused(checkpoint())
    assert text == (
        "the tensors do not tell noise_schedule, diffusion_steps, num_heads or num_head_channels, "
        "use_new_attention_order, image_size"
    )
    assert hint == (
        "--config '{\"KEY\": VALUE, …}' with the flags of its training, or for a published model --preset: "
        "imagenet-64, imagenet-128, imagenet-256, imagenet-256-uncond, imagenet-512, lsun-bedroom, lsun-cat, lsun-horse"
    )
    assert refused(checkpoint(), config=UNTOLD | {"diffusion_steps": 4000})[0] == (
        "the tensors do not tell rescale_timesteps"
    )
    without_size = {key: value for key, value in UNTOLD.items() if key != "image_size"}
    assert refused(checkpoint(), config=without_size)[0] == "the tensors do not tell image_size"


def test_the_size_of_training_follows_from_attention_or_the_usual_multipliers() -> None:
    without_size = {key: value for key, value in UNTOLD.items() if key != "image_size"}

    def size(tensors: Tensors, asked: int | None = None, **more: Any) -> int:
        return guided_diffusion.build(tensors, SourceOptions(config=without_size | more, size=asked)).height

    assert size(checkpoint(), attention_resolutions="20") == 40  # at factor 2
    assert size(checkpoint(), asked=24) == 24
    small = checkpoint(channel_mult=(1, 2, 3, 4))
    assert size(small) == 64
    assert size(small, asked=8) == 8


def test_another_size_leaves_the_attention_where_it_was_trained() -> None:
    config = {"attention_resolutions": "8"}
    source = build(checkpoint(), config=config, size=32)
    assert (source.height, source.width) == (32, 32)
    assert source.details["config"]["image_size"] == SIZE
    assert source.details["config"]["attention_resolutions"] == "8"
    x, label = torch.randn(1, 3, 32, 32), torch.tensor([5.0])
    assert relative(source.net(x, label), network(checkpoint(), x, label).float()) < 1e-5


def test_own_heads_replace_those_of_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = UNTOLD | {"num_heads": -1, "num_head_channels": 16}
    monkeypatch.setitem(guided_diffusion.PRESETS, "tiny", preset)
    x, label = torch.randn(1, 3, SIZE, SIZE), torch.tensor([5.0])
    tensors = checkpoint()
    for config, heads in (({}, {"num_head_channels": 16}), ({"num_heads": 8}, {"num_heads": 8})):
        source = guided_diffusion.build(tensors, SourceOptions(preset="tiny", config=config))
        assert source.name == "tiny"
        assert relative(source.net(x, label), network(tensors, x, label, **heads).float()) < 1e-5


@pytest.mark.parametrize(
    ("options", "text", "hint"),
    [
        (
            {"config": {"image_sise": 64}},
            "guided-diffusion has no config key 'image_sise'",
            "--config takes image_size,",
        ),
        ({"preset": "imagenet"}, "family guided-diffusion has no preset 'imagenet'", "--preset takes imagenet-64,"),
        ({"config": {"num_heads": 0}}, "config num_heads is 0; wanted a whole number above 0, or -1 for not used", ""),
        ({"config": {"num_heads": True}}, "config num_heads is True; wanted a whole number above 0", ""),
        ({"config": {"image_size": 1.5}}, "config image_size is 1.5; wanted a whole number above 0", ""),
        ({"config": {"class_cond": "perhaps"}}, "config class_cond is 'perhaps'; wanted True or False", ""),
        ({"config": {"channel_mult": "1,two"}}, "config channel_mult is '1,two'; wanted numbers such as", ""),
        ({"config": {"channel_mult": [1, 0]}}, "config channel_mult is [1, 0]; wanted numbers such as", ""),
        ({"config": {"attention_resolutions": "1/0"}}, "config attention_resolutions is '1/0'; wanted numbers", ""),
        ({"config": {"noise_schedule": "sigmoid"}}, "config noise_schedule is 'sigmoid'; wanted linear or cosine", ""),
        (
            {"config": UNTOLD | {"diffusion_steps": 20, "rescale_timesteps": True}},
            "config diffusion_steps is 20, too few for the linear schedule",
            "correct diffusion_steps in --config; the usual number is 1000",
        ),
        ({"config": UNTOLD, "size": 30}, "size is 30; the network takes multiples of 4", "--size 32"),
        ({"config": UNTOLD, "size": 0}, "size is 0; the network takes multiples of 4", "--size 4"),
        (
            {"config": UNTOLD, "class_label": 1},
            "class label 1 was given, and the network is not class-conditional",
            "leave --class-label out",
        ),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options: dict[str, Any], text: str, hint: str) -> None:
    said, advice = refused(checkpoint(), OptionError, **options)
    assert said.startswith(text)
    assert advice.startswith(hint)


@pytest.mark.parametrize("label", [-1, 7])
def test_a_class_that_does_not_exist_is_refused(label: int) -> None:
    assert refused(checkpoint(classes=7), OptionError, config=UNTOLD, class_label=label) == (
        f"class label {label} is not one of the network's 7 classes",
        "--class-label takes a whole number from 0 to 6",
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: {"a": torch.zeros(1)}, "no tensor is called input_blocks.0.0.weight"),
        (
            lambda t: {n: v for n, v in t.items() if not n.startswith("output_blocks")},
            "the file has no output_blocks: it is a classifier, not a diffusion network",
        ),
        (
            lambda t: {f"model.diffusion_model.{n}": v for n, v in t.items()},
            "this is a latent diffusion model, whose network sees an autoencoder's codes",
        ),
        (
            lambda t: t | {"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)},
            "the network takes 6 channels and returns 3: not a model of images alone",
        ),
        (lambda t: {"a": t, "b": t}, "the file holds several networks: a.*, b.*"),
        (
            lambda t: {n: v for n, v in t.items() if not n.startswith("time_embed.0")},
            "the file has no time_embed.0.weight",
        ),
        (lambda t: t | {"out.2.weight": torch.zeros(3)}, "out.2.weight has shape [3]; wanted 4 dimensions"),
        (
            lambda t: t | {"input_blocks.999999.0.weight": torch.zeros(3)},
            "1000000 input_blocks do not make 999994 levels of equal depth",
        ),
    ],
    ids=["nothing", "classifier", "latent", "upsampler", "two networks", "no time", "rank", "gap"],
)
def test_files_that_are_something_else_are_told_apart(change: Any, text: str) -> None:
    assert refused(change(checkpoint()), config=UNTOLD)[0] == text


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"channel_mult": "1,2,2.5", "num_channels": 40}, "num_channels"),
        ({"num_heads": 3}, "an attention layer of 64 does not divide by 3"),
        ({"num_head_channels": 48}, "an attention layer of 64 does not divide by 48"),
    ],
)
def test_channels_that_divide_into_no_groups_or_heads_are_refused(config: dict[str, Any], text: str) -> None:
    said, hint = refused(checkpoint(), config=UNTOLD | config)
    assert said.startswith(f"no network has these channels: {text}")
    assert "num_channels" in hint


@pytest.mark.parametrize(
    ("preset", "millions", "size", "classes", "schedule", "new_order", "heads"),
    [  # the sizes are those of the paper's tables; heads: from the finest level with attention to the coarsest
        ("imagenet-64", 296, 64, 1000, "cosine", True, (6, 9, 12)),
        ("imagenet-128", 422, 128, 1000, "linear", False, (4, 4, 4)),
        ("imagenet-256", 554, 256, 1000, "linear", False, (8, 16, 16)),
        ("imagenet-512", 559, 512, 1000, "linear", False, (8, 16, 16)),
        ("imagenet-256-uncond", 553, 256, 0, "linear", False, (8, 16, 16)),
        ("lsun-bedroom", 553, 256, 0, "linear", False, (8, 16, 16)),
        ("lsun-cat", 553, 256, 0, "linear", False, (8, 16, 16)),
        ("lsun-horse", 553, 256, 0, "linear", False, (8, 16, 16)),
    ],
)
def test_a_presets_network_is_the_published_one(
    preset: str,
    millions: int,
    size: int,
    classes: int,
    schedule: str,
    new_order: bool,
    heads: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted: list[Shapes] = []

    def fit(net: torch.nn.Module, tensors: Tensors, *, hint: str) -> torch.nn.Module:  # shapes have no values to load
        fitted.append({name: tuple(t.shape) for name, t in net.state_dict().items()})
        return net

    monkeypatch.setattr(guided_diffusion, "load_weights", fit)
    flags = guided_diffusion.PRESETS[preset]
    multipliers = tuple(float(m) for m in flags["channel_mult"].split(","))
    shapes = layout(
        num_channels=flags["num_channels"], channel_mult=multipliers, num_res_blocks=flags["num_res_blocks"],
        attention=tuple(size // r for r in (32, 16, 8)), resblock_updown=True, learn_sigma=True, classes=classes,
    )  # fmt: skip
    source = guided_diffusion.build(
        {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, SourceOptions(preset=preset)
    )
    assert fitted == [shapes]
    assert round(sum(map(math.prod, shapes.values())) / 1e6) == millions
    assert (source.height, source.width, source.name) == (size, size, preset)
    assert source.details["config"]["noise_schedule"] == schedule
    assert len(source.convention.sde.alphas_cumprod) == 1000

    attention = [layer for layer in source.net.modules() if isinstance(layer, Attention)]
    blocks = flags["num_res_blocks"]
    down = [count for count in heads for _ in range(blocks)]
    up = [count for count in reversed(heads) for _ in range(blocks + 1)]
    assert [layer.heads for layer in attention] == [*down, heads[-1], *up]
    assert {layer.new_order for layer in attention} == {new_order}


def test_the_file_is_recognised_by_its_content(tmp_path: Any) -> None:
    torch.save(checkpoint(), tmp_path / "model.pt")
    source = families.load(str(tmp_path / "model.pt"), SourceOptions(config=UNTOLD))
    assert source.family == "guided-diffusion"
    millions = sum(map(math.prod, layout().values())) / 1e6
    assert source.summary == (
        f"ADM U-Net, {millions:.1f} M parameters, 16x16, no classes, linear schedule of 1000 levels, predicts eps, "
        "model weights"
    )
