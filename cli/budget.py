"""`--max-ms`: what of a budget goes to other things than the edit, from process start to file written."""

import os
import sys
import time
from typing import TYPE_CHECKING

from sdedit.cli.terminal import say

if TYPE_CHECKING:
    from sdedit.budget import Budget
    from sdedit.editor import Editor
    from sdedit.image import Encoded

WRITING_MS = 10  # a small file; and, for noise compressed badly by a slow machine,
WRITING_MS_PER_MEGAPIXEL = 200


def spent_ms(
    editor: "Editor", size: tuple[int, int] | None, guides: "list[Encoded]", masks: "list[Encoded]", results: int
) -> float:
    """Milliseconds since the process began, and those that writing so many results is allowed.

    size: the model's, (width, height); None is its own. The search of --fast, made once on a machine, is not counted
    but told.
    """
    sizes = [guide.size for guide in guides] if masks else [editor.artifact.frame(size)] * len(guides)
    pixels = sum(width * height for width, height in sizes) * results / len(sizes)
    if editor.search_ms:
        say(f"budget: the search of --fast took {editor.search_ms:.0f} ms beside it, which later runs will not")
    return since_start_ms() - editor.search_ms + WRITING_MS + WRITING_MS_PER_MEGAPIXEL * pixels / 1e6


def since_start_ms() -> float:
    """Since this process was started, as the system tells (Linux, to 10 ms); else the CPU time that it has used."""
    if sys.platform == "linux":
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # field 22: since the system started
        return 1e3 * (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return 1e3 * time.process_time()


def told(budget: "Budget") -> str:
    """The choice in one line."""
    return (
        f"budget: {budget.steps} of {budget.most_steps} steps in {budget.max_ms:g} ms "
        f"({budget.step_ms * budget.evaluations_per_step:.1f} ms a step, {budget.spent_ms:.0f} ms for all else)"
    )
