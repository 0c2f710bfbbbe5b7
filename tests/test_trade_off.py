"""What the report on the trade-off says follows from its figures."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from trade_off_report import _claims


def report(kids, l2s=(3.0, 5.0, 7.0, 9.0), differences=()):
    t0 = [
        {"t0": t0, "kid": kid, "kid_se": 0.001, "l2": l2, "l2_se": 0.1}
        for t0, kid, l2 in zip((0.2, 0.4, 0.6, 0.8), kids, l2s, strict=True)
    ]
    paired = [{"one": {"steps": steps}, "kid": kid, "kid_se": 0.002} for steps, kid in differences]
    return {"t0": t0, "guide": [{"colors": 6, "kid": 0.2, "kid_se": 0.01}], "differences": paired}


def test_a_kid_that_falls_all_along_is_said_to():
    l2, kid = _claims(report((0.10, 0.09, 0.08, 0.07)))
    assert l2.startswith("L2 rises with every t0 (paper: rises): 3.0 at 0.2 to 9.0 at 0.8")
    assert kid.startswith("KID falls with t0 (paper: falls): 0.100 ± 0.001 at t0 = 0.2, 0.070 ± 0.001 at t0 = 0.8;")


@pytest.mark.parametrize("kids", [(0.10, 0.12, 0.08, 0.09), (0.10, 0.07, 0.08, 0.06)])
def test_one_that_does_not_is_not_and_its_turns_are_given(kids):
    _, kid = _claims(report(kids))
    assert kid.startswith("KID does **not** fall all along (paper: falls): 0.100 ± 0.001 at t0 = 0.2, ")
    assert f"{min(kids):.3f} ± 0.001" in kid


def test_an_l2_that_does_not_rise_is_said_not_to():
    assert next(_claims(report((0.4, 0.3, 0.2, 0.1), l2s=(3, 5, 4, 9)))).startswith("L2 does **not** rise")


def test_only_differences_beyond_twice_their_error_are_claimed():
    *_, worse, better = _claims(report((0.4, 0.3, 0.2, 0.1), differences=((20, 0.1), (50, 0.003), (99, -0.01))))
    assert "0.1000 ± 0.0020 at N = 20. `em` is worse" in worse
    assert "-0.0100 ± 0.0020 at N = 99. `em` is better" in better
    assert "N = 50" not in worse + better
