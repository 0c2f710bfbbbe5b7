"""Build the operators that the package ships: python -m sdedit.operators.ship [-o FOLDER] [--headers FOLDER]

For developers, on Linux and x86-64 with g++ 12 or later and the C headers of ONNX Runtime 1.20 or later; running the
engine needs neither. Writes liboperators.so, which is linked against the C library alone, of 2011 or later, and
liboperators.json, which says from what it was made.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sdedit.errors import SdeditError
from sdedit.operators.shipped import LIBRARY

FOLDER = LIBRARY.parent
MANIFEST = "liboperators.json"
HEADERS = ("kernels", "vectors", "products", "convolution", "group_norm", "attention")
SOURCES = ("operators.cpp", "kernels.cpp", *(f"{name}.h" for name in HEADERS))
QUIET = "-Wno-maybe-uninitialized"  # of which g++ 12 warns in its own intrinsics
UNITS = {
    "v3": ["-march=x86-64-v3", "-DKERNELS=kernels_v3"],
    "v4": ["-march=x86-64-v4", "-DKERNELS=kernels_v4", QUIET],
    "bf16": ["-march=x86-64-v4", "-mavx512bf16", "-DKERNELS=kernels_bf16", QUIET],
    "fp16": ["-march=x86-64-v4", "-mavx512fp16", "-DKERNELS=kernels_fp16", QUIET],
}
FLAGS = [
    "-std=c++17", "-O3", "-fno-math-errno", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics",
    "-fvisibility=hidden", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-psabi",
]  # fmt: skip
LINK = ["-shared", "-s", "-static-libgcc", "-Wl,-z,defs", "-Wl,-z,now", "-Wl,-z,nodelete", "-Wl,--build-id=none"]
RUNTIME_HEADERS = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime")


def source_sha256() -> str:
    """Of the sources that a library was made from, so that a stale one shows."""
    return hashlib.sha256(b"".join((FOLDER / name).read_bytes() for name in SOURCES)).hexdigest()


def headers() -> Path | None:
    """Where the system keeps onnxruntime_c_api.h."""
    return next((Path(one) for one in RUNTIME_HEADERS if (Path(one) / "onnxruntime_c_api.h").is_file()), None)


def ship(folder: Path, include: Path) -> dict[str, Any]:
    """Write liboperators.so and liboperators.json to `folder`. The manifest. Raises SdeditError."""
    with tempfile.TemporaryDirectory() as scratch:
        objects = [f"{scratch}/operators.o"]
        _run("g++", *FLAGS, f"-I{include}", "-c", FOLDER / "operators.cpp", "-o", objects[0])
        for unit, told in UNITS.items():
            objects.append(f"{scratch}/{unit}.o")
            _run("g++", *FLAGS, *told, "-c", FOLDER / "kernels.cpp", "-o", objects[-1])
        _run("gcc", *LINK, "-o", folder / LIBRARY.name, *objects)
    manifest = {
        "source_sha256": source_sha256(),
        "library_sha256": hashlib.sha256((folder / LIBRARY.name).read_bytes()).hexdigest(),
        "compiler": f"g++ {_run('g++', '-dumpfullversion').strip()}",
        "flags": {"all": FLAGS, "kernels.cpp": UNITS, "link": LINK},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    return manifest


def _run(*command: str | Path) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise SdeditError(f"{command[0]}: {error.strerror}", hint="apt-get install g++") from error
    if done.returncode:
        raise SdeditError(f"{command[0]} failed:\n{done.stderr.strip()}", hint="g++ 12 or later is needed")
    return done.stdout


def main() -> None:
    """Build into the folder that is named, else where the package looks."""
    parser = argparse.ArgumentParser(prog="python -m sdedit.operators.ship", description="Build the shipped operators.")
    parser.add_argument("-o", "--output", metavar="FOLDER", type=Path, default=FOLDER, help="where to")
    parser.add_argument("--headers", metavar="FOLDER", type=Path, help="where onnxruntime_c_api.h is")
    arguments = parser.parse_args()
    try:
        if (include := arguments.headers or headers()) is None:
            raise SdeditError("no onnxruntime_c_api.h", hint="apt-get install libonnxruntime-dev, or --headers")
        ship(arguments.output, include)
    except SdeditError as error:
        sys.exit(f"error: {error}\nhint: {error.hint}")


if __name__ == "__main__":
    main()
