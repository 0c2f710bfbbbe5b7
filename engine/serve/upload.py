"""A request's body: read within its limits, taken apart into pictures and options."""

import asyncio
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from PIL import Image

from sdedit.image import FORMATS
from sdedit.serve.limits import Limits, Share
from sdedit.serve.refusal import Refusal

if TYPE_CHECKING:
    from starlette.requests import Request

FILES = ("guide", "mask")
MOST_FIELDS = 64
MOST_FIELD_BYTES = 1024


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


@dataclass
class Upload:
    """What came in a body."""

    files: dict[str, bytes] = field(default_factory=dict)  # guide, and where there is one mask
    pixels: dict[str, int] = field(default_factory=dict)  # of each, as its head says
    fields: list[tuple[str, str]] = field(default_factory=list)  # options beside those of the address


def media_type(request: "Request") -> str:
    """`image` or `multipart`. Raises Refusal for other bodies."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return "multipart"
    if kind.startswith("image/") or kind == "application/octet-stream":
        return "image"
    raise Refusal(
        415,
        f"the body is {kind[:100] or 'of no type'}; wanted image/* or multipart/form-data",
        hint="-H 'Content-Type: image/png' --data-binary @guide.png, or -F guide=@guide.png",
    )


def check_length(request: "Request", limits: Limits) -> None:
    """Raises Refusal for a body that says that it is too large."""
    declared = request.headers.get("content-length")
    if declared is not None and int(declared) > limits.max_body:
        raise _too_large(limits)


async def read_body(request: "Request", limits: Limits, share: Share) -> bytes:
    """The whole body, which the share holds. Raises ClientLeft, and Refusal for too many bytes."""
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        chunk = message.get("body", b"")
        if len(body) + len(chunk) > limits.max_body:
            raise _too_large(limits)
        share.take(len(chunk))
        body += chunk
        if not message.get("more_body"):
            return bytes(body)


def take_apart(request: "Request", kind: str, body: bytes) -> Upload:
    """The pictures and options of a body. A large form takes a while: not for the event loop. Raises Refusal."""
    upload = Upload({"guide": body}) if kind == "image" else asyncio.run(_form(request, body))
    if not upload.files.get("guide"):
        raise Refusal(400, "there is no guide", hint="send a picture as the body, or -F guide=@guide.png")
    upload.pixels = {role: _pixel_count(data) for role, data in upload.files.items()}
    return upload


async def _form(request: "Request", body: bytes) -> Upload:
    from python_multipart.exceptions import FormParserError
    from starlette.formparsers import MultiPartException, MultiPartParser

    async def whole() -> AsyncIterator[bytes]:
        yield body

    parser = MultiPartParser(
        request.headers,
        whole(),  # type: ignore[arg-type]
        max_files=len(FILES),
        max_fields=MOST_FIELDS,
        max_part_size=MOST_FIELD_BYTES,
    )
    parser.spool_max_size = len(body) + 1  # in memory, where the body is already
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError) as error:
        raise Refusal(400, f"the form cannot be read: {error}", hint="-F guide=@guide.png -F t0=0.5") from None
    upload = Upload()
    for name, value in form.multi_items():
        if isinstance(value, str) and name not in FILES:
            upload.fields.append((name, value))
        elif isinstance(value, str) or name not in FILES or name in upload.files:
            raise Refusal(
                400,
                f"{name[:100]!r} of the form is not what was wanted",
                hint="one file guide (with a filename), at most one file mask, and the options as texts",
            )
        else:
            upload.files[name] = await value.read()
    await form.close()
    return upload


def _pixel_count(data: bytes) -> int:
    """What the head of a picture says; 0 where there is none to be read, which decoding will explain."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            return opened.width * opened.height
    except Image.DecompressionBombError:
        return 2**62
    except Exception:  # Pillow raises many kinds for a broken file
        return 0


def _too_large(limits: Limits) -> Refusal:
    return Refusal(
        413, f"the body is larger than {limits.max_body} bytes", hint="send a smaller picture, or a JPEG or WebP"
    )
