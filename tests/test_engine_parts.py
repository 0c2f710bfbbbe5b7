"""Parts that the command line reaches only on machines, sizes and callers that tests do not have."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from closed_form import SDES, identity

import sdedit
from sdedit import noise as noises
from sdedit.backends import ort


class CopyingBinding:
    """An IOBinding as a GPU session has it: inputs are copied when they are bound."""

    def __init__(self) -> None:
        self.inputs: dict[str, np.ndarray] = {}
        self.arrays: dict[int, np.ndarray] = {}
        self.output: np.ndarray | None = None

    def bind_input(self, name: str, device: str, index: int, dtype: type, shape: tuple[int, ...], pointer: int) -> None:
        self.inputs[name] = self.arrays[pointer].copy()

    def bind_output(self, name: str, device: str, index: int, dtype: type, shape: tuple, pointer: int) -> None:
        self.output = self.arrays[pointer]


class CopyingSession:
    """D = x·σ, over copied inputs."""

    def __init__(self) -> None:
        self.binding = CopyingBinding()

    def io_binding(self) -> CopyingBinding:
        return self.binding

    def run_with_iobinding(self, binding: CopyingBinding) -> None:
        assert binding.output is not None
        binding.output[...] = binding.inputs["x"] * binding.inputs["sigma"].reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("copies", [True, False])
def test_a_session_that_copies_what_it_binds_sees_every_step(monkeypatch: pytest.MonkeyPatch, copies: bool) -> None:
    session = CopyingSession()
    real = ort._Bound._share

    def share(self: ort._Bound, name: str, array: np.ndarray) -> None:
        session.binding.arrays[array.ctypes.data] = array
        real(self, name, array)

    monkeypatch.setattr(ort._Bound, "_share", share)
    bound = ort._Bound(session, copies, SimpleNamespace(extra_inputs={}), (1, 1, 2, 2), {})
    x = np.ones((1, 1, 2, 2), np.float32)
    bound(x, np.full(1, 2, np.float32))
    x *= 3
    second = bound(x, np.full(1, 5, np.float32))
    assert bool((second == 15).all()) is copies


@pytest.mark.usefixtures("each_noise_maker")
@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 160, 160), (3, 256, 256), (1, 1, 1), (3, 5, 7)])
def test_noise_is_the_same_however_it_is_cut(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    """Several steps at once for small frames, several pieces for large ones."""
    whole = [sdedit.Noise([5, 2**40], shape)(step, 1, 0).copy() for step in (7, 8, 9)]
    monkeypatch.setattr(noises, "_COUNTERS_AT_ONCE", 1000)
    cut = sdedit.Noise([5, 2**40], shape)
    for step, expected in zip((7, 8, 9), whole, strict=True):
        np.testing.assert_array_equal(cut(step, 1, 0), expected)


@pytest.mark.usefixtures("each_noise_maker")
@pytest.mark.parametrize("steps", [None, 1, 3, 50, 1000])
def test_noise_may_be_asked_for_in_any_order(steps: int | None) -> None:
    source = sdedit.Noise([1], (3, 64, 64), steps=steps)
    asked = [(3, 0, 0), (0, 0, 0), (3, 0, 1), (1, 2, 0), (3, 0, 0), (2, 0, 0), (200, 0, 1)]
    for step, repeat, stream in asked:
        alone = sdedit.Noise([1], (3, 64, 64))(step, repeat, stream)
        np.testing.assert_array_equal(source(step, repeat, stream), alone)


def test_a_table_for_another_batch_is_refused() -> None:
    table = sdedit.plan(sdedit.VP(0.1, 20), steps=3)
    two = sdedit.StepTable.stack([table, table])
    x = np.zeros((3, 1, 2, 2), np.float32)
    with pytest.raises(sdedit.OptionError, match="step table for 2 images, batch of 3"):
        sdedit.denoise(lambda x, sigma: x.copy(), x, two, sdedit.Noise([0, 1, 2], (1, 2, 2)))


def test_a_denoiser_of_another_shape_is_refused() -> None:
    x = np.zeros((1, 3, 2, 2), np.float32)
    table = sdedit.plan(sdedit.VP(0.1, 20), steps=3)
    with pytest.raises(sdedit.NetworkError, match=r"returned shape \(1, 1, 2, 2\); wanted \(1, 3, 2, 2\)"):
        sdedit.denoise(lambda x, sigma: x[:, :1].copy(), x, table, sdedit.Noise([0], (3, 2, 2)))


def test_vp_without_beta_min_starts_at_zero() -> None:
    sde = sdedit.VP(0, 20)
    np.testing.assert_allclose(sde.time(sde.sigma([0.0, 0.1, 1.0])), [0.0, 0.1, 1.0])


def test_numpy_numbers_are_numbers(tmp_path: Path) -> None:
    editor = sdedit.load(identity(tmp_path / "m.onnx", SDES["vp"]))
    guide = np.zeros((16, 16, 3), np.uint8)
    options = {"t0": np.float32(0.5), "steps": np.int64(2), "seed": np.uint8(3), "samples": np.int32(2)}
    out = editor.edit(guide, **options)
    assert (out.options.t0, out.options.steps, out.seeds) == (0.5, 2, [3, 4])
    assert [type(value) for value in (out.options.t0, out.options.steps, out.options.seed)] == [float, int, int]


@pytest.mark.usefixtures("each_noise_maker")
@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 5, 7)])
def test_noise_that_was_drawn_ahead_is_the_same(shape: tuple[int, ...]) -> None:
    plain, ahead = (sdedit.Noise([3, 2**64 - 1], shape, steps=30) for _ in range(2))
    for repeat in (0, 1):
        assert np.array_equal(plain(0, repeat, 0), ahead(0, repeat, 0))
        ahead.draw_ahead(repeat)
        for step, stream in ((1, 0), (1, 1), (2, 0), (17, 1), (30, 0)):
            assert np.array_equal(plain(step, repeat, stream), ahead(step, repeat, stream))
