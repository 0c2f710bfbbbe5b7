"""TensorRT plans: real ones, built ahead of time by TensorRT-RTX without a GPU; their sidecars; the cache of them."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache as remember
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from closed_form import SDES, metadata, save
from onnx import TensorProto, helper
from test_command import on_a_terminal

from sdedit import artifact as artifacts
from sdedit.artifact import Artifact
from sdedit.cli.main import main
from sdedit.cuda.driver import Gpu
from sdedit.errors import ArtifactError, BackendUnavailable, Cancelled, OptionError, OutputError
from sdedit.tensorrt import build as building
from sdedit.tensorrt import cache, installed, plan
from sdedit.tensorrt.build import Built, build
from sdedit.tensorrt.installed import Library
from sdedit.tensorrt.kernels import listed

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

TARGETS = ("sm_86", "sm_89", "sm_120")
GPU = Gpu("Stub RTX", (8, 6), "13.0")
SHAPE = (3, 8, 12)
NO_GPU = "no NVIDIA driver here: libcuda.so.1 was not found"
STUBS = Path(__file__).parent / "tensorrt_stub"
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

nobody_has_a_gpu = pytest.mark.skipif(
    any(Path("/dev").glob("nvidia[0-9]*")), reason="there is a GPU here: what is said without one cannot be seen"
)


@pytest.fixture(scope="module")
def rtx() -> Library:
    return installed.open_library("tensorrt-rtx")


@pytest.fixture(scope="module")
def bundled(models: Path) -> dict[str, Artifact]:
    """The bundled model in both precisions."""
    from sdedit.export import to_onnx
    from sdedit.export.precision import halve

    half = models / "bundled-fp16.onnx"
    original = artifacts.read(artifacts.BUNDLED)
    to_onnx.save(halve(onnx.load(artifacts.BUNDLED), "fp16"), half, original.metadata | {"precision": "fp16"})
    return {"fp32": original, "fp16": artifacts.read(half)}


@pytest.fixture(scope="module")
def bundled_plan(rtx: Library, bundled: dict[str, Artifact]) -> Callable[[str, str], Built]:
    """bundled_plan(precision, target): built once."""
    return remember(lambda precision, target: build(bundled[precision], rtx, targets=(target,), verbose=True))


@pytest.fixture(scope="module")
def small(network: Path) -> Artifact:
    """A convolution with a little around it: its plan takes a tenth of a second."""
    return artifacts.read(network)


@pytest.fixture(scope="module")
def built(rtx: Library, small: Artifact) -> Built:
    return build(small, rtx, targets=("sm_86",))


@pytest.fixture
def written(built: Built, tmp_path: Path) -> Path:
    plan.write(tmp_path / "small.plan", built.data, built.sidecar)
    return tmp_path / "small.plan"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache: its folder of plans."""
    monkeypatch.setenv("SDEDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plans"


def convolution(path: Path, tail: list[onnx.NodeProto] | None = None, **described: object) -> Path:
    """A convolution with a bias, and what follows it."""
    kernel = np.random.default_rng(0).normal(0, 0.3, (3, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Reshape", ["sigma", "column"], ["s"]),
        helper.make_node("Mul", ["x", "s"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "kernel", "bias"], ["mixed"], "conv", pads=[1, 1, 1, 1]),
        *(tail or [helper.make_node("Tanh", ["mixed"], ["denoised"])]),
    ]
    weights = {"column": np.array([-1, 1, 1, 1], np.int64), "kernel": kernel, "bias": np.ones(3, np.float32)}
    return save(path, nodes, weights, metadata(SHAPE, SDES["vp"], **described), shape=SHAPE)


def ddpm(folder: Path, width: int) -> Artifact:
    """The 256x256 network of Ho et al. 2020 in fp16, random weights; it has a `width` of 128."""
    import diffusers
    import torch

    from sdedit.export import exporting, families, to_onnx
    from sdedit.export.precision import halve
    from sdedit.export.source import SourceOptions

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=256,
        block_out_channels=tuple(width * factor for factor in (1, 1, 2, 2, 4, 4)),
        down_block_types=(*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
        **{"layers_per_block": 2, "attention_head_dim": None, "downsample_padding": 0, "norm_eps": 1e-6},
        **{"flip_sin_to_cos": False, "freq_shift": 1},
    ).eval()
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder / "ddpm")
    graph = exporting.from_source(families.load(str(folder / "ddpm"), SourceOptions()))
    path = folder / "ddpm.onnx"
    to_onnx.save(halve(graph.model, "fp16"), path, graph.metadata | {"precision": "fp16"})
    return artifacts.read(path)


# --- what TensorRT makes of the networks -------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_bundled_model_builds_ahead_of_time_with_its_norms_fused(precision, target, bundled_plan, bundled):
    built = bundled_plan(precision, target)
    assert built.sidecar["targets"] == [target]
    assert built.sidecar["precision"] == precision
    assert built.sidecar["gpu"] is None
    fused = [kernel for kernel in built.kernels if {"Gnor", "Silu"} <= set(kernel.operators)]
    assert built.labels["GroupNorm + SiLU"] == len(fused) >= 8
    assert built.labels["Conv"] + built.labels["Conv + Mul"] >= 30
    assert built.kinds["correlation"] >= 20
    assert 1e6 < built.activation_bytes[0] < 12e6  # of one 64x64 image
    # the weights twice, and for each precision their own size
    assert bundled["fp16"].size_bytes < len(built.data) < 35e6


def test_half_precision_makes_smaller_plans_that_need_no_more_memory(bundled_plan):
    full, half = bundled_plan("fp32", "sm_86"), bundled_plan("fp16", "sm_86")
    assert len(half.data) < 0.7 * len(full.data)
    assert half.activation_bytes[0] <= full.activation_bytes[0]
    assert "Cast" in {operator for kernel in half.kernels for operator in kernel.operators}
    assert "Cast" not in {operator for kernel in full.kernels for operator in kernel.operators}


def test_a_range_of_batches_costs_memory(rtx, bundled, bundled_plan):
    ranged = build(bundled["fp16"], rtx, targets=("sm_86",), batch=(1, 1, 8))
    assert ranged.sidecar["profile"]["batch"] == [1, 1, 8]
    assert ranged.activation_bytes[0] > 1.4 * bundled_plan("fp16", "sm_86").activation_bytes[0]


@pytest.fixture(scope="module")
def full_ddpm(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return ddpm(tmp_path_factory.mktemp("ddpm"), 128)


@pytest.mark.parametrize("target", TARGETS)
def test_a_256_ddpm_builds_ahead_of_time_with_its_norms_fused(target, rtx, full_ddpm):
    built = build(full_ddpm, rtx, targets=(target,), verbose=True)
    assert built.labels["GroupNorm + SiLU"] >= 45
    assert built.activation_bytes[0] < 170e6
    assert 220e6 < len(built.data) < 270e6


@pytest.mark.slow
def test_a_256_ddpm_for_up_to_8_images_needs_more_memory(rtx, full_ddpm):
    built = build(full_ddpm, rtx, targets=("sm_86",), batch=(1, 1, 8), verbose=True)
    assert built.labels["GroupNorm + SiLU"] >= 45
    assert 500e6 < built.activation_bytes[0] < 1.4e9


def test_one_plan_serves_several_targets(rtx, small):
    built = build(small, rtx, targets=TARGETS)
    assert built.sidecar["targets"] == list(TARGETS)


def test_a_further_input_has_a_profile_of_its_own(rtx, labelled):
    built = build(artifacts.read(labelled), rtx, targets=("sm_86",), batch=(1, 2, 4))
    assert built.sidecar["profile"]["shapes"] == {
        "x": [[images, *SHAPE] for images in (1, 2, 4)],
        "sigma": [[1], [2], [4]],
        "class_label": [[1], [2], [4]],
    }


def test_a_network_that_takes_any_size_is_built_for_its_own(rtx, tmp_path):
    free = {"x": (TensorProto.FLOAT, ["B", 3, "H", "W"]), "sigma": (TensorProto.FLOAT, ["B"])}
    described = metadata(SHAPE, SDES["vp"])
    described["image"]["dynamic"] = True
    nodes = [helper.make_node("Tanh", ["x"], ["a"]), helper.make_node("ReduceMean", ["sigma"], ["m"], keepdims=0)]
    nodes.append(helper.make_node("Mul", ["a", "m"], ["denoised"]))
    outputs = {"denoised": (TensorProto.FLOAT, ["B", 3, "H", "W"])}
    path = save(tmp_path / "free.onnx", nodes, {}, described, inputs=free, outputs=outputs)
    built = build(artifacts.read(path), rtx, targets=("sm_86",))
    assert built.sidecar["profile"]["shapes"]["x"] == [[1, *SHAPE]] * 3
    assert built.sidecar["inputs"][0]["shape"] == ["B", 3, "H", "W"]


def test_weights_beside_the_file_are_found(rtx, small, tmp_path):
    path = tmp_path / "outside.onnx"
    onnx.save(onnx.load(small.path), path, save_as_external_data=True, location="outside.data", size_threshold=0)
    opened = artifacts.read(path)
    assert opened.external
    assert build(opened, rtx, targets=("sm_86",)).sidecar["artifact"]["size"] == opened.size_bytes


def test_the_sidecar_says_what_was_built(built, small, rtx):
    sidecar = built.sidecar
    assert sidecar["artifact"] == {
        **{"name": "closed-form", "sha256": small.sha256, "size": small.path.stat().st_size, "opset": 18}
    }
    assert sidecar["library"] == {"name": "tensorrt-rtx", "version": trt.__version__}
    assert sidecar["metadata"] == small.metadata
    assert sidecar["flags"] == {
        "strongly_typed": True,
        "tf32": False,
        "user_allocation": True,
        "workspace_bytes": None,
        "detailed": False,
    }
    assert sidecar["plan"]["bytes"] == len(built.data)
    assert sidecar["activation_bytes"] == list(built.activation_bytes)
    assert sidecar["build_seconds"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", sidecar["built"])
    assert built.kernels == ()


def test_a_workspace_limit_is_passed_on_and_recorded(rtx, small):
    assert build(small, rtx, targets=("sm_86",), workspace_bytes=2**24).sidecar["flags"]["workspace_bytes"] == 2**24


def test_kernels_are_read_from_their_names():
    text = (
        "Layers:\nName: __myl_CastSiluCastGnor_myl0_88, LayerType: kgen, Inputs: [ { Name: a, Dimensions: [1] }]\n"
        "Name: /up.0/conv1/Conv_myl0_89, LayerType: correlation, Inputs: []\n"
        "Name: __myl_Move_myl0_90, LayerType: kgen, Inputs: []\n"
        "Name: Conv_0 + Relu_1, LayerType: CaskConvolution, Inputs: []\n\nI/O Tensors:\n Name: x, IOMode: Input\n"
    )
    kernels = listed(text)
    assert [kernel.label for kernel in kernels] == ["GroupNorm + SiLU", "Conv", "data movement", "CaskConvolution"]
    assert kernels[0].operators == ("Cast", "Silu", "Cast", "Gnor")
    assert listed("") == ()


# --- progress and interrupts -------------------------------------------------------------------------------------


def test_progress_rises_to_the_end(rtx, small):
    seen = []
    build(small, rtx, targets=("sm_86",), on_progress=lambda *report: seen.append(report))
    done = [report[0] for report in seen]
    assert done == sorted(set(done))
    assert seen[-1] == (100, 100, "")


def test_nested_phases_are_one_number_that_never_falls():
    progress, seen = building._Progress(), []
    progress.start("whole", None, 2)
    for part in ("first", "second"):
        progress.start(part, "whole", 4)
        for number in range(4):
            progress.step(part, number)
            seen.append(progress.done)
        progress.finish(part)
        progress.step("whole", 0 if part == "first" else 1)
    progress.start("again", "whole", 10)  # a late one starts over: the number waits
    progress.step("again", 0)
    seen.append(progress.done)
    assert seen == [12, 25, 37, 50, 62, 75, 87, 100, 100]


def test_false_from_on_progress_cancels(rtx, bundled):
    with pytest.raises(Cancelled, match="building was cancelled"):
        build(bundled["fp16"], rtx, targets=("sm_86",), on_progress=lambda *report: False)


def test_an_error_of_the_callers_stops_the_builder_and_comes_out_as_it_is(rtx, bundled):
    def broken(*report: object) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        build(bundled["fp16"], rtx, targets=("sm_86",), on_progress=broken)


@POSIX
def test_ctrl_c_while_building_exits_130_and_leaves_nothing(bundled, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    code = "import sys; from sdedit.tensorrt import build\nold = build._Progress.start\n"
    code += "def start(*a): print('building', flush=True); old(*a)\nbuild._Progress.start = start\n"
    code += "from sdedit.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "build", str(bundled["fp16"].path), "-o", str(out / "a.plan")]
    command += ["--backend", "tensorrt-rtx", "--target", "sm_86"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "error: interrupted" in said
    assert list(out.iterdir()) == []


# --- what cannot be built ----------------------------------------------------------------------------------------


def test_a_node_that_tensorrt_does_not_know_is_named_with_the_reason(rtx, tmp_path):
    tail = [
        helper.make_node("Cast", ["mixed"], ["whole"], "to_whole", to=TensorProto.UINT32),
        helper.make_node("Cast", ["whole"], ["denoised"], "back", to=TensorProto.FLOAT),
    ]
    path = convolution(tmp_path / "odd.onnx", tail)
    with pytest.raises(ArtifactError) as caught:
        build(artifacts.read(path), rtx, targets=("sm_86",))
    assert str(caught.value).startswith(f"{path}: tensorrt-rtx {rtx.version} cannot read it: node to_whole (Cast): ")
    assert "Unsupported data type for the Cast operator" in str(caught.value)
    assert caught.value.hint == "write it again; opset 18 to 22 is safe"


def test_int8_is_refused_in_tensorrts_words_with_the_way_out(rtx, tmp_path):
    from sdedit.export import to_onnx
    from sdedit.export.int8 import quantize

    float32 = onnx.load(convolution(tmp_path / "float32.onnx"))
    feed = {"x": np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32), "sigma": np.ones(2, np.float32)}
    path = tmp_path / "int8.onnx"
    to_onnx.save(quantize(float32, [feed], tolerance=10.0), path, metadata(SHAPE, SDES["vp"]) | {"precision": "int8"})
    with pytest.raises(ArtifactError, match=r"DequantizeLinear.*has type Int32 but must have type") as caught:
        build(artifacts.read(path), rtx, targets=("sm_86",))
    assert "catchCudaError" not in str(caught.value)
    assert caught.value.hint.startswith("export it with --precision fp16")


def test_weights_that_went_away_are_an_error(rtx, small, tmp_path):
    path = tmp_path / "outside.onnx"
    onnx.save(onnx.load(small.path), path, save_as_external_data=True, location="outside.data", size_threshold=0)
    opened = artifacts.read(path)
    opened.sha256  # noqa: B018, read while it could be
    (tmp_path / "outside.data").unlink()
    with pytest.raises(ArtifactError, match="cannot read it: Failed to import initializer"):
        build(opened, rtx, targets=("sm_86",))


@POSIX
def test_a_name_that_is_not_text_is_an_error(rtx, small, tmp_path):
    path = Path(os.fsdecode(bytes(tmp_path / "caf") + b"\xe9.onnx"))
    shutil.copy(small.path, path)
    with pytest.raises(ArtifactError, match="TensorRT opens only names that are text"):
        build(artifacts.read(path), rtx, targets=("sm_86",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": (2, 1, 4)}, "batch is 2:1:4; wanted MIN:OPT:MAX, rising, from 1 to 10000 images"),
        ({"batch": (0, 1, 1)}, "batch is 0:1:1; wanted MIN:OPT:MAX, rising, from 1 to 10000 images"),
        ({"workspace_bytes": 0}, "workspace is 0 bytes; wanted at least 1"),
        ({"timing_cache": Path("t")}, "tensorrt-rtx keeps no timing cache: it times nothing"),
        ({"targets": ()}, "no target to build for"),
        ({"targets": ("sm_99",)}, r"builds for sm_75, .*sm_120.*; not for sm_99$"),
        ({"targets": ("sm_86", "sm_90")}, r"builds for sm_75, .*sm_120.*; not for sm_90, a data-centre GPU$"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options, message, rtx, small):
    with pytest.raises(OptionError, match=message):
        build(small, rtx, **{"targets": ("sm_86",), **options})


def test_a_gpu_that_rtx_does_not_serve_is_named(rtx, small):
    h100 = Gpu("Stub H100", (9, 0), "13.0")
    with pytest.raises(BackendUnavailable, match="not for sm_90, a data-centre GPU") as caught:
        build(small, rtx, gpu=h100)
    assert caught.value.hint == "--backend tensorrt builds on that GPU itself"


@nobody_has_a_gpu
def test_current_without_a_gpu_is_an_error(rtx, small):
    with pytest.raises(BackendUnavailable, match=NO_GPU) as caught:
        build(small, rtx)
    assert "--target sm_86" in caught.value.hint


def test_what_tensorrt_says_last_is_quoted_without_its_source_lines(rtx):
    log = rtx.logger("INFO")
    level = trt.ILogger
    assert log.last_error() is None
    log.log(level.ERROR, "IBuilder::build: out of memory (In allocate at /_src/a/b.cpp:12)")
    log.log(level.ERROR, "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (no driver)")
    log.log(level.VERBOSE, "chatter")
    assert log.last_error() == "IBuilder::build: out of memory ()"
    assert [severity for severity, _ in log.messages] == ["ERROR", "ERROR"]


# --- TensorRT itself, which builds only on the GPU: RTX's builder in its place, told that an sm_86 is here --------


class OnGpuBuilder(trt.Builder):
    def create_builder_config(self):
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM86, 0)
        return config


def in_place_of_tensorrt(**replaced: object) -> Library:
    """RTX as `tensorrt`: everything that build() does there runs for real, but for the choice of the GPU."""
    names = {name: getattr(trt, name) for name in dir(trt) if not name.startswith("__")}
    module = SimpleNamespace(**names | {"Builder": OnGpuBuilder} | replaced)
    del module.ComputeCapability  # which TensorRT does not have
    return Library("tensorrt", module, "10.16.1.11")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorrt_builds_for_the_gpu_here_and_writes_its_timing_cache(small, tmp_path):
    timings = tmp_path / "timings"
    built = build(small, in_place_of_tensorrt(), gpu=GPU, timing_cache=timings)
    assert timings.stat().st_size > 0
    assert built.sidecar["library"] == {"name": "tensorrt", "version": "10.16.1.11"}
    assert built.sidecar["gpu"] == {"name": "Stub RTX", "compute_capability": [8, 6], "driver": "13.0"}
    assert built.sidecar["targets"] == ["sm_86"]


def test_tensorrt_builds_for_no_other_gpu(small):
    with pytest.raises(
        OptionError, match="builds only for the GPU it runs on: sm_120 was asked for, this GPU is sm_86"
    ):
        build(small, in_place_of_tensorrt(), targets=("sm_120",), gpu=GPU)


@nobody_has_a_gpu
def test_tensorrt_without_a_driver_is_an_error_before_it_can_crash(small):
    with pytest.raises(BackendUnavailable, match=NO_GPU):
        build(small, in_place_of_tensorrt(), targets=("sm_86",))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_file_that_is_no_timing_cache_is_refused(small, tmp_path):
    (tmp_path / "timings").write_bytes(b"not timings" * 20)
    with pytest.raises(OptionError, match="timings: not a timing cache of tensorrt 10"):
        build(small, in_place_of_tensorrt(), gpu=GPU, timing_cache=tmp_path / "timings")
    assert (tmp_path / "timings").read_bytes() == b"not timings" * 20


@nobody_has_a_gpu
def test_a_builder_that_failed_is_gone_though_its_error_is_kept(small):
    """Freed later, by a garbage collection inside of another builder's log, it would wait for that one's lock."""
    builders = []

    class Watched(trt.Builder):  # looks for the GPU, and finds none
        def create_builder_config(self):
            builders.append(weakref.ref(self))
            config = super().create_builder_config()
            config.num_compute_capabilities = 1
            config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
            return config

    gc.disable()
    try:
        with pytest.raises(ArtifactError, match="could not build a plan") as caught:
            build(small, in_place_of_tensorrt(Builder=Watched), gpu=GPU)
        assert [builder() for builder in builders] == [None]
    finally:
        gc.enable()
    assert caught.value.__traceback__ is not None


@nobody_has_a_gpu
def test_a_builder_that_fails_is_quoted(small):
    class Honest(trt.Builder):  # looks for the GPU, and finds none
        def create_builder_config(self):
            config = super().create_builder_config()
            config.num_compute_capabilities = 1
            config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
            return config

    with pytest.raises(ArtifactError, match=r"tensorrt 10.16.1.11 could not build a plan: .*CUDA driver") as caught:
        build(small, in_place_of_tensorrt(Builder=Honest), gpu=GPU)
    assert "catchCudaError" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("Requested amount of GPU memory could not be allocated: out of memory", "free memory"),
        ("Could not find any implementation for node due to insufficient workspace.", "a larger --workspace"),
    ],
)
def test_too_little_memory_has_hints_of_its_own(said, hint, small):
    class Short(OnGpuBuilder):
        def __init__(self, log):
            super().__init__(log)
            self.log = log

        def build_serialized_network(self, network, config):
            self.log.log(trt.ILogger.ERROR, said)

    with pytest.raises(BackendUnavailable, match=re.escape(said)) as caught:
        build(small, in_place_of_tensorrt(Builder=Short), gpu=GPU)
    assert caught.value.hint.startswith(hint)


def test_a_builder_that_does_not_start_is_an_error(small):
    class None_(OnGpuBuilder):
        def __init__(self, log):
            raise TypeError("pybind11::init(): factory function returned nullptr")

    with pytest.raises(BackendUnavailable, match=r"tensorrt 10.16.1.11: cannot start: .*nullptr"):
        build(small, in_place_of_tensorrt(Builder=None_), gpu=GPU)


def test_where_the_log_lists_no_kernels_the_inspector_does(small):
    inspected = "Layers:\nName: __myl_SiluGnor_myl0_1, LayerType: kgen, Inputs: []\n"
    engine = SimpleNamespace(
        create_engine_inspector=lambda: SimpleNamespace(get_engine_information=lambda form: inspected)
    )
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: engine)

    class Terse(OnGpuBuilder):
        def build_serialized_network(self, network, config):
            config.profiling_verbosity = trt.ProfilingVerbosity.NONE
            return super().build_serialized_network(network, config)

    terse = in_place_of_tensorrt(Builder=Terse, Runtime=lambda log: runtime)
    assert [kernel.label for kernel in build(small, terse, gpu=GPU, verbose=True).kernels] == ["GroupNorm + SiLU"]
    assert build(small, terse, gpu=GPU).kernels == ()


# --- plans on disk -----------------------------------------------------------------------------------------------


def test_a_plan_and_its_sidecar_come_back(written, built, small):
    read = plan.read(written)
    assert read.path.read_bytes() == built.data
    assert read.sidecar == built.sidecar
    assert (read.built_by, read.version) == ("tensorrt-rtx", trt.__version__)
    assert (read.profile, read.precision, read.targets) == ((1, 1, 1), "fp32", ("sm_86",))
    ours = read.artifact
    assert (ours.path, ours.size_bytes) == (written, small.size_bytes)
    for name in ("metadata", "opset", "inputs", "outputs", "sde", "extra_inputs", "sha256", "name", "precision"):
        assert getattr(ours, name) == getattr(small, name)


def test_the_artifact_of_a_plan_keeps_further_inputs(rtx, labelled, tmp_path):
    built = build(artifacts.read(labelled), rtx, targets=("sm_86",))
    plan.write(tmp_path / "a.plan", built.data, built.sidecar)
    assert plan.read(tmp_path / "a.plan").artifact.extra_inputs == artifacts.read(labelled).extra_inputs


def test_reading_a_plan_loads_no_tensorrt(written):
    code = (
        "import sys; from pathlib import Path; from sdedit.tensorrt import cache, plan; plan.read(Path(sys.argv[1]))\n"
    )
    code += "assert not {'tensorrt', 'tensorrt_rtx', 'onnx', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(written)], check=True)


def change(path: Path, **changes: object) -> None:
    """Replace fields of a sidecar, named as in `library.name`; a value of Ellipsis takes one out."""
    beside = plan.sidecar_path(path)
    sidecar = json.loads(beside.read_text("utf-8"))
    for name, value in changes.items():
        at, parts = sidecar, name.split("__")
        for part in parts[:-1]:
            at = at[part]
        if value is ...:
            del at[parts[-1]]
        else:
            at[parts[-1]] = value
    beside.write_text(json.dumps(sidecar), "utf-8")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no plan": (lambda path: path.unlink(), "small.plan: no such file"),
    "no sidecar": (
        lambda path: plan.sidecar_path(path).unlink(),
        "small.plan: its sidecar small.plan.json is not beside it",
    ),
    "truncated": (
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        r"small.plan: has \d+ bytes; its sidecar says \d+: it is damaged",
    ),
    "one bit": (
        lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
        r"small.plan: has SHA-256 \w{12}…; its sidecar says \w{12}…: it is damaged, or not the plan that the sidecar",
    ),
    "no JSON": (lambda path: plan.sidecar_path(path).write_text("{"), "small.plan.json: not JSON: "),
    "no text": (lambda path: plan.sidecar_path(path).write_bytes(b"\xff"), "small.plan.json: not JSON: it is not text"),
    "no object": (lambda path: plan.sidecar_path(path).write_text("[]"), "small.plan.json: is not a JSON object"),
    "deep": (lambda path: plan.sidecar_path(path).write_text("[" * 10**5), "small.plan.json: not JSON: "),
    "format 0": (lambda path: change(path, format=0), "small.plan.json: format is 0; wanted 1"),
    "no format": (lambda path: change(path, format=...), "small.plan.json: format is None; wanted 1"),
    "no profile": (lambda path: change(path, profile=...), "profile.batch is missing; wanted three whole numbers"),
    "falling batch": (
        lambda path: change(path, profile__batch=[2, 1, 1]),
        r"profile.batch is \[2, 1, 1\]; wanted three whole numbers, rising",
    ),
    "library": (
        lambda path: change(path, library__name="other"),
        "library.name is 'other'; wanted tensorrt or tensorrt-rtx",
    ),
    "targets": (lambda path: change(path, targets=[]), r"targets is \[\]; wanted a list such as \['sm_86'\]"),
    "gpu": (lambda path: change(path, gpu={"name": "x"}), "gpu is {'name': 'x'}; wanted name, compute_capability"),
    "hash": (lambda path: change(path, artifact__sha256="12"), "artifact.sha256 is '12'; wanted a SHA-256"),
    "size": (lambda path: change(path, plan__bytes=None), "plan.bytes is None; wanted a number of bytes"),
    "tensors": (lambda path: change(path, inputs=[{"name": "x"}]), "inputs is .*; wanted a list of name, dtype, shape"),
    "metadata": (
        lambda path: change(path, metadata__image__height="tall"),
        "small.plan.json: image.height is 'tall'; wanted a whole number, at least 1",
    ),
    "other outputs": (
        lambda path: change(path, outputs=[]),
        "small.plan.json: outputs are none; wanted denoised",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_wrong_with_a_plan_is_said_at_open_with_the_fix(damage, message, written):
    damage(written)
    with pytest.raises(ArtifactError, match=message) as caught:
        plan.read(written)
    assert f"sdedit build MODEL.onnx -o {written} --force" in caught.value.hint


def test_a_plan_of_a_newer_format_asks_for_an_upgrade(written):
    change(written, format=2)
    with pytest.raises(ArtifactError, match=r"format 2 is newer than this engine reads \(1\)") as caught:
        plan.read(written)
    assert caught.value.hint == "pip install --upgrade sdedit-engine"


def test_unknown_fields_are_ignored(written):
    change(written, colour="blue")
    assert plan.read(written).sidecar["colour"] == "blue"


def test_a_plan_and_its_sidecar_are_written_both_or_neither(built, tmp_path, monkeypatch):
    (tmp_path / "a.plan").write_bytes(b"old")
    real_replace = os.replace

    def full_at_the_sidecar(source: Path, target: Path) -> None:
        if str(target).endswith(".json"):
            raise OSError(28, "No space left on device")
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", full_at_the_sidecar)
    with pytest.raises(OutputError, match="No space left on device"):
        plan.write(tmp_path / "a.plan", built.data, built.sidecar)
    assert [path.name for path in tmp_path.iterdir()] == ["a.plan"]
    assert (tmp_path / "a.plan").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("here", "capability", "error", "message", "hint"),
    [
        (("tensorrt", "11.4.0.106"), (8, 6), BackendUnavailable,
         r"was built by tensorrt-rtx \S+; tensorrt 11.4.0.106 cannot run it", "--backend tensorrt-rtx, or build it"),
        (("tensorrt-rtx", "1.5.0.114"), (8, 6), ArtifactError,
         r"was built by tensorrt-rtx \S+; here is version 1.5.0.114, and a plan runs only on the version that built it",
         "build it again here: sdedit build MODEL.onnx --backend tensorrt-rtx"),
        (("tensorrt-rtx", trt.__version__), (12, 0), ArtifactError,
         "was built for sm_86; this GPU is sm_120", "build it again here: sdedit build MODEL.onnx --backend"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_run_here_says_both_sides_and_the_fix(here, capability, error, message, hint, written):
    name, version = here
    with pytest.raises(error, match=message) as caught:
        plan.require_runnable(plan.read(written), Library(name, trt, version), capability)
    assert caught.value.hint.startswith(hint)


def test_a_plan_that_is_replaced_after_it_was_checked_is_not_taken(written, built):
    checked = plan.read(written)
    assert checked.data() == built.data
    written.touch()
    with pytest.raises(ArtifactError, match=r"small\.plan: was changed since it was checked"):
        checked.data()
    written.unlink()
    with pytest.raises(ArtifactError, match="was changed since it was checked"):
        checked.data()


def test_a_plan_that_can_run_here_passes(written, rtx):
    plan.require_runnable(plan.read(written), rtx, (8, 6))
    plan.require_runnable(plan.read(written), rtx)


# --- the cache ---------------------------------------------------------------------------------------------------


def find(model: Artifact, opened: Library, said: list[str] | None = None, **options: object) -> plan.Plan:
    say = (lambda text: None) if said is None else said.append
    return cache.find_or_build(model, opened, **{"gpu": GPU, "say": say, **options})


@pytest.fixture
def no_building(monkeypatch) -> None:
    """From here on nothing is built."""

    def build_nothing(*arguments: object, **options: object) -> None:
        raise AssertionError("built")

    monkeypatch.setattr(cache, "build", build_nothing)


def test_a_model_that_is_replaced_while_its_plan_is_built_leaves_none(rtx, network, cached, tmp_path):
    model = artifacts.read(Path(shutil.copy(network, tmp_path / "model.onnx")))
    assert model.sha256

    def replaced(done: int, total: int, phase: str) -> None:
        model.path.touch()

    with pytest.raises(ArtifactError, match=r"model\.onnx: was changed since it was read"):
        find(model, rtx, on_progress=replaced)
    assert list(cached.iterdir()) == []


def test_a_plan_is_built_once_and_found_again(small, rtx, cached, request):
    said: list[str] = []
    first = find(small, rtx, said)
    assert said == [f"closed-form: building a plan with tensorrt-rtx {rtx.version}: nothing is cached for this model"]
    assert first.path.is_relative_to(cached)
    assert first.sidecar["gpu"]["name"] == "Stub RTX"
    assert first.targets == ("sm_86",)
    request.getfixturevalue("no_building")
    assert find(small, rtx, said).sidecar == first.sidecar
    assert len(said) == 1
    assert [entry.name for entry in cached.iterdir()] == [first.path.parent.name]  # no lock, nothing half made


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gpu": replace(GPU, driver="14.0")}, "the cached one has driver 13.0, wanted 14.0"),
        ({"gpu": replace(GPU, name="Stub 2")}, r"the cached one has gpu Stub RTX \(sm_86\), wanted Stub 2 \(sm_86\)"),
        ({"gpu": replace(GPU, compute_capability=(8, 9))}, r"the cached one has gpu .*sm_86\), wanted .*sm_89\)"),
        ({"batch": (2, 2, 2)}, "the cached one has batch 1:1:1, wanted 2:2:2"),
        ({"opened": "9.9"}, r"the cached one has library tensorrt-rtx \S+, wanted tensorrt-rtx 9.9"),
        (
            {"gpu": replace(GPU, driver="14.0"), "batch": (2, 2, 2)},
            "the cached one has driver 13.0, wanted 14.0; the cached one has batch 1:1:1, wanted 2:2:2",
        ),
    ],
    ids=["driver", "name", "architecture", "batch", "version", "two"],
)  # fmt: skip
def test_a_miss_says_what_differs(options, reason, small, rtx, cached):
    find(small, rtx)
    said: list[str] = []
    opened = replace(rtx, version=options["opened"]) if "opened" in options else rtx
    find(small, opened, said, **{name: value for name, value in options.items() if name != "opened"})
    assert re.search(f": building a plan with .*: {reason}$", said[0])
    assert len(list(cached.iterdir())) == 2


def test_the_nearest_of_several_is_the_reason(small, rtx, cached):
    find(small, rtx, gpu=replace(GPU, driver="12.0", name="Old"))
    find(small, rtx, gpu=replace(GPU, driver="14.0"))
    said: list[str] = []
    find(small, rtx, said)
    assert said[0].endswith(": the cached one has driver 14.0, wanted 13.0")


def test_a_changed_file_of_the_same_name_is_another_model(small, rtx, cached, tmp_path):
    find(small, rtx)
    said: list[str] = []
    find(artifacts.read(convolution(tmp_path / "network.onnx")), rtx, said)
    assert said[0].endswith(": what is cached under its name is of another file")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: path.write_bytes(b"short"),
            r"has 5 bytes; its sidecar says \d+: it is damaged; building it again",
        ),
        (
            lambda path: plan.sidecar_path(path).unlink(),
            "its sidecar model.plan.json is not beside it; building it again",
        ),
        (lambda path: path.unlink(), "model.plan: no such file; building it again"),
        (lambda path: change(path, gpu__driver="1.0"), "its sidecar is of another plan; building it again"),
    ],
)
def test_a_damaged_entry_is_said_aloud_and_built_again(damage, message, small, rtx, cached):
    first = find(small, rtx)
    damage(first.path)
    said: list[str] = []
    again = find(small, rtx, said)
    assert re.search(message, said[0])
    assert said[1].endswith(": the cached one is damaged")
    assert again.path == first.path
    assert plan.read(first.path).sidecar["gpu"]["driver"] == "13.0"
    assert len(list(cached.iterdir())) == 1


def test_the_status_counts_plans_bytes_and_what_is_damaged(small, rtx, cached):
    assert cache.status() == cache.CacheStatus(cached, 0, 0, ())
    first, second = find(small, rtx), find(small, rtx, batch=(2, 2, 2))
    second.path.write_bytes(b"short")
    status = cache.status()
    assert (status.folder, status.plans) == (cached, 1)
    assert status.bytes == sum(file.stat().st_size for file in cached.rglob("*") if file.is_file())
    assert status.bytes > first.path.stat().st_size
    assert re.fullmatch(r".*model.plan: has 5 bytes; its sidecar says \d+: it is damaged", *status.damaged)


@POSIX
def test_a_cache_that_cannot_be_written_names_the_variable(small, rtx, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SDEDIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="plans cannot be kept there: Not a directory") as caught:
        find(small, rtx)
    assert caught.value.hint == "set SDEDIT_CACHE to a folder that you may write to"


@pytest.mark.parametrize(
    ("platform", "environment", "wanted"),
    [
        ("linux", {}, "~/.cache/sdedit/plans"),
        ("linux", {"XDG_CACHE_HOME": "/caches"}, "/caches/sdedit/plans"),
        ("darwin", {"XDG_CACHE_HOME": "/caches"}, "~/Library/Caches/sdedit/plans"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/sdedit/plans"),
        ("win32", {}, "~/AppData/Local/sdedit/plans"),
        ("linux", {"SDEDIT_CACHE": "/mine", "XDG_CACHE_HOME": "/caches"}, "/mine/plans"),
    ],
)
def test_the_folder_is_the_platforms_unless_said_otherwise(platform, environment, wanted, monkeypatch):
    for name in ("SDEDIT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cache.sys, "platform", platform)
    assert cache.folder() == Path(wanted).expanduser()


BUILDER = """
import sys, time
from pathlib import Path
from sdedit import artifact
from sdedit.tensorrt import build, cache, installed, plan

model, step, log = sys.argv[1:]
real_build, real_write = cache.build, plan.write

def tell(text):
    with open(log, "a") as file:
        file.write(text + "\\n")

def slow_build(*arguments, **options):
    tell("building")
    if step == "build":
        time.sleep(60)
    time.sleep(1)
    return real_build(*arguments, **options)

def half_a_write(path, data, sidecar):
    path.write_bytes(data[:100])
    tell("writing")
    time.sleep(60)

cache.build = slow_build
if step == "write":
    plan.write = half_a_write
gpu = installed.Gpu("Stub RTX", (8, 6), "13.0")
found = cache.find_or_build(artifact.read(Path(model)), installed.open_library("tensorrt-rtx"), gpu=gpu, say=tell)
tell(f"found {found.path}")
"""


@pytest.fixture
def builder(tmp_path: Path, small: Artifact, cached: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """builder(step): another process that builds the small model's plan, and hangs at this step if there is one."""
    started: list[subprocess.Popen[bytes]] = []

    def start(step: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", BUILDER, str(small.path), step, str(tmp_path / "log")]
        started.append(subprocess.Popen(command))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(log: Path, line: str) -> None:
    for _ in range(600):
        if log.exists() and line in log.read_text().splitlines():
            return
        time.sleep(0.1)
    raise AssertionError(f"{line!r} never came")


def test_two_processes_build_a_plan_once(builder, tmp_path, cached):
    both = [builder("none"), builder("none")]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    said = (tmp_path / "log").read_text().splitlines()
    assert said.count("building") == 1
    assert said.count("closed-form: another process is building this plan; waiting for it") == 1
    (entry,) = cached.iterdir()
    assert said.count(f"found {entry / cache.FILE}") == 2


@POSIX
@pytest.mark.parametrize("step", ["build", "write"])
def test_a_killed_build_leaves_nothing(step, builder, tmp_path, small, rtx, cached):
    killed = builder(step)
    wait_for(tmp_path / "log", {"build": "building", "write": "writing"}[step])
    killed.kill()
    killed.wait()
    leftovers = {path.suffix for path in cached.iterdir()}
    assert leftovers == ({".lock"} if step == "build" else {".lock", ".building"})
    assert cache.status().plans == 0
    assert cache.status().damaged == ()
    other = find(small, rtx, batch=(2, 2, 2))  # of another plan: cleans up all the same
    assert list(cached.iterdir()) == [other.path.parent]
    assert find(small, rtx).path.parent in cached.iterdir()


@POSIX
def test_what_is_being_built_is_left_alone(builder, tmp_path, small, rtx, cached):
    alive = builder("write")
    wait_for(tmp_path / "log", "writing")
    find(small, rtx, batch=(2, 2, 2))
    assert {path.suffix for path in cached.iterdir()} == {".lock", ".building", ""}
    assert alive.poll() is None


@pytest.mark.parametrize("at", [0, building.PROGRESS_STEPS])
def test_a_build_cancelled_at_its_first_or_last_report_is_cancelled(at, rtx, small):
    with pytest.raises(Cancelled):
        build(small, rtx, targets=("sm_86",), on_progress=lambda done, *rest: done < at if at else False)


def test_a_build_that_fails_leaves_nothing(cached, rtx, small):
    with pytest.raises(Cancelled):
        find(small, rtx, on_progress=lambda *report: False)
    assert list(cached.iterdir()) == []


# --- the command -------------------------------------------------------------------------------------------------

RTX = ("--backend", "tensorrt-rtx", "--target", "sm_86")


def test_build_writes_a_plan_and_its_sidecar_and_prints_the_path(small, tmp_path, capsys):
    out = tmp_path / "a.plan"
    assert main(["build", str(small.path), "-o", str(out), *RTX]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.plan", "a.plan.json"]
    assert plan.read(out).artifact.sha256 == small.sha256


def test_build_writes_beside_the_artifact_unless_told_where(small, tmp_path, capsys):
    shutil.copy(small.path, tmp_path / "mine.onnx")
    assert main(["build", str(tmp_path / "mine.onnx"), *RTX]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'mine.plan'}\n"


@pytest.mark.parametrize("existing", ["a.plan", "a.plan.json"])
def test_build_replaces_existing_files_only_when_forced(existing, small, tmp_path, capsys):
    (tmp_path / existing).write_bytes(b"precious")
    command = ["build", str(small.path), "-o", str(tmp_path / "a.plan"), *RTX]
    assert main(command) == 1
    assert f"error: {tmp_path / existing}: exists already" in capsys.readouterr().err
    assert (tmp_path / existing).read_bytes() == b"precious"
    assert main([*command, "--force"]) == 0
    assert plan.read(tmp_path / "a.plan")


def test_build_in_json_is_one_object(small, tmp_path, capsys):
    flags = ("--batch", "1:2:4", "--workspace", "16", "--json", "--explain")
    target = ("--backend", "tensorrt-rtx", "--target", "sm_86,sm_89")
    assert main(["build", str(small.path), "-o", str(tmp_path / "a.plan"), *target, *flags]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["output"] == str(tmp_path / "a.plan")
    assert said["sidecar"] == plan.read(tmp_path / "a.plan").sidecar
    assert said["sidecar"]["profile"]["batch"] == [1, 2, 4]
    assert said["sidecar"]["targets"] == ["sm_86", "sm_89"]
    assert said["sidecar"]["flags"]["workspace_bytes"] == 16_000_000
    assert said["kernels"]["total"] == sum(said["kernels"]["kinds"].values()) > 0
    assert said["kernels"]["operators"]["Conv"] == 1


def test_explain_shows_kernels_and_activation_memory(small, tmp_path, capsys):
    assert main(["build", str(small.path), "-o", str(tmp_path / "a.plan"), *RTX, "--explain"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^tensorrt-rtx \S+, fp32, for sm_86: 0.3 MB, built in \d+.\d s$", said, re.MULTILINE)
    assert re.search(r"^\d+ kernels: .*\d correlation", said, re.MULTILINE)
    assert re.search(r"^ +1  Conv$", said, re.MULTILINE)
    assert re.search(r"^activation memory: 8.2 MB for batches 1:1:1$", said, re.MULTILINE)
    assert said.endswith(f"{tmp_path / 'a.plan'}\n")


def test_a_bar_is_drawn_on_a_terminal(small, tmp_path, monkeypatch):
    command = ["build", str(small.path), "-o", str(tmp_path / "a.plan"), *RTX]
    seen = on_a_terminal(lambda: main(command), monkeypatch)
    assert re.search(r"█+ 100/100", seen)
    assert seen.endswith("\r\x1b[K")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("-o", "a.engine"), 2, "a.engine: a plan's name ends in .plan"),
        (("--batch", "3:2:1"), 2, "batch is 3:2:1; wanted MIN:OPT:MAX, rising"),
        (("--batch", "1:2"), 2, "argument --batch: '1:2' is not MIN:OPT:MAX"),
        (("--workspace", "0"), 2, "argument --workspace: '0' is not a whole number above 0"),
        (("--target", "sm_90"), 2, "not for sm_90, a data-centre GPU"),
        (("--timing-cache", "t"), 2, "tensorrt-rtx keeps no timing cache"),
        (("--backend", "openvino"), 2, "unknown TensorRT library 'openvino'"),
        pytest.param(("--target", "current"), 1, NO_GPU, marks=nobody_has_a_gpu),
    ],
)
def test_words_that_make_no_sense_write_nothing(words, code, message, small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        found = main(["build", str(small.path), "-o", "a.plan", *RTX, *words])
    except SystemExit as left:
        found = left.code
    said = capsys.readouterr()
    assert found == code
    assert message in said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_inspect_shows_a_plan(written, capsys):
    assert main(["inspect", str(written)]) == 0
    said = capsys.readouterr().out
    for row in (
        r"plan +tensorrt-rtx \S+  sm_86",
        r"built +\S+  ahead of time",
        r"batch +1:1:1 \(least, tuned for, most\)",
        r"activation +8.2 MB",
        r"inputs +x float32 \[B, 3, 8, 12\]  sigma float32 \[B\]",
    ):
        assert re.search(f"^  {row}$", said, re.MULTILINE)


def test_inspect_in_json_is_the_sidecar_and_a_table_if_asked_for(written, built, capsys):
    assert main(["inspect", str(written), "--json", "--t0", "0.5", "--steps", "3"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said.pop("table")["rows"]) == 3
    assert said == {"path": str(written), **built.sidecar}


def test_inspect_says_what_is_wrong_with_a_plan(written, capsys):
    written.write_bytes(b"")
    assert main(["inspect", str(written)]) == 1
    assert "has 0 bytes; its sidecar says" in capsys.readouterr().err


# --- finding the library and the GPU -----------------------------------------------------------------------------


@pytest.fixture
def fake_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """fake_tensorrt(source): that is now what `import tensorrt` runs."""

    def install(source: str) -> None:
        (tmp_path / "tensorrt.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)

    yield install
    sys.modules.pop("tensorrt", None)


LIBRARIES_AT_FAULT = {
    "not there": (
        "raise ModuleNotFoundError(\"No module named 'tensorrt'\", name='tensorrt')",
        r"tensorrt: is not installed$",
    ),
    "half there": (
        "raise ModuleNotFoundError(\"No module named 'tensorrt_bindings'\", name='tensorrt_bindings')",
        "tensorrt: needs tensorrt_bindings, which is not installed$",
    ),
    "no libnvinfer": (
        "raise ImportError('libnvinfer.so.10: cannot open shared object file: No such file or directory')",
        "tensorrt: libnvinfer.so.10 was not found: libnvinfer.so.10: cannot open shared object file",
    ),
    "on Windows": (
        "raise FileNotFoundError('Could not find: nvinfer_10.dll. Is it on your PATH?')",
        "tensorrt: nvinfer_10.dll was not found: ",
    ),
    "old": ("__version__ = '8.6.1'", r"tensorrt: version 8.6.1 is installed; wanted 10.1 or later$"),
    "a little old": ("__version__ = '10.0.1'", r"tensorrt: version 10.0.1 is installed; wanted 10.1 or later$"),
}


@pytest.mark.parametrize(("source", "message"), LIBRARIES_AT_FAULT.values(), ids=LIBRARIES_AT_FAULT)
def test_why_tensorrt_cannot_be_used_and_what_to_install(source, message, fake_tensorrt):
    fake_tensorrt(source)
    with pytest.raises(BackendUnavailable, match=message) as caught:
        installed.open_library("tensorrt")
    assert "'sdedit-engine[tensorrt]'" in caught.value.hint


def test_an_unknown_library_is_a_usage_error():
    with pytest.raises(OptionError, match="unknown TensorRT library 'trt'") as caught:
        installed.open_library("trt")
    assert caught.value.hint == "choose one of tensorrt, tensorrt-rtx"


def test_tensorrt_comes_before_rtx(fake_tensorrt):
    fake_tensorrt("__version__ = '11.4.0.106'")
    found = installed.first_installed()
    assert (found.name, found.major, found.ahead_of_time) == ("tensorrt", 11, False)


def test_rtx_is_found_where_tensorrt_is_not(fake_tensorrt):
    fake_tensorrt("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    found = installed.first_installed()
    assert (found.name, found.version, found.ahead_of_time) == ("tensorrt-rtx", trt.__version__, True)
    assert {"sm_75", *TARGETS} <= set(found.ahead_of_time_targets)


def test_neither_installed_says_why_of_both(fake_tensorrt, monkeypatch):
    fake_tensorrt("__version__ = '8.6.1'")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendUnavailable, match=r"no TensorRT here: tensorrt: version 8.6.1.*; tensorrt-rtx: "):
        installed.first_installed()


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stand-in for the driver's library."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here")
    folder = tmp_path_factory.mktemp("libcuda")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", STUBS / "cuda.c"], check=True)
    return folder


def gpu_of(folder: Path, **environment: str) -> str:
    code = "from sdedit.tensorrt.installed import gpu_here\ntry: print(gpu_here())\nexcept Exception as e: print(e)"
    variables = os.environ | {"LD_LIBRARY_PATH": str(folder)} | environment
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="names of Linux libraries")
@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, r"Gpu\(name='Stub RTX 0', compute_capability=\(8, 9\), driver='(\S+, )?CUDA 13.2'\)"),
        ({"STUB_CUINIT": "999"}, "no usable NVIDIA GPU here: cuInit returned 999"),
        ({"STUB_GPUS": "0"}, "no NVIDIA GPU here: the driver shows none"),
    ],
    ids=["a GPU", "a broken driver", "no GPU"],
)
def test_the_gpu_is_what_the_driver_says(environment, wanted, libcuda):
    assert re.fullmatch(wanted, gpu_of(libcuda, **environment))
