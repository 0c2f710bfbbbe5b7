"""The cache of optimised graphs: the same bits with it and without it, and never an entry that is not what it says."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

import sdedit
from sdedit import artifact, record
from sdedit.backends import open_backend, ort_cache
from sdedit.operators import shipped as operators

GUIDE = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    """An empty cache that takes small models too, of graphs as ONNX Runtime makes them; its folder."""
    monkeypatch.setenv("SDEDIT_GRAPH_CACHE", "on")
    monkeypatch.setenv("SDEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SDEDIT_OPERATORS", "off")
    monkeypatch.setattr(ort_cache, "LEAST_BYTES", 0)
    return tmp_path / "cache" / "graphs"


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """What ONNX Runtime is told to open, in order: the names of the files."""
    import onnxruntime

    real, names = onnxruntime.InferenceSession, []

    def session(source, *arguments, **keywords):
        names.append(Path(source).name)
        return real(source, *arguments, **keywords)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return names


def edited(model: Path) -> bytes:
    return sdedit.load(model, backend="ort-cpu", threads=1).edit(GUIDE, steps=3, t0=0.4, seed=5).x.tobytes()


def only_entry(cache: Path) -> Path:
    (entry,) = cache.iterdir()
    return entry


def test_the_second_start_opens_the_optimised_graph_and_makes_the_same_bits(network, cache, opened, monkeypatch):
    first, second = edited(network), edited(network)
    monkeypatch.setenv("SDEDIT_GRAPH_CACHE", "off")
    assert first == second == edited(network)
    assert opened == ["network.onnx", "graph.onnx", "network.onnx"]


def test_the_bundled_model_makes_the_same_bits_from_the_cache(monkeypatch, opened):
    monkeypatch.setenv("SDEDIT_OPERATORS", "on")

    def made() -> bytes:
        return sdedit.load(backend="ort-cpu", threads=2).edit(GUIDE, steps=3, seed=1, samples=2, batch=2).x.tobytes()

    first, second = made(), made()
    monkeypatch.setenv("SDEDIT_GRAPH_CACHE", "off")
    assert first == second == made()
    rewritten = ["eurosat-64.onnx", "graph.onnx"] if operators.usable_library() else ["eurosat-64.onnx"]
    assert opened == [*rewritten, "graph.onnx", *rewritten]


def test_a_file_that_is_replaced_while_it_is_opened_is_refused_and_not_kept(network, negative, cache, tmp_path):
    path = shutil.copy(network, tmp_path / "model.onnx")
    read = artifact.read(Path(path))
    assert read.sha256 == artifact.read(network).sha256
    shutil.copy(negative, tmp_path / "other.onnx")
    os.replace(tmp_path / "other.onnx", path)
    with pytest.raises(sdedit.ArtifactError, match=r"model.onnx: was changed since it was read"):
        open_backend("ort-cpu", read, 1)
    assert list(cache.iterdir()) == []
    assert edited(Path(path)) == edited(negative)


def test_a_file_that_is_replaced_while_its_metadata_are_read_is_refused(network, negative, tmp_path, monkeypatch):
    path = Path(shutil.copy(network, tmp_path / "model.onnx"))
    shutil.copy(negative, tmp_path / "other.onnx")
    validate = artifact.validate

    def replaced(*given):
        os.replace(tmp_path / "other.onnx", path)
        return validate(*given)

    monkeypatch.setattr(artifact, "validate", replaced)
    with pytest.raises(sdedit.ArtifactError, match=r"model.onnx: was changed since it was read"):
        sdedit.load(path, backend="ort-cpu", threads=1)


@pytest.mark.parametrize("cached", ["on", "off"])
def test_a_record_names_the_file_that_was_opened(cached, network, negative, tmp_path, monkeypatch):
    monkeypatch.setenv("SDEDIT_GRAPH_CACHE", cached)
    path = shutil.copy(network, tmp_path / "model.onnx")
    editor = sdedit.load(path, backend="ort-cpu", threads=1)
    os.unlink(path)
    result = editor.edit(GUIDE, steps=1)
    assert record.make(editor, result, 0)["artifact"]["sha256"] == artifact.read(network).sha256


def test_off_writes_nothing(network, cache, monkeypatch):
    monkeypatch.setenv("SDEDIT_GRAPH_CACHE", "off")
    edited(network)
    assert not cache.exists()


def test_a_small_model_is_not_kept(network, cache, monkeypatch):
    monkeypatch.setattr(ort_cache, "LEAST_BYTES", 2**20)
    edited(network)
    assert not cache.exists()


def test_another_model_under_the_same_name_is_another_entry(network, negative, cache, tmp_path):
    model = tmp_path / "model.onnx"
    shutil.copy(network, model)
    edited(model)
    stat = model.stat()
    shutil.copy(negative, model)
    os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if nothing had changed
    assert edited(model) == edited(negative)


@pytest.mark.parametrize("what", ["onnxruntime", "cpu"])
def test_another_library_or_cpu_makes_its_own_entry(what, network, cache, opened, monkeypatch):
    import onnxruntime

    edited(network)
    if what == "cpu":
        monkeypatch.setattr(ort_cache.cpu, "identity", lambda: ["flags: fewer"])
    else:
        monkeypatch.setattr(onnxruntime, "__version__", "99.0")
    edited(network)
    assert opened == ["network.onnx", "network.onnx"]
    assert len(list(cache.iterdir())) == 2


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a bit of the graph": lambda entry: flip_a_bit(entry / "graph.onnx"),
    "a bit of the weights": lambda entry: flip_a_bit(entry / "graph.weights"),
    "weights cut short": lambda entry: os.truncate(entry / "graph.weights", 100),
    "no weights": lambda entry: (entry / "graph.weights").unlink(),
    "an empty graph": lambda entry: (entry / "graph.onnx").write_bytes(b""),
    "no description": lambda entry: (entry / "entry.json").unlink(),
    "no JSON": lambda entry: (entry / "entry.json").write_text("{"),
    "deep JSON": lambda entry: (entry / "entry.json").write_text("[" * 100_000),
    "another identity": lambda entry: (entry / "entry.json").write_text(
        (entry / "entry.json").read_text().replace('"format": 2', '"format": 1')
    ),
    "a description that lacks a word": lambda entry: (entry / "entry.json").write_text(
        (entry / "entry.json").read_text().replace('"fused"', '"confused"')
    ),
    "a description with another word": lambda entry: (entry / "entry.json").write_text(
        (entry / "entry.json").read_text().replace('"fused": false', '"fused": [1]')
    ),
    "a file in its place": lambda entry: (shutil.rmtree(entry), entry.write_text("not a folder")),
}


@pytest.fixture(scope="module")
def weighty(models) -> Path:
    """A network with enough weights for a file of their own."""
    from closed_form import SDES, gaussian

    mean = np.random.default_rng(1).uniform(-0.5, 0.5, (3, 8, 12))
    return gaussian(models / "weighty.onnx", SDES["vp"], mean, std=0.5)[0]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_not_used_and_made_again(damage, weighty, cache, opened):
    wanted = edited(weighty)
    assert (only_entry(cache) / "graph.weights").stat().st_size >= 1024
    DAMAGES[damage](only_entry(cache))
    assert edited(weighty) == wanted
    tried = ["graph.onnx"] if "weights" in damage else []  # they are hashed while the graph is opened
    assert opened == ["weighty.onnx", *tried, "weighty.onnx"]
    del opened[:]
    if damage != "a file in its place":
        assert edited(weighty) == wanted
        assert opened == ["graph.onnx"]


def test_an_entry_that_was_described_as_it_lies_but_does_not_load_is_passed_over(weighty, cache, opened):
    """What a full disk leaves if nobody notices: files too short, and the right SHA-256 of them."""
    wanted = edited(weighty)
    entry = only_entry(cache)
    os.truncate(entry / "graph.weights", 100)
    told = json.loads((entry / "entry.json").read_text())
    (entry / "entry.json").write_text(json.dumps(told | {"sha256": ort_cache._hashes(entry)}))
    assert edited(weighty) == wanted
    assert opened == ["weighty.onnx", "graph.onnx", "weighty.onnx"]


@pytest.mark.parametrize("trouble", ["a file", "no such disk"])
def test_an_edit_goes_on_where_nothing_can_be_kept(trouble, network, tmp_path, monkeypatch):
    wanted = edited(network)
    if trouble == "a file":
        (tmp_path / "file").write_text("")
    place = {"a file": str(tmp_path / "file"), "no such disk": "/proc/none"}[trouble]
    monkeypatch.setenv("SDEDIT_CACHE", place)
    assert edited(network) == wanted


def test_an_edit_goes_on_when_the_disk_is_full(network, cache, monkeypatch):
    wanted = edited(network)
    shutil.rmtree(cache)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ort_cache, "_put", full)
    assert edited(network) == wanted
    assert list(cache.iterdir()) == []


def test_what_another_process_was_first_to_keep_stays(network, cache):
    edited(network)
    entry = only_entry(cache)
    written = (entry / "graph.onnx").stat().st_mtime_ns
    made = cache / ".new-mine" / entry.name
    shutil.copytree(entry, made)
    ort_cache._put(made, entry, json.loads((entry / "entry.json").read_text())["identity"], False)
    assert (entry / "graph.onnx").stat().st_mtime_ns == written
    assert not (made.parent / "anything").exists()


def test_the_least_recently_used_entries_go_first(network, negative, weighty, cache, opened, monkeypatch):
    for age, model in ((300, network), (200, negative)):
        edited(model)
        (new,) = [one for one in cache.iterdir() if (one / "entry.json").stat().st_mtime > time.time() - 100]
        os.utime(new / "entry.json", (time.time() - age,) * 2)
    edited(network)  # used again: the other one is now the oldest
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    monkeypatch.setattr(ort_cache, "MOST_BYTES", size + 2000)
    edited(weighty)
    assert len(list(cache.iterdir())) == 2
    del opened[:]
    for model in (network, weighty, negative):
        edited(model)
    assert opened == ["graph.onnx", "graph.onnx", "negative.onnx"]


def test_what_a_killed_process_left_is_removed_in_time(network, cache):
    for name, age in ((".new-old", 7200), (".new-now", 0)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (time.time() - age,) * 2)
    edited(network)
    assert sorted(one.name for one in cache.iterdir() if one.name.startswith(".")) == [".new-now"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_entries_are_private(network, cache):
    edited(network)
    assert [oct(path.stat().st_mode & 0o777) for path in (cache, only_entry(cache))] == ["0o700", "0o700"]


def test_a_cache_below_a_folder_that_is_gone_is_none(network, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    monkeypatch.setenv("SDEDIT_CACHE", "cache")
    gone.rmdir()
    assert edited(network)
