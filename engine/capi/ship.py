"""Build the library that the package ships: python -m sdedit.capi.ship [FOLDER]

For developers, on Linux and x86-64 with g++ 12 or later; running the engine needs no compiler. Writes libsdedit.so,
which runs on every x86-64 processor and uses AVX2 or AVX-512 where there is one, and libsdedit.json, which says from
what it was made. It is linked against nothing, so that it does not matter which C library a system has, and how old.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from sdedit.capi import build

SOURCES = ("capi/sdedit.h", "capi/sdedit.cpp", "cuda/sdedit.cuh")
ALONE = ("-nostdlib", "-s", "-Wl,-z,defs", "-Wl,-z,now", "-Wl,--build-id=none")  # -z defs: missing symbols are errors
FLAGS = (*build.FLAGS, "-DSDEDIT_EACH_VECTOR_UNIT", *ALONE)
FOLDER = Path(__file__).parent
LIBRARY, MANIFEST = "libsdedit.so", "libsdedit.json"


def source_sha256() -> str:
    """Of the sources that a library was made from, so that a stale one shows."""
    return hashlib.sha256(b"".join((FOLDER.parent / name).read_bytes() for name in SOURCES)).hexdigest()


def ship(folder: Path, compiler: str = "g++") -> dict[str, Any]:
    """Write libsdedit.so and libsdedit.json to `folder`. The manifest. Raises OSError without the compiler."""
    library = folder / LIBRARY
    command = [compiler, *FLAGS, "-o", str(library), str(FOLDER / build.SOURCE), "-lgcc"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{compiler} failed:\n{done.stderr}")
    version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True, check=True).stdout
    manifest = {
        "source_sha256": source_sha256(),
        "library_sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
        "compiler": f"{compiler} {version.strip()}",
        "flags": list(FLAGS),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    return manifest


def main() -> None:
    """Build into the folder that is named, else where the package looks."""
    ship(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)


if __name__ == "__main__":
    main()
