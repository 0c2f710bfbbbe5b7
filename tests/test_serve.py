"""`sdedit serve`: pictures as `sdedit edit` makes them, and a service that lives whatever its clients do."""

import asyncio
import http.client
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image

import sdedit
from sdedit.cli.main import main
from sdedit.serve import server, sockets
from sdedit.serve.limits import Limits
from sdedit.serve.refusal import Refusal
from sdedit.serve.service import Service

PATIENCE_S = 20.0  # no test waits that long unless it fails
UNIX = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets")


class Gated(sdedit.Editor):
    """An editor whose batches wait at a gate, and are counted."""

    def __init__(self, editor: sdedit.Editor) -> None:
        super().__init__(editor.artifact, editor.backend)
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.batches_run: list[list[int]] = []  # the seeds of each

    @contextmanager
    def batches(self, options):
        with super().batches(options) as run:

            def gated(jobs):
                if options.steps != 2 or options.seed or jobs[0].guide.sha256:  # not the warm-up
                    self.batches_run.append([job.seed for job in jobs])
                    self.entered.release()
                    assert self.gate.wait(PATIENCE_S)
                return run(jobs)

            yield gated


@dataclass
class Served:
    """A service in a thread, and a client of it."""

    host: str
    port: int
    service: Service
    stop: threading.Event = field(default_factory=threading.Event)

    def request(self, method: str, target: str, body=None, headers=None) -> "Reply":
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE_S)
        try:
            connection.request(method, target, body, headers or {})
            return Reply.of(connection.getresponse())
        finally:
            connection.close()

    def edit(self, guide: bytes, **options) -> "Reply":
        return self.request("POST", f"/edit?{urlencode(options)}", guide, {"Content-Type": "image/png"})

    def form(self, *parts: tuple[str, bytes | str]) -> "Reply":
        return self.request("POST", "/edit", *multipart(*parts))

    def raw(self, *pieces: bytes) -> socket.socket:
        opened = socket.create_connection((self.host, self.port), timeout=PATIENCE_S)
        for piece in pieces:
            opened.sendall(piece)
        return opened


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @classmethod
    def of(cls, response: http.client.HTTPResponse) -> "Reply":
        return cls(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())

    @property
    def pixels(self) -> np.ndarray:
        assert self.status == 200, self.body
        with Image.open(io.BytesIO(self.body)) as opened:
            return np.asarray(opened)

    def refused(self, status: int) -> str:
        """What it says; every refusal is an error and a hint."""
        assert self.status == status, self.body
        said = json.loads(self.body)
        assert set(said) == {"error", "hint"}
        assert all(said.values())
        assert b"Traceback" not in self.body
        return str(said["error"])


def multipart(*parts: tuple[str, bytes | str]) -> tuple[bytes, dict[str, str]]:
    """A form and its headers: bytes are files, str are fields."""
    body = b""
    for name, value in parts:
        filename = '; filename="x.png"' if isinstance(value, bytes) else ""
        data = value if isinstance(value, bytes) else value.encode()
        body += f'--cut\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'.encode() + data + b"\r\n"
    return body + b"--cut--\r\n", {"Content-Type": "multipart/form-data; boundary=cut"}


def answer(opened: socket.socket, method: str = "POST") -> Reply:
    response = http.client.HTTPResponse(opened, method=method)
    response.begin()
    with response:
        return Reply.of(response)


def head(target: str = "/edit", **headers: object) -> bytes:
    lines = [f"POST {target} HTTP/1.1", "Host: x", "Content-Type: image/png"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


@contextmanager
def serving(editor: sdedit.Editor, *, batch: int = 1, unix: Path | None = None, **limits) -> Iterator[Served]:
    """A service on a free port, or a Unix socket, until the end of the block."""
    bound = sockets.tcp("127.0.0.1", 0, allow_remote=False) if unix is None else sockets.unix(unix)
    with bound as listener:
        ready = threading.Event()
        service = Service(editor, batch, Limits(**limits))
        made = server.create(service, {"model": "described"}, listener, ready.set)
        thread = threading.Thread(target=lambda: asyncio.run(made.serve()))
        thread.start()
        try:
            assert ready.wait(PATIENCE_S)
            host, port = ("", 0) if unix else listener.socket.getsockname()
            served = Served(host, port, service)
            served.stop.set = lambda: setattr(made, "should_exit", True)  # type: ignore[method-assign]
            yield served
        finally:
            made.should_exit = True
            if isinstance(editor, Gated):
                editor.gate.set()
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(editor):
    """One service for all tests that leave it as it was; short times, small limits."""
    with serving(editor, batch=3, upload_s=0.4, max_body=200_000, max_pixels=40_000, max_steps=60) as one:
        yield one


@pytest.fixture
def gated(editor):
    return Gated(editor)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as threads:
        yield threads


@pytest.fixture(scope="module")
def guide(picture) -> bytes:
    return png(picture(20, 11))


def png(pixels: np.ndarray) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()


def lives(served: Served, guide: bytes) -> None:
    assert served.edit(guide, steps=1).status == 200


# --- pictures ----------------------------------------------------------------------------------------------------


def test_a_picture_is_what_edit_makes_with_its_options(served, editor, guide):
    options = {"t0": 0.7, "steps": 3, "sampler": "ddim", "eta": 1.0, "seed": 2**64 - 1, "repeats": 2, "fit": "pad"}
    reply = served.edit(guide, **options)
    assert np.array_equal(reply.pixels, editor.edit(guide, batch=3, **options).results[0].pixels)
    assert reply.headers["content-type"] == "image/png"
    assert reply.headers["sdedit-seed"] == str(2**64 - 1)


def test_a_form_is_the_same_request_and_brings_a_mask(served, editor, guide):
    plain = served.form(("guide", guide), ("steps", "2"), ("seed", "5"))
    assert plain.body == served.edit(guide, steps=2, seed=5).body
    mask = png(np.eye(11, 20, dtype=np.uint8) * 255)
    reply = served.form(("steps", "2"), ("mask", mask), ("fit", "pad"), ("guide", guide))
    wanted = editor.edit(guide, mask=mask, steps=2, fit="pad", batch=3).results[0].pixels
    assert reply.pixels.shape == (11, 20, 3)
    assert np.array_equal(reply.pixels, wanted)


def test_a_picture_carries_its_record_and_can_be_replayed(served, guide, network, tmp_path):
    for name, data in (("guide.png", guide), ("made.png", served.edit(guide, steps=2, seed=9).body)):
        (tmp_path / name).write_bytes(data)
    words = ["edit", "--replay", "made.png", "guide.png", "-m", str(network), "-o", "again.png"]
    assert main([str(tmp_path / word) if word.endswith(".png") else word for word in words]) == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "made.png").read_bytes()


def test_further_inputs_are_set_by_name(labelled, guide):
    with serving(sdedit.load(labelled, backend="ort-cpu", threads=1)) as served:
        reply = served.edit(guide, steps=1, set="class_label=4")
        assert np.unique(reply.pixels).tolist() == [178]
        assert "needs a value for its input class_label" in served.edit(guide, steps=1).refused(400)


# --- batches -----------------------------------------------------------------------------------------------------


def test_requests_share_a_batch_and_each_is_as_if_alone(gated, editor, guide, pool):
    wanted = [{"seed": seed, "t0": t0, "steps": 3} for seed, t0 in enumerate((0.3, 0.5, 0.5, 0.9, 0.4))]
    with serving(gated, batch=4) as served:
        first = pool.submit(served.edit, guide, seed=99, steps=3)
        assert gated.entered.acquire(timeout=PATIENCE_S)
        replies = []
        for number, options in enumerate(wanted, start=1):  # one after the other into the queue
            replies.append(pool.submit(served.edit, guide, **options))
            wait_for(lambda number=number: len(served.service.batcher) == number)
        gated.gate.set()
        for reply, options in zip(replies, wanted, strict=True):
            alone = editor.edit(guide, batch=4, **options).results[0].pixels
            assert np.array_equal(reply.result(PATIENCE_S).pixels, alone)
        assert first.result().status == 200
    assert gated.batches_run == [[99], [0, 1, 2, 3], [4]]


def test_requests_of_other_steps_samplers_or_masks_do_not_share_a_batch(gated, guide, pool):
    mask = png(np.full((11, 20), 255, np.uint8))
    with serving(gated, batch=4) as served:
        replies = [pool.submit(served.edit, guide, seed=9, steps=1)]
        assert gated.entered.acquire(timeout=PATIENCE_S)
        for number, options in enumerate(
            (
                {"seed": 1, "steps": 3},
                {"seed": 2, "steps": 4},
                {"seed": 3, "steps": 3},
                {"seed": 4, "sampler": "em", "steps": 3},
            )
        ):
            replies.append(pool.submit(served.edit, guide, **options))
            wait_for(lambda number=number: len(served.service.batcher) == number + 1)
        replies.append(pool.submit(served.form, ("guide", guide), ("mask", mask), ("steps", "3"), ("fit", "pad")))
        wait_for(lambda: len(served.service.batcher) == 5)
        gated.gate.set()
        assert {reply.result(PATIENCE_S).status for reply in replies} == {200}
    assert gated.batches_run == [[9], [1, 3], [2], [4], [0]]


def test_a_picture_that_the_network_cannot_do_leaves_its_batch_alone(gated, guide, pool, monkeypatch):
    run = sdedit.executor.HostExecutor.run

    def broken(self, work, on_step):
        if 13 in work.seeds:
            raise sdedit.NetworkError("NaN in the network's answer", hint="another picture")
        return run(self, work, on_step)

    monkeypatch.setattr(sdedit.executor.HostExecutor, "run", broken)
    with serving(gated, batch=2) as served:
        first = pool.submit(served.edit, guide, steps=3)
        assert gated.entered.acquire(timeout=PATIENCE_S)
        replies = [pool.submit(served.edit, guide, seed=seed, steps=3) for seed in (12, 13)]
        wait_for(lambda: len(served.service.batcher) == 2)
        gated.gate.set()
        assert first.result(PATIENCE_S).status == 200
        assert replies[0].result(PATIENCE_S).status == 200
        assert replies[1].result(PATIENCE_S).refused(500) == "NaN in the network's answer"
        lives(served, guide)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("t0=0", "t0 is 0.0"), ("t0=abc", "t0 is 'abc'"), ("t0=nan", "t0 is 'nan'"), ("t0=1e999", "t0 is inf"),
        ("steps=0", "steps is 0"), ("steps=1.5", "steps is '1.5'"), ("steps=99999999999999999999999", "steps is"),
        ("steps=61", "this service allows 60"), ("steps=31&repeats=2", "this service allows 60"),
        ("sampler=x", "unknown sampler 'x'"), ("eta=1", "has no eta"), ("seed=-1", "seed is -1"),
        ("seed=", "seed is ''"), ("seed=%EF%BC%91", "seed is"), ("repeats=0", "repeats is 0"), ("fit=x", "unknown fit"),
        ("size=64", "64x64"), ("size=1x", "size"), ("set=a", "set is 'a'"), ("set=a=1", "has no input a"),
        ("set==1", "set is '=1'"), ("steps=1&steps=2", "steps is given twice"), ("stepz=1", "unknown option 'stepz'"),
        ("batch=2", "unknown option 'batch'"), ("samples=2", "unknown option 'samples'"), ("%00=%00", "unknown option"),
        ("sampler=" + "x" * 5000, "sampler has 5000 characters"), ("t0=1&" * 2000 + "t0=1", "given twice"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(query, said, served, guide):
    reply = served.request("POST", f"/edit?{query}", guide, {"Content-Type": "image/png"})
    assert said in reply.refused(400)


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose head says so."""
    chunk = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    crc = zlib.crc32(chunk).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + chunk + crc + b"\0\0\0\0IDAT" + bytes(4)


@pytest.mark.parametrize(
    ("body", "kind", "status", "said"),
    [
        (b"", "image/png", 400, "there is no guide"),
        (b"no picture", "image/png", 422, "the guide: not a picture"),
        (b"%!PS\nshowpage", "image/eps", 422, "not a picture"),
        (huge_png(201, 200), "image/png", 413, "more than 40000 pixels"),
        (huge_png(60_000, 60_000), "image/png", 413, "more than 40000 pixels"),
        (huge_png(20, 11), "image/png", 422, "cannot be decoded"),
        (b"{}", "application/json", 415, "the body is application/json"),
        (b"t0=1", "application/x-www-form-urlencoded", 415, "wanted image/*"),
        (b"x", "multipart/form-data", 400, "Missing boundary"),
        (b"x", "multipart/form-data; boundary=cut", 400, "the form cannot be read"),
        (b"--cut\r\n\r\nx\r\n--cut--\r\n", "multipart/form-data; boundary=cut", 400, "cannot be read"),
        (b"--cut", "multipart/form-data; boundary=cut", 400, "there is no guide"),
    ],
    ids=range(12),
)
def test_bodies_that_are_no_pictures_are_refused(body, kind, status, said, served, guide):
    assert said in served.request("POST", "/edit", body, {"Content-Type": kind}).refused(status)


def test_forms_of_another_shape_are_refused(served, guide):
    small = png(np.zeros((3, 4), np.uint8))
    for parts, status, said in (
        ([("guide", "text")], 400, "'guide' of the form"),
        ([("guide", guide), ("guide", guide)], 400, "'guide' of the form"),
        ([("other", guide)], 400, "'other' of the form"),
        ([("mask", guide)], 400, "there is no guide"),
        ([("guide", guide), ("mask", guide), ("more", guide)], 400, "Too many files"),
        ([("guide", guide), *[("t0", "0.5")] * 65], 400, "Too many fields"),
        ([("guide", guide), ("t0", "1" * 2000)], 400, "Part exceeded"),
        ([("guide", guide), ("mask", small)], 422, "the mask: is 4x3; the guide is 20x11"),
        ([("guide", guide), ("mask", b"x")], 422, "the mask: not a picture"),
        ([("guide", guide), ("mask", huge_png(999, 999))], 413, "the mask has more than 40000 pixels"),
    ):
        assert said in served.form(*parts).refused(status)


def test_other_paths_and_methods_are_refused(served):
    assert "there is no such path" in served.request("GET", "/").refused(404)
    assert "there is no such path" in served.request("POST", "/edit/../../etc/passwd", b"x").refused(404)
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"):
        reply = served.request(method, "/edit")
        assert "not with this method" in reply.refused(405)
        assert reply.headers["allow"] == "POST"
    assert served.request("HEAD", "/edit").status == 405
    assert served.request("HEAD", "/model").status == 200


# --- hostile and broken clients ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello TLS\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no host
        b"POST /edit HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /edit HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        b"POST /edit HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n",
        b"GET /" + b"y" * 100_000,
        b"\r\n\r\n\r\n\r\n{}\r\n",
    ],
    ids=range(9),
)
def test_what_is_no_request_gets_400(sent, served):
    with served.raw(sent) as opened:
        assert answer(opened, "GET").refused(400) == "this is not a valid HTTP request"
    assert served.request("GET", "/healthz").status == 200


def test_a_body_that_is_too_large_is_refused_by_its_head_or_as_soon_as_it_is(served, guide):
    with served.raw(head(Content_Length=10**12)) as opened:  # nothing of it is waited for
        assert "larger than 200000 bytes" in answer(opened).refused(413)
    with served.raw(head(Content_Length=200_001, Expect="100-continue")) as opened:
        assert answer(opened).status == 413
    chunk = b"8000\r\n" + bytes(0x8000) + b"\r\n"
    with served.raw(head(Transfer_Encoding="chunked"), *[chunk] * 7) as opened:  # and never ends
        reply = answer(opened)
    assert "larger than 200000 bytes" in reply.refused(413)
    assert reply.headers["connection"] == "close"
    with served.raw(head(Content_Length=10), guide) as opened:  # more than was announced: another request, and none
        received = b"".join(iter(lambda: opened.recv(1 << 16), b""))
    assert [piece[:3] for piece in received.split(b"HTTP/1.1 ")[1:]] == [b"422", b"400"]
    lives(served, guide)


def test_a_slow_client_gets_408_and_holds_no_place(served, guide):
    with (
        served.raw(b"POST /ed") as no_head,
        served.raw() as nothing,
        served.raw(head(Content_Length=len(guide)), guide[:-1]) as no_end,
        served.raw(head(Transfer_Encoding="chunked"), b"5\r\nabc") as no_chunk,
    ):
        assert served.service.batcher.ready
        lives(served, guide)  # beside them
        for opened in (no_head, nothing, no_end, no_chunk):
            assert "within 0.4 s" in answer(opened).refused(408)
            assert opened.recv(1) == b""  # closed


def test_a_client_that_closes_its_half_or_leaves_is_dropped(served, guide):
    before = len(served.service.batcher)
    for pieces in (
        (head(Content_Length=len(guide)), guide[:-1]),
        (b"POST /ed",),
        (),
        (head(Transfer_Encoding="chunked"),),
    ):
        with served.raw(*pieces) as opened:
            opened.shutdown(socket.SHUT_WR)
            assert opened.recv(1) == b""
        served.raw(*pieces).close()
    assert len(served.service.batcher) == before
    lives(served, guide)


@UNIX
def test_a_client_that_does_not_read_is_cut_off(editor, tmp_path):
    noise = png(np.random.default_rng(0).integers(0, 256, (500, 750, 3), np.uint8))
    body, headers = multipart(("guide", noise), ("mask", png(np.eye(500, 750, dtype=np.uint8))), ("steps", "1"))
    lines = [f"{name}: {value}" for name, value in headers.items()]
    request = "\r\n".join(["POST /edit HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *lines, "", ""]).encode()
    with serving(editor, unix=tmp_path / "s", upload_s=0.3), socket.socket(socket.AF_UNIX) as opened:
        opened.settimeout(PATIENCE_S)
        opened.connect(str(tmp_path / "s"))
        opened.sendall(request + body)
        received = opened.recv(100)
        threading.Event().wait(1.0)
        with suppress(ConnectionError):
            while piece := opened.recv(1 << 20):
                received += piece
        assert len(received) < len(noise)


def test_old_and_hasty_clients_are_served(served, guide):
    length = f"Content-Length: {len(guide)}\r\nContent-Type: image/png\r\n\r\n".encode()
    with served.raw(b"POST /edit?steps=1 HTTP/1.0\r\n" + length + guide) as opened:
        assert answer(opened).pixels.shape == (8, 12, 3)
        assert opened.recv(1) == b""
    one = b"POST /edit?steps=1 HTTP/1.1\r\nHost: x\r\n" + length + guide
    with served.raw(one * 5) as opened:  # five at once, on one connection
        stream = opened.makefile("rb")
        for _ in range(5):
            assert b"200" in stream.readline()
            size = 0
            while (line := stream.readline()) != b"\r\n":
                size = int(line.split()[1]) if line.lower().startswith(b"content-length") else size
            assert stream.read(size).startswith(b"\x89PNG")


def test_more_connections_than_the_system_allows_are_told_so(editor, guide, monkeypatch):
    monkeypatch.setattr(server, "most_connections", lambda: 3)
    with serving(editor) as served:
        idle = [served.raw() for _ in range(3)]
        with served.raw() as opened:
            reply = answer(opened, "GET")
        assert reply.refused(503) == "3 connections are open already"
        assert reply.headers["retry-after"] == "1"
        for one in idle:
            one.close()
        wait_for(lambda: not served.service.draining and served.request("GET", "/readyz").status == 200)
        lives(served, guide)


def test_many_idle_connections_are_let_go(served, guide):
    opened = [served.raw() for _ in range(200)]
    lives(served, guide)
    assert {answer(one).status for one in opened} == {408}
    for one in opened:
        one.close()


# --- queue, deadline, leaving ------------------------------------------------------------------------------------


def test_a_full_queue_is_503_with_retry_after_and_loses_nothing(gated, guide, pool):
    with serving(gated, queue=2) as served:
        accepted = [pool.submit(served.edit, guide, seed=0, steps=4)]
        assert gated.entered.acquire(timeout=PATIENCE_S)
        accepted += [pool.submit(served.edit, guide, seed=seed, steps=4) for seed in (1, 2)]
        wait_for(lambda: len(served.service.batcher) == 2)
        for _ in range(3):
            reply = served.edit(guide)
            assert reply.refused(503) == "2 requests wait already"
            assert int(reply.headers["retry-after"]) >= 1
        text = served.request("GET", "/metrics").body.decode()
        assert {"sdedit_queue_length 2.0", "sdedit_queue_limit 2.0", "sdedit_in_flight 3.0"} <= set(text.splitlines())
        gated.gate.set()
        assert [reply.result(PATIENCE_S).headers["sdedit-seed"] for reply in accepted] == ["0", "1", "2"]


def test_a_client_that_leaves_the_queue_is_not_edited(gated, guide, pool):
    with serving(gated, queue=2) as served:
        first = pool.submit(served.edit, guide, seed=1, steps=3)
        assert gated.entered.acquire(timeout=PATIENCE_S)
        leaving = served.raw(head("/edit?seed=2&steps=3", Content_Length=len(guide)), guide)
        wait_for(lambda: len(served.service.batcher) == 1)
        leaving.close()
        wait_for(lambda: len(served.service.batcher) == 0)
        last = pool.submit(served.edit, guide, seed=3, steps=3)
        wait_for(lambda: len(served.service.batcher) == 1)
        gated.gate.set()
        assert {first.result(PATIENCE_S).status, last.result(PATIENCE_S).status} == {200}
        counted = served.request("GET", "/metrics").body.decode().splitlines()
        assert 'sdedit_requests_total{path="/edit",status="left"} 1.0' in counted
    assert gated.batches_run == [[1], [3]]


def test_the_deadline_covers_queue_and_edit(gated, guide, pool):
    with serving(gated, timeout_s=0.5) as served:
        running = pool.submit(served.edit, guide, seed=1, steps=3)
        assert gated.entered.acquire(timeout=PATIENCE_S)
        waiting = pool.submit(served.edit, guide, seed=2, steps=3)
        for reply in (running, waiting):
            assert "not done within 0.5 s" in reply.result(PATIENCE_S).refused(504)
        gated.gate.set()
        lives(served, guide)
    assert gated.batches_run == [[1], [0]]


def test_what_requests_hold_is_limited_and_given_back(gated, pool, picture):
    wide = png(picture(300, 200))  # 480,000 bytes while it waits
    with serving(gated, max_body=300_000, max_pixels=60_000, memory=1_000_000) as served:
        first = pool.submit(served.edit, wide, steps=1)
        assert gated.entered.acquire(timeout=PATIENCE_S)
        reply = served.edit(wide, steps=1)
        assert reply.refused(503) == "the service holds as many pictures as it may"
        assert reply.headers["retry-after"] == "1"
        gated.gate.set()
        assert first.result(PATIENCE_S).status == 200
        wait_for(lambda: b"\nsdedit_request_bytes 0.0\n" in served.request("GET", "/metrics").body)
        assert served.edit(wide, steps=1).status == 200


# --- health, metrics, model --------------------------------------------------------------------------------------


def test_health_model_and_metrics(served, guide):
    lives(served, guide)
    assert json.loads(served.request("GET", "/healthz").body) == {"alive": True}
    assert json.loads(served.request("GET", "/readyz").body) == {"ready": True, "state": "ready"}
    assert json.loads(served.request("GET", "/model").body) == {"model": "described"}
    text = served.request("GET", "/metrics").body.decode()
    for line in (
        'sdedit_requests_total{path="/edit",status="200"}',
        "sdedit_ready 1.0",
        "sdedit_queue_length 0.0",
        "sdedit_edit_seconds_count",
        'sdedit_batch_size_bucket{le="3.0"}',
        "sdedit_network_evaluations_total",
    ):
        assert f"\n{line}" in text


# --- stopping ----------------------------------------------------------------------------------------------------


def test_told_to_stop_it_finishes_what_is_queued(gated, guide, pool):
    with serving(gated) as served:
        replies = [pool.submit(served.edit, guide, steps=3)]
        assert gated.entered.acquire(timeout=PATIENCE_S)
        replies.append(pool.submit(served.edit, guide, seed=1, steps=3))
        wait_for(lambda: len(served.service.batcher) == 1)
        uploading = served.raw(head(Content_Length=100), b"some")
        served.stop.set()
        wait_for(lambda: served.service.draining)
        with pytest.raises(OSError):
            served.raw()
        assert answer(uploading).refused(503) == "the service is stopping"
        gated.gate.set()
        assert [reply.result(PATIENCE_S).status for reply in replies] == [200, 200]


def test_what_cannot_be_finished_in_time_is_refused(gated, guide, pool):
    with serving(gated, drain_s=0) as served:
        running = pool.submit(served.edit, guide, steps=3)
        assert gated.entered.acquire(timeout=PATIENCE_S)
        waiting = pool.submit(served.edit, guide, seed=1, steps=3)
        wait_for(lambda: len(served.service.batcher) == 1)
        served.stop.set()
        reply = waiting.result(PATIENCE_S)
        assert reply.refused(503) == "the service is stopping"
        assert "retry-after" in reply.headers
        gated.gate.set()
        assert running.result(PATIENCE_S).status == 200


def test_it_stops_while_the_time_of_an_upload_ends(served):
    class Expiring:
        def reschedule(self, when):
            raise RuntimeError("Cannot change state of expiring Timeout")

    gave_up = threading.Event()
    with serving(served.service.editor, drain_s=0) as stopping:
        stopping.service._uploads.add(Expiring())
        stopping.service.batcher.give_up = gave_up.set
        stopping.stop.set()
        assert gave_up.wait(PATIENCE_S)


# --- the command -------------------------------------------------------------------------------------------------


@contextmanager
def command(network: Path, *flags: object) -> Iterator[tuple[subprocess.Popen, str]]:
    words = [
        sys.executable,
        "-m",
        "sdedit.cli.main",
        "serve",
        "-m",
        str(network),
        "--backend",
        "ort-cpu",
        "--threads",
        "1",
    ]
    with subprocess.Popen(
        [*words, *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            yield running, running.stdout.readline().strip()
        finally:
            running.kill()


@UNIX
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_a_socket_and_leaves_with_0(number, network, guide, tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with command(network, "--socket", path) as (running, said):
        assert said == f"unix:{path}"
        assert path.stat().st_mode & 0o777 == 0o600
        assert main(["serve", "--socket", str(path)]) == 1  # a live one is left alone
        with socket.socket(socket.AF_UNIX) as opened:
            opened.connect(str(path))
            opened.sendall(head("/edit?steps=2&seed=3", Content_Length=len(guide)) + guide)
            assert answer(opened).headers["sdedit-seed"] == "3"
            opened.sendall(b"GET /model HTTP/1.1\r\nHost: x\r\n\r\n")
            model = json.loads(answer(opened, "GET").body)
        assert model["path"] == network.name
        assert model["metadata"]["image"] == {"channels": 3, "height": 8, "width": 12}
        running.send_signal(number)
        assert running.wait(PATIENCE_S) == 0
        log = running.stderr.read()
    assert not path.exists()
    assert "POST /edit 200" in log
    assert "seed 3" in log
    assert "Traceback" not in log


def test_only_this_machine_is_served_unless_told_otherwise(capsys):
    for host in ("0.0.0.0", "192.0.2.1", "::"):
        assert main(["serve", "--host", host, "--port", "0"]) == 2
        error, hint = capsys.readouterr().err.splitlines()
        assert error == f"error: {host} can be reached from other machines, and the service asks nobody who they are"
        assert "--allow-remote" in hint
    with sockets.tcp("0.0.0.0", 0, allow_remote=True) as listener:
        assert listener.address.startswith("http://0.0.0.0:")


def test_places_that_cannot_be_listened_on_are_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flags, code, said in (
            (["--port", str(port)], 1, f"127.0.0.1 port {port} cannot be used: Address already in use"),
            (["--port", "65536"], 2, "port is 65536"),
            (["--host", "no.such.host.invalid"], 2, "host 'no.such.host.invalid' is not an address"),
            (["--socket", "x", "--port", "0"], 2, "--socket goes without"),
            (["--socket", str(tmp_path / "file")], 1, "exists and is no socket"),
            (["--socket", str(tmp_path / "no" / "s")], 1, "no socket can be made there"),
            (["--socket", str(tmp_path / ("x" * 200))], 1, "no socket can be made there"),
        ):
            assert main(["serve", *flags]) == code
            told = capsys.readouterr().err
            assert f"error: {said}" in told or (said in told and told.startswith("error: "))
            assert told.count("\n") == 2
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    "flags",
    [("--queue", 0), ("--timeout", 0), ("--drain", -1), ("--max-body", 0), ("--max-pixels", 10**9), ("--max-steps", 0),
     ("--memory", 1000), ("--batch", 0), ("--timeout", "nan")],
)  # fmt: skip
def test_limits_that_make_no_sense_are_refused(flags, capsys):
    assert main(["serve", "--port", "0", *map(str, flags)]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "starlette", None)
    assert main(["serve"]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: serve: starlette is not installed"
    assert hint == "hint: pip install 'sdedit-engine[serve]'"


def test_a_failed_warm_up_is_the_commands_error(gated, monkeypatch):
    def broken(options):
        raise sdedit.DeviceError("out of memory", hint="a smaller batch")

    monkeypatch.setattr(gated, "batches", broken)
    with sockets.tcp("127.0.0.1", 0, allow_remote=False) as listener:
        made = server.create(Service(gated, 1, Limits()), {}, listener, lambda: None)
        with pytest.raises(sdedit.DeviceError, match="out of memory"):
            asyncio.run(made.serve())


def test_the_warm_up_is_the_editor_s_own_and_one_edit(gated, monkeypatch):
    warmed = []
    monkeypatch.setattr(gated, "warmup", lambda **options: warmed.append((options["batch"], options["steps"])))
    with serving(gated, batch=3):
        assert warmed == [(3, 2)]


def test_the_command_closes_its_editor(network, tmp_path, monkeypatch):
    services = []
    monkeypatch.setattr(server, "run", lambda service, *_: services.append(service))
    words = ["serve", "--socket", tmp_path / "s", "-m", network, "--backend", "ort-cpu", "--threads", "1"]
    assert main([str(word) for word in words]) == 0
    with pytest.raises(sdedit.ClosedError):
        services[0].editor.warmup()


def test_retry_after_is_whole_seconds():
    for given, said in ((0.0, "1"), (0.2, "1"), (12.1, "13")):
        assert Refusal(503, "full", hint="later", retry_s=given).headers == {"Retry-After": said}


def wait_for(true) -> None:
    """Until it is true, which another thread makes it."""
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.005)):
        if true():
            return
        pause.wait(0.005)
    raise AssertionError("it never came")
