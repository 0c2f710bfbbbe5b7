"""Write what ort-cpu runs, for hosts in other languages: python -m sdedit.operators.graph [MODEL.onnx] -o FOLDER

--precision fp16 or bf16: its convolutions in half precision, of the kind that this processor has.

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


def write(model: Path, folder: Path, precision: str | None = None) -> None:
    """precision: None is the model's own. Raises SdeditError; nothing is left behind then."""
    from sdedit.backends import open_backend
    from sdedit.backends.ort import OrtBackend

    if folder.exists():
        raise OutputError(f"{folder}: exists already", hint="choose another name")
    output.check([folder], force=False, inputs=[])
    backend = open_backend("ort-cpu", artifact.read(model), None, precision=precision)
    assert isinstance(backend, OrtBackend)
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
    parser.add_argument("--precision", metavar="P", help="fp16 or bf16, for an fp32 model (default: the model's own)")
    arguments = parser.parse_args()
    try:
        write(arguments.model, arguments.output, arguments.precision)
    except SdeditError as error:
        sys.exit(f"error: {error}\nhint: {error.hint}")
    print(arguments.output)


if __name__ == "__main__":
    main()
