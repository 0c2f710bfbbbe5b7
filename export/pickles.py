"""Read a pickle as data: tensors and plain containers are built, and nothing else ever is.

Pickles are programs for a small stack machine, and Python's runs whatever function they name. This one knows the
few functions that checkpoints need, each replaced by code of its own here. Objects become Records, which hold what
the pickle says of them and do nothing; source text inside (EDM's files carry some) stays text. So EDM's .pkl opens
without its classes, and nothing that a hostile file says is run.
"""

import io
import math
import mmap
import pickletools
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from sdedit.export.checkpoints import TORCH_LEGACY, CheckpointError
from sdedit.export.source import Payload

DEPTH = 100  # containers within containers
DIMENSIONS = 8  # of a tensor
LONGEST = 200  # characters of a name
AGAIN = "download it again"
HINT = "if you trust it, load it where it came from and save its state dict as safetensors"


@dataclass(eq=False)
class Record:
    """An object that was not built: the name of its class, and its attributes."""

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)

    def module(self, name: str) -> "Record | None":
        """A module inside this one."""
        modules = self.state.get("_modules")
        found = modules.get(name) if isinstance(modules, dict) else None
        return found if isinstance(found, Record) else None


def load(source: Path | str | BinaryIO) -> Payload:
    """The contents of a pickle: containers of tensors, Records and plain values. Raises CheckpointError."""
    if not isinstance(source, Path | str):
        return _load(source, "")
    try:
        with open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _load(data, f"{source}: ")
    except (OSError, ValueError) as error:  # mmap's ValueError: an empty file
        raise CheckpointError(f"{source}: cannot be read: {error}", hint="name a checkpoint file") from error


def tensors(record: Record) -> dict[str, Tensor]:
    """The state dict of a module: parameters and kept buffers, its own and its modules', in order of registration."""
    return dict(_tensors(record, ""))


def _tensors(record: Record, prefix: str) -> Iterator[tuple[str, Tensor]]:
    def members(name: str) -> dict[str, Any]:
        found = record.state.get(name) or {}
        if not isinstance(found, dict) or not all(isinstance(key, str) and len(key) < LONGEST for key in found):
            raise CheckpointError(f"{record.class_name}: its {name} are not a dict of names", hint=HINT)
        return found

    dropped = record.state.get("_non_persistent_buffers_set")
    unkept = dropped if isinstance(dropped, set) else ()
    for name, value in (members("_parameters") | members("_buffers")).items():
        if isinstance(value, Tensor) and name not in unkept:
            yield prefix + name, value
    for name, module in members("_modules").items():
        if isinstance(module, Record):
            yield from _tensors(module, f"{prefix}{name}.")


# The stack machine


class _Mark:
    """Where a run of items begins on the stack."""


@dataclass(frozen=True)
class _Global:
    """A function or class that the pickle names, and what is done here in its place."""

    name: str
    call: Callable[..., Any]


@dataclass(eq=False)
class _Dtype:
    """A NumPy dtype as pickles spell it: a code such as f4, then its byte order."""

    code: str
    order: str = "="


@dataclass(frozen=True, eq=False)
class _Storage:
    """A tensor's memory."""

    memory: torch.UntypedStorage
    dtype: torch.dtype


MARK = _Mark()
PARTS = (_Mark, _Global, _Dtype, _Storage)  # of a result none is left over
PUSHED = {  # instructions whose argument is the value
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
}  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
COLLECTED = {"LIST": list, "TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
STORED = {"PUT", "BINPUT", "LONG_BINPUT"}
FETCHED = {"GET", "BINGET", "LONG_BINGET"}
PASSED = {"PROTO", "FRAME", "STOP"}


def _load(file: Any, where: str) -> Payload:
    """Run the pickle in a file; `where` begins the message of every error."""
    try:
        payload = _Machine().run(file)
        _check(payload, DEPTH, set())
        return payload
    except CheckpointError as error:
        raise CheckpointError(f"{where}{error}", hint=error.hint) from error.__cause__
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:  # pickletools', torch's
        raise CheckpointError(f"{where}a damaged pickle: {error}", hint=AGAIN) from error


def _refused(what: str) -> CheckpointError:
    return CheckpointError(f"the pickle asks for {what}; only tensors and plain containers are built", hint=HINT)


class _Machine:
    """One run. Every value on its stack is a tensor, a Record, plain, or a _Global that the tables below know."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: Any) -> Any:
        for instruction, argument, _ in pickletools.genops(file):
            self.step(instruction.name, argument)
        (result,) = self.stack
        return result

    def step(self, name: str, argument: Any) -> None:
        """One instruction of the pickle protocol, 0 to 5."""
        stack = self.stack
        if name in PUSHED:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in COLLECTED:
            stack.append(COLLECTED[name](self.items()))
        elif name in TUPLES:
            stack.append(tuple(self.pop() for _ in range(TUPLES[name]))[::-1])
        elif name in STORED:
            self.memo[argument] = self.top()
        elif name in FETCHED:
            stack.append(self.memo[argument])
        elif name not in PASSED:
            self.other(name, argument)

    def other(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "MARK":
                stack.append(MARK)
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top()
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.items()
            case "DUP":
                stack.append(self.top())
            case "APPEND" | "APPENDS":
                items = [self.pop()] if name == "APPEND" else self.items()
                self.target(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self.items()
                self.target(dict).update(_pairs(items))
            case "ADDITEMS":
                items = self.items()
                self.target(set).update(_keys(items))
            case "DICT":
                stack.append(_pairs(self.items()))
            case "FROZENSET":
                stack.append(frozenset(_keys(self.items())))
            case "GLOBAL" | "STACK_GLOBAL":
                module, attribute = argument.split(" ", 1) if argument else (self.pop(), self.pop())[::-1]
                stack.append(self.find(module, attribute))
            case "REDUCE" | "NEWOBJ":
                arguments, function = self.pop(), self.pop()
                stack.append(_call(function, arguments))
            case "BUILD":
                state = self.pop()
                _set_state(self.top(), state)
            case _:
                raise _refused(f"the instruction {name}")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is MARK:
            raise ValueError("an instruction finds no value")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def items(self) -> list[Any]:
        """Everything above the last mark."""
        start = len(self.stack) - 1
        while self.stack[start] is not MARK:  # a stack without a mark ends in an IndexError
            start -= 1
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def target(self, kind: type) -> Any:
        value = self.top()
        if not isinstance(value, kind):
            raise ValueError(f"items for a {kind.__name__} go to a {type(value).__name__}")
        return value

    def find(self, module: Any, attribute: Any) -> Any:
        """What a global stands for. Never looked up in Python's own modules."""
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise ValueError("a global without a name")
        name = f"{module}.{attribute}"
        if name in FUNCTIONS:
            return _Global(name, FUNCTIONS[name])
        if re.fullmatch(r"torch\.nn\.modules\.\w+", module) and attribute.isidentifier():
            return _Global(name, lambda: Record(attribute))  # a layer: its class is only named
        raise _refused(name if re.fullmatch(r"[\w.]+", name) and len(name) < LONGEST else repr(name[:LONGEST]))


def _keys(values: Any) -> Any:
    """Keys of a dict or members of a set: text or numbers, which are hashed at once however they are nested."""
    if not all(value is None or isinstance(value, str | int | float | bytes) for value in values):
        raise ValueError("a key that is neither text nor a number")
    return values


def _pairs(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise ValueError("a key without a value")
    return dict(zip(_keys(items[::2]), items[1::2], strict=True))


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise _refused(f"a call of a {type(function).__name__}")
    try:
        return function.call(*arguments)
    except TypeError as error:
        raise ValueError(f"{function.name} with other arguments than it takes") from error


def _set_state(target: Any, state: Any) -> None:
    """A Record's attributes, once. An OrderedDict's (of a state dict: _metadata) are of no use here."""
    match target, state:
        case Record(), dict() if not target.state and all(isinstance(name, str) for name in state):
            target.state = state
        case _Dtype(), (_, str() as order, *_) if order in tuple("<>|="):
            target.order = order
        case OrderedDict(), dict():
            pass
        case _:
            raise _refused(f"a state of a {type(target).__name__}")


# What stands in for the functions that checkpoints name


def _object(meta: Any) -> Record:
    """An object of EDM's persistence: {type, version, module_src, class_name, state}. Its source stays unread."""
    if not isinstance(meta, dict):
        raise ValueError("a persistent object without a description")
    name, state = meta.get("class_name"), meta.get("state")
    if not isinstance(name, str) or not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError("a persistent object without a class name or a state")
    return Record(name, state)


def _storage(data: Any) -> _Storage:
    """A tensor's memory, which PyTorch pickles as a file of its own older format: read as weights only."""
    if isinstance(data, bytes) and data.startswith(TORCH_LEGACY):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TypedStorage is deprecated, and what files hold
            try:
                found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            except Exception as error:  # pickle's and torch's own kinds
                raise CheckpointError(
                    f"the pickle holds a tensor that is damaged or not one: {' '.join(str(error).split())[:LONGEST]}",
                    hint=HINT,
                ) from error
            if isinstance(found, torch.TypedStorage):
                return _Storage(found.untyped(), found.dtype)
    raise _refused("torch.storage._load_from_bytes of something else than a tensor's memory")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of a storage, within its bounds. The rest, gradient and hooks, is of training."""
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor without memory or shape")
    if any(type(n) is not int or not 0 <= n < 2**40 for n in (offset, *size, *stride)) or len(size) != len(stride):
        raise ValueError("a tensor whose shape is none")
    held = storage.memory.nbytes() // storage.dtype.itemsize
    reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if len(size) > DIMENSIONS or max(math.prod(size), reach if 0 not in size else 0) > held:
        shape = list(size[:DIMENSIONS])
        raise CheckpointError(f"the pickle declares a tensor of shape {shape} in {held} values", hint=AGAIN)
    return torch.empty(0, dtype=storage.dtype).set_(storage.memory, offset, size, stride)


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError("a parameter that is no tensor")
    return data


def _dtype(code: Any, *_: Any) -> _Dtype:
    if not isinstance(code, str) or not re.fullmatch(r"[biuf][1248]", code):
        raise _refused("numpy.dtype of more than a number")
    return _Dtype(code)


def _scalar(dtype: Any, data: Any) -> bool | int | float:
    """A NumPy number as Python's."""
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes) or len(data) != int(dtype.code[1]):
        raise ValueError("a NumPy scalar that is none")
    return np.frombuffer(data, np.dtype(dtype.code).newbyteorder(dtype.order))[0].item()


def _set(items: Any = ()) -> set[Any]:
    return set(_keys(items))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _object,
    "dnnlib.util.EasyDict": lambda: {},
    "collections.OrderedDict": lambda: OrderedDict(),
    "builtins.set": _set,
    "builtins.frozenset": lambda items: frozenset(_keys(items)),
    "torch.storage._load_from_bytes": _storage,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}


# Afterwards


def _check(value: Any, depth: int, checked: set[int]) -> None:
    """Raise CheckpointError for what is only a part of something else, and for containers too deep or in themselves."""
    if isinstance(value, PARTS):
        raise _refused("functions or parts of tensors as values")
    inner = value.state if isinstance(value, Record) else value
    if not isinstance(inner, dict | list | tuple | set | frozenset) or id(value) in checked:
        return
    if depth == 0:
        raise CheckpointError(f"the pickle's containers lie more than {DEPTH} deep, or in themselves", hint=HINT)
    for item in inner.values() if isinstance(inner, dict) else inner:
        _check(item, depth - 1, checked)
    checked.add(id(value))
