"""A time budget becomes a number of steps. Time is a fake clock here: what is computed from it is tested."""

import json
from collections import deque

import numpy as np
import pytest

import sdedit
from sdedit import budget, editor, image
from sdedit.backends.ort import OrtBackend
from sdedit.budget import Budget, StepTimes
from sdedit.cli import budget as command_budget
from sdedit.cli import main as cli

GUIDE = np.full((8, 12, 3), 60, np.uint8)


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    perf_counter = __call__

    def wait(self, milliseconds: float) -> None:
        self.now += milliseconds / 1e3


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """In the editor and the budget, a network call takes 10 ms and nothing else takes any time."""
    clock = Clock()
    monkeypatch.setattr(editor, "time", clock)
    monkeypatch.setattr(budget.StepTimes.calibrate, "__defaults__", (clock,))
    bind = OrtBackend.bind

    def slow(self, *arguments):
        denoiser = bind(self, *arguments)

        def call(x, sigma):
            clock.wait(10)
            return denoiser(x, sigma)

        return call

    monkeypatch.setattr(OrtBackend, "bind", slow)
    return clock


@pytest.fixture
def fresh(network) -> sdedit.Editor:
    return sdedit.load(network, backend="ort-cpu", threads=1)


def measured(step_ms: list[float], finish_ms: float = 0.0) -> StepTimes:
    return StepTimes(deque(step_ms, budget.REMEMBERED), deque([finish_ms], budget.REMEMBERED))


def steps(times: StepTimes, max_ms: float, spent_ms: float = 0.0, **shape: int) -> int:
    return times.pick(max_ms, spent_ms, **({"batches": 1, "repeats": 1, "most_steps": 50} | shape)).steps


def test_as_many_steps_as_fit_run():
    settled = measured([10.0] * 32)
    assert steps(settled, 105) == 10
    assert steps(settled, 105, spent_ms=40) == 6
    assert steps(settled, 10) == 1


def test_the_largest_budget_is_enough_for_the_fastest_steps():
    assert steps(measured([5e-324] * 32), budget.MOST_MS) == 50


def test_never_more_than_without_a_budget():
    assert steps(measured([10.0] * 32), 1e6, most_steps=20) == 20


def test_batches_and_repeats_share_the_budget():
    settled = measured([10.0] * 32)
    assert steps(settled, 240, batches=2, repeats=3) == 4


def test_the_pictures_of_every_batch_are_counted():
    assert steps(measured([10.0] * 32, finish_ms=20.0), 183, batches=2) == 7  # 2 (7·10 + 20·1.05) = 182


def test_the_slowest_of_many_measurements_counts():
    assert steps(measured([10.0] * 31 + [20.0]), 100) == 5


def test_few_measurements_are_taken_with_a_margin():
    assert steps(measured([10.0, 10.0]), 105) == 10  # 5 %
    assert steps(measured([10.0, 10.0]), 104) == 9
    assert steps(measured([8.0, 10.0]), 119) == 9  # 10 + (10 - 8)


def test_an_impossible_budget_is_refused_with_the_least_possible_one():
    with pytest.raises(sdedit.OptionError) as caught:
        steps(measured([31.0] * 32), 20, spent_ms=4)
    assert str(caught.value) == (
        "max_ms is 20; one step takes 31 ms beyond 4 ms for all else: the least possible is 35"
    )
    assert steps(measured([31.0] * 32), 35, spent_ms=4) == 1


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), float("inf"), 1.7e308, 10**400, "500", True])
def test_a_budget_is_a_number_of_milliseconds(wrong, fresh):
    with pytest.raises(sdedit.OptionError, match="wanted milliseconds, above 0"):
        fresh.edit(GUIDE, max_ms=wrong)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1e308, 10**400, "5", True, None])
def test_what_is_spent_is_a_number_of_milliseconds(wrong, fresh):
    with pytest.raises(sdedit.OptionError, match=r"spent_ms is .*; wanted milliseconds"):
        fresh.edit(GUIDE, max_ms=500, spent_ms=wrong)


def test_a_budget_may_be_a_number_of_numpy(fresh):
    assert fresh.edit(GUIDE, steps=2, max_ms=np.float32(1e6)).options.steps == 2


def test_a_calibration_leaves_its_first_run_out():
    clock, times, costs = Clock(), StepTimes(), iter((90, 22, 26))
    times.calibrate(lambda steps: clock.wait(next(costs)), lambda: clock.wait(3), 1e6, 50, clock)
    assert list(times.step_ms) == pytest.approx([11, 13])
    assert list(times.finish_ms) == pytest.approx([3, 3])


def test_what_is_known_can_be_asked_while_another_thread_calibrates_again():
    clock, times, picked = Clock(), StepTimes(), []
    for known in (times.step_ms, times.finish_ms):
        known.append(5.0)

    def run(steps):
        clock.wait(steps)
        picked.append(times.pick(100, 0, batches=1, repeats=1, most_steps=50).steps)

    times.calibrate(run, lambda: clock.wait(1), 1e6, 50, clock)
    assert picked == [18, 18, 18]


def test_a_calibration_of_a_slow_network_is_one_step():
    clock, times = Clock(), StepTimes()
    times.calibrate(lambda steps: clock.wait(3000 * steps), lambda: None, 10_000, 50, clock)
    assert list(times.step_ms) == pytest.approx([3000])


def test_an_edit_takes_the_steps_that_fit_beside_its_calibration(clock, fresh):
    out = fresh.edit(GUIDE, max_ms=200)
    assert out.options.steps == out.timings.evaluations == 16  # 3 evaluations to calibrate; (200 - 30) / 10.5
    assert out.budget == Budget(
        max_ms=200, spent_ms=pytest.approx(30), step_ms=pytest.approx(10.5), finish_ms=0.0, evaluations_per_step=1,
        most_steps=50, steps=16,
    )  # fmt: skip


def test_a_second_edit_of_the_shape_is_not_calibrated(clock, fresh):
    fresh.edit(GUIDE, max_ms=200)
    assert fresh.edit(GUIDE, max_ms=200).budget.spent_ms == 0
    assert fresh.edit(GUIDE, max_ms=400, batch=2, samples=2).budget.spent_ms > 0


def test_edits_that_were_slow_make_the_next_ones_careful(clock, fresh):
    fresh.edit(GUIDE, max_ms=200)
    fresh.edit(GUIDE, max_ms=200, on_step=lambda progress: clock.wait(10))
    assert fresh.edit(GUIDE, max_ms=200).options.steps == 200 // (20 + 10)


def test_a_budget_is_only_refused_by_what_is_timed_at_the_moment(clock, fresh):
    fresh.edit(GUIDE, max_ms=200)
    fresh.edit(GUIDE, max_ms=200, on_step=lambda progress: clock.wait(500))  # the machine was busy
    assert fresh.edit(GUIDE, max_ms=200).budget.step_ms == pytest.approx(10.5)
    with pytest.raises(sdedit.OptionError, match=r"max_ms is 9; one step takes 11 ms beyond 10 ms"):
        fresh.edit(GUIDE, max_ms=9)


def test_steps_are_the_upper_bound_and_time_before_the_call_counts(clock, fresh):
    assert fresh.edit(GUIDE, steps=4, max_ms=1000).options.steps == 4
    assert fresh.edit(GUIDE, max_ms=1000, spent_ms=900).options.steps == 9


def test_samples_repeats_and_a_mask_are_counted(clock, fresh):
    mask = np.zeros((8, 12), np.uint8)
    mask[2:5, 3:7] = 255
    out = fresh.edit(GUIDE, mask=mask, samples=3, batch=2, repeats=2, max_ms=290)
    assert out.timings.evaluations == 2 * 2 * out.options.steps
    assert out.options.steps == 6  # (290 - 30) / (4 · 10.5)
    assert out.timings.total_ms <= 290


def test_the_same_steps_asked_for_give_the_same_bits(clock, fresh):
    out = fresh.edit(GUIDE, max_ms=200, seed=3)
    assert out.x.tobytes() == fresh.edit(GUIDE, steps=out.options.steps, seed=3).x.tobytes()
    assert fresh.edit(GUIDE, seed=3).budget is None


def test_the_command_reports_the_choice_and_replays_it(network, write_png, tmp_path, capsys):
    guide, out, again = write_png("guide.png", GUIDE), tmp_path / "out.png", tmp_path / "again.png"
    words = ["edit", str(guide), "-m", str(network), "--backend", "ort-cpu", "--threads", "1"]
    assert cli.main([*words, "-o", str(out), "--steps", "3", "--max-ms", "1e6", "--json"]) == 0
    told = capsys.readouterr()
    answer = json.loads(told.out)
    assert answer["options"]["steps"] == answer["budget"]["steps"] == 3
    assert answer["budget"]["max_ms"] == 1e6
    assert answer["budget"]["spent_ms"] > 0
    assert "budget: 3 of 3 steps in 1e+06 ms" in told.err
    assert cli.main(["inspect", str(out), "--json"]) == 0
    assert '"most_steps": 3' in capsys.readouterr().out
    assert cli.main(["edit", "--replay", str(out), str(guide), "-m", str(network), "-o", str(again)]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_the_command_refuses_a_budget_that_is_gone_before_the_first_step(network, write_png, tmp_path, capsys):
    guide, out = write_png("guide.png", GUIDE), tmp_path / "out.png"
    assert cli.main(["edit", str(guide), "-m", str(network), "-o", str(out), "--max-ms", "1"]) == 2
    assert "the least possible is" in capsys.readouterr().err
    assert not out.exists()


def test_a_single_step_that_is_possible_is_possible_within_a_budget(fresh):
    edits = {"t0": 0.0005, "steps": 1}
    assert fresh.edit(GUIDE, max_ms=1e6, **edits).x.tobytes() == fresh.edit(GUIDE, **edits).x.tobytes()


def test_writing_is_reckoned_by_the_guides_own_sizes_where_there_are_masks(editor, write_png, monkeypatch):
    monkeypatch.setattr(command_budget, "since_start_ms", lambda: 0.0)
    files = [write_png(f"{side}.png", np.zeros((side, side, 3), np.uint8)) for side in (10, 1000, 1000)]
    guides = [image.read_file(path) for path in files]
    spent = command_budget.spent_ms(editor, None, guides, guides[:1], 6)
    writing = 2 * 2.0001 * command_budget.WRITING_MS_PER_MEGAPIXEL
    assert spent == pytest.approx(command_budget.WRITING_MS + writing)
