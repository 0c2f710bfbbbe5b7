"""`sdedit bench`: which cases, in which order, what a row holds, how it is printed, and what is refused."""

import csv
import io
import json
import re
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdedit
from sdedit.bench import AXES, Bench, Case, Effort, Row, expand, rounds, visit
from sdedit.bench.effort import Visit
from sdedit.cli import bench, bench_formats
from sdedit.cli.main import main

FACTS = {
    "model": "closed-form", "file": "model.onnx", "backend": "ort-cpu", "precision": "fp32", "threads": 1,
    "provider": "CPU", "batch": 2, "steps": 4, "sampler": "em", "t0": 0.5, "spacing": "uniform", "eta": None,
    "repeats": 1, "gpu": None, "noise": "numpy", "versions": {"numpy": "2"}, "conditions": {}, "model_sha256": "0" * 64,
}  # fmt: skip


def answer(*edits: float, network: float = 1.0, **changed: Any) -> dict[str, Any]:
    """What a visit returns for edits that took so many milliseconds."""
    one = {"loop_ms": 0.0, "network_ms": network, "evaluations": 4, "device_ms": None}
    found = {"load_ms": 300.0, "first_edit_ms": 9.0, "peak_bytes": 2**20, "device_bytes": None, "graph": None}
    return found | {"edits": [one | {"total_ms": ms} for ms in edits]} | changed


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Case, Visit | None]]:
    """Every visit that is asked for; no process is started, an edit takes 10 ms a step."""
    seen: list[tuple[Case, Visit | None]] = []

    def run(case: Case, visit: Visit | None) -> dict[str, Any]:
        seen.append((case, visit))
        if visit is None:
            facts = FACTS | {"steps": case.steps or 50, "batch": case.batch, "threads": case.threads or 2}
            return {"facts": facts, "case": asdict(case)}
        return answer(*[10.0 * (case.steps or 50)] * visit.runs)

    monkeypatch.setattr(rounds, "_run", run)
    return seen


# --- which cases, and in which order ---------------------------------------------------------------------------------


def test_lists_expand_to_every_combination_with_the_last_name_varying_fastest():
    cases = expand(["a.onnx", "b.onnx"], {"steps": [20, 50], "threads": [1, 2]})
    assert [(c.model, c.threads, c.steps) for c in cases] == [
        (model, threads, steps) for model in ("a.onnx", "b.onnx") for threads in (1, 2) for steps in (20, 50)
    ]
    assert all((c.batch, c.backend, c.sampler) == (1, "auto", None) for c in cases)


def test_what_varies_is_an_option_of_load_or_of_edit():
    of_edit = {axis.name for axis in AXES if not axis.metadata["of_model"]}
    assert of_edit <= {f.name for f in fields(sdedit.EditOptions)}
    assert Case(batch=3, steps=7).edit_options() == {
        "batch": 3, "steps": 7, "sampler": None, "t0": None, "spacing": None, "eta": None, "repeats": 1,
        "conditions": {},
    }  # fmt: skip


def test_fast_is_of_every_case_and_is_asked_of_loading(monkeypatch):
    cases = expand(["a.onnx"], {"steps": [2, 5], "precision": ["fp32"]}, fast=True)
    assert [case.label for case in cases] == [f"a.onnx --precision fp32 --steps {steps} --fast" for steps in (2, 5)]
    asked = []
    monkeypatch.setattr(sdedit, "load", lambda model, **options: asked.append((model, options)))
    visit.open_case(cases[0])
    assert asked == [("a.onnx", {"backend": "auto", "precision": "fp32", "fast": True, "threads": None})]


def test_every_case_is_examined_before_anything_is_measured_and_rounds_take_turns(asked):
    cases = expand([None], {"steps": [2, 3, 4]})
    bench = Bench(cases, Effort(runs=5, rounds=3))
    assert list(bench.visits()) == list(range(1, bench.total + 1))
    order = [(None if visit is None else visit.runs, case.steps) for case, visit in asked]
    assert order == [
        *((None, steps) for steps in (2, 3, 4)),
        *((2, steps) for steps in (2, 3, 4)),
        *((2, steps) for steps in (4, 3, 2)),  # backwards
        *((1, steps) for steps in (2, 3, 4)),
    ]
    assert [row.runs for row in bench.rows()] == [5, 5, 5]


def test_visited_again_a_bench_begins_again(asked):
    bench = Bench(expand([None], {"steps": [2, 3]}), Effort(runs=2, rounds=1))
    assert list(bench.visits()) == list(bench.visits()) == [1, 2, 3, 4]
    assert [row.runs for row in bench.rows()] == [2, 2]


def test_numbers_of_numpy_are_numbers(network):
    bench = Bench(expand([network], {"steps": [np.int64(2)], "t0": [np.float32(0.5)]}), Effort(np.int64(1), rounds=1))
    assert list(bench.visits()) == [1, 2]
    assert (bench.rows()[0].steps, bench.rows()[0].t0) == (2, 0.5)


@pytest.mark.parametrize(("values", "told"), [(20, "steps is 20; wanted a list"), ("20", "steps is '20'; wanted a")])
def test_what_is_listed_is_a_list(values, told):
    with pytest.raises(sdedit.OptionError, match=told):
        expand([None], {"steps": values})
    with pytest.raises(sdedit.OptionError, match="steps is"):
        Bench(expand([None], {"steps": [[values]]}), Effort())


def test_seconds_are_shared_by_the_rounds_and_every_visit_times_an_edit_at_least():
    assert Effort(seconds=6, rounds=3, warmup=0).visits == [Visit(1, 2.0, 0)] * 3
    assert Effort(runs=2, rounds=5).visits == [Visit(1, 0.0, 1)] * 2


def test_what_was_fastest_at_first_is_what_is_measured(monkeypatch):
    seen = []

    def run(case: Case, visit: Visit | None) -> dict[str, Any]:
        seen.append(case)
        pinned = replace(case, model="b.onnx", backend="openvino", precision="int8", fast=False)
        return {"facts": FACTS, "case": json.loads(json.dumps(asdict(pinned)))} if visit is None else answer(10.0)

    monkeypatch.setattr(rounds, "_run", run)
    bench = Bench(expand([None], {}, {"class_label": 3}, fast=True), Effort(runs=2, rounds=2))
    assert list(bench.visits()) == [1, 2, 3]
    pinned = Case("b.onnx", backend="openvino", precision="int8", conditions=(("class_label", 3),))
    assert seen == [replace(Case(conditions=(("class_label", 3),)), fast=True), pinned, pinned]


# --- what a row holds ------------------------------------------------------------------------------------------------


def row(*visits: dict[str, Any], **facts: Any) -> Row:
    machine = {
        "warmup": 1,
        "cpu": "CPU", "cores": 2, "system": "Linux", "python": "3", "commit": None, "load_average": 0.1, "date": "now",
    }  # fmt: skip
    return rounds.make_row(FACTS | facts, visits, machine)


def test_percentiles_are_of_all_edits_and_rates_of_the_median():
    found = row(answer(*range(1, 51)), answer(*range(51, 102), load_ms=500.0), answer(load_ms=310.0))
    assert (found.runs, found.p50_ms, found.p90_ms, found.p99_ms) == (101, 51, 91, 100)
    assert found.step_ms == 51 / 4
    assert found.images_per_s == pytest.approx(2 * 1000 / 51)
    assert found.other_ms == 50  # the network took 1
    assert found.load_ms == 310
    assert found.spread == pytest.approx((91 - 11) / 51)
    assert found.edit_samples_ms == list(range(1, 102))


def test_a_gpu_is_timed_by_its_own_clock_and_the_copies_are_said_to_be_in_the_edit():
    edits = [{"total_ms": 5.0, "loop_ms": 4.0, "network_ms": None, "evaluations": 4, "device_ms": 3.0}]
    found = row(answer(edits=edits, graph="edit", device_bytes=2**30), gpu="H100")
    assert (found.network_ms, found.device_ms, found.other_ms) == (None, 3.0, 2.0)
    assert (found.graph, found.transfers, found.device_bytes) == ("edit", "in and out", 2**30)


@pytest.fixture(scope="module")
def measured(network: Path) -> list[Row]:
    """Two cases, really measured, in processes of their own, by a process that holds 700 MB."""
    ballast = np.ones(700 * 2**17)
    bench = Bench(expand([str(network)], {"steps": [2, 5], "batch": [3]}), Effort(runs=3, rounds=2, warmup=0))
    for _ in bench.visits():
        pass
    assert ballast.sum() == ballast.size
    return bench.rows()


def test_rows_hold_the_case_as_it_was_resolved_and_their_samples(measured):
    assert [(r.model, r.steps, r.sampler, r.t0, r.backend) for r in measured] == [
        ("closed-form", steps, "ancestral", 0.5, "ort-cpu") for steps in (2, 5)
    ]
    for found in measured:
        assert (found.batch, found.runs, found.graph, found.device_ms) == (3, 3, None, None)
        assert found.p50_ms == np.median(found.edit_samples_ms)
        assert len(found.network_samples_ms) == 3
        assert len(found.load_samples_ms) == len(found.first_edit_samples_ms) == 2  # one a process
        parts = [whole - part for whole, part in zip(found.edit_samples_ms, found.network_samples_ms, strict=True)]
        assert found.other_ms == np.median(parts)
        assert all(part > 0 for part in parts)


def test_rows_say_under_which_conditions(measured):
    for found in measured:
        assert found.provider == "CPUExecutionProvider"
        assert set(found.versions) == {"sdedit-engine", "numpy", "pillow", "onnxruntime"}
        assert len(found.model_sha256) == 64
        assert found.cpu
        assert found.cores >= found.threads >= 1
        assert found.date.endswith("+00:00")
        assert found.transfers == "none"
        assert found.noise == sdedit.noise_maker()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="as Linux counts memory")
def test_peak_memory_is_of_the_case_and_not_of_the_process_that_measures(measured):
    assert all(20 * 2**20 < found.peak_bytes < 400 * 2**20 for found in measured)


# --- how it is printed -----------------------------------------------------------------------------------------------


def test_all_formats_carry_all_columns(measured):
    names = [f.name for f in fields(Row)]
    (*_, last), lines = json.loads(bench_formats.as_json(measured)), bench_formats.as_json_lines(measured).splitlines()
    assert list(last) == names
    assert json.loads(lines[-1]) == last
    assert len(lines) == 2
    table = list(csv.DictReader(io.StringIO(bench_formats.comma_separated(measured))))
    assert list(table[0]) == names
    assert [float(ms) for ms in table[1]["edit_samples_ms"].split()] == last["edit_samples_ms"]


def test_the_table_shows_what_differs_and_tells_the_rest_below(measured):
    lines = bench_formats.markdown(measured).splitlines()
    heading, rule, *cells = (line.split("|")[1:-1] for line in lines[:4])
    assert len({len(heading), len(rule), *map(len, cells)}) == 1
    headings = [word.strip() for word in heading]
    assert "steps" in headings
    assert "p50 ms" in headings
    assert not {"sampler", "device ms", "GPU MiB"} & set(headings)  # the same for all, and never there
    assert [one[headings.index("steps")].strip() for one in cells] == ["2", "5"]
    assert "sampler: ancestral" in lines
    other = [measured[0], replace(measured[1], sampler="em")]
    assert "| sampler " in bench_formats.markdown(other)


def test_bytes_are_shown_in_mebibytes():
    heading, _, line = bench_formats.markdown([row(answer(5.0, peak_bytes=300 * 2**20))]).splitlines()[:3]
    cells = dict(zip(*([word.strip() for word in one.split("|")] for one in (heading, line)), strict=True))
    assert (cells["peak MiB"], cells["p50 ms"], cells["ms/step"]) == ("300", "5.0", "1.25")


def test_models_of_one_name_are_told_apart_by_their_files_and_no_name_breaks_the_table():
    rows = [row(answer(5.0), file=file, model="a|b\nc", model_sha256=file * 32) for file in ("a.onnx", "b.onnx")]
    heading, _, *lines = bench_formats.markdown(rows).splitlines()[:4]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in (heading, *lines)]
    assert [line[1:3] for line in cells] == [["model", "file"], ["a\\|b c", "a.onnx"], ["a\\|b c", "b.onnx"]]
    assert "file" not in bench_formats.markdown(rows[:1]).splitlines()[0]
    assert bench.case_of(rows[1]).startswith("b.onnx, ")


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_one_row_a_case(asked, capsys):
    assert main(["bench", "--steps", "20,50", "--batch", "1,4", "--runs", "6", "-o", "jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["batch"], one["steps"], one["p50_ms"]) for one in rows] == [
        (1, 20, 200.0), (1, 50, 500.0), (4, 20, 200.0), (4, 50, 500.0)
    ]  # fmt: skip


@pytest.mark.parametrize(("gate", "code"), [("500", 0), ("499.9", 3)])
def test_the_gate_is_on_the_median_and_the_rows_are_printed_all_the_same(asked, capsys, gate, code):
    assert main(["bench", "--steps", "20,50", "-o", "csv", "--fail-above-ms", gate]) == code
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 3
    wanted = "error: 1 of 2 cases have a p50 above 499.9 ms, the slowest 500.0 ms: model.onnx, ort-cpu, fp32"
    assert (wanted in told.err) == (code == 3)


def test_the_gate_holds_also_where_nobody_reads_the_rows_any_more(asked, monkeypatch, capsys):
    class Left(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Left())
    assert main(["bench", "--steps", "20", "--fail-above-ms", "1"]) == 3
    assert "error: 1 of 1 cases have a p50 above 1 ms" in capsys.readouterr().err
    assert main(["bench", "--steps", "20", "--fail-above-ms", "1000"]) == 0


def test_ctrl_c_prints_what_was_measured(asked, capsys, monkeypatch):
    fake = rounds._run

    def run(case: Case, visit: Visit | None) -> dict[str, Any]:
        if len(asked) == 3:
            raise KeyboardInterrupt
        return fake(case, visit)

    monkeypatch.setattr(rounds, "_run", run)
    assert main(["bench", "--steps", "20,50", "-o", "jsonl"]) == 130
    told = capsys.readouterr()
    (only,) = (json.loads(line) for line in told.out.splitlines())
    assert (only["steps"], only["runs"]) == (20, 5)
    assert "error: interrupted" in told.err


@pytest.mark.parametrize(("slow", "warned"), [(11.0, False), (12.0, True)])
def test_a_wide_spread_is_warned_of(monkeypatch, capsys, slow, warned):
    found = {True: {"facts": FACTS, "case": asdict(Case())}, False: answer(*[10.0] * 8, slow, slow)}
    monkeypatch.setattr(rounds, "_run", lambda case, visit: found[visit is None])
    assert main(["bench", "--rounds", "1"]) == 0
    said = capsys.readouterr().err
    wanted = "batch 2, t0 0.5, 4 steps of em (uniform): its middle 80 % of edits spread"
    assert (wanted in said) == warned


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--backend", "warp"], 2, "unknown backend 'warp'"),
        (["--steps", "20,,50"], 2, "argument --steps: '20,,50' has an empty value; wanted a list such as 20,50"),
        (["--steps", ""], 2, "argument --steps: '' has an empty value"),
        (["--steps", "20,20"], 2, "steps lists 20 twice"),
        (["--steps", "few"], 2, "argument --steps: 'few': wanted whole numbers, with commas between"),
        (["--t0", "0.3,high"], 2, "argument --t0: '0.3,high': wanted numbers, with commas between"),
        (["--t0", "0.3,1.5"], 2, "t0 is 1.5"),
        (["--sampler", "em,euler"], 2, "euler"),
        (["--batch", "0"], 2, "batch is 0; wanted a whole number from 1"),
        (["a.onnx", "a.onnx"], 2, "model lists a.onnx twice"),
        (["nowhere.onnx"], 1, "nowhere.onnx: no such file"),
        (["--runs", "3", "--seconds", "2"], 2, "not allowed with argument"),
        (["--seconds", "0"], 2, "seconds is 0.0; wanted a number in (0"),
        (["--seconds", "nan"], 2, "seconds is nan"),
        (["--warmup", "-1"], 2, "warmup is -1"),
        (["--fail-above-ms", "nan"], 2, "fail-above-ms is nan; wanted a number above 0"),
        (
            ["-o", "rows.json"],
            2,
            "'rows.json' is not one of md, csv, json, jsonl: the format of stdout, which '>' sends",
        ),
        (["--set", "class_label"], 2, "'class_label' is not NAME=VALUE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_work_is_refused_before_any_process_starts(asked, capsys, words, code, message):
    try:
        found = main(["bench", *words])
    except SystemExit as stop:  # argparse
        found = stop.code
    told = capsys.readouterr()
    assert (found, told.out, asked) == (code, "", [])
    assert message in told.err
    assert told.err.splitlines()[-1].startswith("hint: ")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--threads", "1,0"], 2, "the bundled model --threads 0: threads is 0; wanted a whole number"),
        (["--precision", "int8"], 1, "the bundled model --precision int8: precision int8 was asked for; eurosat-64 is"),
        (["--set", "class_label=3"], 2, "the model has no input class_label to set"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_only_the_model_can_refuse_is_an_error_before_anything_is_measured(capsys, words, code, message):
    assert main(["bench", *words]) == code
    told = capsys.readouterr()
    assert told.out == ""
    assert message in told.err


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "kill -9 $$",
            "the bundled model: its process was ended by SIGKILL\nhint: the system may have run out",
        ),
        ("exit 7", "the bundled model: its process failed with exit code 7\nhint: what it wrote is above"),
    ],
)
def test_a_process_that_dies_is_an_error_with_a_reason(capsys, monkeypatch, tmp_path, script, message):
    (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert main(["bench"]) == 1
    assert message in capsys.readouterr().err
