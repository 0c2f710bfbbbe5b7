"""The TensorRT backend on the driver double, around a library in TensorRT's place whose engines run one kernel.

Run by tests/test_device_loop.py in a process of its own. What TensorRT's own calls are named is checked elsewhere
(test_tensorrt_signatures.py); here it is what the backend does with their answers.
"""

import ctypes
import enum
import gc
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from closed_form import SDES, metadata

import sdedit
from cuda_double.linear import LINEAR, OFFSET, SLOPE, double, edit, linear
from sdedit.backends import tensorrt as backend
from sdedit.cli.main import main
from sdedit.executor import HostExecutor
from sdedit.tensorrt import plan as plans
from sdedit.tensorrt.installed import Library

SHAPE = (3, 8, 12)
TARGET = "sm_90"  # what the double says it is


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class DataType(enum.Enum):
    FLOAT = 1
    HALF = 2


class Context:
    """An execution context: shapes, addresses, and the linear kernel on the stream it is given."""

    def __init__(self, engine):
        self.engine, self.driver = engine, backend.open_driver()
        self.module = self.driver.load(b"\x7fELF the double looks at no more than this")
        self.function = self.driver.function(self.module, "linear")
        self.edit, self.batch = np.zeros(1, LINEAR), 0
        self.edit["slope"], self.edit["offset"] = SLOPE, OFFSET

    def __del__(self):
        with self.driver.current():
            self.driver.unload(self.module)

    def set_input_shape(self, name, shape):
        self.batch = shape[0]
        return self.batch <= self.engine.most

    def set_tensor_address(self, name, address):
        ADDRESSES[name] = address
        if name in ("x", "sigma", "denoised"):
            self.edit[name] = address
        return self.engine.takes_addresses

    def execute_async_v3(self, stream):
        self.edit["batch"], self.edit["elements"] = self.batch, np.prod(SHAPE)
        count = int(self.batch * np.prod(SHAPE))
        self.driver.launch(self.function, (-(-count // 256), 1), 256, self.edit, stream)
        return self.engine.enqueues


ADDRESSES = {}  # of the last context
CONFIGS = []  # of the execution contexts, in order


class RuntimeCache:
    def __init__(self):
        self.held = b""

    def serialize(self):
        return self.held or b"compiled here"

    def deserialize(self, data):
        self.held = data


class RuntimeConfig:
    create_runtime_cache = RuntimeCache

    def set_runtime_cache(self, cache):
        self.cache = cache


class Engine:
    def __init__(self, told):
        self.told = {"tensors": ["x", "sigma", "denoised"], "type": "FLOAT", "shape": [-1, *SHAPE], **told}
        self.most, self.enqueues = told.get("most", 8), told.get("enqueues", True)
        self.takes_addresses = told.get("addresses", True)

    num_io_tensors = property(lambda self: len(self.told["tensors"]))

    def get_tensor_name(self, number):
        return self.told["tensors"][number]

    def get_tensor_mode(self, name):
        return TensorIOMode.OUTPUT if name == "denoised" else TensorIOMode.INPUT

    def get_tensor_dtype(self, name):
        return DataType[self.told["type"]]

    def get_tensor_shape(self, name):
        return self.told["shape"]

    def create_runtime_config(self):
        return RuntimeConfig()

    def create_execution_context(self, config=None):
        CONFIGS.append(config)
        return None if self.told.get("memory") == "none" else Context(self)


class Runtime:
    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, data):
        if data == b"damaged":
            self.logger.said = "the engine was made by another version"
            return None
        return Engine(json.loads(data))


class Stand(Library):
    """TensorRT as the backend sees it."""

    def logger(self, severity="WARNING"):
        kept = SimpleNamespace(said=None)
        kept.last_error = lambda: kept.said
        return kept


MODULE = SimpleNamespace(
    __name__="tensorrt", Runtime=Runtime, TensorIOMode=TensorIOMode, DataType=DataType,
    DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
)  # fmt: skip
LIBRARY = Stand("tensorrt", MODULE, "10.16.1")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    double.reset()
    monkeypatch.setattr(backend, "open_library", lambda name: LIBRARY)
    monkeypatch.setattr("sdedit.backends.find_spec", lambda name: object())


@pytest.fixture
def write_plan(tmp_path):
    """write_plan(told, **changed) -> a plan whose engine is the stand-in's, told so."""

    def write(told=None, data=None, **changed):
        path = tmp_path / "model.plan"
        content = json.dumps(told or {}).encode() if data is None else data
        described = metadata(SHAPE, SDES["vp"], defaults={"t0": 0.5, "steps": 6, "sampler": "ancestral"})
        size = ["B", *SHAPE]
        sidecar = {
            "format": 1,
            "artifact": {"name": "closed-form", "sha256": "0" * 64, "size": 1, "opset": 18},
            "library": {"name": "tensorrt", "version": "10.16.1"},
            "gpu": None,
            "targets": [TARGET],
            "profile": {"batch": [1, 2, 4], "shapes": {}},
            "precision": "fp32",
            "metadata": described,
            "inputs": [{"name": n, "dtype": "float32", "shape": s} for n, s in (("x", size), ("sigma", ["B"]))],
            "outputs": [{"name": "denoised", "dtype": "float32", "shape": size}],
            "plan": {"bytes": len(content), "sha256": __import__("hashlib").sha256(content).hexdigest()},
            "flags": {},
            **changed,
        }
        plans.write(path, content, sidecar)
        return path

    return write


PICTURE = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)


def on_host(editor, picture, seeds, steps=6, **options):
    table = sdedit.plan(editor.sde, t0=0.5, steps=steps)
    guide = np.stack([np.moveaxis(picture.astype(np.float32) / np.float32(127.5) - 1, 2, 0)] * len(seeds))
    return edit(HostExecutor(linear), guide, None, seeds, table)[0]


def test_an_edit_with_a_plan_equals_the_host_loop(write_plan):
    editor = sdedit.load(write_plan())
    assert editor.backend.name == "tensorrt"
    out = editor.edit(PICTURE, samples=5, batch=2, seed=3)
    np.testing.assert_allclose(out.x, on_host(editor, PICTURE, [3, 4, 5, 6, 7]), rtol=0, atol=1e-6)
    assert out.timings.network_ms is None
    assert out.timings.evaluations == 3 * 6
    assert [image.size for image in out.images] == [(12, 8)] * 5


def test_masks_paste_as_on_the_host(write_plan):
    editor = sdedit.load(write_plan())
    mask = np.zeros((8, 12), np.uint8)
    mask[:, 6:] = 255
    out = editor.edit(PICTURE, mask=mask, repeats=2)
    assert np.array_equal(np.asarray(out.images[0])[:, :6], PICTURE[:, :6])


def test_a_second_edit_allocates_and_captures_nothing(write_plan):
    editor = sdedit.load(write_plan())
    editor.edit(PICTURE)
    double.reset()
    editor.edit(PICTURE, seed=1)
    assert not {"cuMemAlloc", "cuMemHostAlloc", "cuStreamBeginCapture", "cuModuleLoadData"} & set(double.calls)


def test_close_frees_what_waited(write_plan):
    gc.collect()
    before = double.live_bytes
    editor = sdedit.load(write_plan())
    editor.edit(PICTURE)
    assert double.live_bytes > before
    editor.backend.close()
    assert double.live_bytes == before


def test_one_editor_serves_eight_threads(write_plan):
    editor = sdedit.load(write_plan())
    wanted = on_host(editor, PICTURE, list(range(8)))
    found = {}

    def work(seed):
        for _ in range(3):
            found[seed] = editor.edit(PICTURE, seed=seed).x[0]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(8):
        np.testing.assert_allclose(found[seed], wanted[seed], rtol=0, atol=1e-6)


def test_progress_and_previews_are_those_of_the_host(write_plan):
    editor = sdedit.load(write_plan())
    seen = []
    editor.edit(PICTURE, samples=2, on_step=lambda p: seen.append((p.done, p.total, p.preview()[0].size)))
    assert seen == [(n, 12, (12, 8)) for n in range(1, 13)]
    with pytest.raises(sdedit.Cancelled, match="cancelled at step 3 of 6"):
        editor.edit(PICTURE, on_step=lambda p: p.done < 3)
    assert editor.edit(PICTURE).x.shape == (1, *SHAPE)


def test_the_denoiser_alone_can_be_compared(write_plan):
    editor = sdedit.load(write_plan())
    x = np.random.default_rng(1).standard_normal((2, *SHAPE)).astype(np.float32)
    sigma = np.array([0.5, 2.0], np.float32)
    np.testing.assert_allclose(editor.backend.bind(2, {})(x, sigma), linear(x, sigma), rtol=0, atol=1e-6)


def test_a_replay_makes_the_same_bytes(write_plan, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(PICTURE).save(tmp_path / "guide.png")
    path, guide, out, again = write_plan(), tmp_path / "guide.png", tmp_path / "out.png", tmp_path / "again.png"
    assert main(["edit", str(guide), "-m", str(path), "-o", str(out)]) == 0
    assert "backend: tensorrt, fp32, tensorrt on" in capsys.readouterr().err
    assert main(["edit", "--replay", str(out), str(guide), "-m", str(path), "-o", str(again)]) == 0
    assert out.read_bytes() == again.read_bytes()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch": 5}, "batch is 5; .*model.plan was built for 1 to 4"),
        ({"size": (24, 16)}, "size is 24x16; closed-form is fixed to 12x8"),
        ({"conditions": {"label": 1}}, "the model has no input label to set"),
    ],
)
def test_what_the_plan_does_not_take_is_refused_before_it_runs(write_plan, options, told):
    editor = sdedit.load(write_plan())
    with pytest.raises(sdedit.OptionError, match=told):
        editor.edit(PICTURE, **options)


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        (
            {"tensors": ["x", "denoised"]},
            r"its tensors are x \(input\), denoised \(output\); wanted x \(input\), sigma",
        ),
        ({"type": "HALF"}, "x is DataType.HALF; wanted float32"),
        ({"shape": [-1, 3, 64, 64]}, r"x has \(3, 64, 64\) after the batch; wanted \(3, 8, 12\)"),
    ],
)
def test_an_engine_that_is_not_the_artifact_is_refused_at_open(write_plan, engine, told):
    with pytest.raises(sdedit.ArtifactError, match=told) as raised:
        sdedit.load(write_plan(engine))
    assert "build it again" in raised.value.hint


def test_an_engine_that_does_not_load_quotes_the_library(write_plan):
    with pytest.raises(sdedit.ArtifactError, match="tensorrt cannot load it: the engine was made by another version"):
        sdedit.load(write_plan(data=b"damaged"))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"library": {"name": "tensorrt", "version": "10.1.0"}},
            "was built by tensorrt 10.1.0; here is version 10.16.1",
        ),
        ({"targets": ["sm_86"]}, "was built for sm_86; this GPU is sm_90"),
    ],
)
def test_a_plan_for_elsewhere_is_refused(write_plan, changed, told):
    with pytest.raises(sdedit.ArtifactError, match=told):
        sdedit.load(write_plan(**changed))


def test_a_plan_of_another_library_is_refused(write_plan):
    path = write_plan(library={"name": "tensorrt-rtx", "version": "1.7.1"})
    with pytest.raises(
        sdedit.BackendUnavailable, match=r"was built by tensorrt-rtx 1\.7\.1; tensorrt 10\.16\.1 cannot"
    ):
        sdedit.load(path, backend="tensorrt")
    with pytest.raises(sdedit.OptionError, match="a plan for tensorrt does not run on ort-cpu"):
        sdedit.load(write_plan(), backend="ort-cpu")


@pytest.mark.parametrize(
    ("engine", "kind", "told"),
    [
        ({"memory": "none"}, sdedit.DeviceError, "tensorrt makes no execution context: it does not say why"),
        ({"most": 0}, sdedit.DeviceError, r"the plan does not take x of shape \(1, 3, 8, 12\)"),
        ({"enqueues": False}, sdedit.NetworkError, "TensorRT could not enqueue the network"),
        ({"addresses": False}, sdedit.DeviceError, "TensorRT does not take an address for x"),
    ],
)
def test_what_fails_when_it_runs_says_so_and_leaks_nothing(write_plan, engine, kind, told):
    editor = sdedit.load(write_plan(engine))
    before = double.live_bytes
    with pytest.raises(kind, match=told) as raised:
        editor.edit(PICTURE)
    assert raised.value.hint
    editor.backend.close()
    assert double.live_bytes == before


def test_without_a_driver_the_backend_says_so_and_touches_no_library(monkeypatch):
    def none():
        raise sdedit.BackendUnavailable("CUDA does not start: libcuda was not found", hint="install the NVIDIA driver")

    monkeypatch.setattr(backend, "open_driver", none)
    monkeypatch.setattr(backend, "open_library", lambda name: pytest.fail("opened"))
    with pytest.raises(sdedit.BackendUnavailable, match="tensorrt: CUDA does not start: libcuda was not found"):
        sdedit.load(backend="tensorrt")


def test_a_class_label_is_an_input_that_later_edits_change_in_place(write_plan, monkeypatch):
    described = metadata(SHAPE, SDES["vp"], inputs={"class_label": {"dtype": "int64", "count": 10}})
    size = ["B", *SHAPE]
    inputs = (("x", "float32", size), ("sigma", "float32", ["B"]), ("class_label", "int64", ["B"]))
    path = write_plan(
        {"tensors": ["x", "sigma", "class_label", "denoised"]},
        metadata=described,
        inputs=[{"name": n, "dtype": kind, "shape": s} for n, kind, s in inputs],
    )
    editor = sdedit.load(path)
    with pytest.raises(sdedit.OptionError, match="the model needs a value for its input class_label"):
        editor.edit(PICTURE)

    def labels():
        return (ctypes.c_int64 * 2).from_address(ADDRESSES["class_label"])[:]

    editor.edit(PICTURE, batch=2, conditions={"class_label": 3})
    assert labels() == [3, 3]
    double.reset()
    editor.edit(PICTURE, batch=2, conditions={"class_label": 7})
    assert labels() == [7, 7]
    assert not {"cuMemAlloc", "cuStreamBeginCapture"} & set(double.calls)


def test_rtx_compiles_before_it_runs_and_keeps_what_it_compiled(write_plan, monkeypatch, tmp_path):
    monkeypatch.setenv("SDEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backend, "open_library", lambda name: Stand("tensorrt-rtx", MODULE, "1.7.1"))
    path = write_plan(library={"name": "tensorrt-rtx", "version": "1.7.1"})
    CONFIGS.clear()
    sdedit.load(path).edit(PICTURE)
    (config,) = CONFIGS
    assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
    (kept,) = (tmp_path / "cache" / "rtx-kernels").iterdir()
    assert kept.read_bytes() == b"compiled here"
    kept.write_bytes(b"compiled before")
    sdedit.load(path).edit(PICTURE)
    assert CONFIGS[1].cache.held == b"compiled before"
    assert kept.read_bytes() == b"compiled before"


def test_tensorrt_itself_is_asked_for_a_plain_context(write_plan):
    CONFIGS.clear()
    sdedit.load(write_plan()).edit(PICTURE)
    assert CONFIGS == [None]
