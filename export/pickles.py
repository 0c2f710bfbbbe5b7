"""Read a pickle as data: tensors and plain containers are built, and nothing else ever is.

Pickles are programs for a small stack machine, and Python's runs whatever function they name. This one knows the
few functions that checkpoints need, each replaced by code of its own here. Objects become Records, which hold what
the pickle says of them and do nothing; source text inside (EDM's files carry some) stays text. So EDM's .pkl opens
without its classes, and a hostile file can at worst be refused.
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
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from sdedit.export.checkpoints import TORCH_LEGACY, CheckpointError
from sdedit.export.source import Payload

INSTRUCTIONS = 2_000_000  # of a pickle; the largest of EDM has some 60,000
VALUES = 10_000_000  # in all, with what is mentioned twice counted twice
DEPTH = 100  # containers within containers
DIMENSIONS = 8  # of a tensor
HEAD = 200  # instructions of one of the pickles that describe a tensor's memory; some 30 is usual
LONGEST = 200  # characters of a name
AGAIN = "download it again"
HINT = "if you trust it, load it where it came from and save its state dict as safetensors"


@dataclass(eq=False)
class Record:
    """An object that was not built: the name of its class, and its attributes."""

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """What it was constructed with, where it says so."""
        given = self.state.get("_init_kwargs")
        return given if isinstance(given, dict) else {}

    def module(self, name: str) -> "Record | None":
        """A module inside this one."""
        modules = self.state.get("_modules")
        found = modules.get(name) if isinstance(modules, dict) else None
        return found if isinstance(found, Record) else None


def load(source: Path | str | BinaryIO) -> Payload:
    """The contents of a pickle: containers of tensors, Records and plain values. Raises CheckpointError."""
    if not isinstance(source, Path | str):
        data = source.read()
        return _load(io.BytesIO(data), len(data), "")
    try:
        with open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _load(data, len(data), f"{source}: ")
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
    kept = members("_buffers").keys() - (dropped if isinstance(dropped, set) else set())
    buffers = {name: value for name, value in members("_buffers").items() if name in kept}
    for name, value in chain(members("_parameters").items(), buffers.items()):
        if isinstance(value, Tensor):
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
PASSED = {"PROTO", "FRAME"}
REFUSED = {  # what these would be for
    "PERSID": "an object stored elsewhere", "BINPERSID": "an object stored elsewhere",
    "EXT1": "an object of the extension registry", "EXT2": "an object of the extension registry",
    "EXT4": "an object of the extension registry",
    "INST": "an instance of a class, the old way", "OBJ": "an instance of a class, the old way",
}  # fmt: skip


def _load(file: Any, size: int, where: str) -> Payload:
    """Run the pickle in a file of `size` bytes; `where` begins the message of every error."""
    try:
        payload = _Machine(size).run(file)
        _check_extent(payload)
        return payload
    except CheckpointError as error:
        raise CheckpointError(f"{where}{error}", hint=error.hint) from error.__cause__
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:  # pickletools', torch's
        raise CheckpointError(f"{where}a damaged pickle: {error}", hint=AGAIN) from error


def _refused(what: str) -> CheckpointError:
    return CheckpointError(f"the pickle asks for {what}; only tensors and plain containers are built", hint=HINT)


class _Machine:
    """One run. Every value on its stack is a tensor, a Record, plain, or a _Global that the tables below know."""

    def __init__(self, size: int) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.left = size  # bytes that copies may take: a file cannot hold less than what it declares
        self.functions = FUNCTIONS | {
            "torch.storage._load_from_bytes": self.storage,
            "builtins.set": self.set,
            "builtins.frozenset": lambda items: frozenset(self.set(items)),
        }

    def run(self, file: Any) -> Any:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(file)):
            if count >= INSTRUCTIONS:
                raise CheckpointError(f"the pickle has more than {INSTRUCTIONS} instructions", hint=HINT)
            if instruction.name != "STOP":
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
        elif name in REFUSED:
            raise _refused(REFUSED[name])
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
        if name in DTYPES:
            return DTYPES[name]
        if name in self.functions:
            return _Global(name, self.functions[name])
        if re.fullmatch(r"torch\.nn\.modules\.\w+", module) and attribute.isidentifier():
            return _Global(name, lambda: Record(attribute))  # a layer: its class is only named
        raise _refused(name if re.fullmatch(r"[\w.]+", name) and len(name) < LONGEST else repr(name[:LONGEST]))

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise CheckpointError("the pickle builds more than it holds", hint=HINT)

    def set(self, items: Any = ()) -> set[Any]:
        self.take(len(items))
        return set(_keys(items))

    def storage(self, data: Any) -> _Storage:
        """A tensor's memory, which PyTorch pickles as a file of its own older format: read as weights only."""
        other = _refused("torch.storage._load_from_bytes of something else than a tensor's memory")
        if not isinstance(data, bytes) or not data.startswith(TORCH_LEGACY):
            raise other
        self.take(len(data))
        file = io.BytesIO(data)
        heads = [list(islice(pickletools.genops(file), HEAD)) for _ in range(5)]  # small pickles, then the numbers
        if any(len(head) == HEAD for head in heads):
            raise other
        declared = max((n for _, n, _ in heads[3] if type(n) is int), default=0)
        if declared > len(data):  # so much would be allocated
            raise CheckpointError(f"the pickle declares {declared} values in {len(data)} bytes", hint=AGAIN)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TypedStorage is deprecated, and what files hold
                found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                storage = _Storage(found.untyped(), found.dtype) if isinstance(found, torch.TypedStorage) else None
        except Exception as error:  # pickle's and torch's own kinds
            text = " ".join(str(error).split())[:LONGEST]
            raise CheckpointError(f"the pickle holds a tensor that is damaged or not one: {text}", hint=HINT) from error
        if storage is None:
            raise other
        return storage


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


def _reconstruct(kind: Any, base: Any, state: Any) -> Any:
    """copyreg's way to make an object without its constructor: of `kind`, on top of object."""
    if not isinstance(kind, _Global) or not isinstance(base, _Global) or base.name != "builtins.object" or state:
        raise _refused("copyreg._reconstructor of more than an empty object")
    return kind.call()


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


def _ordered_dict() -> OrderedDict[Any, Any]:
    return OrderedDict()


def _easy_dict() -> dict[Any, Any]:
    return {}


def _size(numbers: Any) -> tuple[int, ...]:
    if not isinstance(numbers, tuple) or len(numbers) > DIMENSIONS or not all(type(n) is int for n in numbers):
        raise ValueError("a torch.Size that is none")
    return torch.Size(numbers)


def _device(kind: Any, index: Any = None) -> str:
    """As text: a checkpoint's device is where it was trained."""
    if not isinstance(kind, str) or not isinstance(index, int | None):
        raise ValueError("a torch.device that is none")
    return kind if index is None else f"{kind}:{index}"


def _dtype(code: Any, *_: Any) -> _Dtype:
    if not isinstance(code, str) or not re.fullmatch(r"[biuf][1248]", code):
        raise _refused("numpy.dtype of more than a number")
    return _Dtype(code)


def _scalar(dtype: Any, data: Any) -> bool | int | float:
    """A NumPy number as Python's."""
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes) or len(data) != int(dtype.code[1]):
        raise ValueError("a NumPy scalar that is none")
    return np.frombuffer(data, np.dtype(dtype.code).newbyteorder(dtype.order))[0].item()


def _never(*_: Any) -> Any:
    raise _refused("an object of its own kind")


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _object,
    "dnnlib.util.EasyDict": _easy_dict,
    "collections.OrderedDict": _ordered_dict,
    "copyreg._reconstructor": _reconstruct,
    "builtins.object": _never,  # only named, as the base in _reconstruct
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}
DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


# Afterwards


def _check_extent(payload: Payload) -> None:
    """Raise CheckpointError for containers too deep, too many once spelled out, or within themselves."""
    extent: dict[int, tuple[int, int]] = {}  # of a finished container: the values in it, and its depth
    begun: set[int] = set()
    pending: list[Any] = [[payload]]
    while pending:
        value = pending[-1]
        if id(value) in extent:
            pending.pop()
            continue
        inner = _contents(value)
        measured = [extent.get(id(item), (1, 0)) for item in inner]
        count, depth = sum(n for n, _ in measured) + 1, max((d for _, d in measured), default=0) + 1
        if count > VALUES or max(depth, len(begun)) > DEPTH:
            raise CheckpointError(f"the pickle holds more than {VALUES} values or {DEPTH} levels", hint=HINT)
        if id(value) in begun:
            begun.remove(id(value))
            extent[id(value)] = count, depth
            continue
        if any(isinstance(item, PARTS) for item in inner):
            raise _refused("functions or parts of tensors as values")
        begun.add(id(value))
        deeper = [item for item in inner if isinstance(item, CONTAINERS)]
        if any(id(item) in begun for item in deeper):
            raise CheckpointError("the pickle's containers contain themselves", hint=HINT)
        pending += deeper


CONTAINERS = (dict, list, tuple, set, frozenset, Record)


def _contents(container: Any) -> list[Any]:
    if isinstance(container, Record):
        return list(container.state.values())
    return list(container.values() if isinstance(container, dict) else container)
