"""Build the library behind sdedit.h: python -m sdedit.capi.build [-o FOLDER]

Needs a C++ compiler, that of the variable CXX or the first found. Writes libsdedit.so (.dylib, .dll) and sdedit.h;
a program is then built with `cc program.c -IFOLDER -LFOLDER -lsdedit`.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from sdedit.errors import OutputError, SdeditError

FOLDER = Path(__file__).parent
HEADER, SOURCE = "sdedit.h", "sdedit.cpp"
COMPILERS = ("c++", "g++", "clang++")
# -ffp-contract=off: a product fused into a sum is rounded once instead of twice, and the bits differ.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-fPIC", "-shared")
LIBRARY = {"darwin": "libsdedit.dylib", "win32": "sdedit.dll"}.get(sys.platform, "libsdedit.so")


def build(folder: Path) -> Path:
    """Compile into `folder`, which exists, and lay the header beside it. The library's path. Raises SdeditError."""
    library = folder / LIBRARY
    if not folder.is_dir():
        raise OutputError(f"{folder}: no such folder", hint="create it first")
    command = [*compiler(), *FLAGS, "-o", str(library), str(FOLDER / SOURCE)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise SdeditError(f"{command[0]}: {error.strerror}", hint="set CXX to a C++ compiler") from error
    if done.returncode:
        raise SdeditError(
            f"{shlex.join(command)} failed:\n{done.stderr.strip()}", hint="set CXX to a compiler that knows C++17"
        )
    shutil.copyfile(FOLDER / HEADER, folder / HEADER)
    return library


def compiler() -> list[str]:
    """The command of a C++ compiler. Raises SdeditError."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = named or [name for name in COMPILERS if shutil.which(name)][:1]
    if not found:
        raise SdeditError(
            f"no C++ compiler: none of {', '.join(COMPILERS)} is on PATH", hint="apt-get install g++, or set CXX"
        )
    return found


def main() -> None:
    """Build, and print the library's path."""
    parser = argparse.ArgumentParser(
        prog="python -m sdedit.capi.build", description="Build the C library of the noise and the step update."
    )
    parser.add_argument("-o", "--output", metavar="FOLDER", type=Path, default=Path("."), help="where to (default: .)")
    try:
        print(build(parser.parse_args().output))
    except SdeditError as error:
        sys.exit(f"error: {error}\nhint: {error.hint}")


if __name__ == "__main__":
    main()
