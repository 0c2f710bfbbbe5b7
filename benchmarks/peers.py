"""What a user would use instead, beside sdedit: same network, weights, steps and machine, in interleaved rounds.

python benchmarks/peers.py [--network unet-64] [--steps 50] [--rounds 5] [--json FILE]   measure, or measure more
python benchmarks/peers.py --first 3 --json FILE                                         time to the first edit
python benchmarks/peers.py --table FILE                                                  the table of what was kept

Every peer lives in a process of its own and waits there for its turn; one that fails is named and left out. A round is
one edit of each, in turn, every second round backwards; before the first, each makes a short one that is not counted.
An edit is timed by the host's clock in its process, uint8 pixels in and out, batch 1, all cores; the network by the
same clock around its calls; what is left is outside the network. Ratios are taken within a round. With --json, rounds
are added to those in FILE.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from arguments import names, output_file, positive, program
from conditions import conditions
from kept import keep
from peer_networks import NAMES, NETWORKS, VP, Network, network
from processes import Process, Row, serve

import sdedit

OURS, PAPER, EAGER = "sdedit", "original loop", "torch eager"
PACKAGES = ("onnxruntime", "openvino", "torch", "diffusers")
QUIET = 0.05  # the share of CPU time that other processes may have had in a turn that counts
PAUSE_S = 0.3  # before each turn: a library's threads may spin for a while after its own

Round = dict[str, Row]


# --- a peer's process ------------------------------------------------------------------------------------------------


def open_peer(name: str, request: Row) -> Callable[[str], Row]:
    """What makes an edit for every line, and says how long it took."""
    import numpy as np
    from peer_loops import PEERS, Setting

    used = Network.of(request["network"])
    setting = Setting(used, *(request[name] for name in ("steps", "t0", "sigmas", "sampler", "spacing")))
    make, options = PEERS[name]
    edit = make(setting, **options)
    picture = np.random.default_rng(0).integers(0, 256, (used.size, used.size, 3), np.uint8)

    def respond(line: str) -> Row:
        if line == "warm up":
            with setting.shortened():
                edit(picture)
            return {}
        setting.clock.network_s = 0.0
        began = time.perf_counter()
        made = edit(picture)
        edit_ms = 1e3 * (time.perf_counter() - began)
        if made.shape != picture.shape or made.dtype != np.uint8:
            raise ValueError(f"made {made.dtype} {made.shape}")
        said = {} if setting.ran is None else {"ran": setting.ran}
        return {"edit_ms": edit_ms, "network_ms": 1e3 * setting.clock.network_s, **said}

    return respond


class Peer(Process):
    def __init__(self, name: str, request: Row) -> None:
        super().__init__(name, [__file__, "--serve", name], request)
        self.hear()

    def edit(self) -> Row:
        """One edit's times, and the share of this machine's CPU time that went to other processes meanwhile."""
        before = cpu_seconds(self.pid)
        found = self.ask("edit")
        busy, own, idle = (after - was for after, was in zip(cpu_seconds(self.pid), before, strict=True))
        return found | {"others": max(0.0, busy - own) / (busy + idle) if busy + idle > 0 else 0.0}


def cpu_seconds(pid: int) -> tuple[float, float, float]:
    """CPU time so far: of all processes, of this one, and idle. Zeros where /proc does not say."""
    try:
        whole = [int(word) for word in Path("/proc/stat").read_text("ascii").splitlines()[0].split()[1:]]
        own = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    except OSError:
        return 0.0, 0.0, 0.0
    ticks = os.sysconf("SC_CLK_TCK")
    idle = whole[3] + whole[4]  # and waiting for disks
    return (sum(whole[:8]) - idle) / ticks, (int(own[11]) + int(own[12])) / ticks, idle / ticks


# --- measuring -------------------------------------------------------------------------------------------------------


def measure_rounds(names: Sequence[str], request: Row, rounds: int, seconds: float) -> Iterator[Round]:
    """Interleaved rounds; none is begun after `seconds`."""
    began = time.monotonic()  # opening counts
    with ExitStack() as held:
        peers = [held.enter_context(closing(Peer(name, request))) for name in names]
        for peer in peers:
            if peer.name != PAPER:  # whose edits are long enough
                peer.ask("warm up")
        for number in range(rounds):
            if time.monotonic() - began > seconds:
                return
            found: Round = {}
            for peer in peers if number % 2 == 0 else reversed(peers):
                if peer.failed:
                    continue
                time.sleep(PAUSE_S)
                one = peer.edit()
                if not peer.failed:
                    found[peer.name] = one
            if not found:
                return
            yield found


def measure_first(names: Sequence[str], request: Row, rounds: int) -> Iterator[Round]:
    """From the start of a process to its first edit: imports, loading and compiling included."""
    for number in range(rounds):
        found: Round = {}
        for name in names if number % 2 == 0 else reversed(names):
            time.sleep(PAUSE_S)
            began = time.perf_counter()
            with closing(Peer(name, request)) as peer:
                one = peer.edit() | {"first_ms": 1e3 * (time.perf_counter() - began)}
                if not peer.failed:
                    found[name] = one
        yield found


def make_request(used: Network, steps: int, t0: float, sampler: str | None = None, spacing: str = "uniform") -> Row:
    editor = sdedit.load(used.artifact, backend="ort-cpu")
    sampler = sampler or ("ancestral" if used.kind == VP else "em")
    table = sdedit.plan(editor.sde, t0=t0, steps=steps, sampler=sampler, spacing=spacing)
    sigmas = [*table.column("sigma").tolist(), 0.0]
    asked = {"steps": steps, "t0": t0, "sampler": sampler, "spacing": spacing}
    return {"network": used.described(), "artifact_sha256": editor.artifact.sha256, "sigmas": sigmas, **asked}


# --- what was found --------------------------------------------------------------------------------------------------


def tables(kept: dict[str, Any]) -> str:
    """Markdown of everything that a file holds."""
    steps, used = kept["steps"], kept["network"]
    rounds: list[Round] = [one for call in kept["calls"] for one in call["rounds"]]
    used_rounds, left_out = quiet(rounds)
    firsts: list[Round] = [one for call in kept["calls"] for one in call["first"]]
    about = kept["calls"][-1]["conditions"]
    said = ", ".join(f"{name} {one}" for name, one in about["versions"].items())
    lines = [
        f"{used}, t0 {kept['t0']}, batch 1, {about['cores']} cores of {about['cpu']}; {said}; "
        f"{left_out} of {sum(map(len, rounds))} turns are left out: other processes had over {QUIET:.0%} of the CPU",
    ]
    if rounds:
        lines += ["", *edit_table(used_rounds, steps, round(kept["t0"] * 1000))]
    if firsts:
        lines += ["", *first_table(firsts)]
    return "\n".join(lines) + "\n"


def quiet(rounds: Sequence[Round]) -> tuple[list[Round], int]:
    """The rounds without the turns that something else disturbed, and how many those are."""
    kept = [{name: found for name, found in one.items() if found["others"] <= QUIET} for one in rounds]
    return kept, sum(map(len, rounds)) - sum(map(len, kept))


def names_in(rounds: Sequence[Round]) -> list[str]:
    return list(dict.fromkeys(name for one in rounds for name in sorted(one, key=order)))


def order(name: str) -> int:
    from peer_loops import PEERS

    return list(PEERS).index(name)


def edit_table(rounds: Sequence[Round], steps: int, paper_steps: int) -> list[str]:
    lines = [
        "| | steps | ms an edit | ms a step | µs a step outside the network | its time ÷ sdedit's "
        "| torch eager's ÷ its | the original loop's ÷ its | rounds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in sorted(names_in(rounds), key=order):
        found = [one[name] for one in rounds if name in one]
        count = paper_steps if name == PAPER else steps
        edit_ms = statistics.median(one["edit_ms"] for one in found)
        outside = statistics.median(one["edit_ms"] - one["network_ms"] for one in found)
        ran = "; ".join(dict.fromkeys(one["ran"] for one in found if "ran" in one))
        lines.append(
            f"| {name}{ran and f' ({ran})'} | {count} | {edit_ms:.0f} | {edit_ms / count:.1f} "
            f"| {1e3 * outside / count:.0f} | "
            f"{ratio(rounds, name, OURS)} | {ratio(rounds, EAGER, name)} | {ratio(rounds, PAPER, name)} "
            f"| {len(found)} |"
        )
    return lines


def ratio(rounds: Sequence[Round], name: str, of: str, what: str = "edit_ms") -> str:
    """Median of the ratios within a round, and the smallest and largest."""
    found = [one[name][what] / one[of][what] for one in rounds if name in one and of in one]
    if not found or name == of:
        return "1" if found else "-"
    return f"{statistics.median(found):.2f} ({min(found):.2f}–{max(found):.2f})"


def first_table(firsts: Sequence[Round]) -> list[str]:
    lines = [
        "| from the start of a process | to its first edit, s | its time ÷ sdedit's | starts |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name in sorted(names_in(firsts), key=order):
        found = [one[name]["first_ms"] / 1e3 for one in firsts if name in one]
        lines.append(
            f"| {name} | {statistics.median(found):.2f} | {ratio(firsts, name, OURS, 'first_ms')} | {len(found)} |"
        )
    return lines


def load_kept(path: Path | None, asked: dict[str, Any]) -> dict[str, Any]:
    """What the file holds, or nothing yet. Ends the program if it was measured with something else."""
    if path is None or not path.exists():
        return asked | {"calls": []}
    kept: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if any(kept.get(key) != value for key, value in asked.items()):
        held = ", ".join(f"{key} {kept.get(key)}" for key in asked)
        raise SystemExit(f"error: {path} holds {held}\nhint: name another file")
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NAMES, default="unet-64")
    parser.add_argument(
        "--steps", type=positive, default=50, help="of everybody but the original loop, which has them all"
    )
    parser.add_argument("--t0", type=float, default=0.5)
    parser.add_argument("--sampler", help="of sdedit's edits (default: ancestral, em for a VE network)")
    parser.add_argument("--spacing", default="uniform", help="of the same steps (diffusers' scheduler has its own)")
    parser.add_argument(
        "--peers", type=names, metavar="NAME,NAME", help="only these (default: all but the original loop)"
    )
    parser.add_argument("--list", action="store_true", help="print the peers' names")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--seconds", type=float, default=200, help="begin no further round after so many")
    parser.add_argument(
        "--first", type=positive, metavar="N", help="instead: start each peer N times, time its first edit"
    )
    parser.add_argument("--int8", action="store_true", help="make the int8 artifact too, which takes minutes")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="add what is measured to this file")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing, print the tables of this file")
    parser.add_argument("--networks", type=Path, default=NETWORKS, metavar="DIR", help="where they are made and kept")
    parser.add_argument("--serve", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        return serve(partial(open_peer, arguments.serve))
    if arguments.table is not None:
        try:
            return print(tables(json.loads(arguments.table.read_text("utf-8"))), end="")
        except (OSError, ValueError) as error:
            parser.error(f"--table: {error}")

    from peer_loops import PEERS

    if arguments.list:
        return print(*PEERS, sep="\n")
    chosen = [name for name in PEERS if name != PAPER] if arguments.peers is None else arguments.peers
    if unknown := set(chosen) - set(PEERS):
        parser.error(f"no peer is called {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    used = network(arguments.network, arguments.networks, int8=arguments.int8)
    request = make_request(used, arguments.steps, arguments.t0, arguments.sampler, arguments.spacing)
    asked = {name: request[name] for name in ("steps", "t0", "sampler", "spacing")}
    kept = load_kept(arguments.json, {"network": used.name, **asked})
    about = {"artifact_sha256": request["artifact_sha256"], **conditions(*PACKAGES)}
    call: dict[str, Any] = {"conditions": about, "rounds": [], "first": []}
    kept["calls"].append(call)
    if arguments.first is not None:
        part, found = "first", measure_first(chosen, request, arguments.first)
    else:
        part, found = "rounds", measure_rounds(chosen, request, arguments.rounds, arguments.seconds)
    for one in found:
        call[part].append(one)
        if arguments.json is not None:
            keep(arguments.json, kept)
        print(f"{part}: {len(call[part])}", file=sys.stderr)
    if not any(call[part]):
        limit = f"--seconds {arguments.seconds:g}"
        raise SystemExit(f"error: there was no round: every peer was skipped, or opening them took longer than {limit}")
    return print(tables(kept), end="")


if __name__ == "__main__":
    program(main)
