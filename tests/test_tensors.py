"""`Editor.edit_tensor` on a CPU: float tensors of any library, in place, the bits of `edit`."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHAPE

import sdedit
from sdedit.executor import Batch
from sdedit.image import to_pixels

HEIGHT, WIDTH = SHAPE[1:]


@pytest.fixture
def guide():
    return np.random.default_rng(0).uniform(-1, 1, (3, *SHAPE)).astype(np.float32)


@pytest.fixture
def mask():
    made = np.random.default_rng(1).uniform(0, 1, (3, 1, HEIGHT, WIDTH)).astype(np.float32)
    made[..., :3], made[..., -3:] = 0, 1
    return made


class Interface:
    """An array of a library that has no more than the protocol."""

    def __init__(self, array):
        self.array, self.__array_interface__ = array, array.__array_interface__


# --- what comes out ----------------------------------------------------------------------------------------------


def test_it_equals_an_edit_of_the_same_pictures_bit_for_bit(editor, picture):
    pictures = [picture(WIDTH, HEIGHT, seed) for seed in range(3)]
    wanted = editor.edit(pictures, batch=3, seed=7, steps=5, sampler="er-sde", repeats=2)
    scaled = np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1)
    x = editor.edit_tensor(np.ascontiguousarray(scaled), seed=7, steps=5, sampler="er-sde", repeats=2)
    assert np.array_equal(x, wanted.x)
    assert x.dtype == np.float32
    assert np.array_equal(to_pixels(x[1]), wanted.results[1].pixels)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [torch.from_numpy, Interface])
def test_every_library_gets_the_same_bits(kind, masked, editor, guide, mask):
    wanted = editor.edit_tensor(guide, mask=mask if masked else None, steps=4, t0=0.6)
    found = editor.edit_tensor(kind(guide), mask=kind(mask) if masked else None, steps=4, t0=0.6)
    assert np.array_equal(found, wanted)
    assert torch.from_dlpack(found).data_ptr() == found.ctypes.data


def test_an_image_is_the_same_alone(editor, guide, mask):
    together = editor.edit_tensor(guide, mask=mask, steps=4, seed=2**64 - 2)
    for j, seed in enumerate((2**64 - 2, 2**64 - 1, 0)):
        alone = editor.edit_tensor(guide[j : j + 1], mask=mask[j : j + 1], steps=4, seed=seed)
        assert np.array_equal(together[j], alone[0])


def test_a_mask_of_ones_equals_none(editor, guide):
    ones = np.ones((3, 1, HEIGHT, WIDTH), np.float32)
    assert np.array_equal(editor.edit_tensor(guide, mask=ones, steps=3), editor.edit_tensor(guide, steps=3))


def test_a_class_label_is_a_condition(labelled):
    zeros = np.zeros((1, *SHAPE), np.float32)
    x = sdedit.load(labelled, backend="ort-cpu").edit_tensor(zeros, conditions={"class_label": 4}, steps=2)
    np.testing.assert_allclose(x, 0.4, rtol=0, atol=1e-6)


# --- no copies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [lambda array: array, torch.from_numpy, Interface])
def test_guide_and_mask_are_read_where_they_lie_and_never_written(kind, editor, guide, mask, monkeypatch):
    addresses = []
    run = sdedit.executor.HostExecutor.run

    def look(self, batch: Batch, on_step):
        addresses.extend([batch.guide.ctypes.data, batch.mask.ctypes.data])
        return run(self, batch, on_step)

    monkeypatch.setattr(sdedit.executor.HostExecutor, "run", look)
    before = guide.copy(), mask.copy()
    editor.edit_tensor(kind(guide), mask=kind(mask), steps=3, repeats=2)
    assert addresses == [guide.ctypes.data, mask.ctypes.data]
    assert np.array_equal(guide, before[0])
    assert np.array_equal(mask, before[1])


def test_results_do_not_share_memory(editor, guide):
    first, second = (editor.edit_tensor(guide, steps=2, seed=seed) for seed in (0, 1))
    assert not np.shares_memory(first, second)
    kept = first.copy()
    second[:] = 0
    editor.edit_tensor(guide, steps=2, seed=5)
    assert np.array_equal(first, kept)


# --- refused -----------------------------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_refused(editor, guide, mask):
    gradient = torch.from_numpy(guide).requires_grad_()
    spoiled = guide.copy()
    spoiled[1, 2, 3, 4] = np.nan
    for given, options, told in (
        (guide.astype(np.float64), {}, "the guide is float64; wanted float32"),
        (guide[:, :2], {}, r"the guide is \(3, 2, 8, 12\); wanted \(B, 3, 8, 12\)"),
        (guide[0], {}, r"the guide is \(3, 8, 12\); wanted \(B, 3, 8, 12\)"),
        (np.zeros((1, 3, 12, 8), np.float32).swapaxes(2, 3), {}, "the guide is not contiguous"),
        (torch.from_numpy(guide).bfloat16(), {}, "the guide cannot be used: "),
        (gradient, {}, "the guide cannot be used: .*grad"),
        (spoiled, {}, "the guide holds NaN or Inf"),
        ([[0.0]], {}, "the guide is list; wanted a tensor"),
        (guide, {"mask": mask[:2]}, r"the mask is \(2, 1, 8, 12\); wanted \(3, 1, 8, 12\)"),
        (guide, {"mask": mask * 2}, r"the mask leaves \[0, 1\]"),
        (guide, {"mask": mask * np.float32(np.nan)}, r"the mask leaves \[0, 1\]"),
    ):
        with pytest.raises(sdedit.ImageError, match=told) as raised:
            editor.edit_tensor(given, **options)
        assert raised.value.hint


def test_a_tensor_on_a_gpu_is_refused_by_a_network_on_the_cpu(editor):
    for elsewhere in (
        SimpleNamespace(__dlpack__=None, __dlpack_device__=lambda: (2, 0)),
        SimpleNamespace(__cuda_array_interface__={}),
    ):
        with pytest.raises(sdedit.ImageError, match="the guide is not on the CPU, where the network runs"):
            editor.edit_tensor(elsewhere)


def test_options_that_make_no_sense_are_refused(editor, guide):
    for options, told in (
        ({"fit": "crop"}, "unknown option fit"),
        ({"stream": 0}, "stream is given; ort-cpu runs on the CPU"),
        ({"steps": 0}, "steps is 0"),
        ({"conditions": {"label": 1}}, "the model has no input label to set"),
    ):
        with pytest.raises(sdedit.OptionError, match=told):
            editor.edit_tensor(guide, **options)
    with pytest.raises(sdedit.OptionError, match="batch is 0"):
        editor.edit_tensor(guide[:0])
