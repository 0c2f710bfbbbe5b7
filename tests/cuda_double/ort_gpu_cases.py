"""ONNX Runtime's backend on a GPU, on the driver double: its sessions are made up, and run the linear kernel.

Run by tests/test_device_loop.py in a process of its own, once for each port that is installed.
"""

import gc
import os
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from closed_form import SDES, metadata, save
from onnx import TensorProto, helper

import sdedit
from cuda_double.linear import LinearNetwork, double, linear
from cuda_double.tensorrt_backend_cases import PICTURE, SHAPE
from sdedit import artifact
from sdedit.backends import open_backend, ort_gpu
from sdedit.cuda.driver import open_driver
from sdedit.executor import Batch, HostExecutor

driver = open_driver()  # its primary context is the process's, for good


class Session:
    """Has the linear kernel compute `denoised` from whatever is bound to it."""

    first_run_s = 0.0

    def __init__(self, provider, options, settings):
        self.provider, self.options, self.fixed = provider, options, settings
        self.runs, self.threads = [], set()
        with driver.current():
            self._network = LinearNetwork(driver, (settings["B"], *SHAPE))

    def __del__(self):
        with driver.current():
            self._network.close()

    def get_providers(self):
        return [self.provider]

    def io_binding(self):
        def bind(name, device, number, kind, shape, address):
            assert (device, number) == ("cuda", 0)
            bound[name] = np.dtype(kind), tuple(shape), address

        bound = {}
        return SimpleNamespace(bound=bound, bind_input=bind, bind_output=bind)

    def run_with_iobinding(self, binding, options):
        assert options.entries == {"disable_synchronize_execution_providers": "1"}
        if not self.runs:
            time.sleep(self.first_run_s)
        self.threads.add(threading.get_ident())
        self.runs.append(dict(binding.bound))
        self._network.bind(*(binding.bound[name][2] for name in ("x", "sigma", "denoised")))
        with driver.current():  # ONNX Runtime sets its device in every run
            self._network.enqueue(int(self.options["user_compute_stream"]))


class RunOptions:
    def __init__(self):
        self.entries = {}

    def add_run_config_entry(self, name, value):
        self.entries[name] = value


@pytest.fixture
def runtime(monkeypatch, tmp_path):
    """Opens a model with an input `scale` in this ONNX Runtime. `sessions`: opened since; `refuses`: CUDA graphs."""
    made = SimpleNamespace(sessions=[], refuses=False, on_open=lambda: None)

    def session_with(self, providers, change):
        made.on_open()
        settings = {}
        change(SimpleNamespace(add_free_dimension_override_by_name=settings.__setitem__))
        provider, options = providers[0]
        if made.refuses and options.get("enable_cuda_graph") == "1":
            raise RuntimeError("This session cannot use the graph capture feature")
        if made.sessions and made.sessions[-1] is None:
            raise RuntimeError("out of memory")
        made.sessions.append(Session(provider, options, settings))
        return made.sessions[-1]

    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(__version__="1", RunOptions=RunOptions,
                        set_default_logger_severity=lambda level: None))  # fmt: skip
    monkeypatch.setattr("sdedit.backends.probe", lambda name: None)
    monkeypatch.setattr(ort_gpu.OrtGpuBackend, "_session_with", session_with)
    declared = {"x": ("B", *SHAPE), "sigma": ("B",), "scale": ("B",)}
    inputs = {name: (TensorProto.FLOAT, list(shape)) for name, shape in declared.items()}
    path = tmp_path / "model.onnx"
    extra = {"inputs": {"scale": {"dtype": "float32"}}}
    save(path, [helper.make_node("Identity", ["x"], ["denoised"])], {}, metadata(SHAPE, SDES["vp"], **extra),
         inputs=inputs, shape=SHAPE)  # fmt: skip
    made.path = path
    made.load = lambda backend="ort-cuda", **options: sdedit.load(path, backend=backend, **options)
    return made


def test_an_edit_is_the_linear_networks(runtime):
    with runtime.load() as editor:
        found = editor.edit(PICTURE, conditions={"scale": 1}, seed=4, steps=7).x
        table = sdedit.plan(editor.sde, t0=0.5, steps=7, sampler="ancestral")
    guide = np.ascontiguousarray(PICTURE.transpose(2, 0, 1)[None] / np.float32(127.5) - 1, np.float32)
    wanted, _ = HostExecutor(linear).run(Batch(guide, None, [4], table), None)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_every_shape_has_a_session_of_its_own_and_batch_1_the_first(runtime):
    with runtime.load() as editor:
        for batch in (1, 2, 1, 2):
            editor.edit(PICTURE, conditions={"scale": 1}, steps=2, samples=2, batch=batch)
        assert [session.fixed for session in runtime.sessions] == [{"B": 1}, {"B": 2}]


def test_engines_of_other_weights_are_kept_elsewhere(runtime, monkeypatch, tmp_path):
    monkeypatch.setenv("SDEDIT_CACHE", str(tmp_path / "cache"))
    folders = []
    model = onnx.load(runtime.path)
    for model.doc_string in ("trained", "retrained"):
        onnx.save(model, runtime.path)
        with runtime.load("ort-tensorrt") as editor:
            folders.append(runtime.sessions[-1].options["trt_engine_cache_path"])
            assert folders[-1] == str(tmp_path / "cache" / "ort-tensorrt" / editor.artifact.sha256[:24])
    assert folders[0] != folders[1]


def test_of_another_shape_first_the_one_opened_first_is_let_go_before_its_session_opens(runtime):
    with runtime.load() as editor:
        first = weakref.ref(runtime.sessions.pop())  # the backend has the last reference
        runtime.on_open = lambda: gone.append(first() is None)
        gone = []
        editor.edit(PICTURE, conditions={"scale": 1}, steps=2, samples=2, batch=2)
        assert gone == [True]


def test_a_file_that_is_replaced_after_it_was_loaded_is_refused(runtime):
    with runtime.load() as editor:
        editor.edit(PICTURE, conditions={"scale": 1}, steps=2)
        os.utime(runtime.path, ns=(1, 1))
        with pytest.raises(sdedit.ArtifactError, match=r"model\.onnx: was changed since it was read"):
            editor.edit(PICTURE, conditions={"scale": 1}, steps=2, samples=2, batch=2)
        editor.edit(PICTURE, conditions={"scale": 1}, steps=2)  # whose session was opened before


def test_the_sessions_of_a_few_shapes_are_kept(runtime):
    with runtime.load() as editor:
        for batch in (1, 2, 3, 1, 2, 3):
            editor.edit(PICTURE, conditions={"scale": 1}, steps=2, batch=batch)
        assert len(runtime.sessions) == 3


def test_a_session_is_run_by_one_thread_whoever_edits(runtime):
    with runtime.load() as editor:
        for _ in range(3):
            thread = threading.Thread(
                target=editor.edit, args=(PICTURE,), kwargs={"conditions": {"scale": 1}, "steps": 2}
            )
            thread.start()
            thread.join()
        (session,) = runtime.sessions
        assert len(session.threads) == 1
        assert threading.get_ident() not in session.threads


def test_two_editors_at_once_make_what_each_makes_alone(runtime):
    with runtime.load() as one, runtime.load() as other:
        wanted = one.edit(PICTURE, conditions={"scale": 1}, seed=3, steps=5).x
        found = []

        def work(editor, batch):
            found.append(editor.edit(PICTURE, conditions={"scale": 1}, seed=3, steps=5, batch=batch).x)

        threads = [threading.Thread(target=work, args=(editor, batch)) for editor in (one, other) for batch in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4
    assert all(np.array_equal(x, wanted) for x in found)


def test_it_replays_its_own_graph_unless_onnx_runtime_refuses_one(runtime):
    for refuses, graph, told in ((False, "network", "1"), (True, "off", None)):
        runtime.refuses = refuses
        with runtime.load() as editor:
            backend = editor.backend
            with backend.driver.current(), backend.device_loop(1, {"scale": 1}) as loop:
                assert loop.graph == graph
            assert runtime.sessions[-1].options.get("enable_cuda_graph") == told


def test_the_callers_word_on_graphs_is_kept(runtime):
    with runtime.load(provider_options={"enable_cuda_graph": "0"}):
        assert [session.options["enable_cuda_graph"] for session in runtime.sessions] == ["0"]


def test_further_inputs_lie_on_the_gpu_where_they_stay(runtime):
    with runtime.load() as editor:
        for value in (3, 5):
            editor.edit(PICTURE, conditions={"scale": value}, steps=2, samples=2, batch=2)
        runs = runtime.sessions[-1].runs
        kind, shape, address = runs[0]["scale"]
        assert (kind, shape) == (np.float32, (2,))
        assert {run["scale"] for run in runs} == {(kind, shape, address)}
        found = np.zeros(2, np.float32)
        driver = editor.backend.driver
        with driver.current():
            stream, pinned = driver.make_stream(), driver.allocate_pinned(8)
            driver.download(pinned, address, stream)
            driver.synchronize(stream)
            found[:] = pinned.view(np.float32)
            driver.free_pinned(pinned)
            driver.free_stream(stream)
    assert found.tolist() == [5, 5]


def test_a_denoiser_is_the_network_alone_and_outlives_the_editor(runtime):
    gc.collect()
    editor = runtime.load()
    denoise = editor.backend.bind(2, {"scale": 1})
    editor.close()
    x, sigma = np.random.default_rng(0).standard_normal((2, *SHAPE), np.float32), np.array([0.5, 2], np.float32)
    np.testing.assert_array_equal(denoise(x, sigma), linear(x, sigma))
    with pytest.raises(sdedit.ClosedError):
        editor.backend.bind(2, {"scale": 1})


def test_a_denoiser_frees_all_it_has_also_when_nobody_closed_its_backend(runtime):
    gc.collect()
    before = double.live_objects
    denoise = open_backend("ort-cuda", artifact.read(runtime.path), None).bind(2, {"scale": 1})
    assert double.live_objects["streams"] == before["streams"] + 1
    del denoise
    runtime.sessions.clear()
    gc.collect()
    assert double.live_objects == before


def test_what_cannot_be_captured_names_the_option_that_leaves_it_out(runtime, monkeypatch):
    def fail(self, binding, options):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Session, "run_with_iobinding", fail)
    with runtime.load() as editor, pytest.raises(sdedit.NetworkError, match="not permitted") as caught:
        editor.edit(PICTURE, conditions={"scale": 1}, steps=2)
    assert "--ep-option enable_cuda_graph=0" in caught.value.hint


def test_a_shape_that_does_not_open_any_more_is_the_memorys_fault(runtime):
    with runtime.load() as editor:
        runtime.sessions.append(None)
        with pytest.raises(sdedit.SdeditError, match="out of memory") as caught:
            editor.edit(PICTURE, conditions={"scale": 1}, steps=2, samples=4, batch=4)
        assert "a smaller --batch" in caught.value.hint


def test_in_tf32_where_it_is_asked_for_and_the_gpu_has_it(runtime, monkeypatch):
    with runtime.load(precision="tf32") as editor:
        assert editor.backend.precision == "tf32"
        assert runtime.sessions[-1].options["use_tf32"] == "1"
    with runtime.load() as editor:
        assert (editor.backend.precision, runtime.sessions[-1].options["use_tf32"]) == ("fp32", "0")
    with pytest.raises(sdedit.OptionError, match="use_tf32 is a precision here"):
        runtime.load(provider_options={"use_tf32": "1"})
    monkeypatch.setattr(ort_gpu, "WITH_TF32", (99, 0))
    with pytest.raises(sdedit.BackendUnavailable, match="runs it in fp32 alone"):
        runtime.load(precision="tf32")


def test_what_the_first_run_sets_up_is_not_taken_for_a_step_of_a_budget(runtime, monkeypatch):
    monkeypatch.setattr(Session, "first_run_s", 0.6)
    with runtime.load() as editor:
        made = editor.edit(PICTURE, conditions={"scale": 1}, steps=7, max_ms=3000)
    assert made.budget.steps == 7
