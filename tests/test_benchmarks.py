"""What the programs of benchmarks/ have in common: what fails is named and costs nobody else's figures."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import sdedit

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import budget
import conditions
import cpu_network
from kept import keep
from peer_networks import Network
from processes import Process

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CONTESTANT = f"""
import os, sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
from processes import serve

def open_one(request):
    print("a library prints")
    if request == "no":
        raise ValueError("not\\nhere")
    def respond(line):
        if line == "die":
            print("out of memory", file=sys.stderr, flush=True)
            os._exit(3)
        if line == "sleep":
            time.sleep(60)
        return {{"heard": line, "request": request}}
    return respond

serve(open_one)
"""


@pytest.fixture
def start():
    """Starts a contestant by its request."""
    started = []

    def begin(request):
        started.append(Process("one", ["-c", CONTESTANT], request))
        return started[-1]

    yield begin
    for process in started:
        process.close()


def refused(program, *words):
    """What a program says of such words, which it does not start to measure with."""
    command = [sys.executable, str(BENCHMARKS / f"{program}.py"), *map(str, words)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (ran.returncode or "refused", "")
    assert "Traceback" not in ran.stderr
    return ran.stderr


def test_what_a_program_cannot_do_is_said_before_it_measures(tmp_path, network):
    photo = BENCHMARKS.parent / "examples" / "photo.png"
    assert "--runs: '0' is not a whole number above 0" in refused("cold_start", "--runs", 0)
    nowhere = tmp_path / "nowhere" / "found.json"
    assert f"{nowhere}: not a file's name in a folder that is there" in refused("lean", "-o", nowhere)
    assert f"{tmp_path}: not a file's name" in refused("batch", "-o", tmp_path)
    assert "error: nowhere.onnx: no such file\nhint: check the path" in refused("region", "nowhere.onnx", photo)
    assert "--images is 505; wanted a multiple of 10" in refused("batch", "--images", 505)
    assert "nowhere.png: no such file" in refused("region", network, "nowhere.png")
    assert "has one size; wanted a model of any" in refused("region", network, photo)


def test_a_budget_that_always_was_too_small_is_no_number():
    (row,) = budget.rows({60: [(float("inf"), 0), (float("inf"), 0)]})
    assert (row["refused"], row["within"], row["median_ms"], row["worst_ms"]) == (2, 0, None, None)
    assert "Infinity" not in json.dumps(row)


def test_a_contestant_answers_and_what_libraries_print_is_no_answer(start):
    process = start({"steps": 2})
    assert process.hear() == {}
    assert process.ask("edit") == {"heard": "edit", "request": {"steps": 2}}


def test_what_does_not_open_is_skipped_with_its_reason(start, capfd):
    process = start("no")
    assert process.hear() == process.ask("edit") == {"failed": "ValueError: not here"}
    assert capfd.readouterr().err == "skipped: one: ValueError: not here\n"


def test_a_process_that_dies_in_its_turn_is_skipped_with_its_last_words(start):
    process = start(None)
    process.hear()
    assert process.ask("die")["failed"] == process.failed == "died, exit code 3: out of memory"


def test_a_process_that_died_between_turns_is_skipped_too(start):
    process = start(None)
    process.hear()
    process._process.kill()
    process._process.wait()
    assert process.ask("edit") == {"failed": "died, exit code -9: a library prints"}


def test_an_answer_is_not_waited_for_beyond_its_limit(start):
    process = start(None)
    process.hear()
    assert process.ask("sleep", seconds=0.2) == {"failed": "no answer in 0.2 s"}
    assert process._process.returncode == -9


def test_a_result_that_cannot_be_written_leaves_the_last_one_whole(tmp_path):
    path = tmp_path / "result.json"
    keep(path, {"rounds": 1})
    with pytest.raises(TypeError):
        keep(path, {"rounds": object()})
    assert json.loads(path.read_text()) == {"rounds": 1}
    assert list(tmp_path.iterdir()) == [path]


class Turns:
    """Stands for the processes of cpu_network.py: what each answers, in turn; then it has died."""

    answers: ClassVar[dict[str, list[float]]] = {}

    def __init__(self, name, command, request):
        self.name, self._left, self.failed = name, list(self.answers[name]), ""

    def hear(self):
        return self.ask("") if not self._left else {}

    def ask(self, line):
        if not self._left:
            self.failed = "died"
            return {"failed": "died"}
        ms = self._left.pop(0)
        if ms is None:
            raise KeyboardInterrupt
        return {"ms": [ms, ms], "ran": {"backend": "ort-cpu"}}

    def close(self):
        pass


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """Runs cpu_network.py with these answers; returns what it wrote."""

    def run(answers, *options):
        monkeypatch.setattr(Turns, "answers", answers)
        arguments = ["cpu_network.py", "--only", ",".join(answers), "-o", str(tmp_path / "found.json"), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        cpu_network.main()

    used = Network("unet-64", "vp", Path("folder"), Path("artifact"), None)
    monkeypatch.setattr(cpu_network, "network", lambda *_, **__: used)
    monkeypatch.setattr(cpu_network, "Process", Turns)
    monkeypatch.setattr(cpu_network, "PAUSE_S", 0)
    return run


def test_a_configuration_that_dies_costs_no_round_of_the_others(measure, tmp_path, capsys):
    measure({"torch eager": [8.0, 6.0, 9.0], "ort-cpu fp32": [4.0, 2.0], "ort-cpu int8": []}, "--rounds", "3")
    found = json.loads((tmp_path / "found.json").read_text())["configurations"]
    assert found["torch eager"]["rounds_ms"] == [[8.0, 8.0], [6.0, 6.0], [9.0, 9.0]]
    assert found["ort-cpu fp32"]["eager_over_it"] == {"median": 2.5, "min": 2.0, "max": 3.0}
    assert (found["ort-cpu fp32"]["failed"], found["ort-cpu int8"]) == ("died", {"rounds_ms": [], "failed": "died"})
    printed = capsys.readouterr().out
    assert "2.50 (2.00 to 3.00)   after round 2: died" in printed
    assert "ort-cpu int8          skipped: died" in printed


def test_what_was_measured_is_written_after_every_round(measure, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        measure({"torch eager": [8.0, None]})
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["configurations"]["torch eager"]["rounds_ms"] == [[8.0, 8.0]]


@pytest.mark.parametrize(("answers", "options"), [([8.0], ["--seconds", "-1"]), ([], [])])
def test_that_there_was_no_round_is_said(measure, answers, options):
    with pytest.raises(SystemExit, match=r"error: there was no round: all were skipped, or opening them took longer"):
        measure({"torch eager": answers}, *options)


def test_conditions_name_the_machine_and_the_versions_that_are_there():
    pytest.importorskip("onnxruntime")
    about = json.loads(json.dumps(conditions.conditions("no-such-package")))
    assert set(about) == {"cpu", "cores", "system", "python", "versions", "commit", "load_average", "date"}
    assert about["versions"] == {"sdedit-engine": sdedit.__version__, "numpy": np.__version__}
    editor = sdedit.load(backend="ort-cpu", threads=1)
    with_editor = conditions.conditions(editor=editor)
    assert with_editor["versions"] == about["versions"] | editor.backend.versions
    said = {"model": "eurosat-64", "backend": "ort-cpu", "precision": "fp32", "threads": 1}
    assert {name: with_editor[name] for name in set(with_editor) - set(about)} == said


def test_a_cpu_is_told_by_its_name_and_the_extensions_that_matter(monkeypatch, tmp_path):
    lines = ["processor\t: 0", "cpu family\t: 6", "model\t\t: 207", "model name\t: Xeon", "flags\t\t: fpu avx2 avx512f"]
    (tmp_path / "cpuinfo").write_text("\n".join([*lines, "", "processor\t: 1", "model name\t: other"]))
    monkeypatch.setattr(conditions, "Path", lambda _: tmp_path / "cpuinfo")
    assert conditions.cpu() == "Xeon 6/207 avx2 avx512f"
    (tmp_path / "cpuinfo").unlink()
    monkeypatch.setattr(conditions.platform, "processor", lambda: "")
    assert conditions.cpu() == conditions.platform.machine()


def test_no_benchmark_describes_the_machine_in_words_of_its_own():
    words = re.compile(r"\bplatform\.|\bgetloadavg\b")
    own = [path.name for path in sorted(BENCHMARKS.glob("*.py")) if words.search(path.read_text("utf-8"))]
    assert own == ["conditions.py", "gpu_check.py"]  # that describes a GPU
