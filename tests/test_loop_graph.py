"""`sdedit export --loop`: the edit as one ONNX file is `sdedit edit`, to the bit outside the network."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from closed_form import SDES, gaussian, metadata, save
from conftest import SHAPE
from onnx import TensorProto, helper

import sdedit
from sdedit import artifact, noise
from sdedit.cli.main import main
from sdedit.errors import OptionError
from sdedit.export import loop_graph, to_onnx
from sdedit.export.expressions import Value, Writer
from sdedit.export.noise_graph import NoiseGraph
from sdedit.schedule import SAMPLERS

SCHEDULE: dict[str, Any] = {"t0": 0.5, "steps": 4, "sampler": "ancestral", "eta": None}
LAST_SEED = 2**64 - 1
HEIGHT, WIDTH = SHAPE[1:]

Edit = Callable[..., np.ndarray]


def open_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.fixture
def edit(tmp_path: Path) -> Edit:
    """edit(model, schedule, options, **inputs): the image that the exported file makes of these inputs."""

    def run(model: Path, schedule: dict[str, Any], options: dict[str, Any], **inputs: np.ndarray) -> np.ndarray:
        target = tmp_path / "edit.onnx"
        loop_graph.write(artifact.read(model), target, SCHEDULE | schedule, **options, force=True)
        return open_session(target).run(["image"], inputs)[0]

    return run


def expected(model: Path, schedule: dict[str, Any], guides: list[np.ndarray], **options: Any) -> sdedit.EditResult:
    """What `sdedit edit` makes of them, in one batch."""
    editor = sdedit.load(model, backend="ort-cpu", threads=1)
    return editor.edit(guides, batch=len(guides), **SCHEDULE | schedule, **options)


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8)


def soft_mask() -> np.ndarray:
    """Kept at the left, repainted at the right, every grey between."""
    return np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))


def hard_mask() -> np.ndarray:
    return np.where(np.arange(WIDTH) % 5 < 2, 255, 0).astype(np.uint8) * np.ones((HEIGHT, 1), np.uint8)


def as_model(pixels: np.ndarray) -> np.ndarray:
    """(B, H, W, C) uint8 -> (B, C, H, W) float32 in [-1, 1]."""
    return np.moveaxis(pixels, 3, 1).astype(np.float32) / np.float32(127.5) - np.float32(1)


def seeds_from(first: int, count: int) -> np.ndarray:
    return np.array([(first + j) % 2**64 for j in range(count)], np.uint64)


# --- the noise -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def draw(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., np.ndarray]:
    """draw(seeds, (C, H, W), step, repeat, stream): the normals of the graph alone."""
    sessions = {}
    for stream in (noise.STREAM_STATE, noise.STREAM_MASK):
        w = Writer("")
        given = NoiseGraph(w, Value("seed", w), Value("like", w)).stream(Value("repeat", w), stream)
        w("Identity", given(Value("step", w)), name="z")
        inputs = [
            helper.make_tensor_value_info("seed", TensorProto.UINT64, ["B"]),
            helper.make_tensor_value_info("like", TensorProto.FLOAT, ["B", "C", "H", "W"]),
            *(helper.make_tensor_value_info(name, TensorProto.INT64, []) for name in ("repeat", "step")),
        ]
        z = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["B", "C", "H", "W"])
        graph = helper.make_graph(w.nodes, "noise", inputs, [z], w.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        path = tmp_path_factory.mktemp("noise") / "noise.onnx"
        onnx.save(model, path)
        sessions[stream] = open_session(path)

    def run(seeds: list[int], shape: tuple[int, ...], step: int, repeat: int, stream: int) -> np.ndarray:
        like = np.zeros((len(seeds), *shape), np.float32)
        counter = {"repeat": np.array(repeat), "step": np.array(step)}
        return sessions[stream].run(None, {"seed": np.array(seeds, np.uint64), "like": like, **counter})[0]

    return run


@pytest.mark.parametrize("seed", [0, 7, 2**32, LAST_SEED])
@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 5, 7), (1, 1, 1), (2, 3, 3)])
@pytest.mark.parametrize(("step", "repeat", "stream"), [(0, 0, 0), (1, 0, 1), (499, 2, 0), (20, 1, 1)])
def test_normals_are_those_of_the_engine_bit_for_bit(draw, seed, shape, step, repeat, stream):
    wanted = noise.Noise([seed], shape)(step, repeat, stream)
    assert draw([seed], shape, step, repeat, stream).tobytes() == wanted.tobytes()


def test_each_image_of_a_batch_has_its_own_seed(draw):
    seeds = [3, LAST_SEED, 0]
    wanted = noise.Noise(seeds, (3, 5, 7))(2, 1, 1)
    assert draw(seeds, (3, 5, 7), 2, 1, 1).tobytes() == wanted.tobytes()


def test_a_million_normals_are_the_engines(draw):
    wanted = noise.Noise([11], (4, 512, 512))(1, 0, 0)
    assert draw([11], (4, 512, 512), 1, 0, 0).tobytes() == wanted.tobytes()


def special_words() -> tuple[np.ndarray, np.ndarray]:
    """k and j, evenly many, around powers of two, √2 times them, and quarter turns: where something changes."""
    edges = [2**e for e in range(25)] + [round(2 ** (e + 0.5)) for e in range(24)]
    k = np.unique(np.clip(np.add.outer(edges, range(-2, 3)).ravel(), 1, 2**24))
    j = np.unique(np.clip(np.add.outer(np.arange(9) * 2**21, range(-2, 3)).ravel(), 0, 2**24 - 1))
    return k[: len(k) // 2 * 2], np.resize(j, len(k) // 2 * 2)


def test_every_edge_of_the_logarithm_and_the_quarters_is_exact(tmp_path):
    k, j = special_words()
    w = Writer("")
    given = Value("k", w)
    graph = NoiseGraph(w, w.value(np.zeros(1, np.uint64)), w.value(np.zeros((1, 1, 1, 1), np.float32)))
    w("Identity", graph._radius(given), name="r")
    for part, name in zip(graph._cosine_and_sine(Value("j", w)), ("c", "s"), strict=True):
        w("Identity", part, name=name)
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("k", "j", "r", "c", "s")]
    model = helper.make_model(
        helper.make_graph(w.nodes, "parts", tensors[:2], tensors[2:], w.weights),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=8,
    )  # fmt: skip
    onnx.save(model, tmp_path / "parts.onnx")
    found = open_session(tmp_path / "parts.onnx").run(None, {"k": k.astype(np.float32), "j": j.astype(np.float32)})
    generator = noise._Generator(1, len(k) // 2)
    radius = generator._radius((k - 1).astype(np.int32).reshape(2, 1, -1)).ravel()
    assert found[0].tobytes() == radius.tobytes()
    cosine, sine = generator._cosine_and_sine(j.astype(np.int32).reshape(2, 1, -1)).reshape(2, -1)
    assert found[1].tobytes() == cosine.tobytes()
    assert found[2].tobytes() == sine.tobytes()


# --- the edit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("sde", SDES)
def test_every_sampler_gives_the_bits_of_sdedit_edit(tmp_path, edit, sampler, sde):
    mean = np.random.default_rng(1).uniform(-0.5, 0.5, SHAPE)
    model, _ = gaussian(tmp_path / "model.onnx", SDES[sde], mean, std=0.5)
    guides, schedule = pictures(1), {"sampler": sampler, "steps": 7}
    wanted = expected(model, schedule, list(guides), seed=LAST_SEED).x
    found = edit(model, schedule, {"guide": "float32"}, guide=as_model(guides), seed=seeds_from(LAST_SEED, 1))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("masked", ["none", "soft", "hard"])
@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("schedule", [{"sampler": "dpmpp-2m-sde"}, {"sampler": "ddim", "eta": 0.0}, {"steps": 1}])
def test_masks_repeats_and_batches_give_the_bits_of_sdedit_edit(edit, textured, masked, repeats, schedule):
    model, guides, seeds = textured[0], pictures(3), seeds_from(LAST_SEED, 3)
    mask = {"none": None, "soft": soft_mask(), "hard": hard_mask()}[masked]
    wanted = expected(model, schedule, list(guides), mask=mask, repeats=repeats, seed=LAST_SEED)
    options = {"repeats": repeats, "mask": mask is not None}
    pixels = {} if mask is None else {"mask": np.stack([mask] * 3)}
    found = edit(model, schedule, options, guide=guides, seed=seeds, **pixels)
    np.testing.assert_array_equal(found, np.stack([one.pixels for one in wanted.results]))
    omega = {} if mask is None else {"mask": pixels["mask"][:, None].astype(np.float32) / np.float32(255)}
    raw = edit(model, schedule, options | {"guide": "float32"}, guide=as_model(guides), seed=seeds, **omega)
    np.testing.assert_array_equal(raw, wanted.x)


def test_kept_pixels_leave_byte_for_byte(edit, paint):
    guides, mask = pictures(1), hard_mask()
    found = edit(paint, {}, {"mask": True}, guide=guides, seed=seeds_from(1, 1), mask=mask[None])
    np.testing.assert_array_equal(found[0][mask == 0], guides[0][mask == 0])
    assert (found[0][mask == 255] == 204).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("schedule", [{"sampler": "er-sde"}, {"sampler": "ddim", "eta": 0.0}, {"steps": 1}])
def test_the_noise_may_be_an_input(edit, textured, schedule, masked):
    model, guides, repeats = textured[0], pictures(2), 2
    schedule = {"sampler": "ancestral", "steps": 5} | schedule
    steps = schedule["steps"]
    source = noise.Noise([3, 4], SHAPE)
    drawn = 1 if schedule["sampler"] == "ddim" else steps
    given = {"noise": np.stack([source(s, r, 0).copy() for r in range(repeats) for s in range(drawn)])}
    if masked:
        unread = np.full((2, *SHAPE), np.nan, np.float32)
        entries = [source(s, r, 1).copy() if s else unread for r in range(repeats) for s in range(steps)]
        given |= {"mask": np.stack([soft_mask()] * 2)} | ({"mask_noise": np.stack(entries)} if steps > 1 else {})
    options = {"repeats": repeats, "noise": "input", "mask": masked}
    wanted = expected(model, schedule, list(guides), mask=soft_mask() if masked else None, repeats=repeats, seed=3)
    found = edit(model, schedule, options, guide=guides, **given)
    np.testing.assert_array_equal(found, np.stack([one.pixels for one in wanted.results]))


def test_a_network_gives_what_it_gives_in_sdedit_edit(edit, network):
    guides = pictures(1)
    wanted = expected(network, {"steps": 20}, list(guides), seed=7).x
    found = edit(network, {"steps": 20}, {"guide": "float32"}, guide=as_model(guides), seed=seeds_from(7, 1))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_bundled_model_gives_what_it_gives_in_sdedit_edit(edit):
    guides = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    wanted = expected(artifact.BUNDLED, {}, list(guides), seed=7).x
    found = edit(artifact.BUNDLED, {}, {"guide": "float32"}, guide=as_model(guides), seed=seeds_from(7, 1))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_further_inputs_of_the_network_stay_inputs(edit, labelled):
    classes = np.array([2, 5])
    found = edit(labelled, {}, {"repeats": 2}, guide=pictures(2), seed=seeds_from(0, 2), class_label=classes)
    np.testing.assert_array_equal(np.unique(found[0]), [153])
    np.testing.assert_array_equal(np.unique(found[1]), [191])


def test_an_input_named_like_one_of_the_edit_is_refused(tmp_path):
    described = metadata(SHAPE, SDES["vp"], inputs={"seed": {"dtype": "int64"}})
    inputs = {"x": (TensorProto.FLOAT, ["B", *SHAPE]), "sigma": (TensorProto.FLOAT, ["B"])}
    inputs["seed"] = (TensorProto.INT64, ["B"])
    nodes = [helper.make_node("Identity", ["x"], ["denoised"])]
    model = save(tmp_path / "model.onnx", nodes, {}, described, shape=SHAPE, inputs=inputs)
    with pytest.raises(OptionError, match="its input seed has the name of one of the edit's own"):
        loop_graph.write(artifact.read(model), tmp_path / "edit.onnx", SCHEDULE)


def test_a_model_for_any_size_stays_one(tmp_path):
    free = {"x": (TensorProto.FLOAT, ["B", 3, "h", "w"]), "sigma": (TensorProto.FLOAT, ["B"])}
    described = metadata(SHAPE, SDES["vp"])
    described["image"]["dynamic"] = True
    nodes = [helper.make_node("Tanh", ["x"], ["denoised"])]
    outputs = {"denoised": (TensorProto.FLOAT, ["B", 3, "h", "w"])}
    model = save(tmp_path / "free.onnx", nodes, {}, described, shape=SHAPE, inputs=free, outputs=outputs, opset=17)
    guide = np.random.default_rng(0).integers(0, 256, (1, 5, 7, 3), np.uint8)
    loop_graph.write(artifact.read(model), tmp_path / "edit.onnx", SCHEDULE)
    (found,) = open_session(tmp_path / "edit.onnx").run(None, {"guide": guide, "seed": seeds_from(9, 1)})
    wanted = expected(model, {}, [guide[0]], seed=9, size=(7, 5))
    assert (
        np.abs(found[0].astype(int) - wanted.results[0].pixels).max() <= 1
    )  # Tanh of other lengths rounds differently


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(models: Path, network: Path) -> Path:
    path = models / "written-edit.onnx"
    loop_graph.write(artifact.read(network), path, SCHEDULE, repeats=2, mask=True)
    return path


def test_the_checker_passes_it(written):
    onnx.checker.check_model(str(written), full_check=True)


def test_the_network_is_in_it_once(written):
    def operators(graph: onnx.GraphProto) -> list[str]:
        inner = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
        return [node.op_type for node in graph.node] + [name for one in inner for name in operators(one)]

    found = operators(onnx.load(written).graph)
    assert found.count("Conv") == 1
    assert found.count("Loop") == 2


def test_its_metadata_says_what_it_does(written, network):
    found = json.loads(next(p.value for p in onnx.load(written).metadata_props if p.key == "sdedit_loop"))
    assert found == {
        "format": 1,
        "artifact": {"name": "closed-form", "sha256": artifact.read(network).sha256},
        "image": {"channels": 3, "height": HEIGHT, "width": WIDTH},
        **SCHEDULE,
        "repeats": 2,
        "mask": True,
        "guide": "uint8",
        "noise": "graph",
        "noise_specification": "philox-bm24-v1",
        "table_version": 1,
        "precision": "fp32",
        "sdedit_engine": sdedit.__version__,
    }


def test_its_inputs_and_output_are_typed_and_named(written):
    session = open_session(written)
    assert [(t.name, t.type, t.shape) for t in session.get_inputs()] == [
        ("guide", "tensor(uint8)", ["B", HEIGHT, WIDTH, 3]),
        ("mask", "tensor(uint8)", ["B", HEIGHT, WIDTH]),
        ("seed", "tensor(uint64)", ["B"]),
    ]
    assert [(t.name, t.type, t.shape) for t in session.get_outputs()] == [
        ("image", "tensor(uint8)", ["B", HEIGHT, WIDTH, 3])
    ]


PLAIN = """
import sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
feeds = {"guide": np.zeros((1, 8, 12, 3), np.uint8), "mask": np.full((1, 8, 12), 255, np.uint8)}
(image,) = session.run(["image"], feeds | {"seed": np.array([2**64 - 1], np.uint64)})
assert "sdedit" not in sys.modules
print(image.dtype, *image.shape)
"""


def test_onnx_runtime_alone_runs_it(written, tmp_path):
    command = [sys.executable, "-c", PLAIN, written]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("uint8 1 8 12 3\n", "")


def test_weights_that_fill_more_than_one_file_lie_beside_it(network, tmp_path, monkeypatch):
    guides = pictures(1)
    loop_graph.write(artifact.read(network), tmp_path / "one.onnx", SCHEDULE)
    monkeypatch.setattr(to_onnx, "LARGEST_FILE", 100)
    loop_graph.write(artifact.read(network), tmp_path / "two.onnx", SCHEDULE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.onnx", "two.onnx", "two.onnx.data"]
    assert (tmp_path / "two.onnx.data").stat().st_size >= 4 * 3 * 3 * 3 * 3
    feeds = {"guide": guides, "seed": seeds_from(0, 1)}
    one, two = (open_session(tmp_path / name).run(None, feeds)[0] for name in ("one.onnx", "two.onnx"))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("options", [{}, {"mask": True, "repeats": 2}])
def test_tensorrt_builds_it_where_the_noise_is_an_input(network, tmp_path, options):
    trt = pytest.importorskip("tensorrt_rtx")
    loop_graph.write(artifact.read(network), tmp_path / "edit.onnx", SCHEDULE, noise="input", **options)
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    definition = builder.create_network(0)
    parser = trt.OnnxParser(definition, log)
    assert parser.parse((tmp_path / "edit.onnx").read_bytes()), parser.get_error(0).desc()


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_it_and_prints_where(network, tmp_path, capsys):
    target = tmp_path / "edit.onnx"
    flags = ["--t0", "0.4", "--steps", "3", "--sampler", "ddim", "--eta", "0.5", "--repeats", "2"]
    assert main(["export", "--loop", str(network), "-o", str(target), *flags, "--mask", "--guide", "float32"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{target}\n"
    assert said.err == "the edit of closed-form: t0 0.4, 3 steps, ddim\n"
    assert main(["export", "--loop", str(network), "-o", str(target), "--force", "--noise", "input", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == str(target)
    assert {name: found["sdedit_loop"][name] for name in ("t0", "steps", "sampler", "noise")} == {
        "t0": 0.5, "steps": 50, "sampler": "ancestral", "noise": "input",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--loop", "--opset", "19"], 2, "--opset is not for --loop"),
        (["--loop", "--precision", "fp16"], 2, "--precision is not for --loop"),
        (["--loop", "--sde", "linear"], 2, "--sde is not for --loop"),
        (["--loop", "--family", "edm"], 2, "--loop takes one of our artifacts, not edm"),
        (["--loop", "--guide", "float64"], 2, "guide is 'float64'; wanted uint8 or float32"),
        (["--loop", "--guide", "uint8", "--guide", "uint8"], 2, "--guide is given more than once"),
        (["--loop", "--noise", "gpu"], 2, "noise is 'gpu'; wanted graph or input"),
        (["--loop", "--steps", "0"], 2, "steps is 0; wanted a whole number from 1"),
        (["--loop", "--eta", "1"], 2, "sampler ancestral has no eta"),
        (["--loop", "-o", "edit.plan"], 2, "edit.plan: an artifact's name ends in .onnx"),
        (["--loop", "-o", "taken.onnx"], 1, "taken.onnx: exists already"),
        (["--loop", "-o", "model.onnx", "--force"], 1, "model.onnx: would overwrite an input"),
        (["--t0", "0.5"], 2, "--t0 goes with --loop"),
        (["--mask"], 2, "--mask goes with --loop"),
        (["--noise", "input"], 2, "--noise goes with --loop"),
        (["--repeats", "2"], 2, "--repeats goes with --loop"),
    ],
)
def test_a_wrong_option_is_one_error_and_nothing_is_written(
    network, tmp_path, monkeypatch, capsys, words, code, message
):
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").write_bytes(network.read_bytes())
    Path("taken.onnx").write_text("taken")
    assert main(["export", "model.onnx", "-o", "edit.onnx", *words]) == code
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {message}")
    assert hint.startswith("hint: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "taken.onnx"]
    assert Path("taken.onnx").read_text() == "taken"


def test_without_a_source_it_is_the_bundled_model(tmp_path, capsys):
    assert main(["export", "--loop", "-o", str(tmp_path / "edit.onnx"), "--json", "--steps", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["sdedit_loop"]["artifact"]["name"] == "eurosat-64"


def test_what_is_no_artifact_is_refused(written, tmp_path, capsys):
    assert main(["export", "--loop", str(written), "-o", str(tmp_path / "again.onnx")]) == 1
    assert "is a whole edit" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_inspect_shows_what_an_edit_is_and_edit_refuses_it_as_a_network(network, write_png, picture, tmp_path, capsys):
    target, guide = tmp_path / "edit.onnx", write_png("guide.png", picture(12, 8))
    loop_graph.write(artifact.read(network), target, SCHEDULE)
    assert main(["inspect", str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["edit"]["steps"] == SCHEDULE["steps"]
    assert main(["edit", str(guide), "-m", str(target), "-o", str(tmp_path / "out.png")]) == 1
    assert "is a whole edit ('sdedit export --loop'), not a network" in capsys.readouterr().err
