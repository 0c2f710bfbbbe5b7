"""Folders of the diffusers library: what is read is what the library itself computes, and what cannot be is refused."""

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdedit.errors import OptionError
from sdedit.export import families, to_onnx
from sdedit.export.checkpoints import CheckpointError
from sdedit.export.denoiser import Denoiser
from sdedit.export.families import diffusers as family
from sdedit.export.source import SourceOptions

DDPM = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
NCSNPP = {
    "sample_size": 16,
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 1,
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
    "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "attention_head_dim": None,
    "time_embedding_type": "fourier",
    "mid_block_scale_factor": 1.41421356237,
    "norm_num_groups": None,
    "norm_eps": 1e-6,
}
MODERN = {  # what the library's own defaults lead to
    "sample_size": (16, 24),
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "in_channels": 1,
    "out_channels": 2,
}
NONE = SourceOptions()


def network(seed: int = 0, **config: Any) -> diffusers.UNet2DModel:
    """A tiny network whose every parameter is random, the ones that start at zero or one too."""
    unet = diffusers.UNet2DModel(**config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.7 / fan**0.5))
    return unet


def save(folder: Path, unet: diffusers.UNet2DModel, scheduler: Any = None) -> Path:
    """The pipeline folder that the library writes."""
    diffusers.DDPMPipeline(unet, scheduler or diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unet() -> diffusers.UNet2DModel:
    return network(**DDPM)


@pytest.fixture
def folder(tmp_path: Path, unet: diffusers.UNet2DModel) -> Path:
    return save(tmp_path / "church", unet)


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def edit(path: Path, **changes: Any) -> None:
    """Replace fields of a JSON file; None takes one out."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


# --- what comes out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "predicts"),
    [
        (diffusers.DDPMScheduler(), "epsilon"),
        (diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), "epsilon"),
        (diffusers.PNDMScheduler(num_train_timesteps=300, prediction_type="v_prediction"), "v_prediction"),
        (diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2"), "epsilon"),
        (diffusers.EulerDiscreteScheduler(trained_betas=[0.1, 0.2, 0.3], prediction_type="sample"), "sample"),
        (diffusers.DEISMultistepScheduler(), "epsilon"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_d_is_the_closed_formula_of_the_library_s_own_output(
    tmp_path: Path, unet: diffusers.UNet2DModel, scheduler: Any, predicts: str
) -> None:
    source = families.load(str(save(tmp_path / "model", unet, scheduler)), NONE)
    denoiser = Denoiser(source.net, source.convention)
    levels = scheduler.alphas_cumprod  # a product of a thousand float32 numbers
    np.testing.assert_allclose(source.convention.sde.alphas_cumprod, levels, rtol=3e-6)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for i in (0, 1, len(levels) // 2, len(levels) - 1):
        alpha = source.convention.sde.alphas_cumprod[i]
        sigma = ((1 - alpha) / alpha) ** 0.5
        noisy = x * (1 + sigma**2) ** 0.5
        with torch.no_grad():
            raw = unet(x, torch.tensor(i)).sample
            found = denoiser(noisy, torch.full((3,), sigma))
        match predicts:
            case "epsilon":
                wanted = noisy - sigma * raw
            case "sample":
                wanted = raw
            case _:
                wanted = alpha**0.5 * x - (1 - alpha) ** 0.5 * raw
        close(found, wanted, 2e-5 * (1 + sigma))  # noisy - σ raw cancels


def test_a_variance_exploding_network_is_a_score_of_data_in_0_to_1(tmp_path: Path) -> None:
    unet = network(**NCSNPP)
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=380)
    diffusers.ScoreSdeVePipeline(unet, scheduler).save_pretrained(tmp_path)
    source = family.build_folder(tmp_path, NONE)
    assert (source.convention.sde.sigma_min, source.convention.sde.sigma_max) == (0.02, 760)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for sigma in (0.02, 1.0, 700.0):
        own = (sigma * x + 1) / 2  # what a network for [0, 1] sees, under noise σ/2
        with torch.no_grad():
            score = unet(own, torch.full((2,), sigma / 2)).sample
            found = Denoiser(source.net, source.convention)(sigma * x, torch.full((2,), sigma))
        close(found, 2 * (own + (sigma / 2) ** 2 * score) - 1)


@pytest.mark.parametrize("config", [DDPM, NCSNPP, MODERN], ids=["ddpm", "ncsnpp", "modern"])
def test_the_network_computes_what_the_library_does_in_its_precision_and_in_double(config: dict[str, Any]) -> None:
    theirs = network(**config)
    ours = family.unet_on_meta(theirs.config)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    plain = family.PlainUNet(ours.eval())
    x = torch.randn(2, theirs.config.in_channels, 16, 24, generator=torch.Generator().manual_seed(1))
    label = torch.tensor([0.25, 731.5])
    with torch.no_grad():
        single = plain(x, label)
        close(single, theirs(x, label).sample, 1e-6)
        double = plain.double()(x.double(), label.double())
    assert double.dtype == torch.float64
    close(single.double(), double, 2e-5)


def test_a_folder_may_be_flat(folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for place in ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        (flat / Path(place).name).write_bytes((folder / place).read_bytes())
    for path in (flat, folder / "unet"):
        assert family.recognises(path)
        source = family.build_folder(path, NONE)
        assert source.convention == family.build_folder(folder, NONE).convention
        assert (source.channels, source.height, source.width, source.multiple) == (3, 16, 16, 2)


def weights_of(source: Any) -> dict[str, torch.Tensor]:
    return source.net.unet.state_dict()


def test_every_way_to_store_the_weights_gives_the_same(folder: Path, unet: diffusers.UNet2DModel) -> None:
    stored = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(stored)
    stored.unlink()
    names = list(tensors)

    def same() -> None:
        for name, tensor in weights_of(family.build_folder(folder, NONE)).items():
            torch.testing.assert_close(tensor, unet.state_dict()[name], rtol=0, atol=0)

    torch.save(tensors, stored.with_suffix(".bin"))
    same()
    stored.with_suffix(".bin").unlink()
    torch.save(tensors, stored.with_suffix(".bin"), _use_new_zipfile_serialization=False)
    same()
    stored.with_suffix(".bin").unlink()
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, stored.with_name(file))
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    stored.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    same()


def test_half_precision_files_become_float32(folder: Path, unet: diffusers.UNet2DModel) -> None:
    stored = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(stored).items()}, stored)
    found = weights_of(family.build_folder(folder, NONE))
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    torch.testing.assert_close(found, {n: t.half().float() for n, t in unet.state_dict().items()}, rtol=0, atol=0)


def test_names_of_early_versions_are_understood(tmp_path: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    unet = network(**NCSNPP)
    save(tmp_path, unet, diffusers.ScoreSdeVeScheduler())
    stored = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    renamed = {}
    for name, tensor in load_file(stored).items():
        for new, early in old.items():
            if f".{new}." in name:
                name, tensor = name.replace(new, early), tensor[..., None] if name.endswith("weight") else tensor
        renamed[name] = tensor
    assert sum(name.endswith("proj_attn.weight") for name in renamed) == 3
    renamed["time_proj.W"] = renamed["time_proj.weight"].clone()
    for extra in ("time_proj.weight", None):
        save_file(renamed, stored)
        torch.testing.assert_close(weights_of(family.build_folder(tmp_path, NONE)), dict(unet.state_dict()))
        renamed.pop(extra, None)


def test_averaged_weights_are_taken_where_training_left_them(folder: Path) -> None:
    assert family.build_folder(folder, NONE).weights == "model"
    averaged = network(seed=1, **DDPM)
    averaged.save_pretrained(folder / "unet_ema")
    for wanted, weights in ((None, "ema"), ("ema", "ema"), ("model", "model")):
        source = family.build_folder(folder, SourceOptions(weights=wanted))
        assert source.weights == weights
        bias = weights_of(source)["conv_in.bias"]
        assert torch.equal(bias, averaged.conv_in.bias) == (weights == "ema")


def test_a_class_stays_an_input_or_is_folded_in(tmp_path: Path) -> None:
    unet = network(**DDPM, num_class_embeds=7)
    save(tmp_path, unet)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    label, classes = torch.tensor([3.0, 900.0]), torch.tensor([6, 6])
    free = family.build_folder(tmp_path, NONE)
    fixed = families.finish(free, SourceOptions(class_label=6))
    assert free.conditions == {"class_label": {"dtype": "int64", "count": 7}}
    assert fixed.conditions == {}
    with torch.no_grad():
        wanted = unet(x, label, classes).sample
        close(free.net(x, label, classes), wanted)
        close(fixed.net(x, label), wanted)
    with pytest.raises(OptionError, match="class label 7 is not one of the network's 7 classes"):
        families.finish(free, SourceOptions(class_label=7))


def test_a_learned_variance_is_dropped_and_a_frame_need_not_be_square(tmp_path: Path) -> None:
    save(tmp_path, network(**MODERN))
    source = family.build_folder(tmp_path, NONE)
    assert (source.channels, source.height, source.width) == (1, 16, 24)
    with torch.no_grad():
        assert Denoiser(source.net, source.convention)(torch.zeros(2, 1, 16, 24), torch.ones(2)).shape == (2, 1, 16, 24)
    resized = family.build_folder(tmp_path, SourceOptions(size=32))
    assert (resized.height, resized.width) == (32, 32)


def test_a_network_that_looks_its_time_step_up_gets_whole_ones(tmp_path: Path) -> None:
    unet = network(**DDPM, time_embedding_type="learned", num_train_timesteps=50)
    save(tmp_path, unet, diffusers.DDPMScheduler(num_train_timesteps=50))
    source = family.build_folder(tmp_path, NONE)
    assert source.convention.round_time
    x = torch.zeros(1, 3, 16, 16)
    sigma = float(source.convention.sde.sigma(20.2 / 50))  # nearest is level 19
    with torch.no_grad():
        raw = unet(x, torch.tensor([19])).sample
        close(Denoiser(source.net, source.convention)(x, torch.tensor([sigma])), -sigma * raw)


def test_a_schedule_may_end_without_any_signal(tmp_path: Path, unet: diffusers.UNet2DModel) -> None:
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    levels = family.build_folder(save(tmp_path, unet, scheduler), NONE).convention.sde.alphas_cumprod
    assert levels[-1] == 0
    assert all(np.diff(levels) < 0)
    np.testing.assert_allclose(levels, scheduler.alphas_cumprod, rtol=1e-5)


@pytest.mark.parametrize("config", [DDPM, NCSNPP], ids=["ddpm", "ncsnpp"])
def test_the_graph_is_plain_and_takes_other_sizes(tmp_path: Path, config: dict[str, Any]) -> None:
    scheduler = diffusers.ScoreSdeVeScheduler() if config is NCSNPP else diffusers.DDPMScheduler()
    source = family.build_folder(save(tmp_path, network(**config), scheduler), NONE)
    denoiser = Denoiser(source.net, source.convention).eval()
    model = to_onnx.trace(denoiser, (3, 16, 16), dynamic=True)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds.keys().isdisjoint({"Einsum", "Loop", "If", "Range", "Scan", "GridSample"})
    assert len([w for w in model.graph.initializer if w.data_type == 11]) == 0  # double
    assert model.graph.node[0].domain == ""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, height, width in ((1, 16, 16), (3, 24, 32)):
        x = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))
        sigma = torch.linspace(0.5, 3, batch)
        (found,) = session.run(None, {"x": x.numpy(), "sigma": sigma.numpy()})
        close(torch.from_numpy(found), denoiser(x, sigma))


def test_the_readme_names_the_licence_and_the_folder_the_model(folder: Path, tmp_path: Path) -> None:
    source = family.build_folder(folder, NONE)
    assert (source.name, source.license) == ("church", None)
    (folder / "README.md").write_text(
        "---\ntags:\n- unconditional\nlicense: apache-2.0\n---\n# Church\nlicense: other\n"
    )
    assert family.build_folder(folder, NONE).license == "apache-2.0"
    cached = tmp_path / "models--google--ddpm-church-256" / "snapshots"
    cached.mkdir(parents=True)
    assert family.build_folder(folder.rename(cached / "0123abcd"), NONE).name == "ddpm-church-256"


def test_the_user_s_fields_replace_the_folder_s(folder: Path) -> None:
    config = {"scheduler": {"beta_end": 0.01}, "unet": {"sample_size": 32}}
    source = family.build_folder(folder, SourceOptions(config=config))
    assert source.convention.sde.alphas_cumprod[-1] == pytest.approx(np.prod(1 - np.linspace(1e-4, 0.01, 1000)))
    assert source.height == 32
    (folder / "scheduler" / "scheduler_config.json").unlink()
    source = family.build_folder(folder, SourceOptions(config={"scheduler": {"beta_schedule": "squaredcos_cap_v2"}}))
    assert source.convention.sde.alphas_cumprod[-1] < 1e-8


# --- what is refused ---------------------------------------------------------------------------------------------


def refused(folder: Path, text: str, hint: str = "", **options: Any) -> None:
    with pytest.raises((CheckpointError, OptionError)) as caught:
        families.finish(family.build_folder(folder, SourceOptions(**options)), SourceOptions(**options))
    assert text in str(caught.value)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler: not a scheduler of"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "CMStochasticIterativeScheduler: not a scheduler of"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler: not a scheduler of"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "continuous time steps is not"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "with use_flow_sigmas or continuous"),
        ({"_class_name": 3}, "3: not a scheduler of"),
        ({"_class_name": "ScoreSdeVeScheduler", "sigma_min": 2, "sigma_max": 1}, "the scheduler's sde: sigma_min 4, "),
        ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction' is not one of epsilon, sample, "),
        ({"beta_schedule": "steps"}, "no noise schedule follows from {'num_train_timesteps': 1000, "),
        ({"beta_start": "low"}, "the scheduler's beta_start is 'low'; wanted a number"),
        ({"beta_start": 0.5, "beta_end": -0.5}, "the scheduler's sde: alphas_cumprod must fall strictly"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps is beyond 1 … 100000"),
        ({"num_train_timesteps": 9.5}, "no noise schedule follows from"),
        ({"trained_betas": {"a": 1}}, "no noise schedule follows from"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_a_scheduler_without_a_known_training_is_refused(folder: Path, changes: dict[str, Any], text: str) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    refused(folder, text)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "is of a UNet2DConditionModel: a text- or latent-space model"),
        ({"_class_name": "VQModel"}, "is of a VQModel: a text- or latent-space model"),
        ({"in_channels": 6}, "6 channels in and 3 out: it is conditioned on an image"),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep': only class numbers are supported"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type 'fourier', center_input_sample False, and DDPMSch"),
        ({"center_input_sample": True}, "center_input_sample True, and DDPMScheduler do not go together"),
        ({"down_block_types": ["KDownBlock2D", "DownBlock2D"]}, "blocks of type KDownBlock2D are not supported"),
        ({"down_block_types": ["Block", "DownBlock2D"]}, "no UNet2DModel has this configuration: Block does not exist"),
        ({"down_block_types": 3}, "no UNet2DModel has this configuration"),
        ({"block_out_channels": [32, 64, 64]}, "no UNet2DModel has this configuration"),
        ({"block_out_channels": [32, 32]}, "the checkpoint does not fit the network: "),
        ({"layers_per_block": 2}, "the checkpoint does not fit the network: "),
        ({"sample_size": "big"}, "sample_size is 'big'; wanted a number of pixels, or two"),
        ({"sample_size": None}, "the configuration has no sample_size"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_a_network_that_is_not_from_pixels_to_pixels_is_refused(
    folder: Path, changes: dict[str, Any], text: str
) -> None:
    edit(folder / "unet" / "config.json", **changes)
    refused(folder, text)


def test_a_latent_space_pipeline_is_refused_by_its_index(folder: Path) -> None:
    edit(folder / "model_index.json", vqvae=["diffusers", "VQModel"], mel=[None, None])
    refused(
        folder, f"{folder / 'model_index.json'} lists vqvae: a text- or latent-space model", "google/ddpm-church-256"
    )


def test_tensors_are_never_filled_in(folder: Path) -> None:
    stored = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(stored)
    del tensors["conv_out.weight"]
    save_file(tensors, stored)
    refused(folder, "the checkpoint does not fit the network: 1 missing (conv_out.weight)", "config.json")


@pytest.mark.parametrize("most", ["10GB", "20KB"], ids=["one file", "shards"])
def test_a_variant_of_the_weights_is_taken_where_it_is_the_only_one(
    folder: Path, unet: diffusers.UNet2DModel, most: str
) -> None:
    wanted = {name: tensor.half().float() for name, tensor in unet.state_dict().items()}
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    copy.deepcopy(unet).half().save_pretrained(folder / "unet", variant="fp16", max_shard_size=most)
    shards = list((folder / "unet").glob("*-of-*"))
    assert bool(shards) == (most == "20KB")
    found = families.load(str(folder), NONE).net.state_dict()
    assert sum(any(tensor.equal(one) for one in found.values()) for tensor in wanted.values()) == len(wanted) > 10
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    unet.save_pretrained(folder / "unet", variant="non_ema")
    names = ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.non_ema.safetensors"]
    if shards:
        names = [names[1], "diffusion_pytorch_model.safetensors.index.fp16.json"]
    refused(folder, f"{folder / 'unet'} has neither", f"rename one of {', '.join(names)}")


def test_missing_and_broken_files_are_named(folder: Path) -> None:
    stored = folder / "unet" / "diffusion_pytorch_model.safetensors"
    stored.write_bytes(stored.read_bytes()[:-100])
    refused(folder, f"{stored}: not a whole safetensors file")
    stored.unlink()
    refused(
        folder, f"{folder / 'unet'} has neither diffusion_pytorch_model.safetensors nor diffusion_pytorch_model.bin"
    )
    index = stored.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    refused(folder, f"{index} lists no files of its folder")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    refused(folder, f"{folder} has no scheduler_config.json, which says how", '--config \'{"scheduler": {')
    (folder / "unet" / "config.json").write_text("{")
    refused(folder, f"{folder / 'unet' / 'config.json'} cannot be read")
    (folder / "unet" / "config.json").unlink()
    refused(folder, f"{folder / 'unet'} has no config.json")


def test_options_that_do_not_apply_are_refused(folder: Path) -> None:
    refused(folder, "family diffusers has no preset 'church'", "--preset", preset="church")
    refused(folder, "has no 'ema' weights", "--weights model", weights="ema")
    refused(folder, "config: family diffusers does not know 'ch'", '--config \'{"scheduler": {', config={"ch": 3})
    refused(folder, "config: UNet2DModel has no field 'ch'", "block_out_channels", config={"unet": {"ch": 3}})
    refused(folder, "config: DDPMScheduler has no field 'beta'", "beta_start", config={"scheduler": {"beta": 1}})
    refused(folder, "class label 1 was given, and the network is not class-conditional", class_label=1)


def test_weights_alone_ask_for_their_folder(folder: Path, tmp_path: Path) -> None:
    stored = folder / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(CheckpointError) as caught:
        families.load(str(stored), NONE)
    assert "name the folder" in caught.value.hint
    with pytest.raises(CheckpointError, match="of a diffusers UNet2DModel without its configuration"):
        family.build(load_file(stored), NONE)
    text = {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="UNet2DConditionModel: a text- or latent-space model"):
        family.build(text, NONE)


def test_any_other_folder_is_not_recognised(tmp_path: Path) -> None:
    assert not family.recognises(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    assert not family.recognises(tmp_path)


# --- the hub -----------------------------------------------------------------------------------------------------


def test_a_hub_id_without_a_network_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError) as caught:
        family.download("google/ddpm-church-256")
    assert str(caught.value) == (
        "google/ddpm-church-256: no such file or folder, and it could not be downloaded: no route to host"
    )
    assert "name it" in caught.value.hint


def test_a_hub_s_json_is_judged_before_its_weights_are_downloaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def cached(name: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert family.download("google/ddpm-church-256") == folder
    assert "*.json" in asked
    assert any(pattern.endswith(".safetensors") for pattern in asked)
    assert not any(pattern.endswith(".bin") for pattern in asked)
    asked.clear()
    edit(folder / "model_index.json", vqvae=["diffusers", "VQModel"])
    with pytest.raises(CheckpointError, match="lists vqvae"):
        family.download("CompVis/ldm-celebahq-256")
    assert asked == ["*.json", "README.md"]
    (folder / "model_index.json").unlink()
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="CompVis/some-notes holds no diffusers model"):
        family.download("CompVis/some-notes")
