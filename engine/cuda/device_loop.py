"""The edit on the GPU: what loop.py does, as one CUDA graph.

The guide and the step table go up once; every step is the network and one kernel (noise, update, mask composite),
with nothing to wait for in between; the result comes down once. After one evaluation to warm up, a step is captured,
and as many copies of it as there are steps are replayed with one launch.
"""

import gc
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdedit.cuda import kernels
from sdedit.cuda.driver import Driver, Handle
from sdedit.errors import Cancelled, DeviceError, OptionError, SdeditError
from sdedit.executor import Batch
from sdedit.image import Pixels
from sdedit.loop import Array, OnStep, Step, not_finite
from sdedit.schedule import StepTable

MOST_STEPS_A_GRAPH = 64  # longer edits launch it several times: nodes cost memory, launches microseconds
MOST_GRAPHS = 16
_capturing = Lock()  # one capture at a time: none may turn garbage collection on again inside another


class DeviceNetwork(Protocol):
    """A score network whose tensors live on the GPU. Wants the context current."""

    capturable: bool  # whether `enqueue` may be recorded in a CUDA graph
    replays: bool  # whether `enqueue` launches a CUDA graph of its own
    stream: int | None  # the one that it runs on; None where any will do

    def bind(self, x: int, sigma: int, denoised: int) -> None:
        """The addresses of x (B, C, H, W), sigma (B,) and D (B, C, H, W), all float32, for every later call."""
        ...

    def set_conditions(self, values: Mapping[str, float], stream: int) -> None:
        """The values of its further inputs, for what is enqueued on the stream from here on."""
        ...

    def enqueue(self, stream: int) -> None:
        """Evaluate D on the stream; do not wait for it."""
        ...

    def close(self) -> None: ...


class DeviceLoop:
    """Edits batches of one shape (B, C, H, W). Everything is allocated here, once. Not thread-safe.

    It runs on a stream of its own, or on the network's. Every method wants the context current and raises DeviceError.
    """

    def __init__(self, driver: Driver, network: DeviceNetwork, shape: tuple[int, int, int, int]) -> None:
        batch, channels, height, width = shape
        self.shape, self.notes = shape, list[str]()
        self.network = network
        self._driver, self._reads = driver, 0  # how many `on_step` calls have begun
        self._elements, self._plane = channels * height * width, height * width
        self._graphs: dict[bytes, Handle] = {}
        self._steps: dict[bytes, Handle] = {}
        self._captures, self._chains, self._warm = network.capturable, True, False
        if self._captures and driver.graphs is None:
            self._give_up_graphs("cuda-bindings is not installed (pip install cuda-bindings)")
        self._edit = np.zeros(1, kernels.EDIT)
        self._host: dict[str, NDArray[Any]] = {}
        self._held = ExitStack()  # everything that `close` frees
        with ExitStack() as on_failure:
            on_failure.callback(self._held.close)
            self._held.callback(network.close)
            self._kernels = kernels.Kernels(driver)
            self._held.callback(self._kernels.close)
            self.stream = driver.make_stream() if network.stream is None else network.stream
            if network.stream is None:
                self._held.callback(driver.free_stream, self.stream)
            self._uploaded, self._edited = driver.make_event(), driver.make_event()
            for event in (self._uploaded, self._edited):
                self._held.callback(driver.free_event, event)
            self._allocate_all(batch, channels, height, width)
            network.bind(*(int(self._edit[name][0]) for name in ("x", "sigma", "denoised")))
            self._held.callback(self._forget_graphs)
            on_failure.pop_all()

    def _allocate_all(self, batch: int, channels: int, height: int, width: int) -> None:
        frame = 4 * batch * self._elements
        self._fill(interface=kernels.INTERFACE, batch=batch, elements=self._elements, plane=self._plane)
        self._fill(
            x=self._allocate(frame), denoised=self._allocate(frame), sigma=self._allocate(4 * batch),
            seeds=self._allocate(8 * batch), state=self._allocate(kernels.STATE.itemsize),
            pixels=self._allocate(batch * self._elements),
        )  # fmt: skip
        self._guide, self._previous = self._allocate(frame), self._allocate(frame)
        self._mask = self._allocate(4 * batch * self._plane)
        self._table, self._table_bytes = 0, 0
        for name, shape, kind in (
            ("guide", self.shape, np.float32),
            ("mask", (batch, self._plane), np.float32),
            ("seeds", (batch,), np.uint64),
            ("state", (1,), kernels.STATE),
            ("x", self.shape, np.float32),
            ("pixels", (batch, height, width, channels), np.uint8),
        ):
            self._host[name] = self._allocate_pinned(shape, kind)

    def run(self, batch: Batch, on_step: OnStep | None = None) -> tuple[NDArray[np.float32], Pixels]:
        """One edit of the whole batch: (x (B, C, H, W), pixels (B, H, W, C)), valid until the next call.

        Raises NetworkError, Cancelled.
        """
        self.start(batch, on_step)
        self._launch(self._kernels.pixels, kernels.pixel_grid(self._plane, self.shape[0]), self._edit)
        self._driver.record(self._edited, self.stream)
        for name in ("x", "pixels"):
            self._driver.download(self._host[name], int(self._edit[name][0]), self.stream)
        self.finish(batch.table)
        return self._host["x"], self._host["pixels"]

    def start(self, batch: Batch, on_step: OnStep | None = None) -> int:
        """Enqueue the edit. Without `on_step`, only the uploads of this loop's last edit are waited for.

        Returns the address that x will have its result at.
        """
        self._prepare(batch)
        table = batch.table
        for repeat in range(batch.repeats):
            self.begin()
            done = 0
            while done < table.steps:
                count = 1 if on_step is not None else min(table.steps - done, MOST_STEPS_A_GRAPH)
                self.advance(count)
                done += count
                if on_step is not None:
                    self._report(on_step, done, table, repeat)
        return int(self._edit["x"][0])

    def finish(self, table: StepTable) -> None:
        """Wait for the edit. Raises NetworkError if D was not finite at some step."""
        self._driver.download(self._host["state"], int(self._edit["state"][0]), self.stream)
        self._driver.synchronize(self.stream)
        fault = int(self._host["state"]["fault"][0])
        if fault == kernels.WRONG_INTERFACE:
            raise DeviceError("the kernels have another interface version", hint="reinstall sdedit-engine")
        if fault:
            repeat, step = divmod(fault - 1, table.steps)
            raise not_finite("NaN or Inf", step + 1, table, repeat)

    def close(self) -> None:
        """Free everything that was allocated here, the network's binding too."""
        self._host = {}
        self._held.close()

    def device_ms(self) -> float:
        """What the GPU took for the steps of the last `run`: after its uploads, before its downloads."""
        return self._driver.elapsed_ms(self._uploaded, self._edited)

    @property
    def graph(self) -> str:
        """What one CUDA graph holds: an "edit", a "step", the "network" of a step; or there is none, "off"."""
        if self._captures:
            return "edit" if self._chains else "step"
        return "network" if self.network.replays else "off"

    @property
    def nbytes(self) -> int:
        """Of x."""
        return 4 * self.shape[0] * self._elements

    # --- before the steps ------------------------------------------------------------------------------------------

    def _prepare(self, batch: Batch) -> None:
        self._driver.wait(self._uploaded)  # the pinned buffers are free again
        table, rows = batch.table, np.ascontiguousarray(batch.table.rows_for(self.shape[0]), np.float32)
        if rows.nbytes > self._table_bytes:
            self._forget_graphs()
            room = 1 << (rows.nbytes - 1).bit_length()  # it doubles: what was outgrown is freed with the loop
            self._table, self._table_bytes = self._allocate(room), room
            self._host["table"] = self._allocate_pinned((room // 4,), np.float32)
            self._held.callback(self._driver.synchronize, self.stream)  # before these are freed, the first to go
        self._host["table"][: rows.size] = rows.ravel()
        self._driver.upload(self._table, self._host["table"][: rows.size], self.stream)
        self._host["seeds"][:] = batch.seeds
        self._host["state"][:] = 0
        for name in ("seeds", "state"):
            self._driver.upload(int(self._edit[name][0]), self._host[name], self.stream)
        self._send("guide", batch.guide, self._guide)
        if batch.mask is not None:
            self._send("mask", batch.mask, self._mask)
        self._driver.record(self._uploaded, self.stream)
        two_step = bool(table.column("d").any())
        self._fill(
            steps=table.steps, tables=len(rows), table=self._table, guide=self._guide,
            mask=0 if batch.mask is None else self._mask, previous=self._previous if two_step else 0,
        )  # fmt: skip

    def _send(self, name: str, values: Array | int, target: int) -> None:
        """Guide or mask into memory of ours, which is aligned, and where the graph looks for it."""
        host = self._host[name]
        if isinstance(values, int):
            self._driver.copy(target, values, host.nbytes, self.stream)
        else:
            host[:] = values.reshape(host.shape)
            self._driver.upload(target, host, self.stream)

    # --- the steps -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Enqueue the start of a pass: x at the level of t0."""
        self._launch(self._kernels.start, kernels.grid(self._elements, self.shape[0]), self._edit)

    def advance(self, count: int) -> None:
        """Enqueue the next `count` steps, as one graph where that works."""
        while count and self._captures:
            at_once = count if self._chains else 1
            executable = self._graph(at_once)
            if executable is not None:
                self._graph_calls.launch(executable, self.stream)
                count -= at_once
        for _ in range(count):
            self._step()

    def _step(self) -> None:
        self.network.enqueue(self.stream)
        self._launch(self._kernels.step, kernels.grid(self._elements, self.shape[0]), self._edit)

    def _graph(self, count: int) -> Handle | None:
        """`count` steps of this edit as a graph; None, and a note, where one cannot be made."""
        key = self._edit.tobytes()
        name = key + count.to_bytes(4, "little")
        if name not in self._graphs:
            try:
                if key not in self._steps:
                    self._capture(key)
                self._graphs[name] = self._graph_calls.chain(self._steps[key], count)
            except SdeditError as error:
                if key in self._steps and count > 1:
                    self._chains = False
                    self.notes.append(f"every step is a CUDA graph of its own: {error}")
                else:
                    self._give_up_graphs(f"the step cannot be captured: {error}")
                return None
        return self._graphs[name]

    def _capture(self, key: bytes) -> None:
        if len(self._steps) >= MOST_GRAPHS:
            self._forget_graphs()
        if not self._warm:  # a library's first call may do what cannot be captured; D alone changes nothing
            self.network.enqueue(self.stream)
            self._warm = True
        with _capturing:
            collecting = gc.isenabled()
            gc.disable()  # what it would free now could invalidate the capture
            try:
                self._steps[key] = self._captured_step()
            finally:
                if collecting:
                    gc.enable()

    def _captured_step(self) -> Handle:
        self._graph_calls.begin(self.stream)
        try:
            self._step()
        except BaseException:
            with suppress(DeviceError):
                self._graph_calls.free_graph(self._graph_calls.end(self.stream))
            raise
        return self._graph_calls.end(self.stream)

    def _report(self, on_step: OnStep, number: int, table: StepTable, repeat: int) -> None:
        self._driver.synchronize(self.stream)
        self._reads += 1
        step = Step(number, table.steps, repeat, table.column("sigma")[..., number - 1], self._reader(self._reads))
        answer = on_step(step)
        self._reads += 1
        if answer is False:
            raise Cancelled(f"cancelled at step {number} of {table.steps}", hint="on_step returned False")

    def _reader(self, of: int) -> Callable[[], NDArray[np.float32]]:
        """What copies D of the step just run, for a preview that asks for it while `on_step` runs."""

        def read() -> NDArray[np.float32]:
            if of != self._reads:
                raise OptionError("step.denoised is of a step that has passed", hint="read it inside on_step")
            self._driver.download(self._host["x"], int(self._edit["denoised"][0]), self.stream)
            self._driver.synchronize(self.stream)
            return self._host["x"].copy()

        return read

    # --- the device ------------------------------------------------------------------------------------------------

    @property
    def _graph_calls(self) -> Any:
        return self._driver.graphs

    def _give_up_graphs(self, reason: str) -> None:
        self._captures = False
        self.notes.append(f"no CUDA graph, steps are launched one by one: {reason}")

    def _forget_graphs(self) -> None:
        self._driver.synchronize(self.stream)
        for executable in self._graphs.values():
            self._graph_calls.free(executable)
        for step in self._steps.values():
            self._graph_calls.free_graph(step)
        self._graphs, self._steps = {}, {}

    def _fill(self, **values: int) -> None:
        for name, value in values.items():
            self._edit[name] = value

    def _launch(self, function: Handle, grid: tuple[int, int], edit: NDArray[Any]) -> None:
        self._driver.launch(function, grid, kernels.THREADS, edit, self.stream)

    def _allocate(self, nbytes: int) -> int:
        pointer = self._driver.allocate(nbytes)
        self._held.callback(self._driver.free, pointer)
        return pointer

    def _allocate_pinned(self, shape: tuple[int, ...], kind: Any) -> NDArray[Any]:
        memory = self._driver.allocate_pinned(int(np.prod(shape)) * np.dtype(kind).itemsize)
        self._held.callback(self._driver.free_pinned, memory)
        shaped: NDArray[Any] = memory.view(kind).reshape(shape)
        return shaped
