"""TensorRT-RTX compiles a plan's kernels for the GPU when they first run. They are kept for the next process."""

import hashlib
from contextlib import suppress
from typing import IO, Any

from sdedit import output
from sdedit.cuda.driver import Gpu
from sdedit.errors import OutputError
from sdedit.tensorrt import cache
from sdedit.tensorrt.installed import Library
from sdedit.tensorrt.plan import Plan


class Kernels:
    """The compiled kernels of one plan, in a file of the cache folder. TensorRT-RTX decides whether it can use them."""

    def __init__(self, library: Library, plan: Plan, gpu: Gpu) -> None:
        self._library = library
        made_for = f"{plan.sidecar['plan']['sha256']} {library.version} {gpu.name} {gpu.target} {gpu.driver}"
        name = hashlib.sha256(made_for.encode()).hexdigest()[:24]
        self._path = cache.folder().with_name("rtx-kernels") / f"{name}.bin"
        self._cache: Any = None
        self._kept = b""

    def configure(self, engine: Any) -> Any:
        """How contexts of this engine run: with these kernels, each compiled for the shapes at hand before it runs.

        By default it would run generic ones first and exchange them later, which a captured graph would not notice.
        """
        config = engine.create_runtime_config()
        strategies = self._library.module.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with suppress(OSError):
                self._kept = self._path.read_bytes()
                self._cache.deserialize(self._kept)
        config.set_runtime_cache(self._cache)
        return config

    def keep(self) -> None:
        """Write what was compiled since the file was read. A cache that cannot be written is no error."""
        if self._cache is None:
            return
        compiled = bytes(self._cache.serialize() or b"")
        if compiled in (b"", self._kept):
            return
        self._kept = compiled

        def put(file: IO[bytes]) -> None:
            file.write(compiled)

        with suppress(OSError, OutputError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            output.write_all([(self._path, put)], force=True)
