"""A benchmark's result in its file: whole at any moment, for a run may be stopped or killed, and hours are in it."""

import json
import os
from pathlib import Path


def keep(path: Path, found: object) -> None:
    partly = path.with_suffix(".part")
    partly.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    os.replace(partly, path)
