"""Warming up and closing on the driver double, which counts what is allocated.

Run by tests/test_device_loop.py in a process of its own, once for each port that is installed.
"""

import gc
import threading

import numpy as np
import pytest
from closed_form import SDES, gaussian

import sdedit
from cuda_double.linear import LinearNetwork, double
from cuda_double.tensorrt_backend_cases import PICTURE, SHAPE, stand_in, write_plan  # noqa: F401, fixtures
from sdedit.backends import ort_gpu
from sdedit.cuda.driver import open_driver

open_driver()  # its primary context is the process's, for good
MADE = {"cuMemAlloc", "cuMemHostAlloc", "cuStreamCreate", "cuStreamBeginCapture", "cuGraphInstantiate"}


@pytest.fixture
def ort_cuda(monkeypatch, tmp_path):
    """An editor of that backend: its networks are the linear kernel, each on a stream of its own."""
    path, _ = gaussian(tmp_path / "model.onnx", SDES["vp"], np.zeros(SHAPE), std=0.5)

    class OnAStreamOfItsOwn(LinearNetwork):
        capturable = False

        def __init__(self, backend, shape):
            super().__init__(backend.driver, shape)
            self.shape, self.stream = shape, backend.driver.make_stream()

        def close(self):
            super().close()
            self.driver.free_stream(self.stream)

    monkeypatch.setattr("sdedit.backends.probe", lambda name: None)
    monkeypatch.setattr(ort_gpu.OrtGpuBackend, "_open_network", lambda self, shape: OnAStreamOfItsOwn(self, shape))
    gc.collect()
    before = double.live_objects
    editor = sdedit.load(path, backend="ort-cuda")
    return editor, before


@pytest.fixture
def tensorrt(write_plan):  # noqa: F811
    gc.collect()
    before = double.live_objects
    return sdedit.load(write_plan()), before


@pytest.fixture(params=["tensorrt", "ort_cuda"])
def opened(request):
    """An editor, and what was allocated before it."""
    return request.getfixturevalue(request.param)


def test_every_allocation_stream_event_module_and_graph_is_freed(opened):
    editor, before = opened
    with editor:
        for batch, steps in ((1, 4), (2, 4), (2, 7)):
            editor.edit(PICTURE, batch=batch, steps=steps, samples=3)
        editor.warmup(batch=3)
        assert double.live_objects != before
    gc.collect()  # pycuda frees some things with their last reference
    assert double.live_objects == before
    with pytest.raises(sdedit.ClosedError):
        editor.edit(PICTURE)
    editor.close()
    editor.backend.close()
    with pytest.raises(sdedit.ClosedError, match="the backend is closed"), editor.backend.executor(1, {}):
        pass
    assert double.live_objects == before


def test_it_is_all_freed_after_eight_threads_and_a_close_in_their_midst(opened):
    editor, before = opened
    wanted = [editor.edit(PICTURE, seed=seed, steps=6).x for seed in range(8)]
    begun, wrong = threading.Semaphore(0), []

    def work(seed):
        try:
            while True:
                begun.release()
                found = editor.edit(PICTURE, seed=seed, steps=6, batch=1 + seed % 2).x
                if not np.array_equal(found, wanted[seed]):
                    wrong.append(seed)
        except sdedit.ClosedError:
            return

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(32):
        begun.acquire()
    editor.close()
    for thread in threads:
        thread.join()
    gc.collect()
    assert wrong == []
    assert double.live_objects == before


def test_an_edit_inside_an_edit_and_one_between_the_batches_of_another_are_made(opened):
    editor, before = opened
    wanted = editor.edit(PICTURE, steps=3).x
    inner = []
    editor.edit(PICTURE, steps=2, on_step=lambda _: inner.append(editor.edit(PICTURE, steps=3).x) and None)
    options = sdedit.EditOptions(steps=3).resolved(editor.artifact.defaults)
    with editor.batches(options) as run:
        (alone,) = run([editor.prepare(PICTURE, options)])
        thread = threading.Thread(target=lambda: inner.append(editor.edit(PICTURE, steps=3).x), daemon=True)
        thread.start()
        thread.join(60)
    assert len(inner) == 3
    assert all(np.array_equal(found, wanted) for found in (*inner, alone.x[None]))
    editor.close()
    gc.collect()
    assert double.live_objects == before


def test_a_close_waits_for_the_stream_before_it_frees_what_an_edit_on_it_reads(tensorrt):
    editor, _ = tensorrt
    driver = editor.backend.driver
    with driver.current():
        pinned = driver.allocate_pinned(4 * int(np.prod(SHAPE)))
        pinned[:] = 0
        stream, guide = driver.make_stream(), driver.allocate(len(pinned))
        driver.upload(guide, pinned, stream)
        interface = {"shape": (1, *SHAPE), "typestr": "<f4", "data": (guide, False), "version": 3, "strides": None}
        result = editor.edit_tensor(type("Tensor", (), {"__cuda_array_interface__": interface})(), stream=stream)
        double.reset()
        editor.close()
        called = [name for name in double.calls if "Free" in name or "Synchronize" in name]
        driver.synchronize(stream)
        driver.free_stream(stream)
        driver.free_pinned(pinned)
        driver.free(guide)
    assert "Synchronize" in called[0]
    del result


def test_tensors_that_were_made_outlive_the_editor(tensorrt):
    editor, before = tensorrt
    driver = editor.backend.driver
    with driver.current():
        guide = driver.allocate(4 * int(np.prod(SHAPE)))
        pinned = driver.allocate_pinned(4 * int(np.prod(SHAPE)))
        pinned[:] = 0
        stream = driver.make_stream()
        driver.upload(guide, pinned, stream)
        driver.synchronize(stream)
    interface = {"shape": (1, *SHAPE), "typestr": "<f4", "data": (guide, False), "version": 3, "strides": None}
    ours = type("Tensor", (), {"__cuda_array_interface__": interface})()
    wanted = editor.edit(np.full((8, 12, 3), 128, np.uint8)).x  # nearly the same guide
    result = editor.edit_tensor(ours)
    editor.close()
    with driver.current():
        driver.download(pinned, result.pointer, stream)
        driver.synchronize(stream)
        found = pinned.view(np.float32).reshape(1, *SHAPE).copy()
        driver.free_pinned(pinned)
        driver.free_stream(stream)
        driver.free(guide)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.02)
    del result
    gc.collect()
    assert double.live_objects == before


@pytest.mark.parametrize("masked", [False, True])
def test_after_warming_up_an_edit_allocates_and_captures_nothing(masked, opened):
    editor, _ = opened
    mask = np.full((8, 12), 255, np.uint8) if masked else None
    editor.warmup(batch=2, steps=5, masked=masked)
    double.reset()
    editor.edit(PICTURE, mask=mask, samples=2, batch=2, steps=5)
    assert not MADE & set(double.calls)
