"""Pictures in and out: files and arrays to model tensors, masks, and pasting the result back.

Pixels are (H, W, C) uint8 with C the model's 3 (RGB) or 1 (grey); model tensors are (C, H, W) float32
in [-1, 1]; masks are (H, W) float32 in [0, 1], 1 = repaint.
"""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.Image import Resampling

from sdedit.errors import ImageError, OptionError

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom excluded

FITS = ("crop", "pad", "stretch", "exact")
MAX_PIXELS = 100_000_000
MOST_PROFILE = 2**20  # bytes of an ICC profile: with more, Pillow opens no PNG
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")  # EPS, say, would run an interpreter
FORMATS_HINT = "PNG, JPEG, WebP, TIFF, BMP, GIF and PPM are read"


@dataclass(frozen=True)
class Encoded:
    """A picture file's bytes where they have a name."""

    data: bytes
    label: str  # what messages call it

    @property
    def sha256(self) -> str:
        """Of the bytes, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as stored: not turned upright. Raises ImageError."""
        with _opened(self) as opened:
            return opened.size


Source = str | Path | bytes | Encoded | Image.Image | Pixels


@dataclass(frozen=True)
class Picture:
    """A guide or mask as pixels, with what its record and messages need."""

    pixels: Pixels
    label: str
    sha256: str | None  # of the file; None where there was none
    notes: tuple[str, ...] = ()  # what was converted on the way, for the user
    profile: bytes | None = None  # the ICC profile of its colours, which an edit's are of too

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        return self.pixels.shape[1], self.pixels.shape[0]


@dataclass(frozen=True)
class Placement:
    """Which window of the guide fills which part of the model's frame."""

    window: Box  # in the guide
    part: Box  # in the frame
    frame: tuple[int, int]  # (width, height)

    @property
    def enlarges(self) -> bool:
        """Whether the guide has fewer pixels than the model wants."""
        left, top, right, bottom = self.window
        return right - left < self.part[2] - self.part[0] or bottom - top < self.part[3] - self.part[1]

    def notes(self, guide: Picture) -> tuple[str, ...]:
        """What of it the user should know."""
        sizes = ["{}x{}".format(*size) for size in (guide.size, self.frame)]
        said = f"{guide.label}: {sizes[0]} is smaller than the model's {sizes[1]}: enlarged"
        return (said,) if self.enlarges else ()


def read(source: Source, channels: int, role: str = "guide") -> Picture:
    """A path, a file's bytes, a PIL image or a uint8 array (H, W, 3) or (H, W), as `channels` channels.

    Raises ImageError.
    """
    if isinstance(source, str | Path):
        source = _encoded(Path(source))
    if isinstance(source, bytes):
        source = Encoded(source, f"the {role}")
    if isinstance(source, Encoded):
        return _decode(source, channels, role)
    if isinstance(source, Image.Image):
        with _decoding(f"the {role}", hint="pass a picture whose pixels can be read"):
            return _to_picture(source, channels, f"the {role}", role, None)
    array = np.asarray(source)
    if (
        array.dtype != np.uint8
        or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4)))
        or 0 in array.shape
    ):
        raise ImageError(
            f"the {role} is an array of {array.dtype} {array.shape}; wanted uint8 (height, width, 3)",
            hint="pass a path, a PIL image or a uint8 RGB array",
        )
    if array.shape[2:] == (1,):
        array = array[..., 0]
    if channels == 3 and array.shape[2:] == (3,):
        return Picture(array.copy(), f"the {role}", None)
    return read(Image.fromarray(array), channels, role)


def read_file(path: str | Path) -> Encoded:
    """A picture's file, for `read`, which decodes it: only that it begins as a picture is looked at here.

    Raises ImageError.
    """
    encoded = _encoded(Path(path))
    with _opened(encoded):
        return encoded


def _encoded(path: Path) -> Encoded:
    try:
        return Encoded(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file", hint="check the path") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: is a folder, not a picture", hint="name the picture in it") from None
    except OSError as error:
        raise ImageError(
            f"{path}: cannot be read: {error.strerror or error}", hint="check the file's permissions"
        ) from error


def _decode(encoded: Encoded, channels: int, role: str) -> Picture:
    with _opened(encoded) as opened:
        return _to_picture(opened, channels, encoded.label, role, encoded.sha256)


@contextmanager
def _opened(encoded: Encoded) -> Iterator[Image.Image]:
    """The picture, to decode it in the block. What is wrong with it, there too, raises ImageError."""
    label = encoded.label
    if not encoded.data:
        raise ImageError(f"{label}: is empty (0 bytes)", hint="copy or save the picture again")
    too_large = ImageError(f"{label}: more than {MAX_PIXELS // 10**6} megapixels", hint="scale the picture down first")
    with _decoding(label, hint="the file is damaged: save it again"):
        try:
            with Image.open(io.BytesIO(encoded.data), formats=FORMATS) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise too_large
                yield opened
        except Image.DecompressionBombError:
            raise too_large from None
        except UnidentifiedImageError:
            raise ImageError(f"{label}: not a picture, or of an unknown format", hint=FORMATS_HINT) from None


@contextmanager
def _decoding(label: str, *, hint: str) -> Iterator[None]:
    """What goes wrong inside is an ImageError. hint: for what Pillow says itself."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(f"{label}: does not fit into memory", hint="scale the picture down first") from None
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise ImageError(f"{label}: cannot be decoded: {error}", hint=hint) from error


def _to_picture(image: Image.Image, channels: int, label: str, role: str, sha256: str | None) -> Picture:
    """Any Pillow image as (H, W, channels) uint8, upright, opaque."""
    if channels not in (1, 3):
        raise ImageError(
            f"the model has {channels} channels; pictures have 3 (RGB) or 1 (grey)",
            hint="use sdedit.denoise with arrays",
        )
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO: a photograph with previews of itself behind it
        raise ImageError(f"{label}: has {frames} frames (animated, or several pages)", hint="save the one you mean")
    if image.mode in ("I", "F"):
        raise ImageError(f"{label}: has 32-bit pixels (mode {image.mode})", hint="save it with 8 or 16 bits a channel")
    if 0 in image.size:
        raise ImageError(f"{label}: has no pixels ({image.width}x{image.height})", hint="pass a picture that has some")
    notes: list[str] = []
    grey, profile = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I"), image.info.get("icc_profile")
    if not image.mode.startswith("I") and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        notes.append(f"{label}: 16 bits reduced to 8")  # by Pillow, which keeps the upper ones
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF raises many kinds
        notes.append(f"{label}: its orientation cannot be read, taken as upright")
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
        notes.append(f"{label}: 16 bits reduced to 8")
    if image.mode in ("La", "LAB"):  # which Pillow does not make everything of
        image = image.convert({"La": "LA", "LAB": "RGB"}[image.mode])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if np.asarray(image)[..., 3].min() < 255:
            if role == "mask":
                raise ImageError(f"{label}: has transparent parts", hint="fill them: white repaints, black keeps")
            notes.append(f"{label}: transparent parts put on white")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "CMYK":
        notes.append(f"{label}: CMYK converted to RGB without a colour profile")
    if channels == 1 and not grey and role != "mask":
        notes.append(f"{label}: made grey, as the model's pictures are")
    mode, space = ("RGB", b"RGB ") if channels == 3 else ("L", b"GRAY")
    if not isinstance(profile, bytes) or profile[16:20] != space:  # the colours that it is for
        profile = None
    elif len(profile) > MOST_PROFILE:
        profile = None
        notes.append(f"{label}: its colour profile is too large to be kept")
    pixels = np.asarray(image.convert(mode)).reshape(image.height, image.width, channels)
    return Picture(pixels, label, sha256, tuple(notes), profile)


def checked_fit(fit: str) -> str:
    """`fit`, if it is one of FITS. Raises OptionError."""
    if fit not in FITS:
        raise OptionError(f"unknown fit {fit!r}", hint=f"choose one of {', '.join(FITS)}")
    return fit


def place(guide: Picture, frame: tuple[int, int], fit: str, mask: Floats | None = None) -> Placement:
    """Where `guide` goes in a frame (width, height). With a mask, a crop is shifted to cover what it repaints."""
    width, height = guide.size
    whole, full = (0, 0, width, height), (0, 0, *frame)
    if checked_fit(fit) == "exact" and guide.size != frame:
        raise ImageError(
            f"{guide.label}: is {width}x{height}; the model's frame is {frame[0]}x{frame[1]}",
            hint="--fit crop, pad or stretch resizes it",
        )
    if fit == "pad":
        scale = min(frame[0] / width, frame[1] / height)
        inner = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = (frame[0] - inner[0]) // 2, (frame[1] - inner[1]) // 2
        return Placement(whole, (left, top, left + inner[0], top + inner[1]), frame)
    if fit == "crop":
        return Placement(_crop_window(guide, frame, mask), full, frame)
    return Placement(whole, full, frame)


def _crop_window(guide: Picture, frame: tuple[int, int], mask: Floats | None) -> Box:
    """The largest window of the frame's aspect: centred, or shifted over the mask's bounding box."""
    width, height = guide.size
    wide = min(width, max(1, round(height * frame[0] / frame[1])))
    high = min(height, max(1, round(width * frame[1] / frame[0])))
    left, top = (width - wide) // 2, (height - high) // 2
    if mask is not None and mask.any():
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        box = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
        if box[2] - box[0] > wide or box[3] - box[1] > high:
            raise ImageError(
                f"{guide.label}: the mask spans {box[2] - box[0]}x{box[3] - box[1]} pixels; "
                f"the largest crop window of the model's aspect is {wide}x{high}",
                hint="--fit pad or stretch uses the whole picture",
            )
        left = min(max(left, box[2] - wide), box[0])
        top = min(max(top, box[3] - high), box[1])
    return left, top, left + wide, top + high


def to_model(guide: Picture, placement: Placement) -> Floats:
    """The guide in the model's frame: (C, H, W) float32 in [-1, 1]. Padding repeats the edge."""
    window, part, (width, height) = placement.window, placement.part, placement.frame
    pixels = guide.pixels[window[1] : window[3], window[0] : window[2]]
    size = part[2] - part[0], part[3] - part[1]
    if size != (window[2] - window[0], window[3] - window[1]):
        pixels = np.asarray(_resize(to_image(pixels), size)).reshape(size[1], size[0], -1)
    if size != placement.frame:
        pixels = np.pad(pixels, ((part[1], height - part[3]), (part[0], width - part[2]), (0, 0)), mode="edge")
    return np.ascontiguousarray(np.moveaxis(pixels, 2, 0), np.float32) / np.float32(127.5) - np.float32(1)


def mask_to_model(mask: Floats, placement: Placement) -> Floats:
    """The mask in the model's frame, (1, H, W): box filter down, bilinear up; padding is kept (0).

    Whatever is repainted, be it one pixel, is above 0 there.
    """
    left, top, right, bottom = placement.part
    window = placement.window
    mask = mask[window[1] : window[3], window[0] : window[2]]
    mask = _mask_resized(_mask_resized(mask, right - left, axis=1), bottom - top, axis=0)
    framed = np.zeros((1, placement.frame[1], placement.frame[0]), np.float32)
    framed[0, top:bottom, left:right] = np.clip(mask, 0, 1)
    return framed


def _mask_resized(mask: Floats, size: int, axis: int) -> Floats:
    """Along one axis. Down, each pixel counts where its centre falls, to the left of a boundary that it falls on.

    Pillow's box filter has the same rule, but for rounding, by which a pixel on a boundary may count nowhere.
    """
    before = mask.shape[axis]
    if size > before:
        wider = (size, mask.shape[0]) if axis else (mask.shape[1], size)
        return np.asarray(Image.fromarray(np.ascontiguousarray(mask)).resize(wider, Resampling.BILINEAR))
    first = (2 * np.arange(size) * before - size) // (2 * size) + 1  # pixel of each: its centre is beyond the boundary
    counts = np.diff(first, append=before).reshape((-1, 1) if axis == 0 else (1, -1))
    return np.asarray(np.add.reduceat(mask, first, axis=axis, dtype=np.float64) / counts, np.float32)


def read_mask(source: Source, guide: Picture) -> tuple[Floats, Picture]:
    """A mask of the guide's size, (H, W) float32 in [0, 1], white = repaint. Raises ImageError."""
    picture = read(source, 1, "mask")
    if picture.size != guide.size:
        named = "the guide" if guide.label == "the guide" else f"the guide {guide.label}"
        raise ImageError(
            f"{picture.label}: is {picture.size[0]}x{picture.size[1]}; {named} is {guide.size[0]}x{guide.size[1]}",
            hint="a mask has the size of its guide: white repaints, black keeps",
        )
    return picture.pixels[..., 0].astype(np.float32) / np.float32(255), picture


def to_pixels(x: NDArray[Any]) -> Pixels:
    """(C, H, W) in [-1, 1] -> (H, W, C) uint8, clipped."""
    return np.moveaxis(np.rint(np.clip((x + 1) * 127.5, 0, 255)).astype(np.uint8), 0, 2)


def paste(guide: Picture, mask: Floats, x: NDArray[Any], placement: Placement) -> Pixels:
    """guide + Ω (resized x - guide) at the guide's size. Where Ω = 0 its bytes leave as they came."""
    left, top, right, bottom = placement.window
    size = right - left, bottom - top
    planes = [Image.fromarray(np.asarray(plane, np.float32)).crop(placement.part) for plane in x]
    omega = mask[top:bottom, left:right, None]
    result = guide.pixels.copy()
    kept = result[top:bottom, left:right]
    with np.errstate(over="ignore", invalid="ignore"):  # of a network's largest numbers
        edited = (np.stack([np.asarray(_resize(plane, size)) for plane in planes], axis=2) + 1) * np.float32(127.5)
        blended = (1 - omega) * kept + omega * edited
        result[top:bottom, left:right] = np.where(omega > 0, np.rint(np.clip(blended, 0, 255)), kept)
    return result


def to_image(pixels: Pixels, profile: bytes | None = None) -> Image.Image:
    """(H, W, C) uint8 -> a PIL image, RGB or L, with the ICC profile that its file is to have."""
    made = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])
    if profile is not None:
        made.info["icc_profile"] = profile
    return made


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`image` at (width, height), one axis at a time, each with the filter for its direction."""
    for target in ((size[0], image.height), size):
        smaller = target[0] * target[1] < image.width * image.height
        image = image.resize(target, Resampling.LANCZOS if smaller else Resampling.BICUBIC)  # a copy at the same size
    return image
