"""The peers that benchmarks/ compares with are honest: given the same noise, every loop makes the same picture."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import sdedit

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PROGRAMS = sorted(p.name for p in BENCHMARKS.glob("*.py") if '__name__ == "__main__"' in p.read_text("utf-8"))
KEPT = sorted((BENCHMARKS / "results").glob("peers-*.json"))
SEED, STEPS, T0 = 7, 5, 0.5
SHAPE = (1, 3, 16, 16)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_benchmark_says_how_it_is_called(program):
    done = subprocess.run([sys.executable, BENCHMARKS / program, "-h"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {program}")


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_tables_are_made_again_from_the_results_that_are_kept(path):
    command = [sys.executable, BENCHMARKS / "peers.py", "--table", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| sdedit |" in done.stdout


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """peer_loops, peer_networks, peers as modules, and the tiny network that they make."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import peer_loops
        import peer_networks
        import peers

        folder = tmp_path_factory.mktemp("networks")
        yield peer_loops, peers, peer_networks.network("tiny", folder)


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


class Drawn:
    """Our own noise, in the order in which every loop of these draws it: for x at t0, then once a step."""

    def __init__(self, streams=(0,), last=STEPS):
        noise = sdedit.Noise([SEED], SHAPE[1:], steps=last)
        self._normals = iter(
            [noise(step, 0, stream).copy() for step in range(last + 1) for stream in (streams if step else (0,))]
        )

    def __call__(self, *_, **__):
        return next(self._normals)


def setting(peers, steps=STEPS, t0=T0):
    loops, program, used = peers
    request = program.make_request(used, steps, t0)
    return loops.Setting(used, steps, t0, *(request[name] for name in ("sigmas", "sampler", "spacing")))


def ours(peers, picture, steps=STEPS, t0=T0):
    editor = sdedit.load(peers[2].artifact, backend="ort-cpu")
    return editor.edit(picture, t0=t0, steps=steps, sampler="ancestral", seed=SEED)


def with_noise_in_torch(monkeypatch, drawn):
    import torch
    from diffusers.schedulers import scheduling_ddpm

    monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.from_numpy(drawn()))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: torch.from_numpy(drawn()))


def levels_apart(found, wanted):
    """The differences, in 8-bit levels."""
    return np.abs(found.astype(int) - np.asarray(wanted).astype(int))


@pytest.mark.parametrize(
    "name", ["torch eager", "torch channels-last", "torch bf16 autocast", "torch bf16", "openvino bf16"]
)
def test_other_layouts_and_precisions_make_nearly_the_same_picture(peers, picture, monkeypatch, name):
    if name.startswith("openvino"):
        pytest.importorskip("openvino")
    drawn = Drawn()
    with_noise_in_torch(monkeypatch, drawn)
    monkeypatch.setattr(np.random, "default_rng", lambda *_: type("Noise", (), {"standard_normal": drawn}))
    open_peer, options = peers[0].PEERS[name]
    apart = levels_apart(open_peer(setting(peers), **options)(picture), ours(peers, picture).images[0])
    if "bf16" in name:
        assert 0 < apart.mean() <= 2.5
    else:
        assert apart.max() <= 1


@pytest.mark.parametrize("name", ["onnxruntime", "openvino fp32"])
def test_a_runtime_with_a_loop_in_numpy_makes_the_same_picture(peers, picture, monkeypatch, name):
    pytest.importorskip("openvino" if name.startswith("openvino") else "onnxruntime")
    drawn = Drawn()
    monkeypatch.setattr(np.random, "default_rng", lambda *_: type("Noise", (), {"standard_normal": drawn}))
    open_peer, options = peers[0].PEERS[name]
    assert levels_apart(open_peer(setting(peers), **options)(picture), ours(peers, picture).images[0]).max() <= 1


def test_the_bundled_network_predicts_the_same_noise_in_torch(peers):
    import torch

    loops, _, _ = peers
    import peer_networks

    network = peer_networks.network("bundled", Path("nowhere"))
    abar = loops.alphas_cumprod(network)
    x = np.random.default_rng(0).standard_normal((1, 3, 64, 64), np.float32)
    denoise = sdedit.load(backend="ort-cpu").backend.bind(1, {})
    for level in (3, 300, 700):
        sigma = np.sqrt((1 - abar[level]) / abar[level])
        scaled = (x * np.sqrt(1 + sigma**2)).astype(np.float32)
        wanted = (scaled - denoise(scaled, np.full(1, sigma, np.float32))) / sigma
        with torch.inference_mode():
            found = loops.torch_network(network)(torch.from_numpy(x), torch.tensor([level]), return_dict=False)[0]
        np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=2e-3 if level == 3 else 2e-4)


def test_loops_for_ve_networks_are_euler_maruyama_as_ours(peers, picture, monkeypatch):
    import torch

    loops, _, used = peers
    table = sdedit.plan(sdedit.VE(0.02, 60.0), t0=T0, steps=STEPS, sampler="em")
    ve = replace(used, kind="ve")
    asked = loops.Setting(ve, STEPS, T0, [*table.column("sigma").tolist(), 0.0], "em", "uniform")
    noise = sdedit.Noise([SEED], SHAPE[1:], steps=STEPS)
    guide = picture.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1

    def denoise(x, sigma):  # bends, so that a wrong x shows
        return np.float32(0.9) * np.tanh(x / (1 + np.reshape(sigma, (-1, 1, 1, 1))))

    def score(x, sigma):  # the same, as a network for data in [0, 1] has it
        clean = (denoise(2 * x.numpy() - 1, 2 * sigma.numpy()) + 1) / 2
        return (torch.from_numpy(clean) - x) / sigma.reshape(-1, 1, 1, 1) ** 2

    wanted = sdedit.denoise(denoise, sdedit.perturb(guide, table, noise), table, noise)
    with_noise_in_torch(monkeypatch, Drawn())
    np.testing.assert_allclose(loops.torch_ve_loop(asked, score, torch.from_numpy(guide)), wanted, atol=1e-4)
    monkeypatch.setattr(np.random, "default_rng", lambda *_: type("Noise", (), {"standard_normal": Drawn()}))
    assert levels_apart(loops.numpy_edit(asked, denoise)(picture), loops.to_picture(wanted)).max() <= 1


def test_the_papers_loop_is_ours_with_every_level_as_a_step(peers, picture, monkeypatch):
    steps, t0 = 8, 0.008  # the lowest 8 of 1000 levels
    drawn = Drawn(streams=(0, 1), last=steps)
    with_noise_in_torch(monkeypatch, drawn)
    made = peers[0].paper_edit(setting(peers, steps, t0))(picture)
    assert levels_apart(made, ours(peers, picture, steps, t0).images[0]).max() <= 1


class Seconds:
    """A clock that stands still, but for what is said to take time."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def taking(self, seconds, function):
        def slowed(*arguments, **options):
            self.now += seconds
            return function(*arguments, **options)

        return slowed


@pytest.mark.parametrize("name", ["torch eager", "original loop", "onnxruntime", "openvino fp32"])
def test_the_networks_time_is_counted_and_only_that(peers, picture, monkeypatch, name):
    if name.startswith("openvino"):
        pytest.importorskip("openvino")
    loops, seconds, steps = peers[0], Seconds(), 4
    monkeypatch.setattr(loops, "time", seconds)
    monkeypatch.setattr(loops, "to_picture", seconds.taking(100, loops.to_picture))
    noise = seconds.taking(100, lambda *_, **__: np.zeros(SHAPE, np.float32))
    with_noise_in_torch(monkeypatch, noise)
    monkeypatch.setattr(np.random, "default_rng", lambda *_: type("Noise", (), {"standard_normal": noise}))

    class Clock(loops.Clock):
        def timed(self, network):
            return super().timed(seconds.taking(1, network))

    asked = setting(peers, steps, t0=steps / 1000)  # with every level, as the original loop has it
    asked.clock = Clock()
    open_peer, options = loops.PEERS[name]
    open_peer(asked, **options)(picture)
    assert asked.clock.network_s == steps
    assert seconds.now >= 100 * (steps + 1)


def test_of_our_own_edits_the_engines_network_time_counts(peers, picture, monkeypatch):
    asked, results, edit = setting(peers), [], sdedit.Editor.edit

    def kept(*given, **options):
        results.append(edit(*given, **options))
        return results[-1]

    monkeypatch.setattr(sdedit.Editor, "edit", kept)
    edits = peers[0].our_edit(asked, backend="ort-cpu")
    for _ in range(2):
        edits(picture)
    assert 1e3 * asked.clock.network_s == pytest.approx(sum(one.timings.network_ms for one in results))
    assert all(0 < one.timings.network_ms < one.timings.total_ms for one in results)


def turn(edit_ms, network_ms, others=0.0):
    return {"edit_ms": edit_ms, "network_ms": network_ms, "others": others}


def test_ratios_are_of_one_round_and_the_others_are_left_out(peers):
    program = peers[1]
    rounds = [
        {"sdedit": turn(10.0, 9.0), "torch eager": turn(20.0, 16.0)},
        {"sdedit": turn(20.0, 18.0), "torch eager": turn(60.0, 50.0)},
        {"sdedit": turn(30.0, 20.0)},
    ]
    assert program.ratio(rounds, "torch eager", "sdedit") == "2.50 (2.00–3.00)"
    assert program.ratio(rounds, "sdedit", "sdedit") == "1"
    assert program.ratio(rounds, "onnxruntime", "sdedit") == "-"
    last = program.edit_table(rounds, 2, 500)[-1]
    assert last == "| sdedit | 2 | 20 | 10.0 | 1000 | 1 | 2.50 (2.00–3.00) | - | 3 |"


def test_a_turn_that_something_else_disturbed_does_not_count(peers):
    program = peers[1]
    rounds = [{"sdedit": turn(10.0, 9.0), "torch eager": turn(90.0, 90.0, others=0.3)}, {"sdedit": turn(10.0, 9.0)}]
    kept, left_out = program.quiet(rounds)
    assert ([list(one) for one in kept], left_out) == ([["sdedit"], ["sdedit"]], 1)


def test_a_peer_that_is_not_there_is_named_and_the_others_are_measured(peers, capfd):
    _, program, used = peers
    request = program.make_request(used, 2, T0)
    (found,) = program.measure_rounds(["sdedit", "openvino int8"], request, 1, 60)
    assert list(found) == ["sdedit"]
    assert found["sdedit"]["edit_ms"] > found["sdedit"]["network_ms"] > 0
    assert 0 <= found["sdedit"]["others"] <= 1
    assert "skipped: openvino int8: FileNotFoundError: tiny has no int8 artifact" in capfd.readouterr().err


def test_a_peer_that_dies_is_left_out_from_then_on_and_the_rounds_end_with_the_last(peers, monkeypatch):
    program = peers[1]

    class Mortal:
        """A peer with a limited number of edits in it."""

        def __init__(self, name, lives):
            self.name, self.failed, self._lives = name, "", lives[name]

        def ask(self, line):
            return {}

        def edit(self):
            self._lives -= 1
            self.failed = "died" if self._lives < 0 else ""
            return {"failed": "died"} if self.failed else turn(1.0, 0.5)

        def close(self):
            pass

    monkeypatch.setattr(program, "Peer", Mortal)
    monkeypatch.setattr(program, "PAUSE_S", 0)
    rounds = list(program.measure_rounds(["a", "b"], {"a": 2, "b": 1}, 5, 60))
    assert [sorted(one) for one in rounds] == [["a", "b"], ["a"]]


def test_a_network_that_cannot_be_made_ends_with_the_exports_own_error(tmp_path, monkeypatch, capfd):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peer_networks

    with pytest.raises(SystemExit) as left:
        peer_networks._export(tmp_path / "nowhere", tmp_path / "made.onnx")
    assert left.value.code == 1
    said = capfd.readouterr().err
    assert "nowhere" in said
    assert "Traceback" not in said
    monkeypatch.setattr(peer_networks.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -9))
    with pytest.raises(SystemExit, match="the export of nowhere was ended by signal 9\nhint: if memory"):
        peer_networks._export(Path("nowhere"), tmp_path / "made.onnx")
