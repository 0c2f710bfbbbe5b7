"""As much of the protobuf wire format as it takes to read an ONNX file's interface without the onnx package, and to put
other fields into one.

Field numbers are those of onnx.proto (IR version 10); weights are skipped over, not read.
"""

from collections.abc import Iterator
from dataclasses import dataclass

Value = int | memoryview

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Tensor:
    """One input or output of the graph. A dimension is a number, a name, or None where nothing is said."""

    name: str
    element: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Model:
    """An ONNX file as its interface shows it."""

    opset: int
    metadata: dict[str, str]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    external: tuple[str, ...] = ()  # files beside it that hold weights, as it names them


LOCATION = "location"  # the key of external data
ELEMENTS = {1: "float32", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64", 16: "bfloat16"}


def read_model(data: memoryview) -> Model:
    """Raises ValueError where `data` is not a whole ONNX model."""
    opset, metadata, graph = 0, {}, None
    for number, value in fields(data):
        match number, value:
            case 7, memoryview():
                graph = value
            case 8, memoryview():
                operators = dict(fields(value))
                if operators.get(1, b"") in (b"", b"ai.onnx"):
                    version = operators.get(2)
                    opset = version if isinstance(version, int) else 0
            case 14, memoryview():
                entry = dict(fields(value))
                metadata[text(entry.get(1, memoryview(b"")))] = text(entry.get(2, memoryview(b"")))
    if graph is None or not opset:
        raise ValueError("no graph in it")
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    weights: set[str] = set()
    external: dict[str, None] = {}
    for number, value in fields(graph):
        if number == 5:
            weights.add(next((text(v) for n, v in fields(value) if n == 8), ""))
        elif number in (11, 12):
            (inputs if number == 11 else outputs).append(_tensor(value))
        external |= dict.fromkeys(_external(number, value))
    return Model(opset, metadata, tuple(t for t in inputs if t.name not in weights), tuple(outputs), tuple(external))


def _external(number: int, value: Value) -> Iterator[str]:
    """Where the weights lie that this field of a GraphProto does not hold itself; also those of inner graphs."""
    if number == 5:  # initializer
        yield from _location(value)
    elif number == 15:  # sparse_initializer: values, indices
        for _, tensor in fields(value):
            if not isinstance(tensor, int):
                yield from _location(tensor)
    elif number == 1 and LOCATION.encode() in _bytes(value):  # node; most have none, and are not looked into
        for part_of, attribute in fields(value):
            if part_of == 5:
                for kind, part in fields(attribute):
                    if kind in (5, 10):  # t, tensors
                        yield from _location(part)
                    elif kind in (6, 11):  # g, graphs
                        for inner, content in fields(part):
                            yield from _external(inner, content)


def _location(tensor: Value) -> Iterator[str]:
    """The `location` of a TensorProto's external data, where it has any."""
    for number, value in fields(tensor):
        if number == 13:
            entry = dict(fields(value))
            if text(entry.get(1, memoryview(b""))) == LOCATION:
                yield text(entry.get(2, memoryview(b"")))


def _tensor(data: Value) -> Tensor:
    """ValueInfoProto."""
    name, element, shape = "", "not a tensor", None
    for number, value in fields(data):
        if number == 1:
            name = text(value)
        elif number == 2:
            for kind, body in fields(value):
                if kind == 1:  # tensor_type
                    parts = dict(fields(body))
                    element = ELEMENTS.get(_integer(parts.get(1, 0)), f"element type {parts.get(1)}")
                    if 2 in parts:
                        shape = tuple(_dimension(dim) for tag, dim in fields(parts[2]) if tag == 1)
    return Tensor(name, element, shape)


def _dimension(data: Value) -> int | str | None:
    parts = dict(fields(data))
    return _integer(parts[1]) if 1 in parts else text(parts[2]) if 2 in parts else None


def fields(data: Value) -> Iterator[tuple[int, Value]]:
    """The (field number, value) pairs of one message, in order."""
    if isinstance(data, int):
        raise ValueError("a number where a message should be")
    at, end = 0, len(data)
    while at < end:
        tag, at = varint(data, at)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise ValueError("field number 0")
        if wire == VARINT:
            value, at = varint(data, at)
            yield number, value
            continue
        if wire == BYTES:
            size, at = varint(data, at)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > end:
            raise ValueError("it ends too early")
        yield number, data[at : at + size]
        at += size


def varint(data: memoryview, at: int) -> tuple[int, int]:
    """The unsigned integer at this place, and where it ends. Raises ValueError."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("it ends too early")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def text(value: Value) -> str:
    """A field that is text. Raises ValueError."""
    return _bytes(value).decode("utf-8")


def field(number: int, value: int | bytes | memoryview) -> bytes:
    """One field of a message, written: an integer of 64 bits, signed or not, or bytes."""
    if isinstance(value, int):
        return _varint_of(number << 3 | VARINT) + _varint_of(value % 2**64)
    return _varint_of(number << 3 | BYTES) + _varint_of(len(value)) + value


def _varint_of(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])


def _bytes(value: Value) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes should be")
    return bytes(value)


def _integer(value: Value) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number should be")
    return value
