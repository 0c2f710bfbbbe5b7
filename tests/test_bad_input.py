"""Wrong input: one `error:` line, one `hint:` line, the right exit code, and every file as it was before."""

import copy
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from closed_form import SDES, gaussian, identity, metadata, save
from onnx import TensorProto, helper
from PIL import Image, PngImagePlugin

import sdedit
from sdedit import artifact, output
from sdedit.cli.main import main

posix = pytest.mark.skipif(os.name != "posix", reason="signals, limits and byte names as POSIX has them")
not_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read and write all")

FLOAT = TensorProto.FLOAT
SHAPE = (3, 16, 16)
X, SIGMA = (FLOAT, ["B", *SHAPE]), (FLOAT, ["B"])
ANY_IMAGE = {"denoised": (FLOAT, ["B", "C", "H", "W"])}
IDENTITY = [helper.make_node("Identity", ["x"], ["denoised"])]
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


# --- running the command, and what must hold whatever went in --------------------------------------------------------


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


def arguments(*given: Any) -> list[str]:
    """Paths and words as argv; a list among them is spliced in."""
    return [str(one) for part in given for one in (part if isinstance(part, list) else [part])]


def files(folder: Path) -> dict[str, Any]:
    """Everything under a folder: links by target, files by content."""

    def content(path: Path) -> Any:
        return os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None

    return {os.fsdecode(path.relative_to(folder)): content(path) for path in folder.rglob("*")}


def complaints(ran: Ran) -> list[str]:
    """What is wrong with the way a failure was told. Nothing, for a success without a word of error."""
    lines = ran.err.splitlines()
    found = []
    if ran.code not in (0, 1, 2, 3, 130):
        found.append(f"exit code {ran.code}")
    for word in ("Traceback", "Warning", "unexpected ", "Exception ignored", ":onnxruntime:"):
        if word in ran.err:
            found.append(f"{word.strip()!r} on stderr")
    counts = [sum(line.startswith(prefix) for line in lines) for prefix in ("error:", "hint:")]
    if counts != ([1, 1] if ran.code else [0, 0]):
        found.append(f"{counts[0]} error: lines, {counts[1]} hint: lines")
    if ran.code and [line.partition(": ")[0] for line in lines[-2:]] != ["error", "hint"]:
        found.append("stderr does not end in the error: line and the hint: line")
    if ran.code and lines and not lines[-1].removeprefix("hint:").strip():
        found.append("an empty hint")
    return [f"{one}: {ran.err.strip()[-400:]}" for one in found]


@pytest.fixture(autouse=True)
def no_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDEDIT_DEBUG", raising=False)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """The command in this process. A Python warning counts as text on stderr, which it would be."""

    def run(*given: Any) -> Ran:
        capfd.readouterr()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                code = main(arguments(*given))
            except SystemExit as stop:  # argparse
                code = stop.code if isinstance(stop.code, int) else 1
        told = capfd.readouterr()
        said = "".join(f"{one.category.__name__}: {one.message}\n" for one in warned)
        return Ran(code, told.out, said + told.err)

    return run


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Callable[..., Ran]:
    """Run a command that must be refused: code, parts of the error line, and nothing changed on disk."""

    def refused(given: list[Any], code: int, *texts: str) -> Ran:
        before = files(tmp_path)
        ran = run(*given)
        assert complaints(ran) == []
        assert ran.code == code, ran.err
        assert ran.out == ""
        error = ran.err.splitlines()[-2]
        for text in texts:
            assert text in error
        assert files(tmp_path) == before
        return ran

    return refused


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs that every test may read."""
    folder = tmp_path_factory.mktemp("shelf")
    gaussian(folder / "model.onnx", SDES["vp"], np.zeros(SHAPE), 0.5)
    Image.fromarray(PIXELS).save(folder / "guide.png")
    return folder


@pytest.fixture
def model(shelf: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(shelf / "model.onnx", tmp_path))


@pytest.fixture
def guide(shelf: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(shelf / "guide.png", tmp_path))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "OUT.png"


@pytest.fixture
def edit(model: Path, guide: Path, out: Path) -> list[Any]:
    """The start of a command that would work."""
    return ["edit", guide, "-o", out, "-m", model, "--threads", "1", "--steps", "2"]


@pytest.fixture
def edit_with(guide: Path, out: Path) -> Callable[[Path], list[Any]]:
    """The same, with another model."""
    return lambda path: ["edit", guide, "-o", out, "-m", path, "--threads", "1", "--steps", "3"]


def test_the_command_that_the_others_break_works(run: Run, edit: list[Any], out: Path) -> None:
    ran = run(*edit)
    assert complaints(ran) == []
    assert ran.code == 0
    assert ran.out == f"{out}\n"
    assert files(out.parent).keys() == {"OUT.png"}


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["edit"], "the following arguments are required: GUIDE, -o/--output"),
        (["edit", "a.png"], "the following arguments are required: -o/--output"),
        (["inspect", "a", "b"], "unrecognized arguments: b"),
        (["edit", "a.png", "-o", "b.png", "--bogus"], "unrecognized arguments: --bogus"),
        (["edit", "a.png", "-o", "b.png", "--samp", "em"], "unrecognized arguments: --samp em"),
        (["edit", "a.png", "-o", "b.png", "--bo\ngus"], "unrecognized arguments: --bo gus"),
        (["edit", "a.png", "-o", "b.png", "--t0", "half"], "argument --t0: invalid float value: 'half'"),
        (["edit", "a.png", "-o", "b.png", "--t0"], "argument --t0: expected one argument"),
        (["edit", "a.png", "-o", "b.png", "--steps", "1e3"], "argument --steps: invalid int value: '1e3'"),
        (["edit", "a.png", "-o", "b.png", "--steps", "9" * 5000], "argument --steps: invalid int value"),
        (["edit", "a.png", "-o", "b.png", "-n", "many"], "argument -n/--samples: invalid int value: 'many'"),
        (["edit", "a.png", "-o", "b.png", "--set", "label"], "'label' is not NAME=VALUE"),
        (["edit", "a.png", "-o", "b.png", "--set", "=1"], "'=1' is not NAME=VALUE"),
        (["edit", "a.png", "-o", "b.png", "--set", "label=cat"], "'cat' is not a number"),
    ],
)
def test_usage_is_told_in_the_same_two_lines(refused: Callable[..., Ran], given: list[str], text: str) -> None:
    refused(given, 2, text)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--t0", "0"], "t0 is 0.0; wanted a number in (0, 1]"),
        (["--t0", "-1"], "t0 is -1.0; wanted a number in (0, 1]"),
        (["--t0", "1.1"], "t0 is 1.1; wanted a number in (0, 1]"),
        (["--t0", "nan"], "t0 is nan; wanted a number in (0, 1]"),
        (["--t0", "inf"], "t0 is inf; wanted a number in (0, 1]"),
        (["--steps", "0"], "steps is 0; wanted a whole number from 1 to "),
        (["--steps", "-3"], "steps is -3; wanted a whole number from 1 to "),
        (["--sampler", "foo"], "unknown sampler 'foo'"),
        (["--sampler", ""], "unknown sampler ''"),
        (["--eta", "0.5"], "sampler ancestral has no eta, and eta is 0.5"),
        (["--sampler", "em", "--eta", "1"], "sampler em has no eta, and eta is 1.0"),
        (["--sampler", "er-sde", "--eta", "1"], "sampler er-sde has no eta, and eta is 1.0"),
        (["--sampler", "ddim", "--eta", "nan"], "eta is nan; wanted a number in [0, 1]"),
        (["--sampler", "ddim", "--eta", "-1"], "eta is -1.0; wanted a number in [0, 1]"),
        (["--sampler", "ddim", "--eta", "1.5"], "eta is 1.5; wanted a number in [0, 1]"),
        (["--sampler", "dpmpp-2m-sde", "--eta", "inf"], "eta is inf; wanted a number in [0, 100]"),
        (["--sampler", "dpmpp-2m-sde", "--eta", "-0.1"], "eta is -0.1; wanted a number in [0, 100]"),
        (["--fit", "squeeze"], "unknown fit 'squeeze'"),
        (["--fit", ""], "unknown fit ''"),
        (["-n", "0"], "samples is 0; wanted a whole number from 1 to "),
        (["-n", "-1"], "samples is -1; wanted a whole number from 1 to "),
        (["--repeats", "0"], "repeats is 0; wanted a whole number from 1 to "),
        (["--repeats", "-1"], "repeats is -1; wanted a whole number from 1 to "),
        (["--seed", "-1"], "seed is -1; wanted a whole number from 0 to 18446744073709551615"),
        (["--seed", str(2**64)], f"seed is {2**64}; wanted a whole number from 0 to 18446744073709551615"),
        (["--threads", "0"], "threads is 0; wanted a whole number"),
        (["--threads", "-1"], "threads is -1; wanted a whole number"),
        (["--threads", str(2**31)], f"threads is {2**31}; wanted a whole number"),
        (["--threads", "9" * 20], f"threads is {'9' * 20}; wanted a whole number"),
        (["--set", "label=1"], "the model has no input label to set"),
        (["--precision", "double"], "unknown precision 'double'"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_an_option_that_makes_no_sense_is_a_usage_error(
    refused: Callable[..., Ran], edit: list[Any], given: list[str], text: str
) -> None:
    refused([*edit, *given], 2, text)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--backend", "abacus"], "unknown backend 'abacus'"),
        (["--backend", ""], "unknown backend ''"),
        (["--precision", "int8"], "precision int8 was asked for; closed-form is fp32"),
        (["--replay", ""], "not a picture"),
    ],
)
def test_what_this_machine_or_model_does_not_have_fails(
    run: Run, refused: Callable[..., Ran], edit: list[Any], given: list[str], text: str
) -> None:
    code = run(*edit, *given).code
    assert code in (1, 2)
    refused([*edit, *given], code, text)


@pytest.mark.parametrize("backend", ["ort-cuda", "ort-tensorrt"])
def test_a_backend_that_was_named_is_not_replaced(refused: Callable[..., Ran], edit: list[Any], backend: str) -> None:
    import onnxruntime

    if len(onnxruntime.get_available_providers()) > 2:
        pytest.skip("a GPU build of ONNX Runtime")
    refused([*edit, "--backend", backend], 1, f"{backend}: this onnxruntime has no")


@posix
@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--steps", "1000000000"], "steps is 1000000000"),
        (["--steps", "1000000000", "--sampler", "er-sde"], "steps is 1000000000"),
        (["-n", "1000000000"], "samples is 1000000000"),
    ],
    ids=["steps", "steps of er-sde", "samples"],
)
def test_a_number_too_large_is_refused_before_memory_is_taken(
    tmp_path: Path, edit: list[Any], given: list[str], text: str
) -> None:
    import resource

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (5, 5))

    before = files(tmp_path)
    ran = in_process_of_its_own([*edit, *given], preexec_fn=limits)
    assert complaints(ran) == []
    assert ran.code == 2
    assert text in ran.err
    assert files(tmp_path) == before


# --- guides ----------------------------------------------------------------------------------------------------------


def chunk(tag: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))


def png(width: int, height: int, raw: bytes, depth: int = 8, colour: int = 2, *extra: bytes) -> bytes:
    """A PNG by hand, which may lie about its size."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def rgb() -> Image.Image:
    return Image.fromarray(PIXELS)


def frames() -> dict[str, Any]:
    return {"save_all": True, "append_images": [Image.fromarray(np.roll(PIXELS, n, 0)) for n in (1, 2)]}


def app1(payload: bytes) -> bytes:
    """A JPEG with this EXIF segment."""
    jpeg = encoded(rgb(), "JPEG")
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


PNG, JPEG = encoded(rgb(), "PNG"), encoded(rgb(), "JPEG")
UNKNOWN = "not a picture, or of an unknown format"
BROKEN_GUIDES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty (0 bytes)"),
    "text": (b"hello, I am a painting\n", UNKNOWN),
    "zeros": (bytes(1000), UNKNOWN),
    "png signature": (PNG[:8], UNKNOWN),
    "png header cut": (PNG[:20], "cannot be decoded"),
    "png half": (PNG[: len(PNG) // 2], "cannot be decoded: image file is truncated"),
    "png damaged checksum": (PNG[:30] + b"\0\0" + PNG[32:], UNKNOWN),
    "jpeg header cut": (JPEG[:100], "cannot be decoded"),
    "jpeg half": (JPEG[: len(JPEG) // 2], "cannot be decoded"),
    "jpeg end cut": (JPEG[:-8], "cannot be decoded"),
    "png without pixels": (png(16, 16, b""), "cannot be decoded"),
    "no width": (png(0, 5, b""), UNKNOWN),
    "bomb": (png(100_000, 100_000, bytes(100)), "more than 100 megapixels"),
    "just too large": (png(10_001, 10_000, bytes(100)), "more than 100 megapixels"),
    "largest size PNG has": (png(2**31 - 1, 2**31 - 1, bytes(100)), "more than 100 megapixels"),
    "large but allowed, and cut": (png(10_000, 9_000, bytes(100)), "cannot be decoded"),
    "short transparency chunk": (
        png(16, 16, bytes(16 * 33), 16, 0, chunk(b"tRNS", b"\0")),
        "cannot be decoded: Truncated tRNS chunk",
    ),
    "animated gif": (encoded(rgb(), "GIF", **frames()), "has 3 frames (animated, or several pages)"),
    "animated webp": (encoded(rgb(), "WEBP", **frames()), "has 3 frames (animated, or several pages)"),
    "animated png": (encoded(rgb(), "PNG", **frames()), "has 3 frames (animated, or several pages)"),
    "pages of a tiff": (encoded(rgb(), "TIFF", **frames()), "has 3 frames (animated, or several pages)"),
    "float tiff": (
        encoded(Image.fromarray(PIXELS[..., 0].astype(np.float32)), "TIFF"),
        "has 32-bit pixels (mode F)",
    ),
    "32-bit tiff": (encoded(Image.fromarray(PIXELS[..., 0].astype(np.int32)), "TIFF"), "has 32-bit pixels (mode I)"),
    "a program for another program to run": (encoded(rgb(), "EPS"), UNKNOWN),
}


@pytest.mark.parametrize("name", BROKEN_GUIDES)
@pytest.mark.parametrize("role", ["guide", "mask"])
def test_a_file_that_is_no_picture_is_refused(
    refused: Callable[..., Ran], model: Path, guide: Path, out: Path, tmp_path: Path, role: str, name: str
) -> None:
    data, text = BROKEN_GUIDES[name]
    broken = tmp_path / "broken"
    broken.write_bytes(data)
    inputs = [broken] if role == "guide" else [guide, "--mask", broken]
    refused(["edit", *inputs, "-o", out, "-m", model, "--steps", "2"], 1, f"{broken}: {text}")


@pytest.mark.parametrize("role", ["guide", "mask"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nothing.png", "no such file"),
        ("folder", "is a folder, not a picture"),
        ("guide.png/inside.png", "cannot be read: Not a directory"),
        ("loop.png", "cannot be read: Too many levels of symbolic links"),
        (f"{'n' * 300}.png", "cannot be read: File name too long"),
    ],
    ids=["missing", "folder", "inside a file", "link loop", "long name"],
)
def test_a_path_that_leads_to_no_picture_is_refused(
    refused: Callable[..., Ran], model: Path, guide: Path, out: Path, tmp_path: Path, role: str, name: str, text: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    inputs = [tmp_path / name] if role == "guide" else [guide, "--mask", tmp_path / name]
    refused(["edit", *inputs, "-o", out, "-m", model], 1, f"{tmp_path / name}: {text}")


@not_root
def test_a_guide_that_may_not_be_read_is_refused(refused: Callable[..., Ran], edit: list[Any], guide: Path) -> None:
    content = guide.read_bytes()
    guide.unlink()
    other = guide.with_name("locked.png")
    other.write_bytes(content)
    other.chmod(0)
    try:
        ran = main(arguments("edit", other, *edit[2:]))
    finally:
        other.chmod(0o600)
    assert ran == 1


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="Linux has a file that cannot be read")
def test_a_guide_whose_reading_fails_is_refused(refused: Callable[..., Ran], edit: list[Any]) -> None:
    refused(["edit", "/proc/self/mem", *edit[2:]], 1, "/proc/self/mem: cannot be read: Input/output error")


def test_one_bad_guide_among_good_ones_stops_all(refused: Callable[..., Ran], edit: list[Any], guide: Path) -> None:
    refused([*edit[:2], guide, guide.with_name("missing.png"), *edit[2:]], 1, "missing.png: no such file")


PALETTE = rgb().quantize(16)
CONVERTED: dict[str, tuple[bytes, str | None]] = {
    "cmyk jpeg": (encoded(rgb().convert("CMYK"), "JPEG"), "CMYK converted to RGB without a colour profile"),
    "16-bit grey": (encoded(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), "PNG"), "16 bits reduced to 8"),
    "16-bit tiff": (encoded(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), "TIFF"), "16 bits reduced to 8"),
    "16-bit colour": (png(16, 16, (b"\0" + bytes(96)) * 16, 16), "16 bits reduced to 8"),
    "palette": (encoded(PALETTE, "PNG"), None),
    "palette, one clear": (encoded(PALETTE, "PNG", transparency=3), "transparent parts put on white"),
    "palette, some clear": (
        encoded(PALETTE, "PNG", transparency=bytes([0, 100, 200] + [255] * 13)),
        "transparent parts put on white",
    ),
    "gif": (encoded(PALETTE, "GIF", transparency=2), "transparent parts put on white"),
    "grey, opaque": (encoded(rgb().convert("LA"), "PNG"), None),
    "grey, clear": (
        encoded(rgb().convert("LA").rotate(45), "PNG"),
        "transparent parts put on white",
    ),
    "rgba": (encoded(Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]])), "PNG"), "transparent parts put on white"),
    "rgba webp": (
        encoded(Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]])), "WEBP", lossless=True),
        "transparent parts put on white",
    ),
    "one bit": (encoded(rgb().convert("1"), "PNG"), None),
    "bmp": (encoded(rgb(), "BMP"), None),
    "one pixel": (encoded(rgb().crop((0, 0, 1, 1)), "PNG"), "1x1 is smaller than the model's 16x16: enlarged"),
    "a line": (encoded(Image.new("RGB", (5000, 1)), "PNG"), "5000x1 is smaller than the model's 16x16: enlarged"),
    "a column": (encoded(Image.new("RGB", (1, 5000)), "PNG"), "1x5000 is smaller than the model's 16x16: enlarged"),
    "smaller": (encoded(Image.new("RGB", (16, 9)), "PNG"), "16x9 is smaller than the model's 16x16: enlarged"),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_an_unusual_picture_is_read_and_what_was_done_to_it_is_said(
    run: Run, model: Path, out: Path, tmp_path: Path, name: str
) -> None:
    data, note = CONVERTED[name]
    unusual = tmp_path / "unusual"
    unusual.write_bytes(data)
    ran = run("edit", unusual, "-o", out, "-m", model, "--steps", "1")
    assert complaints(ran) == []
    assert ran.code == 0
    assert (f"{unusual}: {note}" in ran.err.splitlines()) if note else (str(unusual) not in ran.err)
    assert Image.open(out).size == (16, 16)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000)])
def test_any_shape_fits(run: Run, edit: list[Any], guide: Path, size: tuple[int, int], fit: str) -> None:
    Image.new("RGB", size).save(guide)
    ran = run(*edit, "--fit", fit)
    assert complaints(ran) == []
    assert ran.code == 0


def exif(order: bytes, *entries: bytes) -> bytes:
    return b"Exif\0\0" + order + b"".join(entries)


CORRUPT_EXIF = {
    "garbage": exif(b"garbage"),
    "nothing": exif(b""),
    "directory outside": exif(b"II*\0", b"\xff\xff\xff\xff"),
    "entries missing": exif(b"MM\0*", b"\0\0\0\x08\xff\xff"),
    "value outside": exif(b"II*\0", struct.pack("<IHHHII", 8, 1, 0x112, 2, 2**31 - 1, 2**31 - 1)),
    "orientation is text": exif(b"II*\0", struct.pack("<IHHHI4sI", 8, 1, 0x112, 2, 2, b"A", 0)),
    "orientation is a fraction": exif(b"II*\0", struct.pack("<IHHHIIIII", 8, 1, 0x112, 5, 1, 26, 0, 0, 0)),
    "orientation 9": exif(b"II*\0", struct.pack("<IHHHIII", 8, 1, 0x112, 3, 1, 9, 0)),
}


@pytest.mark.parametrize("name", CORRUPT_EXIF)
def test_a_damaged_exif_block_costs_neither_the_picture_nor_a_warning(
    run: Run, edit: list[Any], guide: Path, name: str
) -> None:
    guide.write_bytes(app1(CORRUPT_EXIF[name]))
    ran = run(*edit)
    assert complaints(ran) == []
    assert ran.code == 0


@pytest.mark.parametrize("name", CORRUPT_EXIF)
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_damaged_exif_elsewhere_is_at_most_an_error(
    run: Run, edit: list[Any], guide: Path, kind: str, name: str
) -> None:
    guide.write_bytes(encoded(rgb(), kind, exif=CORRUPT_EXIF[name]))
    assert complaints(run(*edit)) == []


def test_a_photograph_lying_on_its_side_is_turned(run: Run, edit: list[Any], guide: Path) -> None:
    turned = Image.Exif()
    turned[0x112] = 6
    Image.new("RGB", (40, 20)).save(guide, exif=turned)
    ran = run(*edit, "--fit", "exact")
    assert complaints(ran) == []
    assert "is 20x40; the model's frame is 16x16" in ran.err


def test_a_guide_of_another_size_does_not_fit_exactly(
    refused: Callable[..., Ran], edit: list[Any], guide: Path
) -> None:
    Image.new("RGB", (17, 16)).save(guide)
    refused([*edit, "--fit", "exact"], 1, f"{guide}: is 17x16; the model's frame is 16x16")


def test_a_model_of_four_channels_edits_no_pictures(
    refused: Callable[..., Ran], edit_with: Callable[[Path], list[Any]], tmp_path: Path
) -> None:
    four = identity(tmp_path / "four.onnx", SDES["vp"], (4, 16, 16))
    refused(edit_with(four), 1, "the model has 4 channels; pictures have 3 (RGB) or 1 (grey)")


# --- masks -----------------------------------------------------------------------------------------------------------


def test_a_mask_has_the_size_of_its_guide(refused: Callable[..., Ran], edit: list[Any], tmp_path: Path) -> None:
    mask = tmp_path / "mask.png"
    Image.new("L", (16, 15)).save(mask)
    refused([*edit, "--mask", mask], 1, f"{mask}: is 16x15; the guide", "is 16x16")


def test_masks_are_one_or_as_many_as_guides(refused: Callable[..., Ran], edit: list[Any], guide: Path) -> None:
    refused([*edit[:2], guide, guide, *edit[2:], "--mask", guide, "--mask", guide], 2, "2 masks for 3 guides")
    refused([*edit, "--mask", guide, "--mask", guide], 2, "2 masks for 1 guides")


def test_a_mask_that_no_window_covers_is_refused(
    refused: Callable[..., Ran], edit: list[Any], guide: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 32)).save(guide)
    mask = tmp_path / "mask.png"
    Image.new("L", (64, 32), 255).save(mask)
    ran = refused(
        [*edit, "--mask", mask],
        1,
        "the mask spans 64x32 pixels; the largest crop window of the model's aspect is 32x32",
    )
    assert "hint: --fit pad or stretch" in ran.err


# --- models ----------------------------------------------------------------------------------------------------------


def save_unchecked(path: Path, *given: Any, **options: Any) -> Path:
    """`save` for graphs that the ONNX checker rejects."""
    import onnx

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx.checker, "check_model", lambda model: None)
        return save(path, *given, **options)


def node(kind: str, inputs: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), ["denoised"], **attributes)


VP = metadata(SHAPE, SDES["vp"])
IMAGE = VP["image"]
DEEP_LIST, DEEP_OBJECT = "[" * 100_000, '{"a":' * 5_000 + "1" + "}" * 5_000
BAD_METADATA: dict[str, tuple[Any, str]] = {
    "none": (None, "an ONNX file without our metadata (property 'sdedit')"),
    "empty": ("", "metadata 'sdedit' is not JSON"),
    "not json": ("{", "metadata 'sdedit' is not JSON"),
    "a list": ("[]", "metadata 'sdedit' is not a JSON object"),
    "null": ("null", "metadata 'sdedit' is not a JSON object"),
    "lists too deep": (DEEP_LIST, "metadata 'sdedit' is not JSON"),
    "objects too deep": (DEEP_OBJECT, "metadata 'sdedit' is not JSON"),
    "a number too long": (json.dumps(VP).replace("0.1", "9" * 5000), "metadata 'sdedit' is not JSON"),
    "format 2": ({**VP, "format": 2}, "format 2 is newer than this engine reads (1)"),
    "format '1'": ({**VP, "format": "1"}, "format is '1'; wanted 1"),
    "format 1.0": ({**VP, "format": 1.0}, "format is 1.0; wanted 1"),
    "format true": ({**VP, "format": True}, "format is True; wanted 1"),
    "format 0": ({**VP, "format": 0}, "format is 0; wanted 1"),
    "no format": ({k: v for k, v in VP.items() if k != "format"}, "format is None; wanted 1"),
    "no image": ({k: v for k, v in VP.items() if k != "image"}, "metadata has no 'image' object"),
    "image is a list": ({**VP, "image": [3, 16, 16]}, "metadata has no 'image' object"),
    "no height": ({**VP, "image": {"channels": 3, "width": 16}}, "image.height is None; wanted a whole number"),
    "height is text": ({**VP, "image": {**IMAGE, "height": "16"}}, "image.height is '16'; wanted a whole number"),
    "height -16": ({**VP, "image": {**IMAGE, "height": -16}}, "image.height is -16; wanted a whole number, at least 1"),
    "channels 0": ({**VP, "image": {**IMAGE, "channels": 0}}, "image.channels is 0; wanted a whole number, at least 1"),
    "channels true": ({**VP, "image": {**IMAGE, "channels": True}}, "image.channels is True; wanted a whole number"),
    "height 32": ({**VP, "image": {**IMAGE, "height": 32}}, "input x has height 16, image.height is 32"),
    "multiple 0": ({**VP, "image": {**IMAGE, "multiple": 0}}, "image.multiple is 0; wanted a whole number, at least 1"),
    "multiple 5": ({**VP, "image": {**IMAGE, "multiple": 5}}, "image.height is 16; must be a multiple of 5"),
    "no sde": ({k: v for k, v in VP.items() if k != "sde"}, "metadata has no 'sde' object"),
    "sde is text": ({**VP, "sde": "vp"}, "metadata has no 'sde' object"),
    "sde kind": ({**VP, "sde": {"kind": "heat"}}, "sde.kind is 'heat'; wanted one of ve, vp, vp-discrete, edm"),
    "sde kind is a list": ({**VP, "sde": {"kind": []}}, "sde.kind is []; wanted one of"),
    "beta is text": ({**VP, "sde": {**SDES["vp"], "beta_max": "20"}}, "sde.beta_max is '20'; wanted a number"),
    "beta is true": ({**VP, "sde": {**SDES["vp"], "beta_max": True}}, "sde.beta_max is True; wanted a number"),
    "beta is nan": ({**VP, "sde": {**SDES["vp"], "beta_max": np.nan}}, "sde: beta_min 0.1, beta_max nan"),
    "beta is huge": ({**VP, "sde": {**SDES["vp"], "beta_max": 10**400}}, "sde.beta_max is 1000"),
    "betas swapped": ({**VP, "sde": {"kind": "vp", "beta_min": 20, "beta_max": 0.1}}, "sde: beta_min 20"),
    "sigma 0": ({**VP, "sde": {**SDES["ve"], "sigma_min": 0}}, "sde: sigma_min 0.0, sigma_max 60.0; wanted 0 <"),
    "sigma infinite": ({**VP, "sde": {**SDES["ve"], "sigma_max": np.inf}}, "sde: sigma_min 0.02, sigma_max inf"),
    "sigma is huge": ({**VP, "sde": {**SDES["ve"], "sigma_max": 10**400}}, "sde.sigma_max is 1000"),
    "rho 0": ({**VP, "sde": {**SDES["edm"], "rho": 0}}, "sde: rho is 0.0; wanted a positive number"),
    "no levels": ({**VP, "sde": {"kind": "vp-discrete", "alphas_cumprod": []}}, "alphas_cumprod must fall strictly"),
    "level is text": (
        {**VP, "sde": {"kind": "vp-discrete", "alphas_cumprod": [0.9, "0.5"]}},
        "sde.alphas_cumprod is [0.9, '0.5']; wanted a list of numbers",
    ),
    "level is huge": (
        {**VP, "sde": {"kind": "vp-discrete", "alphas_cumprod": [10**400]}},
        "sde.alphas_cumprod is [1000",
    ),
    "levels rise": ({**VP, "sde": {"kind": "vp-discrete", "alphas_cumprod": [0.5, 0.9]}}, "alphas_cumprod must fall"),
    "level nan": ({**VP, "sde": {"kind": "vp-discrete", "alphas_cumprod": [np.nan]}}, "alphas_cumprod must fall"),
    "inputs is a list": ({**VP, "inputs": ["label"]}, "inputs is not a JSON object of objects"),
    "input is text": ({**VP, "inputs": {"label": "int64"}}, "inputs is not a JSON object of objects"),
    "input of no type": ({**VP, "inputs": {"label": {}}}, "inputs.label.dtype is None; wanted int64, int32 or float32"),
    "input count 0": (
        {**VP, "inputs": {"label": {"dtype": "int64", "count": 0}}},
        "inputs.label.count is 0; wanted a whole number, at least 1",
    ),
    "input that is not there": (
        {**VP, "inputs": {"label": {"dtype": "int64"}}},
        "inputs are x, sigma; wanted x, sigma",
    ),
    "input called sigma": ({**VP, "inputs": {"sigma": {"dtype": "float32"}}}, "inputs.sigma"),
    "defaults is a list": ({**VP, "defaults": [0.5]}, "defaults is not a JSON object"),
    "default t0 7": ({**VP, "defaults": {"t0": 7}}, "defaults.t0 is 7"),
    "default t0 is text": ({**VP, "defaults": {"t0": "x"}}, "defaults.t0 is 'x'"),
    "default t0 nan": ({**VP, "defaults": {"t0": np.nan}}, "defaults.t0 is nan"),
    "default steps 0": ({**VP, "defaults": {"steps": 0}}, "defaults.steps is 0"),
    "default steps is text": ({**VP, "defaults": {"steps": "x"}}, "defaults.steps is 'x'"),
    "default steps 2.5": ({**VP, "defaults": {"steps": 2.5}}, "defaults.steps is 2.5"),
    "default sampler foo": ({**VP, "defaults": {"sampler": "foo"}}, "defaults.sampler is 'foo'"),
    "default sampler is a list": ({**VP, "defaults": {"sampler": ["em"]}}, "defaults.sampler is ['em']"),
}


@pytest.mark.parametrize("name", BAD_METADATA)
@pytest.mark.parametrize("command", ["edit", "inspect"])
def test_metadata_is_checked_when_the_model_is_opened(
    refused: Callable[..., Ran], edit_with: Callable[[Path], list[Any]], tmp_path: Path, command: str, name: str
) -> None:
    described, text = BAD_METADATA[name]
    bad = save(tmp_path / "bad.onnx", IDENTITY, {}, described)
    refused(edit_with(bad) if command == "edit" else ["inspect", bad], 1, f"{bad}: ", text)


Graph = dict[str, Any]
BAD_INTERFACES: dict[str, tuple[Graph, str]] = {
    "another input name": (
        {"inputs": {"y": X, "sigma": SIGMA}, "nodes": [node("Identity", "y")]},
        "inputs are y, sigma; wanted x, sigma",
    ),
    "an input too few": ({"inputs": {"x": X}}, "inputs are x; wanted x, sigma"),
    "an input too many": (
        {"inputs": {"x": X, "sigma": SIGMA, "label": (TensorProto.INT64, ["B"])}},
        "inputs are x, sigma, label; wanted x, sigma",
    ),
    "another output name": (
        {"nodes": [helper.make_node("Identity", ["x"], ["y"])], "outputs": {"y": X}},
        "outputs are y; wanted denoised",
    ),
    "an output too many": (
        {
            "nodes": [*IDENTITY, helper.make_node("Identity", ["sigma"], ["y"])],
            "outputs": {"denoised": X, "y": SIGMA},
        },
        "outputs are denoised, y; wanted denoised",
    ),
    "x of rank 3": (
        {"inputs": {"x": (FLOAT, ["B", 3, 16]), "sigma": SIGMA}, "outputs": {"denoised": (FLOAT, ["B", 3, 16])}},
        "input x has rank 3; wanted 4",
    ),
    "sigma of rank 2": ({"inputs": {"x": X, "sigma": (FLOAT, ["B", 1])}}, "input sigma has rank 2; wanted 1"),
    "sigma a scalar": ({"inputs": {"x": X, "sigma": (FLOAT, [])}}, "input sigma has rank 0; wanted 1"),
    "x in double": (
        {
            "inputs": {"x": (TensorProto.DOUBLE, ["B", *SHAPE]), "sigma": SIGMA},
            "outputs": {"denoised": (TensorProto.DOUBLE, ["B", *SHAPE])},
        },
        "input x is float64; wanted float32",
    ),
    "sigma whole": ({"inputs": {"x": X, "sigma": (TensorProto.INT64, ["B"])}}, "input sigma is int64; wanted float32"),
    "a batch of one": (
        {"inputs": {"x": (FLOAT, [1, *SHAPE]), "sigma": SIGMA}},
        "input x has a fixed batch of 1; wanted a dynamic one",
    ),
    "a batch of one sigma": (
        {"inputs": {"x": X, "sigma": (FLOAT, [1])}},
        "input sigma has a fixed batch of 1; wanted a dynamic one",
    ),
    "another height": (
        {
            "inputs": {"x": (FLOAT, ["B", 3, 32, 16]), "sigma": SIGMA},
            "outputs": {"denoised": (FLOAT, ["B", 3, 32, 16])},
        },
        "input x has height 32, image.height is 16",
    ),
    "an old opset": ({"opset": 16}, "opset is 16; wanted at least 17"),
}


@pytest.mark.parametrize("name", BAD_INTERFACES)
@pytest.mark.parametrize("command", ["edit", "inspect"])
def test_the_graph_s_interface_is_checked_when_the_model_is_opened(
    refused: Callable[..., Ran], edit_with: Callable[[Path], list[Any]], tmp_path: Path, command: str, name: str
) -> None:
    graph, text = BAD_INTERFACES[name]
    options = {key: value for key, value in graph.items() if key != "nodes"}
    bad = save_unchecked(tmp_path / "bad.onnx", graph.get("nodes", IDENTITY), {}, VP, **options)
    refused(edit_with(bad) if command == "edit" else ["inspect", bad], 1, f"{bad}: {text}")


UNRUNNABLE: dict[str, Graph] = {
    "an operator from nowhere": {"nodes": [node("Nonsense", "x")]},
    "a value from nowhere": {"nodes": [node("Identity", "nothing")]},
    "a circle": {
        "nodes": [
            helper.make_node("Identity", ["a"], ["denoised"]),
            helper.make_node("Identity", ["denoised"], ["a"]),
        ]
    },
    "an opset from the future": {"nodes": IDENTITY, "opset": 99},
}


@pytest.mark.parametrize("name", UNRUNNABLE)
def test_a_graph_that_onnx_runtime_does_not_load_is_refused(
    refused: Callable[..., Ran], edit_with: Callable[[Path], list[Any]], tmp_path: Path, name: str
) -> None:
    graph = dict(UNRUNNABLE[name])
    bad = save_unchecked(tmp_path / "bad.onnx", graph.pop("nodes"), {}, VP, **graph)
    refused(edit_with(bad), 1, f"{bad}: ONNX Runtime cannot load it: ")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "is empty (0 bytes)"),
        (b"\0", "not an ONNX file, or a truncated one"),
        (b"garbage", "not an ONNX file, or a truncated one"),
        (b"\x08\x08", "not an ONNX file, or a truncated one: no graph in it"),
        (b"\x80" * 40, "not an ONNX file, or a truncated one"),
        (b"\xff" * 40, "not an ONNX file, or a truncated one"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "not an ONNX file, or a truncated one"),
        (PNG, "not an ONNX file, or a truncated one"),
        (json.dumps(VP).encode(), "not an ONNX file, or a truncated one"),
    ],
    ids=["empty", "zero", "garbage", "no graph", "endless varint", "ones", "huge length", "png", "json"],
)
@pytest.mark.parametrize("command", ["edit", "inspect"])
def test_a_file_that_is_no_model_is_refused(
    refused: Callable[..., Ran],
    edit_with: Callable[[Path], list[Any]],
    tmp_path: Path,
    command: str,
    data: bytes,
    text: str,
) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(data)
    refused(edit_with(bad) if command == "edit" else ["inspect", bad], 1, f"{bad}: {text}")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nothing.onnx", "no such file"),
        ("folder", "is a folder, not an .onnx file"),
        (f"{'n' * 300}.onnx", "cannot be read: File name too long"),
    ],
    ids=["missing", "folder", "long name"],
)
@pytest.mark.parametrize("command", ["edit", "inspect"])
def test_a_path_that_leads_to_no_model_is_refused(
    refused: Callable[..., Ran],
    edit_with: Callable[[Path], list[Any]],
    tmp_path: Path,
    command: str,
    name: str,
    text: str,
) -> None:
    (tmp_path / "folder").mkdir()
    bad = tmp_path / name
    refused(edit_with(bad) if command == "edit" else ["inspect", bad], 1, f"{bad}: {text}")


def test_a_plan_that_is_not_there_or_has_no_sidecar(
    refused: Callable[..., Ran], edit_with: Callable[[Path], list[Any]], tmp_path: Path
) -> None:
    refused(edit_with(tmp_path / "model.plan"), 1, "model.plan: no such file")
    (tmp_path / "model.plan").write_bytes(b"plan")
    refused(edit_with(tmp_path / "model.plan"), 1, "model.plan: its sidecar model.plan.json is not beside it")


def test_a_missing_bundled_model_is_an_error(
    refused: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, guide: Path, out: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(artifact, "BUNDLED", tmp_path / "bundled.onnx")
    refused(["edit", guide, "-o", out], 1, "bundled.onnx: no such file")
    refused(["inspect"], 1, "bundled.onnx: no such file")


def test_doctor_says_that_nothing_works(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(artifact, "BUNDLED", tmp_path / "bundled.onnx")
    ran = run("doctor")
    assert ran.code == 1
    assert "bundled.onnx: no such file" in ran.out
    assert complaints(ran) == []


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--t0", "7"], "t0 is 7.0; wanted a number in (0, 1]"),
        (["--steps", "0"], "steps is 0; wanted a whole number from 1 to "),
        (["--sampler", "foo"], "unknown sampler 'foo'"),
        (["--eta", "1"], "sampler ancestral has no eta"),
    ],
)
def test_inspect_checks_its_table_s_options(
    refused: Callable[..., Ran], model: Path, given: list[str], text: str
) -> None:
    refused(["inspect", model, *given], 2, text)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e300", "1.5"])
def test_a_label_is_a_whole_number(
    refused: Callable[..., Ran], edit_with: Callable[[Path], list[Any]], tmp_path: Path, value: str
) -> None:
    inputs = {"x": X, "sigma": SIGMA, "label": (TensorProto.INT64, ["B"])}
    described = {**VP, "inputs": {"label": {"dtype": "int64"}}}
    path = save(tmp_path / "labels.onnx", IDENTITY, {}, described, inputs=inputs)
    refused([*edit_with(path), "--set", f"label={value}"], 2, f"label is {float(value):g}; wanted")


@pytest.mark.parametrize("value", ["-1", "10", "nan", "inf", "0.5"])
def test_a_label_is_one_of_those_the_model_knows(
    refused: Callable[..., Ran], edit_with: Callable[[Path], list[Any]], tmp_path: Path, value: str
) -> None:
    inputs = {"x": X, "sigma": SIGMA, "label": (TensorProto.INT64, ["B"])}
    described = {**VP, "inputs": {"label": {"dtype": "int64", "count": 10}}}
    path = save(tmp_path / "labels.onnx", IDENTITY, {}, described, inputs=inputs)
    text = f"label is {float(value):g}; wanted a whole number from 0 to 9"
    refused([*edit_with(path), "--set", f"label={value}"], 2, text)
    refused(edit_with(path), 2, "the model needs a value for its input label")


# --- models: whatever a field holds ----------------------------------------------------------------------------------

ODD_VALUES: list[Any] = [
    None,
    True,
    "x",
    "a\nb",
    "\ud800",
    -1,
    0,
    1e308,
    1e-320,
    10**30,
    10**400,
    float("nan"),
    float("inf"),
    [],
    [[[]]],
    [1, "a"],
    {},
    {"a": 1},
]
COMPLETE = metadata(
    SHAPE,
    SDES["ve"],
    defaults={"t0": 0.5, "steps": 2, "sampler": "em"},
    inputs={},
    license="free",
    source={"family": "none"},
    sigma_range=[0.02, 60.0],
)
COMPLETE["image"] |= {"multiple": 1, "dynamic": False}
SHORT_LEVELS = {"kind": "vp-discrete", "alphas_cumprod": [0.9, 0.5, 0.1]}
FIELDS = (
    [("ve", (name,)) for name in COMPLETE]
    + [("ve", (part, name)) for part in ("image", "defaults") for name in COMPLETE[part]]
    + [(kind, ("sde", name)) for kind in SDES for name in SDES[kind]]
    + [("ve", ("sde", "alphas_cumprod"))]
)


def with_field(described: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(described)
    place = changed
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("kind", "path"), FIELDS, ids=lambda value: value if isinstance(value, str) else ".".join(value)
)
def test_no_value_of_a_metadata_field_surprises_the_engine(
    run: Run, edit_with: Callable[[Path], list[Any]], out: Path, tmp_path: Path, kind: str, path: tuple[str, ...]
) -> None:
    base = {**COMPLETE, "sde": SHORT_LEVELS if kind == "vp-discrete" else SDES[kind]}
    free = {"x": (FLOAT, ["B", "C", "H", "W"]), "sigma": SIGMA}
    odd = tmp_path / "odd.onnx"
    before = files(tmp_path).keys() | {odd.name}
    surprises = []
    for value in ODD_VALUES:
        if path == ("defaults", "steps") and isinstance(value, int) and value > 1000:
            continue  # a number that only takes long is tested above
        interface = {"inputs": free, "outputs": ANY_IMAGE} if path[0] == "image" else {}
        save(odd, IDENTITY, {}, with_field(base, path, value), **interface)
        given = edit_with(odd) if path != ("defaults", "steps") else edit_with(odd)[:-2]
        for command in (["inspect", odd, "--t0", "0.5", "--steps", "2"], given):
            surprises += [f"{value!r:.40}: {command[0]}: {one}" for one in complaints(run(*command))]
            out.unlink(missing_ok=True)
            assert files(tmp_path).keys() == before
    assert surprises == []


@pytest.mark.parametrize(
    "sde",
    [
        {"kind": "edm", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 1e-300},
        {"kind": "edm", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 1e-3},
        {"kind": "edm", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 1e300},
        {"kind": "edm", "sigma_min": 1e-300, "sigma_max": 1e300, "rho": 7.0},
        {"kind": "ve", "sigma_min": 1e-320, "sigma_max": 1e308},
        {"kind": "ve", "sigma_min": 0.01, "sigma_max": 1e60},
        {"kind": "vp", "beta_min": 0.1, "beta_max": 1e308},
        {"kind": "vp", "beta_min": 0.1, "beta_max": 5000.0},
        {"kind": "vp", "beta_min": 0.0, "beta_max": 1e-300},
        {"kind": "vp-discrete", "alphas_cumprod": [0.9, 1e-320]},
        {"kind": "vp-discrete", "alphas_cumprod": [0.9, 0.0, 0.0]},
    ],
    ids=lambda sde: " ".join(f"{value}" for value in sde.values()),
)
def test_no_schedule_surprises_the_engine(
    run: Run, edit_with: Callable[[Path], list[Any]], out: Path, tmp_path: Path, sde: dict[str, Any]
) -> None:
    path = save(tmp_path / "odd.onnx", IDENTITY, {}, metadata(SHAPE, sde))
    surprises = []
    for sampler in sdedit.SAMPLERS:
        for t0 in ("0.5", "1"):
            ran = run(*edit_with(path), "--t0", t0, "--sampler", sampler)
            surprises += [f"{sampler} from {t0}: {one}" for one in complaints(ran)]
            if "nan" in ran.err:
                surprises.append(f"{sampler} from {t0}: advice that is no number: {ran.err.splitlines()[-1]}")
            out.unlink(missing_ok=True)
    assert surprises == []


def test_a_t0_without_signal_names_the_largest_that_has_some(
    refused: Callable[..., Ran], edit_with: Callable[[Path], list[Any]], tmp_path: Path
) -> None:
    sde = {"kind": "vp-discrete", "alphas_cumprod": [0.9, 0.5, 0.0, 0.0]}
    path = save(tmp_path / "zero.onnx", IDENTITY, {}, metadata(SHAPE, sde))
    ran = refused([*edit_with(path), "--t0", "0.75"], 2, "t0 is 0.75, where this model's schedule has no signal left")
    assert "hint: use t0 <= 0.5" in ran.err


MANY_RUNS = """
import contextlib, io, json, sys
from pathlib import Path
from sdedit.cli.main import main

guide, out = sys.argv[1:3]
for name in sys.argv[3:]:
    for command in (["inspect", name], ["edit", guide, "-o", out, "-m", name, "--steps", "2", "--threads", "1"]):
        told = io.StringIO()
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            code = main(command)
        print(json.dumps([Path(name).name, command[0], code, told.getvalue()]), flush=True)
        Path(out).unlink(missing_ok=True)
"""


def damaged(whole: bytes, kind: str) -> Iterator[bytes]:
    """A file cut at many places, or with a few of its bytes changed, lost or added."""
    if kind == "cut":
        yield from (whole[:size] for size in range(1, len(whole), 23))
        return
    chance = random.Random(7)
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            at = chance.randrange(len(data))
            match chance.randrange(4):
                case 0:
                    data[at] ^= 1 << chance.randrange(8)
                case 1:
                    data[at] = chance.randrange(256)
                case 2:
                    del data[at : at + chance.randrange(1, 9)]
                case 3:
                    data[at:at] = chance.randbytes(chance.randrange(1, 9))
        yield bytes(data)


@pytest.mark.parametrize("kind", ["cut", "changed"])
def test_a_damaged_model_neither_crashes_nor_hangs_the_engine(
    tmp_path: Path, guide: Path, out: Path, kind: str
) -> None:
    """In a process of its own, which an engine that crashes would take with it."""
    mean = np.zeros((3, 8, 8))
    whole = gaussian(tmp_path / "whole.onnx", SDES["ve"], mean, 0.5)[0].read_bytes()
    names = []
    for number, data in enumerate(damaged(whole, kind)):
        names.append(tmp_path / f"{number:03d}.onnx")
        names[-1].write_bytes(data)
    before = files(tmp_path).keys()
    command = [sys.executable, "-c", MANY_RUNS, *arguments(guide, out, *names)]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stdout[-300:] + ended.stderr[-1000:]
    assert ended.stderr == ""
    surprises = []
    for line in ended.stdout.splitlines():
        name, run_as, code, err = json.loads(line)
        surprises += [f"{name}: {run_as}: {one}" for one in complaints(Ran(code, "", err))]
    assert surprises == []
    assert len(ended.stdout.splitlines()) == 2 * len(names)
    assert files(tmp_path).keys() == before


# --- networks that go wrong while they run ---------------------------------------------------------------------------


def breaks_below(path: Path, level: float, factor: float) -> Path:
    """D = x · where(σ < level, factor, 1)."""
    nodes = [
        helper.make_node("Reshape", ["sigma", "column"], ["s"]),
        helper.make_node("Less", ["s", "level"], ["low"]),
        helper.make_node("Where", ["low", "factor", "one"], ["f"]),
        helper.make_node("Mul", ["x", "f"], ["denoised"]),
    ]
    weights = {
        "column": np.array([-1, 1, 1, 1], np.int64),
        "level": np.float32(level),
        "factor": np.float32(factor),
        "one": np.float32(1),
    }
    return save(path, nodes, weights, VP)


@pytest.mark.parametrize("factor", [np.nan, np.inf, -np.inf])
def test_a_network_that_breaks_at_step_3_is_named_with_the_step(
    refused: Callable[..., Ran], edit_with: Callable[[Path], list[Any]], tmp_path: Path, factor: float
) -> None:
    sigma = sdedit.plan(sdedit.VP(0.1, 20.0), t0=0.5, steps=5).column("sigma")
    path = breaks_below(tmp_path / "breaks.onnx", float((sigma[1] + sigma[2]) / 2), factor)
    given = [*edit_with(path)[:-2], "--t0", "0.5", "--steps", "5"]
    refused(given, 1, "the network returned 768 NaN or Inf values at step 3 of 5 (repeat 0")
    refused([*given, "-n", "3"], 1, "NaN or Inf values at step 3 of 5")


@pytest.mark.parametrize("factor", [1e30, 1e37, 2e38, -2e38])
def test_a_network_that_explodes_is_not_said_to_return_what_it_did_not(
    run: Run, edit_with: Callable[[Path], list[Any]], tmp_path: Path, factor: float
) -> None:
    ran = run(*edit_with(breaks_below(tmp_path / "explodes.onnx", 1e9, factor)))
    assert complaints(ran) == []
    assert "returned 0 NaN" not in ran.err


SHAPES_AT_RUN_TIME: dict[str, tuple[Any, list[int] | None]] = {
    "another frame": (node("Reshape", "x to"), [-1, 3, 8, 32]),
    "a frame that cannot be": (node("Reshape", "x to"), [-1, 3, 7, 32]),
    "smaller": (node("MaxPool", "x", kernel_shape=[2, 2], strides=[2, 2]), None),
    "more channels": (node("Concat", "x x", axis=1), None),
    "more pictures": (node("Concat", "x x", axis=0), None),
    "an index outside": (node("Gather", "x to", axis=1), [0, 1, 99]),
}


@pytest.mark.parametrize("name", SHAPES_AT_RUN_TIME)
def test_a_network_that_returns_another_shape_is_an_error(
    refused: Callable[..., Ran], edit_with: Callable[[Path], list[Any]], tmp_path: Path, name: str
) -> None:
    last, to = SHAPES_AT_RUN_TIME[name]
    weights = {} if to is None else {"to": np.array(to, np.int64)}
    path = save(tmp_path / "shapes.onnx", [last], weights, VP, outputs=ANY_IMAGE)
    refused(edit_with(path), 1, "ONNX Runtime failed: ")


# --- where results go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["OUT", "OUT.jpg", "OUT.PNG", "OUT.npz", ".png", "..", "results/"])
def test_an_output_is_png_or_npy(refused: Callable[..., Ran], edit: list[Any], out: Path, name: str) -> None:
    refused([*edit, "-o", f"{out.parent}/{name}"], 2, "outputs are .png or .npy")


@pytest.mark.parametrize("name", ["", ".", "/", ".."])
def test_an_output_has_a_name(refused: Callable[..., Ran], edit: list[Any], name: str) -> None:
    refused([*edit, "-o", name], 2, "outputs are .png or .npy")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("missing/OUT.png", "no such folder"),
        ("new\nline/OUT.png", "no such folder"),
        ("guide.png/OUT.png", "no such folder"),
        (f"{'n' * 300}/OUT.png", "File name too long"),
        (f"{'n' * 300}.png", "File name too long"),
        (f"{'n' * 300}.npy", "File name too long"),
    ],
    ids=["missing", "two lines", "inside a file", "long folder", "long png", "long npy"],
)
def test_an_output_has_a_folder_and_a_name_that_can_be(
    refused: Callable[..., Ran], edit: list[Any], tmp_path: Path, name: str, text: str
) -> None:
    refused([*edit, "-o", tmp_path / name], 1, text)


@pytest.mark.parametrize("size", [240, 255])
def test_a_name_as_long_as_the_system_allows_is_written(run: Run, edit: list[Any], out: Path, size: int) -> None:
    name = f"{'n' * (size - 4)}.png"
    ran = run(*edit, "-o", out.with_name(name))
    assert complaints(ran) == []
    assert ran.code == 0
    assert files(out.parent).keys() == {name}


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_an_output_is_not_a_folder(refused: Callable[..., Ran], edit: list[Any], out: Path, force: list[str]) -> None:
    out.mkdir()
    refused([*edit, *force], 1, f"{out}: is a folder")


def test_an_existing_output_is_kept(refused: Callable[..., Ran], edit: list[Any], out: Path) -> None:
    out.write_text("precious")
    refused(edit, 1, f"{out}: exists already")
    out.with_suffix(".npy").write_text("precious")
    refused([*edit, "-o", out.with_suffix(".npy")], 1, "OUT.npy: exists already")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_one_existing_output_of_several_is_kept(
    refused: Callable[..., Ran], edit: list[Any], out: Path, number: int
) -> None:
    out.with_name(f"OUT-00{number}.png").write_text("precious")
    refused([*edit, "-n", "3"], 1, f"OUT-00{number}.png: exists already")


def test_a_link_that_leads_nowhere_is_kept(refused: Callable[..., Ran], edit: list[Any], out: Path) -> None:
    out.symlink_to("elsewhere.png")
    refused(edit, 1, f"{out}: exists already")


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("how", ["the same", "another spelling", "symlink", "hard link", "numbered"])
def test_an_output_never_replaces_a_guide(
    refused: Callable[..., Ran], model: Path, guide: Path, tmp_path: Path, how: str, force: list[str]
) -> None:
    target, more = guide, []
    if how == "another spelling":
        target = tmp_path / ".." / tmp_path.name / guide.name
    elif how == "symlink":
        target = tmp_path / "link.png"
        target.symlink_to(guide)
    elif how == "hard link":
        target = tmp_path / "link.png"
        target.hardlink_to(guide)
    elif how == "numbered":
        guide = guide.rename(tmp_path / "guide-001.png")
        more = ["-n", "2"]
    given = ["edit", guide, "-o", target, "-m", model, "--steps", "1", *more, *force]
    refused(given, 1, "would overwrite an input")


def test_an_output_never_replaces_a_mask(
    refused: Callable[..., Ran], edit: list[Any], guide: Path, tmp_path: Path
) -> None:
    mask = Path(shutil.copy(guide, tmp_path / "mask.png"))
    refused([*edit, "--mask", mask, "-o", mask, "--force"], 1, f"{mask}: would overwrite an input")


@not_root
def test_a_folder_that_may_not_be_written_is_refused_before_the_work(
    refused: Callable[..., Ran], edit: list[Any], out: Path
) -> None:
    out.parent.chmod(0o500)
    try:
        refused(edit, 1, f"{out.parent}: not writable")
    finally:
        out.parent.chmod(0o700)


def test_a_folder_said_to_be_read_only_is_refused_before_the_work(
    refused: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, edit: list[Any], out: Path
) -> None:
    monkeypatch.setattr(os, "access", lambda *given, **options: False)
    refused(edit, 1, f"{out.parent}: not writable")


def test_two_guides_of_one_name_give_two_results(run: Run, edit: list[Any], guide: Path, out: Path) -> None:
    other = guide.parent / "other" / guide.name
    other.parent.mkdir()
    Image.new("RGB", (16, 16), "red").save(other)
    ran = run(*edit[:2], other, *edit[2:])
    assert complaints(ran) == []
    assert ran.code == 0
    assert files(out.parent).keys() == {"OUT-000.png", "OUT-001.png"}


FAILURES: dict[str, tuple[BaseException, int, str]] = {
    "disk full": (OSError(28, "No space left on device"), 1, "cannot be written: No space left on device"),
    "an error without a number": (OSError("encoder error -2"), 1, "cannot be written: encoder error -2"),
    "no memory": (MemoryError(), 1, "out of memory"),
    "interrupted": (KeyboardInterrupt(), 130, "interrupted"),
}


def fails_once(real: Callable[..., Any], at: int, error: BaseException) -> Callable[..., Any]:
    """`real`, but call number `at` raises."""
    calls = 0

    def call(*given: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return real(*given, **options)

    return call


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("where", ["encoding", "renaming"])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_of_several_outputs_all_are_written_or_none(
    refused: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
    edit: list[Any],
    out: Path,
    at: int,
    existing: bool,
    where: str,
    name: str,
) -> None:
    error, code, text = FAILURES[name]
    if existing:
        for number in range(3):
            out.with_name(f"OUT-00{number}.png").write_text(f"precious {number}")
    if where == "encoding":
        monkeypatch.setattr(output, "to_image", fails_once(output.to_image, at, error))
    else:
        monkeypatch.setattr(os, "replace", fails_once(os.replace, at, error))
    refused([*edit, "-n", "3", "--force"], code, text)


@posix
@pytest.mark.parametrize("name", ["OUT.png", "OUT.npy"])
def test_a_disk_that_fills_up_leaves_no_part_of_a_file(tmp_path: Path, edit: list[Any], out: Path, name: str) -> None:
    import resource

    before = files(tmp_path)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))  # noqa: E731
    ran = in_process_of_its_own([*edit, "-o", out.with_name(name)], preexec_fn=limit)
    assert complaints(ran) == []
    assert ran.code == 1
    assert f"{name}: cannot be written: " in ran.err
    assert "None" not in ran.err
    assert files(tmp_path) == before


# --- replay ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(run: Run, edit: list[Any], tmp_path: Path) -> Path:
    """A result with its record."""
    path = tmp_path / "made.png"
    assert run(*edit, "-o", path).code == 0
    return path


@pytest.fixture
def replay(model: Path, guide: Path, out: Path) -> Callable[[Path], list[Any]]:
    return lambda path: ["edit", "--replay", path, guide, "-o", out, "-m", model]


def record_of(path: Path) -> dict[str, Any]:
    with Image.open(path) as opened:
        return dict(json.loads(opened.info["sdedit"]))


def with_record(path: Path, text: str) -> Path:
    with Image.open(path) as opened:
        opened.load()
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("sdedit", text)
        opened.save(path.with_name("changed.png"), pnginfo=chunks)
    return path.with_name("changed.png")


def test_an_untouched_record_replays(run: Run, replay: Callable[[Path], list[Any]], made: Path, out: Path) -> None:
    ran = run(*replay(made))
    assert complaints(ran) == []
    assert ran.code == 0
    assert out.read_bytes() == made.read_bytes()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("guide.png", "carries no record"),
        ("picture.jpg", "carries no record"),
        ("nothing.png", "no such file"),
        ("model.onnx", "not a picture"),
        ("out", "not a picture"),
        ("cut.png", "not a picture"),
        ("empty.png", "not a picture"),
        ("bomb.png", "not a picture"),
        (f"{'n' * 300}.png", "File name too long"),
    ],
    ids=["no record", "jpeg", "missing", "model", "folder", "cut", "empty", "bomb", "long name"],
)
def test_what_carries_no_record_is_not_replayed(
    refused: Callable[..., Ran],
    replay: Callable[[Path], list[Any]],
    made: Path,
    tmp_path: Path,
    name: str,
    text: str,
) -> None:
    (tmp_path / "picture.jpg").write_bytes(JPEG)
    (tmp_path / "cut.png").write_bytes(made.read_bytes()[:60])
    (tmp_path / "empty.png").touch()
    (tmp_path / "bomb.png").write_bytes(png(100_000, 100_000, b""))
    refused(replay(tmp_path / name), 1, f"{tmp_path / name}: ", text)
    if name.endswith(".png"):
        refused(["inspect", tmp_path / name], 1, f"{tmp_path / name}: ", text)


def test_only_a_model_has_a_step_table(refused: Callable[..., Ran], made: Path) -> None:
    refused(["inspect", made, "--steps", "2"], 2, f"{made}: --steps asks for a step table, and this is no model")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "1", '"x"', "\x00", DEEP_LIST, DEEP_OBJECT], ids=lambda text: repr(text[:10])
)
def test_a_record_that_is_no_json_object_is_no_record(
    refused: Callable[..., Ran], replay: Callable[[Path], list[Any]], made: Path, text: str
) -> None:
    changed = with_record(made, text)
    refused(replay(changed), 1, f"{changed}: carries no record")
    refused(["inspect", changed], 1, f"{changed}: carries no record")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": 2}, "its record has format 2; wanted 1"),
        ({"format": "1"}, "its record has format '1'; wanted 1"),
        ({"noise": "white"}, "was made with noise 'white'; this engine makes philox-bm24-v1"),
        ({"options": None}, "its record is damaged"),
        ({"options": {}}, "its record is damaged"),
        ({"options": []}, "its record is damaged"),
        ({"options": {"samples": 3}}, "its record is damaged"),
        ({"backend": None}, "its record is damaged"),
        ({"backend": {"name": "ort-cpu"}}, "its record is damaged"),
        ({"artifact": "x"}, "its record is damaged"),
        ({"guide": {}}, "its record is damaged"),
        ({"mask": "x"}, "its record is damaged"),
        ({"versions": 1}, "its record is damaged"),
        ({"guide": {"sha256": "0" * 64}}, "the guide is not the one recorded: the record wants SHA-256 000000000000…"),
        (
            {"mask": {"sha256": "0" * 64}},
            "the mask is not the one recorded",
        ),
        ({"artifact": {"name": "x", "sha256": "0" * 64}}, "the model is not the one recorded"),
    ],
    ids=lambda value: json.dumps(value)[:30] if isinstance(value, dict) else "",
)
def test_a_record_that_does_not_fit_is_not_replayed(
    refused: Callable[..., Ran], replay: Callable[[Path], list[Any]], made: Path, change: dict[str, Any], text: str
) -> None:
    refused(replay(with_record(made, json.dumps(record_of(made) | change))), 1, text)


@pytest.mark.parametrize("name", ["t0", "steps", "sampler", "eta", "repeats", "fit", "batch", "seed", "conditions"])
def test_a_record_without_one_of_its_options_is_damaged(
    refused: Callable[..., Ran], replay: Callable[[Path], list[Any]], made: Path, name: str
) -> None:
    record = record_of(made)
    del record["options"][name]
    refused(replay(with_record(made, json.dumps(record))), 1, "its record is damaged")


@pytest.mark.parametrize(
    "path",
    [("format",), ("noise",), ("options",), ("artifact",), ("guide",), ("mask",), ("backend",), ("versions",)]
    + [("options", name) for name in ("t0", "steps", "sampler", "eta", "repeats", "fit", "batch", "seed")]
    + [("options", name) for name in ("conditions", "samples", "bogus")]
    + [("backend", "name"), ("backend", "threads"), ("artifact", "sha256"), ("guide", "sha256")],
    ids=".".join,
)
def test_no_value_of_a_record_surprises_the_engine(
    run: Run, replay: Callable[[Path], list[Any]], made: Path, out: Path, tmp_path: Path, path: tuple[str, ...]
) -> None:
    record = record_of(made)
    if path[-1] == "eta":
        record["options"] |= {"sampler": "ddim"}
    before = files(tmp_path).keys() | {"changed.png"}
    surprises = []
    for value in [3, 1.5, *ODD_VALUES]:
        if path[-1] in ("steps", "repeats", "batch", "samples") and isinstance(value, int) and value > 1000:
            continue  # these only take long
        ran = run(*replay(with_record(made, json.dumps(with_field(record, path, value)))))
        surprises += [f"{value!r:.40}: {one}" for one in complaints(ran)]
        out.unlink(missing_ok=True)
        assert files(tmp_path).keys() == before
    assert surprises == []


@pytest.mark.parametrize(
    ("more", "code", "text"),
    [
        (["--t0", "0.5"], 2, "--replay takes its options from the record, not from --t0"),
        (["--steps", "2"], 2, "--replay takes its options from the record, not from --steps"),
        (["--seed", "0"], 2, "--replay takes its options from the record, not from --seed"),
        (["-n", "2"], 2, "--replay takes its options from the record, not from --samples"),
        (["--backend", "auto"], 2, "--replay takes its options from the record, not from --backend"),
        (["--set", "a=1"], 2, "--replay takes its options from the record, not from --set"),
        (["another.png"], 2, "--replay makes one PNG from one guide"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_replay_changes_nothing(
    refused: Callable[..., Ran], replay: Callable[[Path], list[Any]], made: Path, more: list[str], code: int, text: str
) -> None:
    given = replay(made)
    refused([*given[:4], *more, *given[4:]], code, text)


def test_a_replay_makes_a_png(refused: Callable[..., Ran], replay: Callable[[Path], list[Any]], made: Path) -> None:
    refused([*replay(made), "-o", made.with_suffix(".npy")], 2, "--replay makes one PNG from one guide")


def test_a_replay_does_not_replace_its_record(
    refused: Callable[..., Ran], replay: Callable[[Path], list[Any]], made: Path
) -> None:
    refused([*replay(made), "-o", made, "--force"], 1, f"{made}: would overwrite an input")


def test_a_replay_wants_the_same_files(
    refused: Callable[..., Ran], replay: Callable[[Path], list[Any]], made: Path, guide: Path, tmp_path: Path
) -> None:
    ran = refused([*replay(made), "--mask", guide], 1, "the mask is not the one recorded", "wants none")
    assert "hint: leave --mask out" in ran.err
    other = identity(tmp_path / "other.onnx", SDES["vp"])
    refused([*replay(made)[:-1], other], 1, "the model is not the one recorded")
    Image.new("RGB", (16, 16), "red").save(guide)
    refused(replay(made), 1, "the guide is not the one recorded")
    guide.unlink()
    refused(replay(made), 1, f"{guide}: no such file")


# --- in a process of its own: signals, pipes, names ------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("SDEDIT_DEBUG", "PYTHONUNBUFFERED", "PYTHONIOENCODING")}
    return kept | more


def command_line(given: list[Any]) -> list[bytes]:
    words = [sys.executable, "-m", "sdedit.cli.main", *given]
    return [word if isinstance(word, bytes) else os.fsencode(str(word)) for word in words]


def in_process_of_its_own(given: list[Any], *, stdout: Any = subprocess.PIPE, env: Any = None, **options: Any) -> Ran:
    ended = subprocess.run(
        command_line(given),
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=env or environment(),
        timeout=60,
        check=False,
        **options,
    )
    return Ran(ended.returncode, os.fsdecode(ended.stdout or b""), ended.stderr.decode("utf-8", "replace"))


@posix
@pytest.mark.parametrize(
    ("name", "more"),
    [("SIGINT", []), ("SIGINT", ["-n", "2"]), ("SIGINT", ["--json", "--force"]), ("SIGTERM", []), ("SIGHUP", [])],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_an_edit_that_is_stopped_leaves_nothing(
    tmp_path: Path, edit: list[Any], out: Path, name: str, more: list[str]
) -> None:
    if "--force" in more:
        out.write_text("precious")
    before = files(tmp_path)
    given = [*edit, "--steps", "5000", "--repeats", "10000", *more]
    with subprocess.Popen(
        command_line(given), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(b"backend: ")  # it has begun
        process.send_signal(signal.Signals[name])
        try:
            told, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert told == b""
    assert files(tmp_path) == before
    if name == "SIGINT":
        assert process.returncode in (130, -2)  # -2, CPython's own end, where a dataclass was just being made
        assert complaints(Ran(130, "", said.decode())) == []
        assert "error: interrupted" in said.decode()
    else:
        number = signal.Signals[name].value
        assert process.returncode in (-number, 128 + number)
        assert b"Traceback" not in said


STOPPED_WHILE_WRITING = """
import os, signal, sys
from sdedit import output
from sdedit.cli.main import main

real = output.to_image

def to_image(pixels):
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    return real(pixels)

output.to_image = to_image
sys.exit(main(sys.argv[2:]))
"""


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_edit_that_is_stopped_while_it_writes_leaves_nothing(tmp_path: Path, edit: list[Any], name: str) -> None:
    before = files(tmp_path)
    command = [sys.executable, "-c", STOPPED_WHILE_WRITING, name, *arguments(*edit, "-n", "2")]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    number = signal.Signals[name].value
    assert ended.returncode in ([130] if name == "SIGINT" else [-number, 128 + number])
    assert "Traceback" not in ended.stderr
    assert files(tmp_path) == before


@posix
@pytest.mark.parametrize("given", [["inspect"], ["inspect", "--json"], ["edit"]], ids=" ".join)
def test_a_reader_that_went_away_is_no_error(edit: list[Any], model: Path, out: Path, given: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ran = in_process_of_its_own(edit if given == ["edit"] else [*given, model], stdout=writing)
    finally:
        os.close(writing)
    assert complaints(ran) == []
    assert ran.code == 0
    assert given != ["edit"] or out.exists()


def test_a_reader_that_leaves_early_is_no_error(model: Path) -> None:
    with subprocess.Popen(
        command_line(["inspect", model, "--steps", "5000"]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(os.fsencode(str(model)))
        process.stdout.close()
        said = process.stderr.read().decode()
    assert said == ""
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_an_answer_that_cannot_be_written_is_an_error(model: Path, unbuffered: str) -> None:
    with Path("/dev/full").open("wb") as full:
        ran = in_process_of_its_own(["inspect", model], stdout=full, env=environment(PYTHONUNBUFFERED=unbuffered))
    assert complaints(ran) == []
    assert ran.code == 1
    assert "No space left on device" in ran.err


@posix
@pytest.mark.parametrize("stream", [0, 1, 2], ids=["stdin", "stdout", "stderr"])
def test_a_stream_that_is_closed_does_not_matter(edit: list[Any], out: Path, stream: int) -> None:
    ran = in_process_of_its_own(edit, preexec_fn=lambda: os.close(stream))
    assert ran.code == 0
    assert complaints(ran) == []
    assert ran.out == ("" if stream == 1 else f"{out}\n")
    assert Image.open(out).size == (16, 16)


def test_the_traceback_is_for_those_who_ask(tmp_path: Path, edit: list[Any]) -> None:
    before = files(tmp_path)
    given = ["edit", tmp_path / "missing.png", *edit[2:]]
    ran = in_process_of_its_own(given, env=environment(SDEDIT_DEBUG="1"))
    assert ran.code != 0
    assert "Traceback (most recent call last)" in ran.err
    assert f"ImageError: {tmp_path / 'missing.png'}: no such file" in ran.err
    assert files(tmp_path) == before
    for value in ("", "0"):
        assert complaints(in_process_of_its_own(given, env=environment(SDEDIT_DEBUG=value))) == []


NAMES = {"plain": b"plain", "spaces": b" a  b ", "unicode": "Gemälde 画 🎨".encode(), "not utf-8": b"caf\xe9 \xff"}


@posix
@pytest.mark.parametrize("coding", ["utf-8:strict", "ascii:strict"])
@pytest.mark.parametrize("name", NAMES)
def test_any_name_will_do(tmp_path: Path, model: Path, guide: Path, name: str, coding: str) -> None:
    """For guide, mask, result and, where it is text, model; whatever stdout can show."""
    there = os.fsencode(str(tmp_path)) + b"/" + NAMES[name]
    stem = there + b"/" + NAMES[name]
    model_name = os.fsencode(str(model)) if name == "not utf-8" else stem + b".onnx"
    try:
        os.mkdir(there)
        shutil.copy(guide, stem + b".png")
        shutil.copy(guide, stem + b" mask.png")
        if name != "not utf-8":
            shutil.copy(model, model_name)
    except OSError:
        pytest.skip("the file system has no such names")
    given = ["edit", stem + b".png", "--mask", stem + b" mask.png", "-m", model_name, "-o", stem + b" out.png"]
    ran = in_process_of_its_own([*given, "--steps", "1"], env=environment(PYTHONIOENCODING=coding))
    assert complaints(ran) == []
    assert ran.code == 0
    assert os.path.exists(stem + b" out.png")
    assert len(ran.out.splitlines()) == 1
    missing = ["inspect", stem + b" missing.onnx"]
    ran = in_process_of_its_own(missing, env=environment(PYTHONIOENCODING=coding))
    assert complaints(ran) == []
    assert ran.code == 1


@posix
def test_a_model_whose_name_is_no_text_runs_or_is_refused(edit: list[Any], model: Path) -> None:
    """ONNX Runtime takes names as text."""
    named = os.fsencode(str(model.parent)) + b"/caf\xe9.onnx"
    try:
        shutil.copy(model, named)
    except OSError:
        pytest.skip("the file system has no such names")
    ran = in_process_of_its_own([*edit, "-m", named])
    assert complaints(ran) == []
    assert ran.code in (0, 1)
    assert "incompatible constructor arguments" not in ran.err


@pytest.mark.parametrize("coding", ["utf-8:strict", "ascii:strict"])
@pytest.mark.parametrize("name", ["Gemälde", "\ud800"], ids=["umlaut", "surrogate"])
def test_metadata_that_stdout_cannot_show_is_shown_some_other_way(tmp_path: Path, name: str, coding: str) -> None:
    path = save(tmp_path / "named.onnx", IDENTITY, {}, {**VP, "name": name})
    ran = in_process_of_its_own(["inspect", path], env=environment(PYTHONIOENCODING=coding))
    assert complaints(ran) == []
    assert ran.code == 0
