"""`sdedit batch --ray` with folders at URLs: the local run's bytes, and no work done twice, wherever fsspec reads."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_batch import command, fill, noted, seed_of, written

import sdedit
from sdedit.cli.main import main

pytest.importorskip("ray", reason="needs ray (pip install 'sdedit-engine[ray]')")
pytest.importorskip("fsspec", reason="needs fsspec (pip install 'sdedit-engine[ray]')")
import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations
from object_store import ObjectStore

from sdedit import folder, remote_place
from sdedit.listing import guide_file
from sdedit.places import LocalPlace
from sdedit.url_folder import UrlFolder

NAMES = [f"{n % 3}/{n:02d}.png" for n in range(9)]
BROKEN = "2/02.png"
URLS = ("bucket://", "local://")  # a store of objects; and a file system that fsspec, not we, reads and writes

fsspec.register_implementation("bucket", ObjectStore, clobber=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two cores of Ray in this process, which jobs here join instead of starting their own.

    Its workers know bucket:// as they would any package's protocol: by an entry point.
    """
    import ray

    site = tmp_path_factory.mktemp("site")
    (site / "object_store-1.dist-info").mkdir()
    (site / "object_store-1.dist-info" / "METADATA").write_text("Name: object-store\nVersion: 1\n")
    (site / "object_store-1.dist-info" / "entry_points.txt").write_text(
        "[fsspec.specs]\nbucket = object_store:ObjectStore\n"
    )
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), str(Path(__file__).parent)])
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="CRITICAL")
    yield ray
    ray.shutdown()
    del os.environ["PYTHONPATH"]
    if before is not None:
        os.environ["PYTHONPATH"] = before


@pytest.fixture
def guides(tmp_path, picture):
    made = fill(tmp_path / "in", picture, NAMES)
    (made / BROKEN).write_bytes(b"not a picture")
    return made


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def local(guides, tmp_path, network):
    """What the local run makes of the guides."""
    made = tmp_path / "local"
    made.mkdir()
    assert main([str(word) for word in command(guides, made, network)]) == 1
    return made


def on_ray(guides, out, network, *flags):
    return main([str(word) for word in command(guides, out, network, "--ray", "auto", *flags)])


@pytest.fixture
def run(network, monkeypatch):
    """run(protocol, IN, OUT) -> exit code: the job of a Ray driver, with the local run's one worker: it is quicker."""

    def batch(protocol, guides, out):
        with monkeypatch.context() as patched:
            patched.setattr(folder, "LocalPlace", lambda *folders: place(protocol, *folders))
            return main([str(word) for word in command(guides, out, network)])

    return batch


def place(protocol, *folders):
    """Of guides, masks and results."""
    return remote_place.place_of(*(None if path is None else f"{protocol}{path}" for path in folders))


def without_stamps(out, guides) -> dict[str, dict]:
    """The manifest's entries by path, as a job with paths notes them."""
    entries = [json.loads(json.dumps(entry).replace(guides, "")) for entry in noted(out)]
    return {entry["path"]: {key: entry[key] for key in entry if key != "stamps"} for entry in entries}


# --- results -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", URLS)
def test_results_and_manifest_are_those_of_the_local_run(protocol, cluster, guides, local, out, network, capfd):
    capfd.readouterr()
    assert on_ray(f"{protocol}{guides}", f"{protocol}{out}/", network, "--json") == 1
    assert written(out) == written(local)
    assert without_stamps(out, f"{protocol}{guides}") == without_stamps(local, str(guides))
    said = capfd.readouterr()
    assert json.loads(said.out)["manifest"] == f"{protocol}{out}/manifest.jsonl"
    assert said.err.splitlines()[0].startswith(f"{protocol}{guides}/{BROKEN}: not a picture")
    assert sorted(path.name for path in out.iterdir()) == ["0", "1", "2", "manifest.jsonl"]


def test_masks_are_at_urls_too_and_paths_among_them(cluster, guides, tmp_path, out, network):
    for name in NAMES[:-1]:
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(guides / (NAMES[0] if name == BROKEN else name)) as guide:
            Image.fromarray(np.eye(guide.height, guide.width, dtype=np.uint8) * 255).save(tmp_path / "masks" / name)
    here = tmp_path / "here"
    here.mkdir()
    flags = ("--fit", "stretch", "--masks")
    assert main([str(word) for word in command(guides, here, network, *flags, tmp_path / "masks")]) == 1
    assert on_ray(guides, f"bucket://{out}", network, *flags, f"bucket://{tmp_path}/masks") == 1
    assert written(out) == written(here)
    assert len(written(out)) == len(NAMES) - 2
    errors = {entry["path"]: entry.get("error", "") for entry in noted(out)}
    assert errors[NAMES[-1]] == f"bucket://{tmp_path}/masks/{NAMES[-1]}: no such mask"


# --- finished by a later run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", URLS)
def test_what_is_done_is_known_without_reading_it(protocol, run, guides, local, out, capsys):
    shutil.copytree(guides, guides.parent / "all")
    for name in NAMES[3:]:
        (guides / name).unlink()
    assert run(protocol, guides, out) == 1
    shutil.copytree(guides.parent / "all", guides, dirs_exist_ok=True, copy_function=copy_missing)
    (out / NAMES[0]).write_bytes(b"damaged")
    capsys.readouterr()
    assert run(protocol, guides, out) == 1
    assert capsys.readouterr().out.startswith("7 edited, 1 done before, 1 failed")
    assert written(out) == written(local)
    assert len(noted(out)) == len(NAMES)
    ObjectStore.reads.clear()
    assert run(protocol, guides, out) == 1
    assert capsys.readouterr().out.startswith("0 edited, 8 done before, 1 failed")
    assert ObjectStore.reads == ([str(guides / BROKEN)] if protocol == "bucket://" else [])  # it may be mended by now


def copy_missing(source, target):
    if not os.path.exists(target):
        shutil.copy2(source, target)


def test_a_job_goes_on_where_its_folders_were_copied_to(run, guides, local, network, capsys):
    """By hash: no stamp of a local run, and none of another place, says anything here."""
    capsys.readouterr()
    assert run("bucket://", guides, local) == 1
    assert capsys.readouterr().out.startswith("0 edited, 8 done before, 1 failed")
    (local / NAMES[1]).unlink()
    assert run("bucket://", guides, local) == 1
    assert run("local://", guides, local) == 1
    assert main([str(word) for word in command(guides, local, network)]) == 1
    said = [line.partition(" failed")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["1 edited, 7 done before, 1", *["0 edited, 8 done before, 1"] * 2]


def test_a_driver_that_dies_has_to_do_again_what_it_had_not_noted(run, guides, local, out, capsys):
    assert run("bucket://", guides, out) == 1
    lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    (out / "manifest.jsonl").write_text("".join(line for line in lines if '"done"' in line)[: len(lines[0]) + 10])
    capsys.readouterr()
    assert run("bucket://", guides, out) == 1
    assert capsys.readouterr().out.startswith("7 edited, 1 done before, 1 failed")
    assert written(out) == written(local)


# --- the manifest, away ------------------------------------------------------------------------------------------


def entry(path, status="done"):
    file = guide_file(path, 0)
    return {"path": file.path, "output": file.output, "status": status, "seed": file.seed, "stamps": {}}


@pytest.mark.parametrize("protocol", URLS)
def test_the_manifest_is_copied_every_so_often_and_at_the_end(protocol, guides, out, monkeypatch):
    away, now = place(protocol, guides, None, out), [0.0]
    monkeypatch.setattr(remote_place.time, "monotonic", lambda: now[0])

    def job():
        with away.claimed():
            away.replace([])
            assert noted(out) == []
            away.append([entry("a.png")])
            assert noted(out) == []
            now[0] += remote_place.SECONDS_A_COPY
            away.append([entry("b.png")])
            assert [one["path"] for one in noted(out)] == ["a.png", "b.png"]
            away.append([entry("c.png")])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job()
    assert [one["path"] for one in noted(out)] == ["a.png", "b.png", "c.png"]
    assert not (out / ".sdedit-batch").exists()


def test_a_long_manifest_takes_a_tenth_of_the_time_at_most(guides, out, monkeypatch):
    away, now = place("bucket://", guides, None, out), [0.0]
    monkeypatch.setattr(remote_place.time, "monotonic", lambda: now[0])
    slowly = ObjectStore.put_file

    def put_file(*arguments):
        now[0] += 20
        slowly(*arguments)

    monkeypatch.setattr(ObjectStore, "put_file", put_file)
    with away.claimed():
        away.replace([])
        for second, lines in ((199, 0), (200, 2)):
            now[0] = 20 + second
            away.append([entry("a.png")])
            assert len(noted(out)) == lines


# --- whole files -------------------------------------------------------------------------------------------------


def test_a_file_that_did_not_arrive_whole_is_an_error(out):
    away = UrlFolder.at(f"bucket://{out}")
    with pytest.raises(sdedit.OutputError, match=r"a\.png: cannot be written: 2 bytes are there of 3"):
        away.put("a.png", 3, lambda fs, path: fs.pipe_file(path, b"12"), rename=False)


def test_a_file_server_never_shows_half_a_file(out):
    away = UrlFolder.at(f"local://{out}")
    assert away.open_scratch()
    away.put("a/b.png", 3, lambda fs, path: fs.pipe_file(path, b"old"), rename=True)

    def breaks_off(fs, path):
        fs.pipe_file(path, b"n")
        raise OSError("the line is cut")

    with pytest.raises(sdedit.OutputError, match=r"a/b\.png: cannot be written: the line is cut"):
        away.put("a/b.png", 3, breaks_off, rename=True)
    assert (out / "a" / "b.png").read_bytes() == b"old"
    away.remove_scratch()
    assert [path.name for path in out.iterdir()] == ["a"]


# --- refused -----------------------------------------------------------------------------------------------------


def test_paths_and_file_urls_stay_paths(guides, out):
    made = remote_place.place_of(guides.as_uri(), None, out)
    assert made == LocalPlace(guides, None, out)


def test_a_missing_package_is_named_with_its_pip_line(guides, out, network, capsys, monkeypatch):
    far = {"class": "farfs_of_nobody.core.Far", "err": "Install it"}
    monkeypatch.setitem(known_implementations, "far", far)
    assert on_ray("far://bucket/in", out, network) == 1
    assert capsys.readouterr().err == (
        "error: far://bucket/in: Install it\nhint: pip install farfs_of_nobody (on every machine of the cluster)\n"
    )


def test_what_only_a_worker_cannot_open_is_said_too(cluster, guides, out, network, capsys, monkeypatch):
    monkeypatch.setattr(ObjectStore, "protocol", "here")
    fsspec.register_implementation("here", ObjectStore, clobber=True)
    assert on_ray(f"here://{guides}", out, network) == 1
    assert capsys.readouterr().err == (
        f"error: on a worker: here://{guides}: Protocol not known: here\n"
        "hint: install on all machines of the cluster what it takes here\n"
    )
    assert written(out) == {}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nowhere://a/b", "nowhere://a/b: Protocol not known: nowhere"),
        ("nowhere://me:secret@host/b", "nowhere://host/b: Protocol not known: nowhere"),
        ("memory://a", "memory://a: each process has its own"),
    ],
)
def test_urls_that_workers_cannot_read_are_refused(url, message, out, network, capsys):
    assert on_ray(url, out, network) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}\nhint: ")


def test_a_model_is_no_url(guides, out, capsys):
    assert on_ray(guides, out, "s3://bucket/model.onnx") == 2
    assert capsys.readouterr().err == (
        "error: s3://bucket/model.onnx: a model is not opened from a URL\n"
        "hint: copy it to one path on all machines of the cluster\n"
    )


@pytest.mark.parametrize("protocol", URLS)
def test_folders_that_are_not_there_or_in_each_other_are_refused(protocol, guides, out, tmp_path, network, capsys):
    inside = guides / "results"
    inside.mkdir()
    at = {name: f"{protocol}{path}" for name, path in (("in", guides), ("out", out), ("inside", inside))}
    none = f"{protocol}{tmp_path}/none"
    nothing = f"{none}: no such folder" if protocol == "local://" else f"{none}: no pictures in it"
    for words, message in (
        ((none, at["out"]), nothing),
        ((at["in"], at["inside"]), f"{at['inside']}: would mix results with {at['in']}"),
        ((at["in"], at["in"]), f"{at['in']}: would mix results with {at['in']}"),
        ((at["in"], at["out"], "--masks", at["inside"]), f"{at['inside']}: its masks would be edited with {at['in']}"),
        ((at["in"], at["out"], "--masks", at["out"]), f"{at['out']}: would mix results with {at['out']}"),
    ):
        arguments = [*words[:2], network, *words[2:]]
        assert on_ray(*arguments) == 1
        assert capsys.readouterr().err.startswith(f"error: {message}\nhint: ")
    assert written(out) == {}


def test_a_file_server_wants_the_output_folder_to_be_there(guides, tmp_path, network, capsys):
    assert on_ray(f"local://{guides}", f"local://{tmp_path}/none", network) == 1
    assert (
        capsys.readouterr().err
        == f"error: local://{tmp_path}/none: no such folder\nhint: make the folder, or the bucket, first\n"
    )


@pytest.mark.parametrize("protocol", URLS)
def test_an_existing_file_is_not_replaced(protocol, guides, out, network, capsys):
    (out / "0").mkdir()
    (out / NAMES[0]).write_bytes(b"precious")
    for _ in range(2):  # the first try did not make it ours
        assert on_ray(f"{protocol}{guides}", f"{protocol}{out}", network) == 1
        assert capsys.readouterr().err.startswith(f"error: {protocol}{out}/{NAMES[0]}: exists already\nhint: ")
    assert written(out) == {NAMES[0]: b"precious"}


def test_a_folder_that_cannot_be_listed_is_not_left_out(guides, out, network, capsys, monkeypatch):
    listed = LocalFileSystem.ls

    def ls(self, path, **options):
        if path.rstrip("/") == str(guides / "1"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listed(self, path, **options)

    monkeypatch.setattr(LocalFileSystem, "ls", ls)
    assert on_ray(f"local://{guides}", f"local://{out}", network) == 1
    assert capsys.readouterr().err.startswith(f"error: local://{guides}: cannot be listed: Permission denied\nhint: ")


def test_seeds_come_from_the_path_below_the_url(guides, out):
    away = place("bucket://", guides, None, out)
    assert [guide_file(path, 5).seed for path in away.pictures()] == [seed_of(name, 5) for name in sorted(NAMES)]
