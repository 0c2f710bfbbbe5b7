"""Training the bundled model: the split, the network, and runs that can be interrupted and repeated."""

import io
import math
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdedit.export import eurosat
from sdedit.export.networks.patch_unet import PatchUNet

WIDTHS = (8, 8, 32)
COUNT = 12  # pictures per class; number 10 of each is held out

STOPPED_AFTER_ITS_FIRST_CHECKPOINT = """
import builtins, os, runpy, signal

def print_and_die(*words, print=builtins.print, **options):
    print(*words, **options)
    if str(words[0]).startswith("step "):
        os.kill(os.getpid(), signal.{})

builtins.print = print_and_die
runpy.run_module("sdedit.export.train", run_name="__main__", alter_sys=True)
"""


def archive(path: Path, held_out_seed: int = 0) -> Path:
    """A small EuroSAT: three classes of random pictures, those held out drawn from another seed."""
    with zipfile.ZipFile(path, "w") as files:
        for number, label in enumerate(("Forest", "River", "SeaLake")):
            for j in range(1, COUNT + 1):
                rng = np.random.default_rng([number, j, held_out_seed if j % 10 == 0 else 0])
                encoded = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(encoded, "JPEG")
                files.writestr(f"EuroSAT_RGB/{label}/{label}_{j}.jpg", encoded.getvalue())
    return path


def train(
    data: Path,
    output: Path,
    *,
    length: tuple[str, float] = ("--images", 8),
    seed: int = 0,
    weights: Path | None = None,
    stopped: signal.Signals | None = None,
) -> str:
    """What `python -m sdedit.export.train` prints: batches of 8, a checkpoint every 3 steps, one thread."""
    program = ["-m", "sdedit.export.train"]
    if stopped:
        program = ["-c", STOPPED_AFTER_ITS_FIRST_CHECKPOINT.format(stopped.name)]
    counts = dict([length]) | {"--batch": 8, "--save-every": 3, "--threads": 1, "--seed": seed}
    if weights:
        counts["--weights"] = weights
    options = [str(word) for option in counts.items() for word in option]
    widths = ["--widths", *(str(width) for width in WIDTHS)]
    command = [sys.executable, *program, str(data), "-o", str(output), "--device", "cpu", *options, *widths]
    done = subprocess.run(command, cwd=output.parent, capture_output=True, text=True)
    ends = {None: 0, signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM}
    assert done.returncode == ends[stopped], done.stderr
    return done.stdout


def read(checkpoint: Path) -> dict:
    return torch.load(checkpoint, map_location="cpu", weights_only=True)


def tensors(value: object) -> list[torch.Tensor]:
    """Every tensor of a checkpoint or a part of it, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def same_bits(one: object, other: object) -> bool:
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    assert pairs
    return all(torch.equal(a, b) for a, b in pairs)


def held_out_losses(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"held-out (\S+)", printed)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return archive(folder / "data.zip")


@pytest.fixture(scope="module")
def whole(folder: Path, data: Path) -> tuple[Path, str]:
    """A run of six steps that nobody disturbed: the checkpoint and what it printed."""
    return folder / "whole.pt", train(data, folder / "whole.pt", length=("--images", 48))


@pytest.fixture(scope="module")
def short(folder: Path, data: Path) -> tuple[Path, str]:
    """A run of one step."""
    return folder / "short.pt", train(data, folder / "short.pt")


# --- the split ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "held_out"),
    [
        ("EuroSAT_RGB/Residential/Residential_120.jpg", True),
        ("EuroSAT_RGB/Residential/Residential_10.jpg", True),
        ("EuroSAT_RGB/Residential/Residential_12.jpg", False),
        ("EuroSAT_RGB/Residential/Residential_101.jpg", False),
        ("EuroSAT_10/River/River_1.jpg", False),
    ],
)
def test_files_whose_number_ends_in_0_are_held_out(name, held_out):
    assert eurosat.is_held_out(name) == held_out


def test_every_picture_is_on_one_side_of_the_split(data):
    trained, held_out = (set(eurosat.load(data, held_out=side)[1]) for side in (False, True))
    assert held_out == {f"EuroSAT_RGB/{label}/{label}_10.jpg" for label in ("Forest", "River", "SeaLake")}
    assert len(trained) == 3 * (COUNT - 1)
    assert trained & held_out == set()


def test_held_out_pixels_are_not_among_those_trained_on(data):
    (trained, _), (held_out, _) = (eurosat.load(data, held_out=side) for side in (False, True))
    assert trained.shape == (3 * (COUNT - 1), 64, 64, 3)
    assert {picture.tobytes() for picture in trained} & {picture.tobytes() for picture in held_out} == set()


def test_nearly_flat_photographs_are_left_out(tmp_path):
    flat, detailed = np.full((64, 64, 3), 120, np.uint8), np.zeros((64, 64, 3), np.uint8)
    flat[::8], detailed[::2] = 123, 255
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as files:
        for number, picture in enumerate((flat, detailed), start=1):
            encoded = io.BytesIO()
            Image.fromarray(picture).save(encoded, "JPEG", quality=100)
            files.writestr(f"EuroSAT_RGB/River/River_{number}.jpg", encoded.getvalue())
    assert eurosat.detail(eurosat.stretch(flat)) < eurosat.LEAST_DETAIL < eurosat.detail(eurosat.stretch(detailed))
    assert eurosat.load(tmp_path / "data.zip", held_out=False)[1] == ["EuroSAT_RGB/River/River_2.jpg"]


def test_detail_is_the_mean_difference_of_neighbours():
    stripes = np.zeros((4, 4, 3), np.uint8)
    stripes[::2] = 10
    assert eurosat.detail(stripes) == 5.0


def test_held_out_pictures_change_what_is_measured_and_not_the_weights(folder, short):
    checkpoint, printed = short
    others = folder / "others.pt"
    printed_with_others = train(archive(folder / "others.zip", held_out_seed=1), others)
    assert same_bits(read(others)["model"], read(checkpoint)["model"])
    assert held_out_losses(printed_with_others) != held_out_losses(printed)


# --- runs --------------------------------------------------------------------------------------------------------


def test_training_reports_a_finite_loss_at_every_checkpoint(whole):
    lines = re.findall(r"^step (\d+)  images (\d+)  loss (\S+)  held-out (\S+)  ", whole[1], re.MULTILINE)
    assert [(int(step), int(images)) for step, images, *_ in lines] == [(3, 24), (6, 48)]
    assert all(
        math.isfinite(float(loss)) and float(loss) > 0 for *_, loss, measured in lines for loss in (loss, measured)
    )


def test_training_changes_every_weight(whole):
    torch.manual_seed(0)
    fresh = dict(PatchUNet(widths=WIDTHS).named_parameters())
    trained = read(whole[0])["model"]
    assert [name for name, weight in fresh.items() if torch.equal(weight, trained[name])] == []


def test_a_checkpoint_is_plain_data_that_says_what_it_is(whole):
    checkpoint = read(whole[0])
    assert {name: checkpoint[name] for name in ("step", "widths", "images")} == {
        "step": 6,
        "widths": list(WIDTHS),
        "images": 48,
    }
    net = PatchUNet(widths=tuple(checkpoint["widths"]))
    for weights in ("model", "ema"):
        net.load_state_dict(checkpoint[weights])
    assert not same_bits(checkpoint["model"], checkpoint["ema"])


def test_a_killed_run_continues_as_if_nothing_had_happened(folder, data, whole):
    output = folder / "killed.pt"
    assert "step 3 " in train(data, output, length=("--images", 48), stopped=signal.SIGKILL)
    assert read(output)["step"] == 3
    resumed = train(data, output, length=("--images", 48))
    assert resumed.startswith("resuming at step 3\n")
    finished, undisturbed = read(output), read(whole[0])
    assert finished["step"] == undisturbed["step"]
    for part in ("model", "ema", "optimizer"):
        assert same_bits(finished[part], undisturbed[part])


def test_a_run_asked_to_stop_saves_and_continues_as_if_nothing_had_happened(folder, data, whole):
    output = folder / "stopped.pt"
    train(data, output, length=("--images", 48), stopped=signal.SIGTERM)
    assert read(output)["step"] == 3
    train(data, output, length=("--images", 48))
    assert same_bits(read(output)["model"], read(whole[0])["model"])


def test_a_run_by_the_clock_ends_with_a_checkpoint_when_its_time_is_over(folder, data):
    printed = train(data, folder / "timed.pt", length=("--minutes", 0.01))
    checkpoint = read(folder / "timed.pt")
    assert checkpoint["seconds"] >= 0.6
    assert f"step {checkpoint['step']}  images {8 * checkpoint['step']}  " in printed.splitlines()[-1]


def test_a_run_begins_with_the_averaged_weights_of_another(folder, data, whole):
    output = folder / "onward.pt"
    printed = train(data, output, weights=whole[0])
    assert printed.startswith(f"beginning with held-out {held_out_losses(whole[1])[-1]:.4f}\n")
    assert (read(output)["step"], read(output)["images"]) == (1, 48 + 8)


def test_another_seed_makes_other_weights(folder, data, short):
    other = folder / "other.pt"
    train(data, other, seed=1)
    assert not same_bits(read(other)["model"], read(short[0])["model"])


# --- the network -------------------------------------------------------------------------------------------------


@pytest.fixture
def net() -> Iterator[PatchUNet]:
    """Random weights everywhere, since fresh ones end in zeros and would hide what the network does. One thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(3)
    net = PatchUNet(widths=WIDTHS).eval().requires_grad_(False)
    for p in net.parameters():
        p.normal_(std=0.1)
    yield net
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (3, 3, 32, 48)])
def test_the_network_keeps_the_shape(net, shape):
    denoised = net(torch.randn(shape), torch.full(shape[:1], 0.7))
    assert denoised.shape == shape
    assert denoised.isfinite().all()


def test_without_noise_the_network_returns_its_input(net):
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    away = [(net(x, torch.full((2,), sigma)) - x).abs().max().item() for sigma in (1e-1, 1e-3, 1e-5)]
    assert away[0] > 1e-2  # the network has a say where there is noise
    assert away[1] < 1e-2
    assert away[2] < 1e-4


def test_each_picture_of_a_batch_has_its_own_noise_level(net):
    x, sigma = torch.randn(2, 3, 32, 32), torch.tensor([0.05, 5.0])
    together = net(x, sigma)
    apart = torch.cat([net(x[j : j + 1], sigma[j : j + 1]) for j in range(2)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, net(x, sigma.flip(0)), atol=1e-2)
