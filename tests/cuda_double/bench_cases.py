"""`sdedit bench` on the driver double: what is timed by the GPU's clock, and how edits were launched.

Run by tests/test_device_loop.py in a process of its own.
"""

import pytest

from cuda_double.linear import double
from cuda_double.tensorrt_backend_cases import stand_in, write_plan  # noqa: F401  (fixtures)
from sdedit.bench import Case
from sdedit.bench.effort import Visit
from sdedit.bench.visit import examine, measure


@pytest.fixture
def case(write_plan):  # noqa: F811
    return Case(str(write_plan()), backend="tensorrt", batch=2, steps=5)


def test_the_gpu_is_timed_by_events_and_the_host_end_to_end(case):
    found = measure(case, Visit(runs=3, seconds=0, warmup=1))
    for edit in found["edits"]:
        assert edit["network_ms"] is None
        assert 0 <= edit["device_ms"] < edit["total_ms"]
    assert len(found["edits"]) == 3
    assert found["graph"] == "edit"


def test_events_lie_after_the_copies_in_and_before_the_copies_out(case):
    double.reset()
    measure(case, Visit(runs=1, seconds=0, warmup=0))
    watched = ("cuMemcpyHtoDAsync", "cuEventRecord", "cuMemcpyDtoHAsync", "cuEventElapsedTime")
    calls = [call for call in double.calls if call in watched]
    one = calls[len(calls) // 2 :]  # the second edit
    assert one.count("cuEventRecord") == 2
    first, last = (i for i, call in enumerate(one) if call == "cuEventRecord")
    assert set(one[:first]) == {"cuMemcpyHtoDAsync"}
    assert set(one[last + 1 : -1]) == {"cuMemcpyDtoHAsync"}
    assert last == first + 1
    assert one[-1] == "cuEventElapsedTime"


def test_a_driver_without_graphs_is_said_so(case, monkeypatch):
    from sdedit.backends import tensorrt

    monkeypatch.setattr(tensorrt.open_driver(), "graphs", None)
    assert measure(case, Visit(runs=1, seconds=0, warmup=0))["graph"] == "off"


def test_the_row_names_the_gpu(case):
    found = examine(case)["facts"]
    assert found["gpu"]
    assert (found["backend"], found["batch"], found["steps"]) == ("tensorrt", 2, 5)
    assert "tensorrt" in found["versions"]
