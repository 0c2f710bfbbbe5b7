"""What the programs of benchmarks/ have in common: what fails is named and costs nobody else's figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from kept import keep
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


@pytest.mark.parametrize("images", [505, 5, 0])
def test_a_folder_that_has_no_whole_tenths_is_refused(images):
    pytest.importorskip("onnxruntime")
    command = [sys.executable, BENCHMARKS / "batch.py", "--images", str(images)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, f"--images is {images}; wanted a positive multiple of 10" in done.stderr) == (2, True)
