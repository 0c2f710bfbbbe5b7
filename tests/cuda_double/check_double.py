"""Tests of the driver double itself, through cuda.bindings; test_cuda_double.py runs them in a process of their own."""

import ctypes
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cuda_double

RELAXED, GLOBAL = 2, 0
IMAGE = b"\x50\xed\x55\xba" + bytes(12)  # only its magic number counts

ScaleArgument = np.dtype(
    [("source", np.uint64), ("target", np.uint64), ("count", np.uint32), ("factor", np.float32)], align=True
)
SumArgument = np.dtype([(name, np.uint64) for name in ("source", "partial", "ticket", "total")])
MistakeArgument = np.dtype([("target", np.uint64), ("kind", np.uint32)], align=True)


@pytest.fixture(scope="session")
def double(tmp_path_factory: pytest.TempPathFactory) -> cuda_double.Double:
    folder = tmp_path_factory.mktemp("double")
    library = cuda_double.build(folder, [cuda_double.FOLDER / "example.cpp"])
    assert cuda_double.build(folder, [cuda_double.FOLDER / "example.cpp"]) == library
    return cuda_double.load(library)


@pytest.fixture(autouse=True)
def leaves_nothing(double: cuda_double.Double) -> Iterator[None]:
    """Every test begins and ends with a device that holds nothing."""
    double.reset()
    yield
    double.reset()
    assert double.live_bytes == 0
    assert not any(double.live_objects.values()), double.live_objects


class Device:
    """cuda.bindings' driver with errors raised, a context and a stream, and kernels by name."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self.driver = driver
        self.call("cuInit", 0)
        self.context = self.call("cuDevicePrimaryCtxRetain", 0)
        self.call("cuCtxPushCurrent", self.context)
        self.stream = self.call("cuStreamCreate", 1)
        self.module = self.call("cuModuleLoadData", IMAGE)

    def result(self, name: str, *arguments: Any) -> str:
        """The result's name, without CUDA_ERROR_."""
        return getattr(self.driver, name)(*arguments)[0].name.removeprefix("CUDA_").removeprefix("ERROR_")

    def call(self, name: str, *arguments: Any) -> Any:
        code, *values = getattr(self.driver, name)(*arguments)
        assert code == 0, f"{name}: {code.name}"
        return values[0] if len(values) == 1 else tuple(values)

    def close(self) -> None:
        self.call("cuModuleUnload", self.module)
        self.call("cuStreamDestroy", self.stream)
        self.call("cuCtxPopCurrent")
        self.call("cuDevicePrimaryCtxRelease", 0)

    def upload(self, values: np.ndarray) -> int:
        address = self.call("cuMemAlloc", values.nbytes)
        self.call("cuMemcpyHtoD", address, values, values.nbytes)
        return int(address)

    def download(self, address: int, like: np.ndarray) -> np.ndarray:
        values = np.empty_like(like)
        self.call("cuMemcpyDtoH", values, address, values.nbytes)
        return values

    def free(self, *addresses: int) -> None:
        for address in addresses:
            self.call("cuMemFree", address)

    def function(self, name: str) -> Any:
        return self.call("cuModuleGetFunction", self.module, name.encode())

    def launch(self, name: str, argument: np.ndarray, grid: int, block: int, *, check: bool = True) -> str:
        pointers = np.array([argument.ctypes.data], np.uint64)
        call = (self.function(name), grid, 1, 1, block, 1, 1, 0, self.stream, pointers.ctypes.data, 0)
        result = self.result("cuLaunchKernel", *call)
        assert result == "SUCCESS" or not check
        return result

    def capture(self, name: str, argument: np.ndarray, grid: int, block: int) -> Any:
        """The graph of one launch."""
        self.call("cuStreamBeginCapture", self.stream, self.driver.CUstreamCaptureMode(RELAXED))
        self.launch(name, argument, grid, block)
        return self.call("cuStreamEndCapture", self.stream)


@pytest.fixture
def device(double: cuda_double.Double, leaves_nothing: None) -> Iterator[Device]:
    opened = Device()
    yield opened
    double.reset()
    opened.close()


@pytest.fixture
def scale(device: Device) -> Iterator[SimpleNamespace]:
    """1000 numbers, room for their double, and the argument of the kernel that doubles them."""
    numbers = np.arange(1000, dtype=np.float32)
    source, target = device.upload(numbers), int(device.call("cuMemAlloc", numbers.nbytes))
    argument = np.array((source, target, 1000, 2), ScaleArgument)
    yield SimpleNamespace(numbers=numbers, source=source, target=target, argument=argument)
    device.free(source, target)


def test_kernel_parameters(device: Device, scale: SimpleNamespace, double: cuda_double.Double) -> None:
    assert np.isnan(device.download(scale.target, scale.numbers)).all()
    device.launch("example_scale_kernel", scale.argument, 4, 256)
    np.testing.assert_array_equal(device.download(scale.target, scale.numbers), 2 * scale.numbers)
    assert "kernel example_scale_kernel 4x1x1 256x1x1" in double.work
    assert double.calls[-2:] == ["cuLaunchKernel", "cuMemcpyDtoH"]


def extra(argument: np.ndarray, size: ctypes.c_size_t) -> Any:
    return (ctypes.c_void_p * 5)(1, argument.ctypes.data, 2, ctypes.addressof(size), 0)


def test_kernel_parameters_in_one_buffer(device: Device, scale: SimpleNamespace) -> None:
    call = (device.function("example_scale_kernel"), 4, 1, 1, 256, 1, 1, 0, device.stream, 0)
    size = ctypes.c_size_t(scale.argument.nbytes)
    assert device.result("cuLaunchKernel", *call, ctypes.addressof(extra(scale.argument, size))) == "SUCCESS"
    np.testing.assert_array_equal(device.download(scale.target, scale.numbers), 2 * scale.numbers)
    short = ctypes.c_size_t(scale.argument.nbytes - 1)
    assert device.result("cuLaunchKernel", *call, ctypes.addressof(extra(scale.argument, short))) == "INVALID_VALUE"


@pytest.mark.parametrize("backwards", [False, True])
def test_barriers_atomics_and_tickets(device: Device, double: cuda_double.Double, backwards: bool) -> None:
    numbers = np.random.default_rng(3).integers(0, 1000, 9 * 256, np.uint32)
    source, ticket = device.upload(numbers), device.upload(np.zeros(1, np.uint32))
    partial, total = int(device.call("cuMemAlloc", 9 * 4)), int(device.call("cuMemAlloc", 4))
    double.run_backwards(backwards)
    for _ in range(3):
        device.launch("example_sum_kernel", np.array((source, partial, ticket, total), SumArgument), 9, 256)
        assert device.download(total, numbers[:1]) == numbers.sum()
        assert device.download(ticket, numbers[:1]) == 0
    device.free(source, ticket, partial, total)


def test_a_captured_launch_runs_at_replay_with_the_argument_it_had(device: Device, scale: SimpleNamespace) -> None:
    argument = scale.argument.copy()
    graph = device.capture("example_scale_kernel", argument, 4, 256)
    assert np.isnan(device.download(scale.target, scale.numbers)).all()
    argument["factor"] = 5
    executable = device.call("cuGraphInstantiate", graph, 0)
    device.call("cuGraphDestroy", graph)
    device.call("cuGraphLaunch", executable, device.stream)
    device.call("cuGraphExecDestroy", executable)
    np.testing.assert_array_equal(device.download(scale.target, scale.numbers), 2 * scale.numbers)


@pytest.mark.parametrize("chained", [True, False])
def test_child_graphs_run_in_the_order_of_their_dependencies(
    device: Device, scale: SimpleNamespace, chained: bool
) -> None:
    graphs = []
    for source, factor in ((scale.source, 2), (scale.target, 10)):
        argument = np.array((source, scale.target, 1000, factor), ScaleArgument)
        graphs.append(device.capture("example_scale_kernel", argument, 4, 256))
    chain = device.call("cuGraphCreate", 0)
    nodes: list[Any] = []
    for graph in graphs:
        before = nodes[-1:] if chained else []
        nodes.append(device.call("cuGraphAddChildGraphNode", chain, before, len(before), graph))
    assert device.call("cuGraphGetNodes", chain, 9)[1] == 2
    executable = device.call("cuGraphInstantiate", chain, 0)
    device.call("cuGraphLaunch", executable, device.stream)
    # Without the dependency the second ran first, and the first overwrote what it had made.
    expected = scale.numbers * (20 if chained else 2)
    np.testing.assert_array_equal(device.download(scale.target, scale.numbers), expected)
    device.call("cuGraphExecDestroy", executable)
    for graph in (*graphs, chain):
        device.call("cuGraphDestroy", graph)


def test_copies_and_fills_are_captured_too(device: Device, scale: SimpleNamespace, double: cuda_double.Double) -> None:
    results = np.zeros(1000, np.float32)
    device.call("cuStreamBeginCapture", device.stream, device.driver.CUstreamCaptureMode(RELAXED))
    device.call("cuMemsetD32Async", scale.source, 0x3F800000, 500, device.stream)
    device.launch("example_scale_kernel", scale.argument, 4, 256)
    device.call("cuMemcpyDtoHAsync", results, scale.target, results.nbytes, device.stream)
    graph = device.call("cuStreamEndCapture", device.stream)
    executable = device.call("cuGraphInstantiate", graph, 0)
    double.reset()
    device.call("cuGraphLaunch", executable, device.stream)
    assert double.calls == ["cuGraphLaunch"]
    assert double.work == ["fill 2000", "kernel example_scale_kernel 4x1x1 256x1x1", "copy device to host 4000"]
    np.testing.assert_array_equal(results, [2] * 500 + list(2 * scale.numbers[500:]))
    device.call("cuGraphExecDestroy", executable)
    device.call("cuGraphDestroy", graph)


def test_a_second_stream_joins_a_capture_by_events(device: Device, scale: SimpleNamespace) -> None:
    other, fork, join = (device.call(*name) for name in (("cuStreamCreate", 1), *2 * (("cuEventCreate", 2),)))
    for wait_for_it in (True, False):
        device.call("cuStreamBeginCapture", device.stream, device.driver.CUstreamCaptureMode(RELAXED))
        device.call("cuEventRecord", fork, device.stream)
        device.call("cuStreamWaitEvent", other, fork, 0)
        device.call("cuMemsetD8Async", scale.target, 0, 4000, other)
        device.call("cuEventRecord", join, other)
        if wait_for_it:
            device.call("cuStreamWaitEvent", device.stream, join, 0)
            device.call("cuGraphDestroy", device.call("cuStreamEndCapture", device.stream))
        else:
            assert device.result("cuStreamEndCapture", device.stream) == "STREAM_CAPTURE_UNJOINED"
    for event in (fork, join):
        device.call("cuEventDestroy", event)
    device.call("cuStreamDestroy", other)


@pytest.mark.parametrize(
    ("mode", "call", "result"),
    [
        (RELAXED, "cuStreamSynchronize", "STREAM_CAPTURE_UNSUPPORTED"),
        (RELAXED, "cuCtxSynchronize", "STREAM_CAPTURE_UNSUPPORTED"),
        (RELAXED, "cuMemFree", "STREAM_CAPTURE_UNSUPPORTED"),
        (RELAXED, "cuMemAlloc", "SUCCESS"),
        (GLOBAL, "cuMemAlloc", "STREAM_CAPTURE_UNSUPPORTED"),
        (GLOBAL, "cuMemcpyHtoD", "STREAM_CAPTURE_UNSUPPORTED"),
        (RELAXED, "cuMemcpyHtoD", "SUCCESS"),
        (RELAXED, "cuStreamBeginCapture", "ILLEGAL_STATE"),
    ],
)
def test_calls_that_a_capture_does_not_allow(
    device: Device, scale: SimpleNamespace, mode: int, call: str, result: str
) -> None:
    capture_mode = device.driver.CUstreamCaptureMode(mode)
    arguments = {
        "cuStreamSynchronize": (device.stream,),
        "cuMemFree": (scale.target,),
        "cuMemAlloc": (16,),
        "cuMemcpyHtoD": (scale.target, scale.numbers, 16),
        "cuStreamBeginCapture": (device.stream, capture_mode),
    }.get(call, ())
    device.call("cuStreamBeginCapture", device.stream, capture_mode)
    code, *values = getattr(device.driver, call)(*arguments)
    ended, graph = device.driver.cuStreamEndCapture(device.stream)
    assert code.name.removeprefix("CUDA_").removeprefix("ERROR_") == result
    if result == "STREAM_CAPTURE_UNSUPPORTED":
        assert ended.name == "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
        return
    assert ended == 0
    device.call("cuGraphDestroy", graph)
    if call == "cuMemAlloc":
        device.free(int(values[0]))


def test_the_default_stream_cannot_be_used_while_a_blocking_stream_captures(
    device: Device, scale: SimpleNamespace
) -> None:
    blocking = device.call("cuStreamCreate", 0)
    device.call("cuStreamBeginCapture", blocking, device.driver.CUstreamCaptureMode(RELAXED))
    assert device.result("cuMemsetD8Async", scale.target, 0, 1, 0) == "STREAM_CAPTURE_IMPLICIT"
    assert device.result("cuStreamEndCapture", blocking) == "STREAM_CAPTURE_INVALIDATED"
    device.call("cuStreamDestroy", blocking)


def test_nothing_works_without_a_context(device: Device) -> None:
    device.call("cuCtxPopCurrent")
    assert device.result("cuMemAlloc", 16) == "INVALID_CONTEXT"
    device.call("cuCtxPushCurrent", device.context)
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(device.result("cuStreamCreate", 0)))
    thread.start()
    thread.join()
    assert results == ["INVALID_CONTEXT"]


def test_ranges_must_lie_in_one_live_allocation(device: Device, scale: SimpleNamespace) -> None:
    numbers, target = scale.numbers, scale.target
    assert device.result("cuMemcpyHtoD", target + 4, numbers, numbers.nbytes) == "INVALID_VALUE"
    assert device.result("cuMemcpyDtoH", numbers, target - 4, 8) == "INVALID_VALUE"
    assert device.result("cuMemcpyHtoD", target, target, 8) == "INVALID_VALUE"
    assert device.result("cuMemcpyDtoDAsync", target, numbers.ctypes.data, 8, device.stream) == "INVALID_VALUE"
    assert device.result("cuMemsetD32", target, 0, 1001) == "INVALID_VALUE"
    assert device.result("cuMemsetD32", target + 2, 0, 1) == "INVALID_VALUE"
    assert device.result("cuMemFree", target + 4) == "INVALID_VALUE"
    assert device.result("cuMemAlloc", 0) == "INVALID_VALUE"
    assert device.result("cuMemAlloc", 2**40) == "OUT_OF_MEMORY"


def test_memory_is_counted(device: Device, double: cuda_double.Double) -> None:
    one, two = int(device.call("cuMemAlloc", 1000)), int(device.call("cuMemAlloc", 500))
    device.free(one)
    assert (double.live_bytes, double.peak_bytes) == (500, 1500)
    assert double.live_objects["device_allocations"] == 1
    device.free(two)
    assert device.result("cuMemFree", two) == "INVALID_VALUE"
    host = device.call("cuMemHostAlloc", 64, 0)
    assert (double.live_bytes, double.live_objects["host_allocations"]) == (0, 1)
    device.call("cuMemFreeHost", host)


def test_images_and_launches_are_checked(device: Device, scale: SimpleNamespace) -> None:
    assert device.result("cuModuleLoadData", b"not an image at all") == "INVALID_IMAGE"
    assert device.result("cuModuleLoadData", b"// text\n.version 8.0\n.target sm_75\n") == "SUCCESS"
    assert device.result("cuModuleGetFunction", device.module, b"no_such_kernel") == "NOT_FOUND"
    for grid, block in ((0, 32), (1, 0), (1, 1025)):
        assert device.launch("example_scale_kernel", scale.argument, grid, block, check=False) == "INVALID_VALUE"


@pytest.mark.parametrize(("kind", "result"), [(0, "ILLEGAL_ADDRESS"), (2, "LAUNCH_FAILED"), (3, "LAUNCH_FAILED")])
def test_mistakes_of_a_kernel_are_errors_that_stay(
    device: Device, double: cuda_double.Double, kind: int, result: str
) -> None:
    target = int(device.call("cuMemAlloc", 256))
    mistake = np.array((target, kind), MistakeArgument)
    assert device.launch("example_mistake_kernel", mistake, 2, 64, check=False) == result
    assert device.result("cuStreamSynchronize", device.stream) == result
    double.reset()
    device.free(target)


def test_shared_memory_is_not_initialised(device: Device) -> None:
    target = int(device.call("cuMemAlloc", 256))
    device.call("cuMemsetD8", target, 0, 256)
    device.launch("example_mistake_kernel", np.array((target, 1), MistakeArgument), 1, 64)
    assert np.isnan(device.download(target, np.empty(64, np.float32))).all()
    device.free(target)


def test_misaligned_vectors(device: Device, double: cuda_double.Double, scale: SimpleNamespace) -> None:
    device.launch("example_scale4_kernel", scale.argument, 1, 250)
    np.testing.assert_array_equal(device.download(scale.target, scale.numbers), 2 * scale.numbers)
    shifted = np.array((scale.source, scale.target + 4, 1000, 2), ScaleArgument)
    assert device.launch("example_scale4_kernel", shifted, 1, 1, check=False) == "MISALIGNED_ADDRESS"
    double.reset()
    device.launch("example_scale_kernel", scale.argument, 4, 256)


def test_planned_failures_happen_once(device: Device, double: cuda_double.Double) -> None:
    double.fail("cuMemAlloc", 2, nth=2)
    double.fail("cuMemAlloc", 700, nth=3)
    first = int(device.call("cuMemAlloc", 16))
    assert device.result("cuMemAlloc", 16) == "OUT_OF_MEMORY"
    assert device.result("cuMemAlloc", 16) == "ILLEGAL_ADDRESS"
    device.free(first, int(device.call("cuMemAlloc", 16)))


def test_attributes_can_be_set(device: Device, double: cuda_double.Double) -> None:
    major = device.driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    assert device.call("cuDeviceGetAttribute", major, 0) == 9
    double.set_attribute(major, 5)
    assert device.call("cuDeviceGetAttribute", major, 0) == 5


def test_deferred_work_is_done_when_it_is_waited_for(
    device: Device, double: cuda_double.Double, scale: SimpleNamespace
) -> None:
    results = np.zeros(1000, np.float32)
    other, event = device.call("cuStreamCreate", 1), device.call("cuEventCreate", 2)
    double.defer()
    device.launch("example_scale_kernel", scale.argument, 4, 256)
    device.call("cuEventRecord", event, device.stream)
    device.call("cuStreamWaitEvent", other, event, 0)
    device.call("cuMemcpyDtoHAsync", results, scale.target, results.nbytes, other)
    # A copy without a stream does not wait for streams that were made non-blocking.
    assert np.isnan(device.download(scale.target, scale.numbers)).all()
    assert device.result("cuStreamQuery", other) == "NOT_READY"
    device.call("cuStreamSynchronize", other)
    np.testing.assert_array_equal(results, 2 * scale.numbers)
    device.call("cuEventDestroy", event)
    device.call("cuStreamDestroy", other)


def test_a_replay_that_outlives_its_memory_is_an_error(device: Device, double: cuda_double.Double) -> None:
    target = int(device.call("cuMemAlloc", 64))
    device.call("cuStreamBeginCapture", device.stream, device.driver.CUstreamCaptureMode(RELAXED))
    device.call("cuMemsetD8Async", target, 0, 64, device.stream)
    graph = device.call("cuStreamEndCapture", device.stream)
    executable = device.call("cuGraphInstantiate", graph, 0)
    device.free(target)
    assert device.result("cuGraphLaunch", executable, device.stream) == "ILLEGAL_ADDRESS"
    double.reset()
    device.call("cuGraphExecDestroy", executable)
    device.call("cuGraphDestroy", graph)


def test_the_primary_context_takes_its_objects_along(device: Device, double: cuda_double.Double) -> None:
    device.call("cuMemAlloc", 16)
    device.call("cuEventCreate", 0)
    device.call("cuCtxPopCurrent")
    device.call("cuDevicePrimaryCtxRelease", 0)
    assert not any(double.live_objects.values())
    assert device.result("cuStreamSynchronize", device.stream) == "INVALID_CONTEXT"
    device.__init__()  # type: ignore[misc]


def test_functions_the_double_lacks_are_not_found(device: Device) -> None:
    with pytest.raises(Exception, match="cuMemAllocAsync is not found"):
        device.driver.cuMemAllocAsync(16, device.stream)
