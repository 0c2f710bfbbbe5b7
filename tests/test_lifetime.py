"""An editor in a program: warm before the first edit, shared by threads, closed while they run."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from closed_form import SDES, metadata, save
from conftest import SHAPE
from onnx import helper

import sdedit
from sdedit.budget import StepTimes
from sdedit.lifetime import Lifetime

HEIGHT, WIDTH = SHAPE[1:]


@pytest.fixture
def fresh(network):
    return sdedit.load(network, backend="ort-cpu", threads=1)


def uses(picture):
    """What a program does with an editor, by name: each gives bytes that depend on it alone."""
    guide, other = picture(WIDTH, HEIGHT), picture(2 * WIDTH, HEIGHT, 1)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, 4:] = 200
    tensor = np.linspace(-1, 1, 2 * int(np.prod(SHAPE)), dtype=np.float32).reshape(2, *SHAPE)

    def watched(editor, seed):
        seen = []

        def look(progress):
            seen.append(progress.step.denoised.tobytes())
            progress.preview()

        return editor.edit([guide, other], seed=seed, steps=6, batch=2, on_step=look).x.tobytes() + b"".join(seen)

    return {
        "alone": lambda editor, seed: editor.edit(guide, seed=seed, steps=12).x.tobytes(),
        "in batches": lambda editor, seed: editor.edit(other, seed=seed, steps=8, samples=5, batch=3).x.tobytes(),
        "masked": lambda editor, seed: editor.edit(guide, mask=mask, seed=seed, steps=9, repeats=2).x.tobytes(),
        "watched": watched,
        "tensors": lambda editor, seed: editor.edit_tensor(tensor, seed=seed, steps=10).tobytes(),
    }


# --- threads -----------------------------------------------------------------------------------------------------


def test_eight_threads_that_do_different_things_get_what_they_would_get_in_turn(fresh, picture):
    work = [(use, seed) for seed in range(8) for use in uses(picture).values()]
    in_turn = [use(fresh, seed) for use, seed in work]
    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(lambda one: one[0](fresh, one[1]), work))
    assert at_once == in_turn
    assert len(set(in_turn)) == len(work)


def test_a_close_while_threads_edit_lets_each_finish_or_refuses_it(network, picture):
    known = {(name, seed): use(sdedit.load(network, backend="ort-cpu", threads=1), seed)
             for name, use in uses(picture).items() for seed in range(4)}  # fmt: skip
    editor = sdedit.load(network, backend="ort-cpu", threads=1)
    started, done, refused = threading.Semaphore(0), [], []

    def work(number):
        for turn in range(1000):
            name, seed = list(known)[(7 * number + turn) % len(known)]
            started.release()
            try:
                done.append(uses(picture)[name](editor, seed) == known[name, seed])
            except sdedit.ClosedError as error:
                refused.append(str(error))
                return

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(24):
        started.acquire()
    editor.close()
    finished = len(done)
    for thread in threads:
        thread.join(timeout=60)
    assert refused == ["the editor of closed-form is closed"] * 8
    assert all(done)
    assert len(done) - finished <= 8  # those that had come out of the editor, and not yet said so


# --- close -------------------------------------------------------------------------------------------------------


def test_what_is_closed_says_so_and_how_to_go_on(fresh, picture):
    guide = picture(WIDTH, HEIGHT)
    options = sdedit.EditOptions(t0=0.5, steps=2).resolved({})
    fresh.close()
    for use in (
        lambda: fresh.edit(guide),
        lambda: fresh.edit_tensor(np.zeros((1, *SHAPE), np.float32)),
        lambda: fresh.warmup(),
        lambda: fresh.batches(options).__enter__(),
    ):
        with pytest.raises(sdedit.ClosedError, match="the editor of closed-form is closed") as raised:
            use()
        assert raised.value.hint == "load the model again: sdedit.load"
    with pytest.raises(sdedit.ClosedError, match="the backend is closed"):
        fresh.backend.bind(1, {})
    fresh.close()


def test_with_closes_also_when_it_fails_and_results_stay(network, picture):
    editor = sdedit.load(network, backend="ort-cpu", threads=1)
    result = editor.edit(picture(WIDTH, HEIGHT), steps=2)
    with pytest.raises(ZeroDivisionError), editor as same:
        assert 1 / (same is not editor)
    with pytest.raises(sdedit.ClosedError):
        editor.edit(picture(WIDTH, HEIGHT))
    assert result.images[0].size == (WIDTH, HEIGHT)
    assert editor.backend.name == "ort-cpu"


def test_an_edit_cannot_close_its_own_editor(fresh, picture):
    def close(progress):
        fresh.close()

    with pytest.raises(sdedit.ClosedError, match="in use by the thread that closes it"):
        fresh.edit(picture(WIDTH, HEIGHT), on_step=close)
    assert fresh.edit(picture(WIDTH, HEIGHT), steps=2).x.shape == (1, *SHAPE)  # it is still open


def test_close_waits_for_the_edit_that_runs_and_so_does_a_second_one(fresh, picture):
    inside, go_on, order = threading.Event(), threading.Event(), []

    def hold(progress):
        inside.set()
        assert go_on.wait(60)

    def close(name):
        fresh.close()
        order.append(name)

    editing = threading.Thread(
        target=lambda: (fresh.edit(picture(WIDTH, HEIGHT), steps=1, on_step=hold), order.append("edit"))
    )
    editing.start()
    assert inside.wait(60)
    closing = [threading.Thread(target=close, args=(name,)) for name in ("close", "again")]
    for thread in closing:
        thread.start()
    while not fresh._lifetime._closing:
        time.sleep(0.001)
    with pytest.raises(sdedit.ClosedError):
        fresh.edit(picture(WIDTH, HEIGHT))
    assert order == []
    go_on.set()
    for thread in (editing, *closing):
        thread.join(timeout=60)
    assert sorted(order) == ["again", "close", "edit"]


def test_a_close_that_is_interrupted_can_be_done_again():
    lifetime, freed, inside, leave = Lifetime("it", "open it again"), [], threading.Event(), threading.Event()

    def use():
        with lifetime.inside():
            inside.set()
            assert leave.wait(60)

    using = threading.Thread(target=use)
    using.start()
    assert inside.wait(60)
    wait = lifetime._changed.wait
    lifetime._changed.wait = interrupted = mock.Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        lifetime.close(lambda: freed.append(1))
    interrupted.assert_called_once()
    lifetime._changed.wait = wait
    free = lambda: freed.append(1)  # noqa: E731
    closing = [threading.Thread(target=lifetime.close, args=(free,), daemon=True) for _ in range(2)]
    for thread in closing:
        thread.start()
    leave.set()
    for thread in (using, *closing):
        thread.join(timeout=60)
    assert freed == [1]


def closes_meanwhile(editor):
    """Closes an editor from another thread. The thread, once `close` has been called."""
    closing = threading.Thread(target=editor.close)
    closing.start()
    while not editor._lifetime._closing:
        time.sleep(0.001)
    return closing


@pytest.fixture(scope="module")
def resizable(models):
    """A model of any size: D = tanh(x)."""
    described = metadata((3, 64, 64), SDES["vp"])
    described["image"] |= {"dynamic": True, "multiple": 8}
    nodes = [helper.make_node("Tanh", ["x"], ["denoised"])]
    return save(models / "resizable.onnx", nodes, {}, described, shape=(3, "height", "width"))


def test_a_close_between_the_sizes_of_an_edit_waits_for_its_end(resizable, picture):
    """Windows of two sizes are two executors: at the first step the second one is yet to be had."""
    mask = np.zeros((64, 64), np.uint8)
    mask[4:8, 4:8] = mask[56:60, 20:60] = 255
    options = {"mask": mask, "region": "auto", "steps": 2, "seed": 3}
    guide, closing, sizes = picture(64, 64), [], set()
    wanted = sdedit.load(resizable, backend="ort-cpu", threads=1).edit(guide, **options).x
    editor = sdedit.load(resizable, backend="ort-cpu", threads=1)

    def close(progress):
        if not closing:
            closing.append(closes_meanwhile(editor))
        sizes.add(progress.step.denoised.shape)
        assert closing[0].is_alive()

    result = editor.edit(guide, on_step=close, **options)
    closing[0].join(timeout=60)
    assert len(sizes) == 2
    assert np.array_equal(result.x, wanted)
    with pytest.raises(sdedit.ClosedError):
        editor.edit(guide)


def test_a_close_after_a_budget_was_calibrated_waits_for_the_edit(fresh, picture, monkeypatch):
    closing = []
    pick = StepTimes.pick

    def close_then_pick(*arguments, **options):
        closing.append(closes_meanwhile(fresh))
        return pick(*arguments, **options)

    monkeypatch.setattr(StepTimes, "pick", close_then_pick)
    result = fresh.edit(picture(WIDTH, HEIGHT), steps=2, max_ms=60_000)
    closing[0].join(timeout=60)
    assert result.budget.steps == 2


def test_a_use_within_a_use_is_finished_too():
    lifetime, closed = Lifetime("it", ""), []
    with lifetime.inside():
        closing = threading.Thread(target=lambda: lifetime.close(lambda: closed.append(1)))
        closing.start()
        while not lifetime._closing:
            time.sleep(0.001)
        with lifetime.inside():
            assert closed == []
    closing.join(timeout=60)
    assert closed == [1]
    with pytest.raises(sdedit.ClosedError), lifetime.inside():
        pass


def test_what_was_bound_before_lives_on(fresh):
    denoiser = fresh.backend.bind(1, {})
    x, sigma = np.ones((1, *SHAPE), np.float32), np.ones(1, np.float32)
    before = denoiser(x, sigma).copy()
    fresh.close()
    assert np.array_equal(denoiser(x, sigma), before)


def test_a_failure_to_free_is_told_once():
    frees = []

    def free():
        frees.append(1)
        raise sdedit.DeviceError("cuMemFree failed", hint="")

    lifetime = Lifetime("it", "")
    with pytest.raises(sdedit.DeviceError):
        lifetime.close(free)
    lifetime.close(free)
    assert frees == [1]


WATCHED = """
import sys
from pathlib import Path
import numpy as np
import sdedit

def resident():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1]) / 2**20

guide = np.zeros((1, 3, 8, 12), np.float32)
sdedit.load(sys.argv[1], backend="ort-cpu", threads=1).edit_tensor(guide, steps=1)  # a small one: libraries are in
before = resident()
for _ in range(3):
    with sdedit.load(sys.argv[2], backend="ort-cpu", threads=1) as editor:
        editor.edit_tensor(guide, steps=1)
        loaded = resident()
    print(loaded - before, resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_the_memory_of_the_weights_is_given_back(models, network):
    """In a process of its own: allocators of long test runs keep what they had."""
    wide, layers = 192, 60
    rng = np.random.default_rng(0)
    channels = [3, *[wide] * layers, 3]
    weights = {
        f"w{n}": rng.standard_normal((after, before, 3, 3)).astype(np.float32) / 100
        for n, (before, after) in enumerate(pairwise(channels))
    }
    names = ["x", *(f"h{n}" for n in range(len(weights) - 1)), "denoised"]
    nodes = [
        helper.make_node("Conv", [names[n], f"w{n}"], [names[n + 1]], pads=[1, 1, 1, 1]) for n in range(len(weights))
    ]
    big = save(models / "big.onnx", nodes, weights, metadata(SHAPE, SDES["vp"]), shape=SHAPE)
    megabytes = sum(one.nbytes for one in weights.values()) / 2**20
    words = [sys.executable, "-c", WATCHED, str(network), str(big)]
    printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    for line in printed.splitlines():
        loaded, closed = map(float, line.split())
        assert loaded > megabytes
        assert closed < megabytes / 4


# --- warm-up -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_warming_up_is_one_evaluation_of_the_batch_that_will_come(masked, fresh, monkeypatch):
    shapes = []
    bind = fresh.backend.bind

    def counted(*arguments):
        denoiser = bind(*arguments)
        return lambda x, sigma: (shapes.append(x.shape), denoiser(x, sigma))[1]

    monkeypatch.setattr(fresh.backend, "bind", counted)
    fresh.warmup(batch=4, steps=30, repeats=2, masked=masked)
    assert shapes == [(4, *SHAPE)]


def test_warming_up_changes_no_result(fresh, editor, picture):
    fresh.warmup(batch=2)
    options = {"steps": 4, "seed": 3, "samples": 3, "batch": 2}
    guide = picture(WIDTH, HEIGHT)
    assert np.array_equal(fresh.edit(guide, **options).x, editor.edit(guide, **options).x)


def test_warming_up_wants_what_an_edit_wants(fresh, labelled):
    with pytest.raises(sdedit.OptionError, match="the model needs a value for its input class_label"):
        sdedit.load(labelled, backend="ort-cpu").warmup()
    sdedit.load(labelled, backend="ort-cpu").warmup(conditions={"class_label": 1})
    with pytest.raises(sdedit.OptionError, match="size is 24x16"):
        fresh.warmup(size=(24, 16))
    with pytest.raises(sdedit.OptionError, match="unknown fit 'squeeze'"):
        fresh.warmup(fit="squeeze")
    with pytest.raises(sdedit.OptionError, match="unknown option wide"):
        fresh.warmup(wide=True)
