"""Tensors of other libraries on the GPU, in and out without a copy: `__cuda_array_interface__` and DLPack."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from sdedit.cuda.graphs import Graphs
from sdedit.errors import ImageError, OptionError
from sdedit.tensors import require_shape

KIND_CUDA = 2  # DLDeviceType kDLCUDA
FLOAT = 2  # DLDataTypeCode kDLFloat
LEGACY_STREAM = 1  # the handle of the default stream that both protocols can tell from none
WITH_STREAM = 3  # the version of `__cuda_array_interface__` that names the stream to wait for


class _DlTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


class _DlManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DlManagedTensor))
_DlManagedTensor._fields_ = (("tensor", _DlTensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_python = ctypes.pythonapi
_capsule_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", _python)
)
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", _python)
)
_capsule_rename = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", _python))
_NEW, _USED = b"dltensor", b"used_dltensor"


def stream_handle(stream: Any) -> int | None:
    """A CUDA stream as its handle: an int, a PyTorch, CuPy or cuda-core stream, or None. Raises OptionError."""
    if stream is None or (isinstance(stream, int) and not isinstance(stream, bool)):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        found = stream.__cuda_stream__
        return int((found() if callable(found) else found)[1])
    for name in ("cuda_stream", "ptr", "handle"):  # PyTorch, CuPy, pycuda
        if hasattr(stream, name):
            return int(getattr(stream, name))
    raise OptionError(
        f"stream is {type(stream).__name__}; wanted a CUDA stream",
        hint="pass its handle as an int, or a PyTorch, CuPy or cuda-core stream",
    )


class GpuView:
    """Where another library's float32 tensor lies. Keeps it alive.

    Raises ImageError for one that is not on the first GPU, not float32, not contiguous, or not of `shape` (None: any
    length).
    """

    def __init__(self, tensor: Any, shape: tuple[int | None, ...], role: str) -> None:
        self._tensor, self._role = tensor, role
        self._stream: int | None = None  # that must be waited for
        self._release: Callable[[], None] | None = None
        try:
            found = getattr(tensor, "__cuda_array_interface__", None)
        except Exception as error:  # PyTorch's own, for a tensor on the CPU or with a gradient
            raise ImageError(f"the {role} cannot be used: {error}", hint="pass tensor.detach(), on the GPU") from error
        # an older interface does not say what fills the tensor: where its owner orders streams itself, as PyTorch does
        # by DLPack, it shall
        self._by_dlpack = hasattr(tensor, "__dlpack__") and (found or {}).get("version", 0) < WITH_STREAM
        if self._by_dlpack:
            self._take_dlpack(tensor, None)
        elif found is not None:
            self.pointer, self.shape = int(found["data"][0]), tuple(map(int, found["shape"]))
            self._stream = found.get("stream")
            self._require_floats(found["typestr"] in ("<f4", "=f4"), found["typestr"])
            self._require_contiguous(found.get("strides"), itemsize=4)
        else:
            raise ImageError(
                f"the {role} is {type(tensor).__name__}; wanted a tensor on the GPU",
                hint="pass one with __cuda_array_interface__ or __dlpack__; edit() takes files, pictures and arrays",
            )
        require_shape(self.shape, shape, role)

    def ready_on(self, stream: int, graphs: Graphs) -> int:
        """Its address, for what is enqueued on `stream` from here on: that waits for whoever fills it."""
        if self._by_dlpack:
            self._take_dlpack(self._tensor, stream)
        elif self._stream is not None:
            graphs.follow(stream, self._stream)
        return self.pointer

    def _take_dlpack(self, tensor: Any, stream: int | None) -> None:
        """stream None: only to look at it; else its owner makes the stream wait for what fills it."""
        kind, number = tensor.__dlpack_device__()
        if int(kind) != KIND_CUDA or number != 0:
            raise ImageError(
                f"the {self._role} is not on the first CUDA device (DLPack device {int(kind)}:{number})",
                hint="move it to the GPU; CUDA_VISIBLE_DEVICES chooses which is first",
            )
        try:
            capsule = tensor.__dlpack__(stream=-1 if stream is None else stream)
        except Exception as error:  # its library's own
            raise ImageError(f"the {self._role} cannot be used: {error}", hint="pass tensor.detach()") from error
        managed = ctypes.cast(_capsule_pointer(capsule, _NEW), ctypes.POINTER(_DlManagedTensor))
        _capsule_rename(capsule, _USED)
        self._free()
        self._release = lambda: managed.contents.deleter(managed)
        found = managed.contents.tensor
        self.pointer = int(found.data or 0) + int(found.byte_offset)
        self.shape = tuple(found.shape[k] for k in range(found.ndim))
        self._require_floats((found.code, found.bits, found.lanes) == (FLOAT, 32, 1), f"{found.bits}-bit")
        strides = [found.strides[k] for k in range(found.ndim)] if found.strides else None
        self._require_contiguous(strides, itemsize=1)

    def _require_floats(self, given: bool, kind: str) -> None:
        if not given:
            raise ImageError(f"the {self._role} is {kind}; wanted float32", hint="convert it first, to [-1, 1]")

    def _require_contiguous(self, strides: Any, itemsize: int) -> None:
        expected = itemsize
        for side, stride in zip(reversed(self.shape), reversed(list(strides or ())), strict=False):
            if side != 1 and stride != expected:
                raise ImageError(f"the {self._role} is not contiguous", hint="pass it in C order: B, C, H, W")
            expected *= side

    def _free(self) -> None:
        if self._release is not None:
            self._release()
            self._release = None

    def __del__(self) -> None:
        if getattr(self, "_release", None) is not None:
            self._free()


class GpuTensor:
    """A float32 tensor on the GPU that this engine made; PyTorch, CuPy, JAX and others take it as it is.

    stream: the caller's, on which its making was enqueued; None where it is finished.
    """

    def __init__(
        self, pointer: int, shape: tuple[int, ...], stream: int | None, graphs: Graphs | None, free: Callable[[], None]
    ) -> None:
        self.pointer, self.shape, self.stream = pointer, shape, stream
        self.dtype = np.dtype(np.float32)
        self._graphs = graphs
        self._free: Callable[[], None] | None = free

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape, "typestr": "<f4", "data": (self.pointer, False), "version": 3, "strides": None,
            "stream": LEGACY_STREAM if self.stream == 0 else self.stream,
        }  # fmt: skip

    def __dlpack_device__(self) -> tuple[int, int]:
        return KIND_CUDA, 0

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        """A capsule. What is on the taker's stream from here on waits for the tensor, unless it says -1."""
        if self.stream is not None and stream != -1 and self._graphs is not None:
            taker = LEGACY_STREAM if stream is None else stream
            if taker != (self.stream or LEGACY_STREAM):
                self._graphs.follow(taker, self.stream)
        return _capsule(self)

    def __del__(self) -> None:
        free = getattr(self, "_free", None)
        if free is not None:
            self._free = None
            free()


_lent: dict[int, tuple[Any, ...]] = {}  # what capsules point to, until their takers are done


def _delete(managed: Any) -> None:
    _lent.pop(ctypes.addressof(managed.contents), None)


def _capsule_died(capsule: int) -> None:
    """A capsule that nobody took still owns its tensor."""
    valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _python))
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _python))
    if valid(capsule, _NEW):
        _lent.pop(pointer(capsule, _NEW), None)


_deleter = _Deleter(_delete)
_destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_capsule_died)


def _capsule(tensor: GpuTensor) -> Any:
    shape = (ctypes.c_int64 * len(tensor.shape))(*tensor.shape)
    managed = _DlManagedTensor()
    managed.tensor.data, managed.tensor.device_type, managed.tensor.ndim = tensor.pointer, KIND_CUDA, len(tensor.shape)
    managed.tensor.code, managed.tensor.bits, managed.tensor.lanes = FLOAT, 32, 1
    managed.tensor.shape = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
    managed.deleter = _deleter
    _lent[ctypes.addressof(managed)] = (managed, shape, tensor)
    return _capsule_new(ctypes.addressof(managed), _NEW, ctypes.cast(_destructor, ctypes.c_void_p))
