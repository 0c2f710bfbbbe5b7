"""A verification report on the terminal."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdedit.verify import Report


def show_report(report: "Report", title: str) -> None:
    """The table: one row an evaluation, then the worst."""
    print(f"verification {title}\n{'where':>10}{'t':>10}{'σ':>12}{'error':>12}")
    for e in report.evaluations:
        print(f"{e.where:>10}{e.t:>10.4f}{e.sigma:>12.5g}{e.error:>12.2e}")
    worst, limit = report.worst, "none" if math.isinf(report.tolerance) else f"{report.tolerance:.0e}"
    print(f"worst {worst.error:.2e} at σ = {worst.sigma:.5g}, tolerance {limit}: {'ok' if report.within else 'FAILED'}")
    if report.images:
        print(
            f"pictures after {report.images.steps} steps differ by {report.images.mean:.3f} of 255 in the mean, "
            f"{report.images.percentile_99_9:.1f} at the 99.9th percentile"
        )
