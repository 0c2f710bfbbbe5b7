"""`sdedit serve` at three times its capacity: is every request answered or refused, and with the right picture?

python benchmarks/serve_load.py [--requests 1000] [--steps 6] [--batch 4] [-o benchmarks/results/serve_load.json]

The service runs in a process of its own. Its capacity is measured first, by clients that wait for their answers. Then
requests are sent at three times that rate whatever comes back (an open loop), each with its own seed and one of four
t0. Every picture is compared, by the hash of its pixels, with the edit of that seed and t0 in this process. Prints one
JSON object; exits with 1 if a request was lost, mixed up, or refused otherwise than by 503 with Retry-After.
"""

import argparse
import asyncio
import hashlib
import io
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from arguments import output_file, positive, program
from conditions import conditions
from PIL import Image

import sdedit

GUIDE = Path(__file__).parents[1] / "examples" / "strokes.png"
T0S = (0.3, 0.4, 0.5, 0.6)  # mixed in the batches
OVERLOAD = 3
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Reply:
    """What came of the request with this seed."""

    seed: int
    status: int  # 0: no answer
    seconds: float
    headers: dict[str, str]
    body: bytes

    @property
    def t0(self) -> float:
        return T0S[self.seed % len(T0S)]

    @property
    def fault(self) -> str | None:
        """What is wrong with it, its pixels aside."""
        if self.status == 200:
            said = self.headers.get("sdedit-seed")
            return None if said == str(self.seed) else f"seed {self.seed} was answered as seed {said}"
        if self.status == 503:
            retry = self.headers.get("retry-after", "")
            return None if retry.isdigit() and int(retry) >= 1 else f"Retry-After is {retry!r}"
        return f"status {self.status}"


@contextmanager
def service(*flags: str) -> Iterator[tuple[str, int]]:
    """`sdedit serve` with the bundled model on a free port."""
    command = [sys.executable, "-m", "sdedit.cli.main", "serve", "--port", "0", "--quiet", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            host, _, port = running.stdout.readline().strip().removeprefix("http://").partition(":")
            yield host, int(port)
        finally:
            running.terminate()
        assert running.wait(PATIENCE_S) == 0


async def send(where: tuple[str, int], seed: int, steps: int, guide: bytes) -> Reply:
    """One request on a connection of its own."""
    began = time.perf_counter()
    head = (
        f"POST /edit?seed={seed}&t0={T0S[seed % len(T0S)]}&steps={steps} HTTP/1.1\r\nHost: {where[0]}\r\n"
        f"Content-Type: image/png\r\nContent-Length: {len(guide)}\r\nConnection: close\r\n\r\n"
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_connection(*where)
            try:
                writer.write(head.encode() + guide)
                answer = await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        answer = b""
    seconds = time.perf_counter() - began
    lines, _, body = answer.partition(b"\r\n\r\n")
    first, *rest = lines.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
    whole = len(body) == int(headers.get("content-length", -1))
    return Reply(seed, int(first.split()[1]) if whole else 0, seconds, headers, body)


async def measure_capacity(where: tuple[str, int], clients: int, seconds: float, steps: int, guide: bytes) -> float:
    """Edits a second while this many clients each wait for one answer after the other."""
    done, end = 0, time.perf_counter() + seconds

    async def client(number: int) -> None:
        nonlocal done
        while time.perf_counter() < end:
            reply = await send(where, number, steps, guide)
            assert reply.status == 200, reply
            done += 1

    began = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    return done / (time.perf_counter() - began)


async def overload(
    where: tuple[str, int], rate: float, requests: int, steps: int, guide: bytes
) -> tuple[list[Reply], float]:
    """The replies to requests that leave at this rate, and the rate that came of it."""
    began = time.perf_counter()
    sent = []
    for number in range(requests):
        await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
        sent.append(asyncio.create_task(send(where, 1000 + number, steps, guide)))
    achieved = (requests - 1) / (time.perf_counter() - began)
    return list(await asyncio.gather(*sent)), achieved


def mixed_up(editor: sdedit.Editor, replies: list[Reply], steps: int, batch: int) -> list[int]:
    """The seeds whose picture is not the one of an edit here, alone in a batch of that size."""
    wrong = []
    for reply in replies:
        with Image.open(io.BytesIO(reply.body)) as opened:
            got = hashlib.sha256(np.asarray(opened).tobytes()).hexdigest()
        made = editor.edit(GUIDE, seed=reply.seed, t0=reply.t0, steps=steps, batch=batch).images[0]
        if hashlib.sha256(np.asarray(made).tobytes()).hexdigest() != got:
            wrong.append(reply.seed)
    return wrong


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    named = {"p50": cuts[49], "p90": cuts[89], "p95": cuts[94], "p99": cuts[98], "max": max(seconds)}
    return {name: round(1e3 * value, 1) for name, value in named.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="A service under three times the load it can do.")
    parser.add_argument("--requests", type=positive, default=1000)
    parser.add_argument("--steps", type=positive, default=6)
    parser.add_argument("--batch", type=positive, default=4)
    parser.add_argument("--queue", type=positive, default=32)
    parser.add_argument("--capacity-seconds", type=float, default=15)
    parser.add_argument("-o", "--output", type=output_file)
    arguments = parser.parse_args()
    steps, batch, guide = arguments.steps, arguments.batch, GUIDE.read_bytes()

    async def both(where: tuple[str, int]) -> tuple[float, list[Reply], float]:
        capacity = await measure_capacity(where, 2 * batch, arguments.capacity_seconds, steps, guide)
        return capacity, *await overload(where, OVERLOAD * capacity, arguments.requests, steps, guide)

    editor = sdedit.load()
    about = conditions(editor=editor)
    with service("--batch", str(batch), "--queue", str(arguments.queue)) as where:
        capacity, replies, achieved = asyncio.run(both(where))
    edited = [reply for reply in replies if reply.status == 200]
    faults = Counter(reply.fault for reply in replies if reply.fault is not None)
    wrong = mixed_up(editor, edited, steps, batch)
    retries = [int(reply.headers["retry-after"]) for reply in replies if reply.status == 503]
    result = {
        "conditions": {
            **about,
            "steps": steps,
            "batch": batch,
            "queue": arguments.queue,
            "t0": T0S,
            "clients": "on the same machine, a connection for each request",
        },
        "capacity_per_s": round(capacity, 2),
        "sent_per_s": round(achieved, 2),
        "requests": len(replies),
        "statuses": dict(Counter(str(reply.status) for reply in replies)),
        "faults": dict(faults),
        "pictures_compared": len(edited),
        "pictures_mixed_up": wrong,
        "edited_latency_ms": percentiles([reply.seconds for reply in edited]),
        "refused_latency_ms": percentiles([reply.seconds for reply in replies if reply.status == 503]),
        "retry_after_s": {"min": min(retries), "max": max(retries)} if retries else {},
        "edited_latency_ms_samples": [round(1e3 * reply.seconds, 1) for reply in edited],
    }
    print(json.dumps(result, indent=2))
    if arguments.output is not None:
        samples = result.pop("edited_latency_ms_samples")
        text = json.dumps(result, indent=2).removesuffix("\n}")
        arguments.output.write_text(f'{text},\n  "edited_latency_ms_samples": {json.dumps(samples)}\n}}\n')
    return 1 if faults or wrong else 0


if __name__ == "__main__":
    program(main)
