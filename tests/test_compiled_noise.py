"""The noise by the library that the package ships: NumPy's bits, by any thread, on every kind of processor."""

import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import sdedit
from sdedit.capi import build, ship, shipped
from sdedit.capi.steps import compiled_steps
from sdedit.cli import doctor
from sdedit.cli.main import main
from sdedit.schedule import StepTable

MANIFEST = json.loads((ship.FOLDER / ship.MANIFEST).read_text("utf-8"))
SEEDS = (0, 7, 2**32, 2**64 - 1)
USES = [(0, 0, 0), (1, 0, 1), (50, 2, 0), (2**32 - 1, 2**31, 1)]  # step, repeat, stream
LEVELS = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512bw"}  # GCC's name -> the processor's
CPUINFO = Path("/proc/cpuinfo")

needs_library = pytest.mark.skipif(shipped._load() is None, reason="the shipped library is for Linux on x86-64")


def drawn(monkeypatch, maker, shape, seeds=SEEDS, uses=USES, **options):
    """The noise of all uses from one source, in this order."""
    monkeypatch.setenv(shipped.VARIABLE, maker)
    noise = sdedit.Noise(seeds, shape, **options)
    return np.stack([noise(*use).copy() for use in uses])


# --- the library -------------------------------------------------------------------------------------------------


def test_it_was_made_from_these_sources():
    assert MANIFEST["source_sha256"] == ship.source_sha256(), "python -m sdedit.capi.ship"
    assert MANIFEST["library_sha256"] == hashlib.sha256(shipped.LIBRARY.read_bytes()).hexdigest()
    assert MANIFEST["flags"] == list(ship.FLAGS)
    assert "-ffp-contract=off" in MANIFEST["flags"]


def test_it_is_small():
    assert shipped.LIBRARY.stat().st_size < 100_000


@needs_library
def test_it_wants_no_other_library_and_no_symbol():
    tool = shutil.which("readelf")
    if tool is None:
        pytest.skip("needs readelf")
    told = subprocess.run(
        [tool, "--wide", "--dynamic", "--dyn-syms", shipped.LIBRARY], check=True, capture_output=True, text=True
    ).stdout
    assert "sdedit_normals" in told
    assert "NEEDED" not in told
    undefined = [line for line in told.splitlines() if " UND " in line]
    assert len(undefined) == 1  # the table's first row, which names nothing
    assert undefined[0].split()[-1] == "UND"


@needs_library
@pytest.mark.parametrize("level", LEVELS)
def test_the_source_gives_its_bits_for_every_kind_of_processor(level, tmp_path, monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    if LEVELS[level] not in CPUINFO.read_text().split():
        pytest.skip(f"this processor is no {level}")
    library = tmp_path / "libsdedit.so"
    source = ship.FOLDER / build.SOURCE
    subprocess.run(["g++", *build.FLAGS, f"-march={level}", "-o", library, source], check=True)
    shape = (3, 101, 67)
    ours = drawn(monkeypatch, "compiled", shape)
    monkeypatch.setattr(shipped, "LIBRARY", library)
    monkeypatch.setattr(shipped, "_load", shipped._load.__wrapped__)
    assert np.array_equal(drawn(monkeypatch, "compiled", shape), ours)


@needs_library
def test_shipping_makes_a_library_that_loads_and_says_from_what(tmp_path, monkeypatch):
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True) if shutil.which("g++") else None
    if version is None or int(version.stdout.partition(".")[0]) < 12:
        pytest.skip("needs g++ 12")
    manifest = ship.ship(tmp_path)
    assert manifest == json.loads((tmp_path / ship.MANIFEST).read_text("utf-8"))
    assert manifest["source_sha256"] == MANIFEST["source_sha256"]
    monkeypatch.setattr(shipped, "LIBRARY", tmp_path / ship.LIBRARY)
    monkeypatch.setattr(shipped, "_load", shipped._load.__wrapped__)
    assert np.array_equal(*(drawn(monkeypatch, maker, (3, 5, 7)) for maker in ("compiled", "numpy")))


# --- the bits ----------------------------------------------------------------------------------------------------


@needs_library
def test_four_million_normals_are_numpys(monkeypatch):
    ours, numpys = (
        drawn(monkeypatch, maker, (4, 1024, 1024), seeds=[11], uses=[(3, 1, 0)]) for maker in shipped.MAKERS
    )
    assert ours.size == 2**22
    assert np.array_equal(ours.view(np.int32), numpys.view(np.int32))


@needs_library
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 3), (3, 5, 7), (1, 3, 3), (3, 64, 64), (1, 257, 193)])
def test_every_seed_step_repeat_and_stream_is_numpys(monkeypatch, shape):
    ours, numpys = (drawn(monkeypatch, maker, shape) for maker in shipped.MAKERS)
    assert np.array_equal(ours.view(np.int32), numpys.view(np.int32))
    assert len({one.tobytes() for one in ours.reshape(-1, *shape)}) == len(SEEDS) * len(USES) or shape == (1, 1, 1)


@needs_library
def test_steps_in_any_order_and_equal_seeds_are_numpys(monkeypatch):
    uses = [(step, repeat, stream) for repeat in (0, 1) for step in (0, 1, 2, 30, 3) for stream in (0, 1)]
    options = {"seeds": [5, 9, 5, 5], "uses": uses, "steps": 30}
    ours, numpys = (drawn(monkeypatch, maker, (3, 8, 12), **options) for maker in shipped.MAKERS)
    assert np.array_equal(ours.view(np.int32), numpys.view(np.int32))


@needs_library
def test_it_writes_what_it_is_asked_for_and_no_more():
    out = np.full(16, 99, np.float32)
    shipped.open_library().sdedit_normals(7, 1, 0, 0, 5, out.ctypes.data)
    assert (out[5:] == 99).all()
    assert not (out[:5] == 99).any()


@needs_library
def test_threads_do_not_disturb_each_other(monkeypatch):
    shape, seeds = (3, 64, 64), range(32)
    wanted = [sdedit.Noise([seed], shape)(1, 0, 0).copy() for seed in seeds]
    monkeypatch.setenv(shipped.VARIABLE, "compiled")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda seed: sdedit.Noise([seed], shape)(1, 0, 0), seeds))
    assert all(np.array_equal(*pair) for pair in zip(found, wanted, strict=True))


@needs_library
@pytest.mark.parametrize("sampler", sdedit.SAMPLERS)
@pytest.mark.parametrize("masked", [False, True])
def test_an_edit_s_bytes_do_not_depend_on_who_makes_the_noise(sampler, masked, editor, picture, monkeypatch):
    options = {"sampler": sampler, "steps": 5, "repeats": 2, "samples": 3, "batch": 2}
    guide, mask = picture(12, 8), np.full((8, 12), 200, np.uint8) if masked else None
    results = []
    for maker in shipped.MAKERS:
        monkeypatch.setenv(shipped.VARIABLE, maker)
        results.append(editor.edit(guide, mask=mask, **options).x)
    assert np.array_equal(*results)


# --- the steps ---------------------------------------------------------------------------------------------------


def edited(maker, monkeypatch, table, masked, *, network=lambda x, sigma: np.tanh(x), repeat=1, dtype=np.float32):
    """A pass over two frames that are longer than the pieces the library works in, and no multiple of them."""
    monkeypatch.setenv(shipped.VARIABLE, maker)
    rng = np.random.default_rng(4)
    guide = rng.uniform(-1, 1, (2, 3, 37, 53)).astype(dtype)
    mask = rng.uniform(0, 1, (2, 1, 37, 53)).round(1).astype(dtype) if masked else None
    inside, seeds = (guide if masked else None), [3, 2**64 - 1]
    noise = sdedit.Noise(seeds, guide.shape[1:])
    x = sdedit.perturb(guide, table, noise, repeat=repeat)
    advance = compiled_steps(x, table, seeds, repeat, inside, mask)
    assert (advance is None) == (maker == "numpy" or dtype != np.float32)
    return sdedit.denoise(network, x, table, noise, repeat=repeat, guide=inside, mask=mask, advance=advance)


@needs_library
@pytest.mark.parametrize("sampler", sdedit.SAMPLERS)
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_steps_are_numpys(sampler, masked, monkeypatch):
    tables = [sdedit.plan(sdedit.VP(0.1, 20), t0=t0, steps=6, sampler=sampler) for t0 in (0.4, 0.7)]
    for table in (tables[0], StepTable.stack(tables)):
        ours, numpys = (edited(maker, monkeypatch, table, masked) for maker in shipped.MAKERS)
        assert np.isfinite(ours).all()
        assert np.array_equal(ours.view(np.int32), numpys.view(np.int32))


@needs_library
def test_one_guide_one_mask_and_one_stacked_table_serve_all_images():
    rng = np.random.default_rng(4)
    guide, mask = rng.uniform(-1, 1, (1, 3, 8, 9)).astype(np.float32), np.float32(rng.uniform(0, 1, (1, 1, 8, 9)))
    table, seeds = StepTable.stack([sdedit.plan(sdedit.VP(0.1, 20), t0=0.5, steps=4)]), [3, 4, 5]
    noise, start = sdedit.Noise(seeds, (3, 8, 9)), rng.uniform(-1, 1, (3, 3, 8, 9)).astype(np.float32)
    results = []
    for compiled in (True, False):
        x = start.copy()
        advance = compiled_steps(x, table, seeds, 0, guide, mask) if compiled else None
        made = sdedit.denoise(lambda x, _: np.tanh(x), x, table, noise, guide=guide, mask=mask, advance=advance)
        results.append(made)
    assert np.array_equal(*results)


@needs_library
def test_a_table_for_another_number_of_images_is_refused():
    table = StepTable.stack([sdedit.plan(sdedit.VP(0.1, 20), t0=t0, steps=4) for t0 in (0.4, 0.5)])
    with pytest.raises(sdedit.OptionError, match="step table for 2 images, batch of 3"):
        compiled_steps(np.zeros((3, 3, 4, 4), np.float32), table, [0, 1, 2], 0, None, None)


@needs_library
def test_a_network_s_answer_may_lie_anywhere(monkeypatch):
    """In a new array every time, in the same one, and not in C order."""
    table = sdedit.plan(sdedit.VP(0.1, 20), t0=0.5, steps=4)
    kept = np.empty((2, 3, 37, 53), np.float32, order="F")
    answers = [
        lambda x, sigma: np.tanh(x),
        lambda x, sigma: np.asfortranarray(np.tanh(x)),
        lambda x, sigma: np.tanh(x, out=kept),
    ]
    plain, *odd = (edited("compiled", monkeypatch, table, False, network=network) for network in answers)
    assert all(np.array_equal(plain, one) for one in odd)


@needs_library
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_told_alike(bad, monkeypatch):
    def network(x, sigma):
        denoised = np.tanh(x)
        denoised[1, 2, 36, 50:] = bad
        return denoised

    table = sdedit.plan(sdedit.VP(0.1, 20), t0=0.5, steps=4)
    said = []
    for maker in shipped.MAKERS:
        with pytest.raises(sdedit.NetworkError) as raised:
            edited(maker, monkeypatch, table, False, network=network)
        said.append(str(raised.value))
    assert said[0] == said[1]
    assert "3 NaN or Inf values at step 1 of 4" in said[0]


def test_numbers_of_another_precision_are_numpys(monkeypatch):
    table = sdedit.plan(sdedit.VP(0.1, 20), t0=0.5, steps=2)
    maker = sdedit.noise_maker()
    assert edited(maker, monkeypatch, table, True, dtype=np.float64).dtype == np.float64


# --- who makes it ------------------------------------------------------------------------------------------------


@needs_library
def test_the_library_makes_it_where_it_loads_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv(shipped.VARIABLE, raising=False)
    assert sdedit.noise_maker() == "compiled"
    monkeypatch.setenv(shipped.VARIABLE, "numpy")
    assert sdedit.noise_maker() == "numpy"


@pytest.mark.parametrize("library", ["absent", "for another system"])
def test_where_it_does_not_load_numpy_makes_it(library, tmp_path, monkeypatch, editor, picture):
    wanted = editor.edit(picture(12, 8), steps=3).x
    other = tmp_path / "libsdedit.so"
    if library != "absent":
        other.write_bytes(b"\xcf\xfa\xed\xfe" + bytes(4096))  # as macOS has them
    monkeypatch.setattr(shipped, "LIBRARY", other)
    monkeypatch.setattr(shipped, "_load", shipped._load.__wrapped__)
    monkeypatch.delenv(shipped.VARIABLE, raising=False)
    assert sdedit.noise_maker() == "numpy"
    assert np.array_equal(editor.edit(picture(12, 8), steps=3).x, wanted)
    monkeypatch.setenv(shipped.VARIABLE, "compiled")
    with pytest.raises(sdedit.BackendUnavailable, match=r"libsdedit\.so does not load here") as raised:
        sdedit.Noise([0], (1, 2, 2))
    assert "for NumPy" in raised.value.hint


def test_the_variable_has_two_values(monkeypatch, capsys):
    monkeypatch.setenv(shipped.VARIABLE, "Numpy")
    with pytest.raises(sdedit.OptionError, match="SDEDIT_NOISE is 'Numpy'") as raised:
        sdedit.Noise([0], (1, 2, 2))
    assert raised.value.hint == "set it to compiled or numpy, or not at all"


def test_doctor_says_who_makes_it(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "try_backend", lambda name: {"name": name, "works": True})
    monkeypatch.setenv(shipped.VARIABLE, "numpy")
    assert main(["doctor"]) == 0
    assert "\nnoise\n  numpy\n" in capsys.readouterr().out
    monkeypatch.setenv(shipped.VARIABLE, "fast")
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["noise"].startswith("SDEDIT_NOISE is 'fast'; fix: ")


def test_edit_says_who_made_it(network, write_png, picture, tmp_path, monkeypatch, capsys):
    guide = write_png("guide.png", picture(12, 8))
    monkeypatch.setenv(shipped.VARIABLE, "numpy")
    words = ["edit", guide, "-o", tmp_path / "out.png", "-m", network, "--backend", "ort-cpu", "--steps", 2, "--json"]
    assert main(list(map(str, words))) == 0
    assert json.loads(capsys.readouterr().out)["noise"] == "numpy"


def test_importing_the_engine_loads_no_library():
    code = "import sys, sdedit; sdedit.Noise; import sdedit.capi.shipped as s; print(s._load.cache_info().currsize)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "0\n"
