"""What pycuda has not, on streams' handles, by cuda.bindings: CUDA graphs, and order between streams of any maker."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdedit.cuda.bindings_port import Calls

Graph = Any
Executable = Any


class Graphs:
    """Capture what one step enqueues; replay it any number of times in a row with one launch. Order streams.

    Every method wants the context current and raises DeviceError.
    """

    def __init__(self, call: "Calls") -> None:
        self._call = call

    def follow(self, stream: int, leader: int) -> None:
        """What is enqueued on `stream` from here on waits for what is on `leader` now. The host does not."""
        event = self._call("cuEventCreate", self._call.cu.CUevent_flags.CU_EVENT_DISABLE_TIMING.value)
        try:
            self._call("cuEventRecord", event, leader)
            self._call("cuStreamWaitEvent", stream, event, 0)
        finally:
            self._call("cuEventDestroy", event)

    def begin(self, stream: int) -> None:
        """What is enqueued on the stream from here on is recorded, not run. Other threads are not affected."""
        self._call(
            "cuStreamBeginCapture", stream, self._call.cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        )

    def end(self, stream: int) -> Graph:
        return self._call("cuStreamEndCapture", stream)

    def chain(self, step: Graph, count: int) -> Executable:
        """`count` times `step`, one after another, ready to launch."""
        if count == 1:
            return self._call("cuGraphInstantiate", step, 0)
        whole = self._call("cuGraphCreate", 0)
        try:
            last: list[Any] = []
            for _ in range(count):
                last = [self._call("cuGraphAddChildGraphNode", whole, last or None, len(last), step)]
            return self._call("cuGraphInstantiate", whole, 0)
        finally:
            self._call("cuGraphDestroy", whole)

    def launch(self, executable: Executable, stream: int) -> None:
        self._call("cuGraphLaunch", executable, stream)

    def free(self, executable: Executable) -> None:
        self._call("cuGraphExecDestroy", executable)

    def free_graph(self, step: Graph) -> None:
        self._call("cuGraphDestroy", step)
