"""The device loop on the driver double: the kernels' real source and the real driver port, no GPU.

Run by tests/test_device_loop.py in a process of its own, once for each port that is installed.
"""

import ctypes
import gc
import os
import threading
import time
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest

import sdedit
from cuda_double.linear import LinearNetwork, double, edit, linear
from sdedit.cuda.device_loop import MOST_GRAPHS, MOST_STEPS_A_GRAPH, DeviceLoop
from sdedit.cuda.driver import VARIABLE, open_driver
from sdedit.cuda.interop import _capsule
from sdedit.cuda.pool import LoopPool
from sdedit.executor import Batch, HostExecutor
from sdedit.image import to_pixels

VP, VE = sdedit.VP(0.1, 20.0), sdedit.VE(0.02, 60.0)
ODD = (3, 5, 7)  # 105 elements, 35 pixels: multiples of nothing
EVEN = (3, 8, 12)


@pytest.fixture(autouse=True)
def fresh():
    gc.collect()  # pycuda frees some things with their last reference
    double.reset()
    yield
    double.reset()


@pytest.fixture
def driver():
    opened = open_driver()
    with opened.current():
        yield opened


@pytest.fixture
def loops(driver):
    """loops(shape) -> a DeviceLoop around the linear network; everything is freed afterwards, and that is checked."""
    before = double.live_objects
    made = []

    def make(shape, network=LinearNetwork, **options):
        made.append(DeviceLoop(driver, network(driver, shape, **options), shape))
        return made[-1]

    yield make
    double.reset()
    while made:
        made.pop().close()
    gc.collect()
    assert double.live_objects == before


def inputs(shape, *, masked, seed=0):
    rng = np.random.default_rng(seed)
    guide = rng.uniform(-1, 1, shape).astype(np.float32)
    mask = rng.uniform(0, 1, (shape[0], 1, *shape[2:])).astype(np.float32) if masked else None
    if mask is not None:
        mask[:, :, :2], mask[:, :, -2:] = 0, 1
    return guide, mask, [2**64 - 1 - 7 * j for j in range(shape[0])]


def on_host(guide, mask, seeds, table, repeats=1):
    x, _ = edit(HostExecutor(linear), guide, mask, seeds, table, repeats=repeats)
    return x


# --- what is computed ------------------------------------------------------------------------------------------------


def test_the_port_that_was_asked_for_is_the_one_that_runs(driver):
    assert driver.name == os.environ.get(VARIABLE, driver.name)
    assert driver.gpu.target.startswith("sm_")


@pytest.mark.parametrize("batch", range(1, 10))
@pytest.mark.parametrize("shape", [ODD, EVEN], ids=["odd", "even"])
def test_a_masked_edit_of_20_steps_equals_the_host_loop(loops, batch, shape):
    shape = (batch, *shape)
    table = sdedit.plan(VP, t0=0.5, steps=20, sampler="dpmpp-2m-sde")
    guide, mask, seeds = inputs(shape, masked=True)
    x, pixels = edit(loops(shape), guide, mask, seeds, table, repeats=2)
    wanted = on_host(guide, mask, seeds, table, repeats=2)
    np.testing.assert_allclose(x, wanted, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(pixels, np.stack([to_pixels(one) for one in x]))


@pytest.mark.parametrize("sampler", sdedit.SAMPLERS)
@pytest.mark.parametrize("sde", [VP, VE], ids=["vp", "ve"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_every_sampler_equals_the_host_loop(loops, sampler, sde, masked):
    shape = (2, *EVEN)
    table = sdedit.plan(sde, t0=0.4, steps=7, sampler=sampler)
    guide, mask, seeds = inputs(shape, masked=masked)
    x, _ = edit(loops(shape), guide, mask, seeds, table)
    np.testing.assert_allclose(x, on_host(guide, mask, seeds, table), rtol=1e-6, atol=1e-6)


def test_a_table_for_each_image_equals_the_host_loop(loops):
    shape = (3, *ODD)
    table = sdedit.StepTable.stack(
        [sdedit.plan(VP, t0=t0, steps=6, sampler=s) for t0, s in ((0.3, "em"), (0.5, "dpmpp-2m-sde"), (0.7, "ddim"))]
    )
    guide, mask, seeds = inputs(shape, masked=True)
    x, _ = edit(loops(shape), guide, mask, seeds, table)
    np.testing.assert_allclose(x, on_host(guide, mask, seeds, table), rtol=0, atol=1e-6)


def test_a_table_for_other_images_is_refused_before_anything_runs(loops):
    table = sdedit.StepTable.stack([sdedit.plan(VP, t0=0.5, steps=3)] * 3)
    shape = (2, *EVEN)
    loop = loops(shape)
    double.reset()
    with pytest.raises(sdedit.OptionError, match="step table for 3 images, batch of 2"):
        edit(loop, *inputs(shape, masked=False), table)
    assert double.work == []


@pytest.mark.parametrize("shape", [(2, *ODD), (1, *EVEN), (1, 1, 1, 1), (1, 3, 40, 40)])
@pytest.mark.parametrize("repeats", [1, 3])
def test_normals_are_those_of_the_specification_bit_for_bit(loops, shape, repeats):
    """With σ = 1, a guide of 0 and D = 0, x is the noise itself, at every step and repeat."""
    steps = 4
    table = sdedit.StepTable(np.array([[1, 0, 0, 1, 0, 1]] * steps, float))
    seen = {}
    loop = loops(shape, slope=0, offset=0)
    noise = sdedit.Noise(range(shape[0]), shape[1:])

    def look(step):
        loop._driver.download(loop._host["x"], int(loop._edit["x"][0]), loop.stream)
        loop._driver.synchronize(loop.stream)
        seen[step.repeat, step.number] = loop._host["x"].copy()

    edit(loop, np.zeros(shape, np.float32), None, list(range(shape[0])), table, repeats=repeats, on_step=look)
    assert len(seen) == steps * repeats
    for (repeat, number), x in seen.items():
        np.testing.assert_array_equal(x.view(np.uint32), noise(number, repeat, 0).view(np.uint32))


def test_an_all_white_mask_equals_no_mask_bit_for_bit(loops):
    shape = (2, *EVEN)
    guide, _, seeds = inputs(shape, masked=False)
    table = sdedit.plan(VP, t0=0.5, steps=5)
    loop = loops(shape)
    plain = edit(loop, guide, None, seeds, table)[0].copy()
    white = edit(loop, guide, np.ones((2, 1, *EVEN[1:]), np.float32), seeds, table)[0]
    np.testing.assert_array_equal(plain.view(np.uint32), white.view(np.uint32))


def test_results_do_not_depend_on_the_order_of_threads_nor_on_late_streams(loops):
    shape = (2, *ODD)
    guide, mask, seeds = inputs(shape, masked=True)
    table = sdedit.plan(VP, t0=0.5, steps=5, sampler="er-sde")
    loop = loops(shape)
    first = edit(loop, guide, mask, seeds, table, repeats=2)[0].copy()
    double.defer()
    double.run_backwards()
    again = edit(loop, guide, mask, seeds, table, repeats=2)[0]
    np.testing.assert_array_equal(first, again)


def test_edits_that_follow_each_other_without_a_wait_keep_their_own_inputs(loops, driver):
    shape = (1, *EVEN)
    table = sdedit.plan(VP, t0=0.5, steps=5)
    loop = loops(shape)
    wanted = [edit(loop, *inputs(shape, masked=False, seed=k), table)[0].copy() for k in range(3)]
    kept = [driver.allocate(wanted[0].nbytes) for _ in wanted]
    double.defer()
    for k, pointer in enumerate(kept):
        x = loop.start(Batch(*inputs(shape, masked=False, seed=k), table))
        driver.copy(pointer, x, wanted[0].nbytes, loop.stream)
    for k, pointer in enumerate(kept):
        driver.download(loop._host["x"], pointer, loop.stream)
        loop.finish(table)
        np.testing.assert_array_equal(loop._host["x"], wanted[k])
        driver.free(pointer)


# --- in which order --------------------------------------------------------------------------------------------------


def test_an_edit_is_one_graph_launch_and_one_wait(loops):
    shape = (1, *EVEN)
    guide, mask, seeds = inputs(shape, masked=True)
    table = sdedit.plan(VP, t0=0.5, steps=20)
    loop = loops(shape)
    edit(loop, guide, mask, seeds, table)
    double.reset()
    edit(loop, guide, mask, seeds, table)
    calls = [c for c in double.calls if not c.startswith(("cuCtx", "cuGetProcAddress"))]
    assert calls.count("cuGraphLaunch") == 1
    assert calls.count("cuLaunchKernel") == 2  # start, and pixels at the end
    assert calls.count("cuStreamSynchronize") == 1
    assert not {"cuMemAlloc", "cuMemFree", "cuStreamBeginCapture", "cuGraphInstantiate"} & set(calls)
    kernels = [line.split()[1] for line in double.work if line.startswith("kernel")]
    assert kernels == ["sdedit_start", *["linear", "sdedit_step"] * 20, "sdedit_pixels"]


def test_capture_comes_after_one_evaluation_to_warm_up(loops):
    shape = (1, *EVEN)
    edit(loops(shape), *inputs(shape, masked=False), sdedit.plan(VP, t0=0.5, steps=3))
    kernels = [line.split()[1] for line in double.work if line.startswith("kernel")]
    assert kernels == ["sdedit_start", "linear", *["linear", "sdedit_step"] * 3, "sdedit_pixels"]
    calls = double.calls
    assert calls.index("cuStreamBeginCapture") < calls.index("cuStreamEndCapture") < calls.index("cuGraphInstantiate")


def test_nothing_is_collected_in_a_capture_though_another_ends_meanwhile(loops, driver, monkeypatch):
    shape = (1, *EVEN)
    table = sdedit.plan(VP, t0=0.5, steps=2, sampler="em")
    first, second = (loops(shape) for _ in range(2))
    collecting, started, failures = [], threading.Event(), []

    def step(loop, seconds):
        real = loop._step

        def slowly():
            started.set()
            time.sleep(seconds)
            collecting.append(gc.isenabled())
            real()

        return slowly

    def run(loop):
        try:
            with driver.current():
                edit(loop, *inputs(shape, masked=False), table)
        except BaseException as error:
            failures.append(error)

    monkeypatch.setattr(first, "_step", step(first, 0.2))
    monkeypatch.setattr(second, "_step", step(second, 0.4))  # ends after the first has turned it on again
    threads = [threading.Thread(target=run, args=(loop,)) for loop in (first, second)]
    threads[0].start()
    assert started.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert collecting == [False, False]
    assert gc.isenabled()


def test_a_long_edit_is_several_launches_of_the_same_graph(loops):
    shape = (1, 3, 4, 4)
    guide, mask, seeds = inputs(shape, masked=False)
    steps = 2 * MOST_STEPS_A_GRAPH + 5
    table = sdedit.plan(VP, t0=0.5, steps=steps)
    x, _ = edit(loops(shape), guide, mask, seeds, table)
    assert double.calls.count("cuGraphLaunch") == 3
    assert double.calls.count("cuGraphInstantiate") == 2
    np.testing.assert_allclose(x, on_host(guide, mask, seeds, table), rtol=0, atol=1e-6)


def test_many_kinds_of_edit_keep_few_graphs(loops):
    shape = (1, 3, 4, 4)
    loop = loops(shape)
    for steps in range(1, 3 * MOST_GRAPHS):
        edit(loop, *inputs(shape, masked=False), sdedit.plan(VP, t0=0.5, steps=steps))
    assert double.live_objects["executables"] <= MOST_GRAPHS


def test_on_step_sees_every_step_and_its_estimate(loops):
    shape = (2, *EVEN)
    guide, mask, seeds = inputs(shape, masked=True)
    table = sdedit.plan(VP, t0=0.5, steps=4)
    seen, wanted = [], []
    edit(loops(shape), guide, mask, seeds, table, repeats=2,
        on_step=lambda s: seen.append((s.number, s.steps, s.repeat, float(s.sigma), s.denoised.copy())),
    )  # fmt: skip
    edit(HostExecutor(linear),
        guide, mask, seeds, table, repeats=2,
        on_step=lambda s: wanted.append((s.number, s.steps, s.repeat, float(s.sigma), s.denoised.copy())),
    )  # fmt: skip
    assert [s[:4] for s in seen] == [w[:4] for w in wanted]
    for s, w in zip(seen, wanted, strict=True):
        np.testing.assert_allclose(s[4], w[4], rtol=0, atol=1e-6)


def test_on_step_can_cancel_and_the_loop_can_be_used_again(loops):
    shape = (1, *EVEN)
    guide, mask, seeds = inputs(shape, masked=False)
    table = sdedit.plan(VP, t0=0.5, steps=6)
    loop = loops(shape)
    with pytest.raises(sdedit.Cancelled, match="cancelled at step 3 of 6"):
        edit(loop, guide, mask, seeds, table, on_step=lambda s: s.number < 3)
    x, _ = edit(loop, guide, mask, seeds, table)
    np.testing.assert_allclose(x, on_host(guide, mask, seeds, table), rtol=0, atol=1e-6)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_network_that_overflows_is_named_with_its_step_and_repeat(loops):
    shape = (1, *EVEN)
    with pytest.raises(sdedit.NetworkError, match=r"NaN or Inf at step 2 of 5 \(repeat 0, σ = "):
        edit(loops(shape, slope=1e30), *inputs(shape, masked=False), sdedit.plan(VP, t0=0.5, steps=5), repeats=2)


def test_without_capture_steps_are_launched_one_by_one_and_that_is_said(loops):
    shape = (1, *EVEN)
    guide, mask, seeds = inputs(shape, masked=True)
    table = sdedit.plan(VP, t0=0.5, steps=5)
    loop = loops(shape)
    double.fail("cuStreamBeginCapture", 900)
    x, _ = edit(loop, guide, mask, seeds, table)
    np.testing.assert_allclose(x, on_host(guide, mask, seeds, table), rtol=0, atol=1e-6)
    (note,) = loop.notes
    assert note.startswith("no CUDA graph, steps are launched one by one: the step cannot be captured: ")
    assert "cuStreamBeginCapture failed: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" in note
    assert "cuGraphLaunch" not in double.calls


@pytest.mark.parametrize("call", ["cuGraphAddChildGraphNode", "cuGraphInstantiate"])
def test_where_several_steps_make_no_graph_each_is_one_and_that_is_said(loops, call):
    shape = (1, *EVEN)
    guide, mask, seeds = inputs(shape, masked=True)
    table = sdedit.plan(VP, t0=0.5, steps=5)
    loop = loops(shape)
    double.fail(call, 2)
    x, _ = edit(loop, guide, mask, seeds, table)
    np.testing.assert_allclose(x, on_host(guide, mask, seeds, table), rtol=0, atol=1e-6)
    (note,) = loop.notes
    assert note.startswith("every step is a CUDA graph of its own: ")
    assert "CUDA_ERROR_OUT_OF_MEMORY" in note
    assert double.calls.count("cuGraphLaunch") == 5


def test_where_no_step_makes_a_graph_that_is_said_too(loops):
    shape = (1, *EVEN)
    guide, mask, seeds = inputs(shape, masked=True)
    table = sdedit.plan(VP, t0=0.5, steps=5)
    loop = loops(shape)
    for attempt in (1, 2):
        double.fail("cuGraphInstantiate", 2, attempt)
    x, _ = edit(loop, guide, mask, seeds, table)
    np.testing.assert_allclose(x, on_host(guide, mask, seeds, table), rtol=0, atol=1e-6)
    assert "cuGraphLaunch" not in double.calls
    assert "steps are launched one by one" in loop.notes[1]


def test_a_network_that_cannot_be_captured_runs_all_the_same(loops):
    class Waits(LinearNetwork):
        def enqueue(self, stream):
            super().enqueue(stream)
            self.driver.synchronize(stream)

    shape = (1, *EVEN)
    guide, mask, seeds = inputs(shape, masked=True)
    table = sdedit.plan(VP, t0=0.5, steps=5)
    loop = loops(shape, Waits)
    x, _ = edit(loop, guide, mask, seeds, table)
    np.testing.assert_allclose(x, on_host(guide, mask, seeds, table), rtol=0, atol=1e-6)
    assert "the step cannot be captured: " in loop.notes[0]
    x, _ = edit(loop, guide, mask, seeds, table)
    assert len(loop.notes) == 1


def run_once(driver, network, shape):
    with driver.current():
        pass
    loop = DeviceLoop(driver, network, shape)
    try:
        edit(loop, *inputs(shape, masked=True), sdedit.plan(VP, t0=0.5, steps=3))
    finally:
        loop.close()


CALLS = [
    "cuMemAlloc", "cuMemHostAlloc", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuLaunchKernel", "cuStreamSynchronize",
    "cuStreamCreate", "cuEventCreate", "cuEventRecord", "cuModuleLoadData", "cuModuleGetFunction", "cuCtxPushCurrent",
    "cuGraphLaunch",
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_a_driver_call_that_fails_is_an_error_that_names_it(driver, call):
    shape = (1, *EVEN)
    before = double.live_objects
    network = LinearNetwork(driver, shape)
    if call == "cuCtxPushCurrent" and driver.name == "pycuda":
        pytest.skip("pycuda's own stack of contexts does not survive that")
    for name in (call, "cuModuleLoadDataEx") if call == "cuModuleLoadData" else (call,):
        double.fail(name, 719)  # CUDA_ERROR_LAUNCH_FAILED
    with pytest.raises(sdedit.DeviceError) as raised:
        run_once(driver, network, shape)
    assert call.removeprefix("cu").lower() in str(raised.value).replace("_v2", "").lower().removeprefix("cu")
    assert "CUDA_ERROR_LAUNCH_FAILED" in str(raised.value) or "launch fail" in str(raised.value).lower()
    assert raised.value.hint
    double.reset()
    if call == "cuCtxPushCurrent":
        network.close()
    del network, raised
    gc.collect()
    assert double.live_objects == before


def test_memory_that_runs_out_says_what_to_do(driver):
    for attempt in (1, 2) if driver.name == "pycuda" else (1,):  # pycuda collects garbage and tries again
        double.fail("cuMemAlloc", 2, attempt)
    with pytest.raises(sdedit.DeviceError, match="cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY") as raised:
        DeviceLoop(driver, LinearNetwork(driver, (1, *EVEN)), (1, *EVEN))
    assert raised.value.hint.startswith("use a smaller --batch")


def test_kernels_of_another_interface_run_nothing_and_say_so(loops):
    shape = (1, *EVEN)
    loop = loops(shape)
    loop._edit["interface"] = 2
    with pytest.raises(sdedit.DeviceError, match="another interface version"):
        edit(loop, *inputs(shape, masked=False), sdedit.plan(VP, t0=0.5, steps=2))


# --- other libraries' tensors ------------------------------------------------------------------------------------


class Elsewhere:
    """A tensor of another library: memory of the double's, by its interface."""

    def __init__(self, driver, values, **changed):
        self.driver, self.values = driver, np.ascontiguousarray(values)
        self.pointer = driver.allocate(self.values.nbytes)
        ctypes.memmove(self.pointer, self.values.ctypes.data, self.values.nbytes)
        self.__cuda_array_interface__ = {
            "shape": self.values.shape, "typestr": self.values.dtype.str, "data": (self.pointer, False), "version": 3,
            "strides": None, **changed,
        }  # fmt: skip


def made(shape):
    driver = open_driver()
    return DeviceLoop(driver, LinearNetwork(driver, shape), shape)


class Backend:
    def __init__(self, driver):
        self.driver = driver
        self.pool = LoopPool()

    def on_gpu(self):
        return self

    def device_loop(self, batch, conditions):
        return self.pool.lease((batch, *EVEN), made)


class Model:
    name = "linear"
    channels, height, width = EVEN
    defaults = MappingProxyType({"steps": 6})
    sde = VP


@pytest.fixture
def tensor_editor(driver):
    editor = sdedit.Editor(Model(), Backend(driver))
    yield editor
    double.reset()
    editor.backend.pool.close()


def fetched(driver, tensor):
    found = tensor.__cuda_array_interface__
    floats = (ctypes.c_float * int(np.prod(found["shape"]))).from_address(found["data"][0])
    return np.ctypeslib.as_array(floats).reshape(found["shape"]).copy()


def test_a_tensor_is_edited_where_it_lies(driver, tensor_editor):
    guide, mask, _ = inputs((3, *EVEN), masked=True)
    ours, theirs = Elsewhere(driver, guide), Elsewhere(driver, mask)
    double.reset()
    result = tensor_editor.edit_tensor(ours, mask=theirs, seed=5, repeats=2)
    assert result.shape == guide.shape
    assert [
        w for w in double.work if "to device" in w and int(w.split()[-1]) >= guide.nbytes // 2 and "host" in w
    ] == []
    np.testing.assert_allclose(
        fetched(driver, result), on_host(guide, mask, [5, 6, 7], sdedit.plan(VP, steps=6), repeats=2), rtol=0, atol=1e-6
    )


def test_a_result_is_taken_by_dlpack_and_outlives_its_maker(driver, tensor_editor):
    from sdedit.cuda.interop import GpuView

    guide, _, _ = inputs((1, *EVEN), masked=False)
    before = double.live_bytes
    result = tensor_editor.edit_tensor(Elsewhere(driver, guide))
    wanted = fetched(driver, result)

    class Capsule:
        def __init__(self, tensor):
            self.__dlpack__, self.__dlpack_device__ = tensor.__dlpack__, tensor.__dlpack_device__

    view = GpuView(Capsule(result), (1, *EVEN), "guide")
    del result
    again = tensor_editor.edit_tensor(Capsule(tensor_editor.edit_tensor(Elsewhere(driver, guide))))
    assert again.shape == (1, *EVEN)
    assert view.shape == (1, *EVEN)
    got = np.ctypeslib.as_array((ctypes.c_float * wanted.size).from_address(view.pointer)).reshape(wanted.shape)
    np.testing.assert_array_equal(got, wanted)
    held = double.live_bytes
    del view
    assert double.live_bytes == held - wanted.nbytes
    again.__dlpack__()  # a capsule that nobody takes
    del again
    assert double.live_bytes < held - wanted.nbytes
    assert double.live_bytes >= before


def test_on_the_callers_stream_the_result_is_not_waited_for(driver, tensor_editor):
    guide, mask, _ = inputs((1, *EVEN), masked=True)
    wanted = on_host(guide, mask, [3], sdedit.plan(VP, steps=6))
    stream = driver.make_stream()
    ours, theirs = Elsewhere(driver, np.zeros_like(guide)), Elsewhere(driver, mask)
    tensor_editor.edit_tensor(ours, stream=stream)  # makes the loop and its graph
    double.reset()
    double.defer()
    pinned = driver.allocate_pinned(guide.nbytes)
    pinned.view(np.float32)[:] = guide.ravel()
    driver.upload(ours.pointer, pinned, stream)  # the guide is only on its way
    result = tensor_editor.edit_tensor(ours, mask=theirs, stream=stream, seed=3)
    assert not {"cuStreamSynchronize", "cuCtxSynchronize"} & set(double.calls)
    assert result.__cuda_array_interface__["stream"] == stream
    driver.download(pinned, result.pointer, stream)  # in the stream's order, after the edit
    driver.synchronize(stream)
    np.testing.assert_allclose(pinned.view(np.float32).reshape(guide.shape), wanted, rtol=0, atol=1e-6)
    driver.free_pinned(pinned)
    driver.free_stream(stream)


def test_a_guide_that_another_stream_still_fills_is_waited_for(driver, tensor_editor):
    guide, _, _ = inputs((1, *EVEN), masked=False)
    wanted = on_host(guide, None, [0], sdedit.plan(VP, steps=6))
    stream = driver.make_stream()
    ours = Elsewhere(driver, np.zeros_like(guide), stream=stream)
    pinned = driver.allocate_pinned(guide.nbytes)
    pinned.view(np.float32)[:] = guide.ravel()
    double.defer()
    driver.upload(ours.pointer, pinned, stream)
    result = tensor_editor.edit_tensor(ours)
    assert result.__cuda_array_interface__["stream"] is None  # finished
    np.testing.assert_allclose(fetched(driver, result), wanted, rtol=0, atol=1e-6)
    driver.synchronize(stream)
    driver.free_pinned(pinned)
    driver.free_stream(stream)


def test_a_tensor_as_pytorch_has_them_is_waited_for_too(driver, tensor_editor):
    """Its older interface names no stream; by DLPack its library makes ours wait for what fills it."""

    class Torch(Elsewhere):
        def __dlpack_device__(self):
            return 2, 0

        def __dlpack__(self, *, stream):
            if stream != -1:
                self.driver.graphs.follow(stream, self.filled_on)
            return _capsule(SimpleNamespace(pointer=self.pointer, shape=self.values.shape))

    guide, _, _ = inputs((1, *EVEN), masked=False)
    wanted = on_host(guide, None, [0], sdedit.plan(VP, steps=6))
    ours = Torch(driver, np.zeros_like(guide), version=2)
    ours.filled_on = driver.make_stream()
    pinned = driver.allocate_pinned(guide.nbytes)
    pinned.view(np.float32)[:] = guide.ravel()
    double.defer()
    driver.upload(ours.pointer, pinned, ours.filled_on)
    np.testing.assert_allclose(fetched(driver, tensor_editor.edit_tensor(ours)), wanted, rtol=0, atol=1e-6)
    driver.synchronize(ours.filled_on)
    driver.free_pinned(pinned)
    driver.free_stream(ours.filled_on)


def test_a_guide_at_any_address_is_taken(driver, tensor_editor):
    guide, _, _ = inputs((1, *EVEN), masked=False)
    shifted = np.concatenate([[0.0], guide.ravel()]).astype(np.float32)
    whole = Elsewhere(driver, shifted)
    whole.__cuda_array_interface__ |= {"shape": guide.shape, "data": (whole.pointer + 4, False)}
    result = tensor_editor.edit_tensor(whole)
    np.testing.assert_allclose(
        fetched(driver, result), on_host(guide, None, [0], sdedit.plan(VP, steps=6)), rtol=0, atol=1e-6
    )


def test_a_tensor_whose_library_refuses_says_what_to_do(tensor_editor):
    class Gradient:
        @property
        def __cuda_array_interface__(self):
            raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad.")

    with pytest.raises(sdedit.ImageError, match="the guide cannot be used: Can't get") as raised:
        tensor_editor.edit_tensor(Gradient())
    assert "detach" in raised.value.hint


def test_a_kept_step_cannot_be_read_later(loops):
    shape = (1, *EVEN)
    kept = []
    loop = loops(shape)
    edit(loop, *inputs(shape, masked=False), sdedit.plan(VP, t0=0.5, steps=2), on_step=kept.append)
    with pytest.raises(sdedit.OptionError, match="a step that has passed"):
        _ = kept[0].denoised


def test_a_pool_keeps_as_many_loops_as_were_busy(driver):
    pool = LoopPool()
    shape = (1, *EVEN)
    with pool.lease(shape, made) as a, pool.lease(shape, made) as b, pool.lease(shape, made) as c:
        assert len({id(one) for one in (a, b, c)}) == 3
    double.reset()
    with pool.lease(shape, made), pool.lease(shape, made), pool.lease(shape, made):
        assert "cuMemAlloc" not in double.calls
    with pytest.raises(sdedit.Cancelled), pool.lease(shape, made):
        raise sdedit.Cancelled("cancelled", hint="")
    with pool.lease(shape, made):
        assert "cuMemAlloc" not in double.calls
    pool.close()
    assert double.live_objects["streams"] == 0


def test_idle_loops_make_room_where_memory_runs_out(driver):
    pool = LoopPool()
    with pool.lease((1, *EVEN), made):
        pass
    for attempt in (1, 2) if driver.name == "pycuda" else (1,):
        double.fail("cuMemAlloc", 2, attempt)
    with pool.lease((2, *EVEN), made) as loop:
        assert loop.shape == (2, *EVEN)
    pool.close()


@pytest.mark.parametrize(
    ("values", "changed", "told"),
    [
        (np.zeros((1, *EVEN), np.float64), {}, "the guide is <f8; wanted float32"),
        (np.zeros((1, 3, 8, 8), np.float32), {}, r"the guide is \(1, 3, 8, 8\); wanted \(B, 3, 8, 12\)"),
        (np.zeros((1, *EVEN), np.float32), {"strides": (4, 4, 4, 4)}, "the guide is not contiguous"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(driver, tensor_editor, values, changed, told):
    with pytest.raises(sdedit.ImageError, match=told):
        tensor_editor.edit_tensor(Elsewhere(driver, values, **changed))


def test_what_is_no_tensor_on_a_gpu_is_refused(tensor_editor):
    with pytest.raises(sdedit.ImageError, match="the guide is list; wanted a tensor on the GPU"):
        tensor_editor.edit_tensor([0.0])
    with pytest.raises(sdedit.ImageError, match="not on the first CUDA device"):
        tensor_editor.edit_tensor(type("T", (), {"__dlpack__": 0, "__dlpack_device__": lambda self: (1, 0)})())
    with pytest.raises(sdedit.OptionError, match="unknown option fit"):
        tensor_editor.edit_tensor(None, fit="crop")
    with pytest.raises(sdedit.OptionError, match="stream is str; wanted a CUDA stream"):
        tensor_editor.edit_tensor(None, stream="0")
