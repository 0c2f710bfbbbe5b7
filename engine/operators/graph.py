"""Write what ort-cpu runs, for hosts in other languages: python -m sdedit.operators.graph [MODEL.onnx] -o FOLDER

FOLDER, which must not exist, gets graph.onnx, its graph.weights and liboperators.so. A session registers the library
(RegisterCustomOpsLibrary), takes the graph as it is (ORT_DISABLE_ALL), and makes the bits that ort-cpu makes here. The
graph is for processors like this one, and for an ONNX Runtime that is not older than this one.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from sdedit import artifact, output
from sdedit.errors import OutputError, SdeditError
from sdedit.operators import shipped


def write(model: Path, folder: Path) -> None:
    """Raises SdeditError; nothing is left behind then."""
    from sdedit.backends.ort import OrtBackend, probe

    if folder.exists():
        raise OutputError(f"{folder}: exists already", hint="choose another name")
    output.check([folder], force=False, inputs=[])
    probe("ort-cpu")
    backend = OrtBackend(artifact.read(model), "ort-cpu", None)
    with output.writing(folder), tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        backend.write_graph(made)
        shutil.copy(shipped.LIBRARY, made)
        made.chmod(0o755)
        made.rename(folder)


def main() -> None:
    """Write, and print the folder."""
    parser = argparse.ArgumentParser(
        prog="python -m sdedit.operators.graph", description="Write what ort-cpu runs, for hosts in other languages."
    )
    parser.add_argument(
        "model", metavar="MODEL.onnx", nargs="?", type=Path, default=artifact.BUNDLED, help="default: the bundled one"
    )
    parser.add_argument("-o", "--output", metavar="FOLDER", type=Path, required=True, help="one that is not there yet")
    arguments = parser.parse_args()
    try:
        write(arguments.model, arguments.output)
    except SdeditError as error:
        sys.exit(f"error: {error}\nhint: {error.hint}")
    print(arguments.output)


if __name__ == "__main__":
    main()
