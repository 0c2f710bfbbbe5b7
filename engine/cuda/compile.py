"""Compile the kernels that the package ships: python -m sdedit.cuda.compile [FOLDER]

For developers: needs nvcc 13 or later; running the engine needs none. Writes sdedit.fatbin, machine code for every
architecture in ARCHITECTURES and PTX that newer ones compile for themselves, and sdedit.json, which says from what.
"""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

SOURCES = ("sdedit.cuh", "sdedit.cu")
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
PTX = 75  # of the oldest, which every later GPU can compile
FOLDER = Path(__file__).parent


def source_sha256() -> str:
    """Of the sources that a fatbin was made from, so that a stale one shows."""
    return hashlib.sha256(b"".join((FOLDER / name).read_bytes() for name in SOURCES)).hexdigest()


def nvcc_version(nvcc: str = "nvcc") -> str:
    """Such as 13.0.88. Raises OSError without nvcc."""
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", printed)
    if found is None:
        raise OSError(f"nvcc does not say its version: {printed}")
    return found[1]


def compile_kernels(folder: Path, nvcc: str = "nvcc") -> tuple[dict[str, Any], str]:
    """Write sdedit.fatbin and sdedit.json to `folder`. The manifest, and what ptxas says of every kernel."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    targets.append(f"-gencode=arch=compute_{PTX},code=compute_{PTX}")
    fatbin = folder / "sdedit.fatbin"
    command = [nvcc, "-fatbin", "-std=c++17", "-O3", "-Xptxas", "-v", *targets, "-o", str(fatbin), "sdedit.cu"]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"nvcc failed:\n{done.stderr}")
    manifest = {
        "source_sha256": source_sha256(),
        "fatbin_sha256": hashlib.sha256(fatbin.read_bytes()).hexdigest(),
        "nvcc": nvcc_version(nvcc),
        "architectures": [f"sm_{a}" for a in ARCHITECTURES],
        "ptx": f"compute_{PTX}",
    }
    (folder / "sdedit.json").write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    return manifest, done.stderr


def main() -> None:
    """Compile into the folder that is named, else where the package looks."""
    _, said = compile_kernels(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
    print(said, end="")


if __name__ == "__main__":
    main()
