"""`sdedit batch --ray`: the folder job on two local workers, byte for byte the local one, whatever dies on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_batch import command, fill, noted, written

import sdedit
from sdedit.cli.main import main

pytest.importorskip("ray", reason="needs ray (pip install 'sdedit-engine[ray]')")
from sdedit import ray_folder

NAMES = [f"{n % 3}/{n:02d}.png" for n in range(30)]
WORKER = "ray::MapWorker(MapBatches(Worker)"


@pytest.fixture(scope="module")
def cluster():
    """Two cores of Ray in this process, which jobs here join instead of starting their own."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="CRITICAL")
    yield ray
    ray.shutdown()


@pytest.fixture
def guides(tmp_path, picture):
    made = fill(tmp_path / "in", picture, NAMES)
    (made / "2" / "02.png").write_bytes(b"not a picture")
    return made


@pytest.fixture
def local(guides, tmp_path, network):
    """What the local run makes of the guides."""
    out = tmp_path / "local"
    out.mkdir()
    assert main([str(word) for word in command(guides, out, network)]) == 1
    return out


def on_ray(guides, out, network, *flags):
    return main([str(word) for word in command(guides, out, network, "--ray", "auto", *flags)])


def by_path(folder: Path) -> dict[str, dict]:
    entries = noted(folder)
    assert len({entry["path"] for entry in entries}) == len(entries)
    return {entry["path"]: entry for entry in entries}


# --- results -----------------------------------------------------------------------------------------------------


def test_results_and_manifest_are_those_of_the_local_run(cluster, guides, local, tmp_path, network, capfd):
    out = tmp_path / "out"
    out.mkdir()
    assert on_ray(guides, out, network, "--json") == 1
    assert written(out) == written(local)
    assert by_path(out) == by_path(local)
    said = capfd.readouterr()
    assert json.loads(said.out)["edited"] == 29
    lines = said.err.splitlines()
    assert lines[0].startswith(f"{guides}/2/02.png: ")
    assert lines[1:] == [
        "error: 1 of 30 pictures could not be edited",
        "hint: mend them and run the same command again",
    ]


def test_a_local_run_finishes_what_ray_began_and_the_other_way_round(cluster, guides, local, tmp_path, network, capsys):
    whole = written(local)
    out = tmp_path / "out"
    out.mkdir()
    for name in NAMES[:2]:
        moved = guides.parent / "kept" / name
        moved.parent.mkdir(parents=True, exist_ok=True)
        (guides / name).rename(moved)
    assert on_ray(guides, out, network) == 1
    for name in NAMES[:2]:
        (guides.parent / "kept" / name).rename(guides / name)
    capsys.readouterr()
    assert main([str(word) for word in command(guides, out, network)]) == 1
    assert capsys.readouterr().out.startswith("2 edited, 27 done before, 1 failed")
    assert written(out) == whole
    (out / NAMES[3]).unlink()
    assert on_ray(guides, out, network) == 1
    assert capsys.readouterr().out.startswith("1 edited, 28 done before, 1 failed")
    assert written(out) == whole


def test_masks_go_by_their_guides_names(cluster, guides, tmp_path, network):
    for name in NAMES:
        target = tmp_path / "masks" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(guides / ("0/00.png" if name == "2/02.png" else name)) as guide:
            Image.fromarray(np.eye(guide.height, guide.width, dtype=np.uint8) * 255).save(target)
    outs = [tmp_path / "here", tmp_path / "there"]
    for out, run in zip(outs, (lambda *a: main([str(w) for w in command(*a)]), on_ray), strict=True):
        out.mkdir()
        assert run(guides, out, network, "--masks", f"{tmp_path}/masks", "--fit", "stretch") == 1
    assert written(outs[0]) == written(outs[1])


# --- workers that die --------------------------------------------------------------------------------------------


def workers() -> list[int]:
    """The processes of actors."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if words.startswith(WORKER.encode()):
                found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="workers are found in Linux's /proc")
def test_a_worker_that_is_killed_loses_nothing(cluster, tmp_path, picture, network):
    many = fill(tmp_path / "many", picture, [f"{n % 5}/{n:03d}.png" for n in range(240)])
    outs = [tmp_path / "here", tmp_path / "there"]
    for out in outs:
        out.mkdir()
    flags = ("--steps", 100)
    assert main([str(word) for word in command(many, outs[0], network, *flags)]) == 0
    before, killed = set(workers()), []

    def kill(progress):
        now = [process for process in workers() if process not in before]
        if not killed and progress.done >= 24 and now:
            os.kill(now[0], signal.SIGKILL)
            killed.append((now[0], progress.done))

    result = ray_folder.edit_folder_on_ray(
        network, many, outs[1], backend="ort-cpu", workers=2, on_file=kill, steps=100, batch=3
    )
    assert killed
    assert killed[0][1] < 240
    assert result.edited == 240
    assert written(outs[1]) == written(outs[0])
    assert by_path(outs[1]) == by_path(outs[0])


@pytest.mark.slow
def test_a_driver_that_is_killed_finishes_the_rest(guides, local, tmp_path, network):
    """In a process of its own, with a cluster of its own, which dies with it."""
    out = tmp_path / "out"
    out.mkdir()
    words = [sys.executable, "-m", "sdedit.cli.main",
             *map(str, command(guides, out, network, "--ray", "local", "--steps", 2000))]  # fmt: skip
    with open(os.devnull, "w") as nowhere, subprocess.Popen(words, stdout=nowhere, stderr=nowhere) as running:
        deadline = time.monotonic() + 90
        while len(list(out.rglob("*.png"))) < 4 and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        cut = running.poll() is None
        running.kill()
    assert cut
    whole = tmp_path / "whole"
    whole.mkdir()
    assert main([str(word) for word in command(guides, whole, network, "--steps", 2000)]) == 1
    assert main([str(word) for word in command(guides, out, network, "--steps", 2000)]) == 1
    assert written(out) == written(whole)


# --- refused -----------------------------------------------------------------------------------------------------


def test_a_worker_that_cannot_open_the_model_says_so(cluster, guides, tmp_path, network, monkeypatch, capsys):
    out, model = tmp_path / "out", tmp_path / "model.onnx"
    out.mkdir()
    model.write_bytes(network.read_bytes())
    entries = ray_folder._entries

    def elsewhere(*arguments):
        model.unlink()  # as on a machine that has it not
        return entries(*arguments)

    monkeypatch.setattr(ray_folder, "_entries", elsewhere)
    assert on_ray(guides, out, model) == 1
    assert capsys.readouterr().err == (
        f"error: on a worker: {model}: no such file\nhint: the model lies at one path on all machines\n"
    )
    assert written(out) == {}


def test_more_than_the_cluster_has_is_refused(cluster, guides, tmp_path, network, capsys):
    out = tmp_path / "out"
    out.mkdir()
    assert on_ray(guides, out, network, "--threads", 3) == 1
    assert capsys.readouterr().err.startswith("error: a worker on ort-cpu wants 3 CPU; the cluster has 2\nhint: ")
    assert list(out.iterdir()) == []


def test_a_cluster_that_is_not_there_is_said_at_once(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(sdedit.BackendUnavailable, match="Connection refused") as raised:
        ray_folder._cluster("127.0.0.1:1").__enter__()
    assert "--ray local" in raised.value.hint


def test_a_job_that_finds_no_cluster_leaves_nothing(monkeypatch, guides, tmp_path, network, capsys):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    out = tmp_path / "out"
    out.mkdir()
    assert main([str(word) for word in command(guides, out, network, "--ray", "127.0.0.1:1")]) == 1
    assert capsys.readouterr().err.startswith("error: Ray at 127.0.0.1:1: Connection refused\nhint: ")
    assert list(out.iterdir()) == []


def test_file_urls_are_paths(cluster, guides, local, tmp_path, network):
    out = tmp_path / "out"
    out.mkdir()
    sdedit.ray_folder.edit_folder_on_ray(network, guides.as_uri(), out.as_uri(), backend="ort-cpu", steps=2, batch=3)
    assert written(out) == written(local)
