"""A pickle is read as data: what checkpoints hold comes out whole, and whatever else it asks for is refused unrun."""

import copyreg
import io
import os
import pickle
import random
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sdedit.export import pickles
from sdedit.export.checkpoints import CheckpointError

ONLY = "only tensors and plain containers are built"

# --- EDM's way to pickle, with classes of our own ----------------------------------------------------------------


class Persistent:
    """Pickled as EDM pickles its objects: by the source text of their class, and their attributes."""

    def __init__(self, class_name: str, source: str = "class Any: pass", /, **state: Any) -> None:
        self.class_name, self.source, self.state = class_name, source, state

    def __reduce__(self) -> tuple[Any, ...]:
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": self.class_name}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta | {"state": self.state},)


def persistent(class_name: str, module: nn.Module, **init_kwargs: Any) -> Persistent:
    """A module of PyTorch as if it had been a class of EDM's; modules inside stay what they are."""
    return Persistent(class_name, **vars(module), _init_args=(), _init_kwargs=init_kwargs)


def edm_pickle(payload: Any, protocol: int = 4) -> bytes:
    """pickle.dumps beside stand-ins for the two modules that EDM's pickles name."""
    persistence, util = ModuleType("torch_utils.persistence"), ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta: Any) -> None:
        raise AssertionError("called by an unpickler")

    class EasyDict(dict):
        pass

    for function, module in ((_reconstruct_persistent_obj, persistence), (EasyDict, util)):
        function.__module__, function.__qualname__ = module.__name__, function.__name__
        setattr(module, function.__name__, function)
    stand_ins = {"torch_utils": ModuleType("torch_utils"), "dnnlib": ModuleType("dnnlib")}
    stand_ins |= {module.__name__: module for module in (persistence, util)}
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        return pickle.dumps(payload() if callable(payload) else payload, protocol)
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def easy_dict(**values: Any) -> Any:
    return sys.modules["dnnlib.util"].EasyDict(values)


def load(data: bytes) -> Any:
    return pickles.load(io.BytesIO(data))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ModuleDict({"4x4_conv": nn.Conv2d(8, 3, 1)}))
    net.register_buffer("kept", torch.arange(4))
    net.register_buffer("dropped", torch.arange(4), persistent=False)
    return net


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert type(found[name]) is torch.Tensor
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)


# --- what is in a checkpoint -------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_the_tensors_of_an_edm_pickle_are_the_state_dict_of_its_module(network: nn.Module, protocol: int) -> None:
    state = network.state_dict()
    outer = Persistent("EDMPrecond", **vars(nn.Module()))
    outer.state["_modules"] = OrderedDict(model=persistent("SongUNet", network, model_channels=8))
    payload = load(
        edm_pickle({"ema": outer, "augment_pipe": None, "loss_fn": Persistent("Loss", P_mean=-1.2)}, protocol)
    )
    record = payload["ema"]
    assert record.class_name == "EDMPrecond"
    assert record.module("model").class_name == "SongUNet"
    assert record.module("model").state["_init_kwargs"] == {"model_channels": 8}
    assert record.module("elsewhere") is None
    assert_same(pickles.tensors(record), {f"model.{name}": tensor for name, tensor in state.items()})
    assert payload["loss_fn"].state == {"P_mean": -1.2}
    assert pickles.tensors(payload["loss_fn"]) == {}


def test_plain_layers_are_read_from_their_attributes(network: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(network))
    record = pickles.load(tmp_path / "net.pkl")
    assert record.class_name == "Sequential"
    assert_same(pickles.tensors(record), network.state_dict())


def test_a_pickled_state_dict_keeps_its_order_and_loses_its_metadata(network: nn.Module) -> None:
    state = network.state_dict()
    assert hasattr(state, "_metadata")
    found = load(pickle.dumps(state))
    assert_same(found, state)
    assert not hasattr(found, "_metadata")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensors_of_every_type_and_layout_come_out_as_they_were(dtype: torch.dtype) -> None:
    whole = (torch.arange(60).reshape(3, 4, 5) % 7).to(dtype)
    views = {"whole": whole, "turned": whole.transpose(0, 2), "part": whole[1:, ::2, 3], "none": whole[:0]}
    views |= {"scalar": whole[0, 0, 1], "last": whole.to(memory_format=torch.contiguous_format)[2, 3, 4:]}
    assert_same(load(pickle.dumps(views)), views)


def test_plain_values_come_out_as_they_were() -> None:
    plain = {
        "numbers": [0, -1, 255, 65536, 2**40, -(2**70), 1.5, float("inf"), True, False, None],
        "texts": ("", "a", "ä" * 300, b"", b"bytes"),
        "sets": {1, 2},
        3: frozenset({"frozen"}),
        "nested": [[[]], {}, ((), {"a": ({"b": []},)})],
    }
    shared: list[int] = [1]
    for protocol in (3, 4, 5):
        assert load(pickle.dumps(plain, protocol)) == plain
    found = load(pickle.dumps([shared, shared]))
    assert found == [[1], [1]]
    assert found[0] is found[1]


def test_harmless_kinds_become_plain_values() -> None:
    made = lambda: {  # noqa: E731
        "easy": easy_dict(class_name="training.networks.EDMPrecond", mult=[1, 2]),
        "numbers": [np.float32(0.5), np.int64(-3), np.bool_(True), np.dtype(">f8").type(2)],
        "parameter": nn.Parameter(torch.ones(2)),
    }
    found = load(edm_pickle(made))
    assert type(found["easy"]) is dict
    assert found["easy"] == {"class_name": "training.networks.EDMPrecond", "mult": [1, 2]}
    assert found["numbers"] == [0.5, -3, True, 2.0]
    assert {type(number) for number in found["numbers"]} == {float, int, bool}
    assert type(found["parameter"]) is torch.Tensor
    assert not found["parameter"].requires_grad


def test_source_text_inside_is_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for kind, source in (("Net", f"open({str(canary)!r}, 'w')"), ("os.system", "import os")):
        record = load(edm_pickle(Persistent(kind, source, x=1)))
        assert (record.class_name, record.state) == (kind, {"x": 1})
    assert not canary.exists()


def test_attributes_with_dangerous_names_are_data(network: nn.Module) -> None:
    names = ["__class__", "__reduce__", "__setstate__", "__getattr__", "__del__", "state", "class_name", "module"]
    record = load(edm_pickle(Persistent("Net", **dict.fromkeys(names, "anything"))))
    assert type(record) is pickles.Record
    assert record.class_name == "Net"
    assert record.state == dict.fromkeys(names, "anything")


# --- attacks -----------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    """Pushes a string."""
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def called(module: str, name: str, *arguments: bytes) -> bytes:
    """Pushes module.name(*arguments)."""
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


class Calls:
    """An object that, unpickled, is function(*arguments)."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def legacy(thing: Any) -> bytes:
    """torch.save in the format that tensors inside of a pickle have."""
    buffer = io.BytesIO()
    torch.save(thing, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def pushed(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def four() -> bytes:
    """The memory of four float32 numbers, as pickles of tensors hold it."""
    memory = torch.arange(4.0).untyped_storage()
    return legacy(torch.storage.TypedStorage(wrap_storage=memory, dtype=torch.float32, _internal=True))


def tensor_of(storage: bytes, *layout: Any) -> bytes:
    """Pushes a tensor: its memory, offset, size and stride."""
    values = (pickle.dumps(value, 2)[2:-1] for value in (*layout, False))  # without the first and last instruction
    memory = called("torch.storage", "_load_from_bytes", pushed(storage))
    return called("torch._utils", "_rebuild_tensor_v2", memory, *values, DICT)


LAYER = b"ctorch.nn.modules.linear\nLinear\n)\x81"


DICT = called("collections", "OrderedDict")
RUNNABLE: dict[str, tuple[Callable[[str], bytes], str]] = {  # what Python's own unpickler would run; and our answer
    "a command": (lambda canary: called("os", "system", text(f"touch '{canary}'")), "os.system"),
    "an expression": (lambda canary: called("builtins", "eval", text(f"open({canary!r}, 'w')")), "builtins.eval"),
    "Python 2's eval": (
        lambda canary: called("__builtin__", "eval", text(f"open({canary!r}, 'w')")),
        "__builtin__.eval",
    ),
    "a file": (lambda canary: called("builtins", "open", text(canary), text("w")), "builtins.open"),
    "a process": (
        lambda canary: called("subprocess", "call", b"(", text("touch"), text(canary), b"l"),
        "subprocess.call",
    ),
    "a module": (
        lambda canary: (
            called("builtins", "getattr", called("builtins", "__import__", text("os")), text("mkdir"))
            + b"("
            + text(canary)
            + b"tR"
        ),
        "builtins.getattr",
    ),
    "an old instance": (lambda canary: b"(" + text(canary) + b"ios\nmkdir\n", "the instruction INST"),
    "an older instance": (lambda canary: b"(cos\nmkdir\n" + text(canary) + b"o", "os.mkdir"),
    "an attribute": (
        lambda canary: called("builtins", "setattr", DICT, text("x"), called("os", "mkdir", text(canary))),
        "builtins.setattr",
    ),
    "a call as a value": (lambda canary: b"]" + called("os", "mkdir", text(canary)) + b"a", "os.mkdir"),
    "a call as a state": (lambda canary: DICT + called("os", "mkdir", text(canary)) + b"0}b", "os.mkdir"),
    "dots in a name": (
        lambda canary: b"\x80\x04" + text("os") + text("path.os.mkdir") + b"\x93" + b"(" + text(canary) + b"tR",
        "os.path.os.mkdir",
    ),
    "a torch file": (
        lambda canary: called("torch.storage", "_load_from_bytes", pushed(legacy(Calls(os.mkdir, canary)))),
        "",
    ),
}


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file or folder that must not come into being."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def runs(data: bytes, path: Path) -> bool:
    """Whether Python's own unpickler runs the attack."""
    subprocess.run(
        [sys.executable, "-c", "import pickle, sys; pickle.load(sys.stdin.buffer)"],
        input=data,
        capture_output=True,
    )
    return path.exists()


@pytest.mark.parametrize("attack", [name for name in RUNNABLE if name != "a torch file"])
def test_the_attacks_are_real(attack: str, tmp_path: Path) -> None:
    path = tmp_path / "canary"
    assert runs(RUNNABLE[attack][0](str(path)) + b".", path)


@pytest.mark.parametrize("attack", RUNNABLE)
def test_an_attack_is_refused_by_name_and_nothing_runs(attack: str, canary: Path) -> None:
    make, asked = RUNNABLE[attack]
    with pytest.raises(CheckpointError) as refused:
        load(make(str(canary)) + b".")
    if asked:
        assert str(refused.value) == f"the pickle asks for {asked}; {ONLY}"
    else:
        assert str(refused.value).startswith("the pickle holds a tensor that is damaged or not one: Weights only load")
    assert refused.value.hint == "if you trust it, load it where it came from and save its state dict as safetensors"


def test_an_error_names_the_file(tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "net.pkl"
    path.write_bytes(called("os", "mkdir", text(str(canary))) + b".")
    with pytest.raises(CheckpointError) as refused:
        pickles.load(path)
    assert str(refused.value) == f"{path}: the pickle asks for os.mkdir; {ONLY}"


def test_a_name_that_would_forge_the_message_is_quoted() -> None:
    with pytest.raises(CheckpointError) as refused:
        load(b"\x80\x04" + text("os") + text("system\n" + "x" * 1000) + b"\x93.")
    assert str(refused.value).startswith(r"the pickle asks for 'os.system\nxxx")
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("code", [b"\x82\xf0", b"\x83\xf0\x00", b"\x84\xf0\x00\x00\x00"], ids=["EXT1", "EXT2", "EXT4"])
def test_the_extension_registry_is_not_asked(code: bytes, canary: Path, tmp_path: Path) -> None:
    attack = code + b"(" + text(str(canary)) + b"tR."
    copyreg.add_extension("os", "mkdir", 240)
    try:
        pickle.loads(attack)  # real; and from now on Python has it in its cache
        canary.rmdir()
        with pytest.raises(CheckpointError) as refused:
            load(attack)
    finally:
        copyreg.remove_extension("os", "mkdir", 240)
        copyreg.clear_extension_cache()
    assert str(refused.value) == f"the pickle asks for the instruction EXT{'124'[code[0] - 0x82]}; {ONLY}"


REFUSED = {
    "a persistent id": (b"Pstorage\n", "the instruction PERSID"),
    "a persistent tuple": (b"(" + text("storage") + text("0") + b"tQ", "the instruction BINPERSID"),
    "a call of a value": (text("f") + b")R", "a call of a str"),
    "a call of an object": (LAYER + b")R", "a call of a Record"),
    "a call without a tuple": (b"ccollections\nOrderedDict\n]R", "a call of a _Global"),
    "keywords": (b"ccollections\nOrderedDict\n)}\x92", "the instruction NEWOBJ_EX"),
    "a state of a dict": (b"}}b", "a state of a dict"),
    "a state of text": (text("a") + b"}b", "a state of a str"),
    "a state of slots": (LAYER + b"N}" + text("__class__") + b"Ns\x86b", "a state of a Record"),
    "a second state": (LAYER + b"}" + text("a") + b"Nsb" + b"}b", "a state of a Record"),
    "a state of a class": (b"ctorch.nn.modules.linear\nLinear\n}b", "a state of a _Global"),
    "a function as a value": (b"]ccollections\nOrderedDict\na", "functions or parts of tensors as values"),
    "a class as a value": (b"ctorch.nn.modules.linear\nLinear\n", "functions or parts of tensors as values"),
    "a function beside the layers": (b"ctorch.nn.modules\nsys.modules\n)R", "torch.nn.modules.sys.modules"),
    "an object of any class": (
        called("copyreg", "_reconstructor", b"ctorch.nn.modules.linear\nLinear\n", b"cbuiltins\nobject\n", b"N"),
        "copyreg._reconstructor",
    ),
    "another dtype": (called("numpy", "dtype", text("O8")), "numpy.dtype of more than a number"),
    "an array": (called("numpy.core.multiarray", "_reconstruct"), "numpy.core.multiarray._reconstruct"),
    "out-of-band memory": (b"\x97", "the instruction NEXT_BUFFER"),
    "memory that is no file": (
        called("torch.storage", "_load_from_bytes", pushed(b"\x80\x04N.")),
        "torch.storage._load_from_bytes of something else than a tensor's memory",
    ),
    "memory that is a zip file": (
        called("torch.storage", "_load_from_bytes", pushed(b"PK\x03\x04")),
        "torch.storage._load_from_bytes of something else than a tensor's memory",
    ),
    "memory that is a dict": (
        called("torch.storage", "_load_from_bytes", pushed(legacy({"a": 1}))),
        "torch.storage._load_from_bytes of something else than a tensor's memory",
    ),
    "memory as text": (
        called("torch.storage", "_load_from_bytes", text("a")),
        "torch.storage._load_from_bytes of something else than a tensor's memory",
    ),
    "memory without a tensor": (
        called("torch.storage", "_load_from_bytes", pushed(four())),
        "functions or parts of tensors as values",
    ),
}


@pytest.mark.parametrize("attack", REFUSED)
def test_what_no_checkpoint_does_is_refused(attack: str) -> None:
    data, asked = REFUSED[attack]
    with pytest.raises(CheckpointError) as refused:
        load(data + b".")
    assert str(refused.value) == f"the pickle asks for {asked}; {ONLY}"


def test_any_name_among_the_layers_is_only_a_name() -> None:
    found = load(b"ctorch.nn.modules.module\n__import__\n)R.")
    assert (type(found), found.class_name, found.state) == (pickles.Record, "__import__", {})


# --- bombs -------------------------------------------------------------------------------------------------------


def deep() -> dict[Any, Any]:
    key: tuple[Any, ...] = ()
    for _ in range(200):
        key = (key,)
    return {key: None}


DEEP = "the pickle's containers lie more than 100 deep, or in themselves"
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "lists in lists": (lambda: b"]" * 20_000 + b"a" * 19_999, DEEP),
    "tuples in tuples": (lambda: b")" + b"\x85" * 20_000, DEEP),
    "marks": (lambda: b"(" * 20_000, "a damaged pickle: too many values to unpack (expected 1)"),
    "a deep key": (lambda: b"}" + b")" + b"\x85" * 20_000 + b"Ns", "a damaged pickle: a key that is neither text"),
    "a wide key": (lambda: b"}" + b")" + b"2\x86" * 100 + b"Ns", "a damaged pickle: a key that is neither text"),
    "a deep member": (lambda: b"\x8f(" + b")" + b"\x85" * 20_000 + b"\x90", "a damaged pickle: a key that is neither"),
    "a circle": (lambda: b"]q\x00h\x00a", DEEP),
    "a long circle": (lambda: b"]q\x00}" + text("a") + b"h\x00sa", DEEP),
    "huge bytes": (lambda: b"\x8e" + struct.pack("<Q", 2**62) + b"abc", "a damaged pickle: expected"),
    "huger bytes": (lambda: b"\x8e" + struct.pack("<Q", 2**64 - 1) + b"abc", "a damaged pickle: bytes8 byte count"),
    "huge text": (lambda: b"X" + struct.pack("<I", 2**32 - 1) + b"abc", "a damaged pickle: expected 4294967295 bytes"),
    "a huge number": (lambda: b"\x8b" + struct.pack("<i", 2**31 - 1) + b"abc", "a damaged pickle: not enough data"),
    "many digits": (lambda: b"I" + b"9" * 20_000 + b"\n", "a damaged pickle: Exceeds the limit"),
    "a huge shape": (
        lambda: tensor_of(four(), 0, (2**39,), (1,)),
        "the pickle declares a tensor of shape [549755813888] in 4 values",
    ),
    "a shape without steps": (
        lambda: tensor_of(four(), 0, (2**30, 2**30), (0, 0)),
        "the pickle declares a tensor of shape [1073741824, 1073741824] in 4 values",
    ),
    "an offset beyond": (lambda: tensor_of(four(), 1, (4,), (1,)), "the pickle declares a tensor of shape [4] in 4"),
    "a stride beyond": (lambda: tensor_of(four(), 0, (2, 2), (3, 1)), "the pickle declares a tensor of shape [2, 2]"),
    "a deep key in a tensor": (
        lambda: called("torch.storage", "_load_from_bytes", pushed(legacy(deep()))),
        "the pickle asks for torch.storage._load_from_bytes of something else than a tensor's memory",
    ),
    "a negative stride": (lambda: tensor_of(four(), 3, (4,), (-1,)), "a damaged pickle: a tensor whose shape is none"),
    "a negative offset": (lambda: tensor_of(four(), -1, (1,), (1,)), "a damaged pickle: a tensor whose shape is none"),
    "half a shape": (lambda: tensor_of(four(), 0, (2, 2), (2,)), "a damaged pickle: a tensor whose shape is none"),
    "a shape of text": (lambda: tensor_of(four(), 0, "4", "1"), "a damaged pickle: a tensor without memory or shape"),
    "a huge size": (lambda: tensor_of(four(), 0, (2**80,), (1,)), "a damaged pickle: a tensor whose shape is none"),
    "a tensor of nothing": (
        lambda: called("torch._utils", "_rebuild_tensor_v2"),
        "a damaged pickle: torch._utils._rebuild_tensor_v2 with other arguments than it takes",
    ),
    "items of another kind": (lambda: b"](" + text("a") + b"Nu", "a damaged pickle: items for a dict go to a list"),
    "declared memory": (
        lambda: tensor_of(four().replace(b"K\x04N", b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"N"), 0, (4,), (1,)),
        "the pickle holds a tensor that is damaged or not one: ",
    ),
    "more memory than given": (
        lambda: tensor_of(four().replace(b"K\x04N", b"K\x40N"), 0, (4,), (1,)),
        "the pickle holds a tensor that is damaged or not one: ",
    ),
    "truncated memory": (
        lambda: tensor_of(four()[:-5], 0, (4,), (1,)),
        "the pickle holds a tensor that is damaged or not one: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_before_it_goes_off(bomb: str) -> None:
    make, message = BOMBS[bomb]
    data = make() + b"."
    with pytest.raises(CheckpointError) as refused:
        load(data)
    assert str(refused.value).startswith(message)


def test_a_memo_index_costs_nothing() -> None:
    assert load(b"Nr\xff\xff\xff\xff0j\xff\xff\xff\xff.") is None


# --- damage ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole() -> bytes:
    """A small pickle with everything in it."""
    torch.manual_seed(0)
    net = persistent("Net", nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2)), mult=[1, 2])
    return edm_pickle(lambda: {"ema": net, "kwargs": easy_dict(a=np.float64(0.5), b={1, 2}, c=1)})


def test_a_truncated_pickle_is_refused_wherever_it_ends(whole: bytes, tmp_path: Path) -> None:
    load(whole)
    for end in range(0, len(whole), 7):
        with pytest.raises(CheckpointError):
            load(whole[:end])
    (tmp_path / "short.pkl").write_bytes(whole[:-1])
    with pytest.raises(CheckpointError) as refused:
        pickles.load(tmp_path / "short.pkl")
    assert str(refused.value).startswith(f"{tmp_path / 'short.pkl'}: a damaged pickle: ")
    assert refused.value.hint == "download it again"


def test_a_damaged_pickle_is_refused_or_read_and_nothing_else(whole: bytes, canary: Path) -> None:
    generator = random.Random(0)
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        try:
            load(bytes(data))
        except CheckpointError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    "data", [b"", b".", b"..", b"\x80\x04.", b"\x80\xff.", b"hello", b"N0.", b"NN.", b"a.", b"h\x05."]
)
def test_what_is_no_pickle_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "none.pkl").write_bytes(data)
    for source in (tmp_path / "none.pkl", io.BytesIO(data)):
        with pytest.raises(CheckpointError):
            pickles.load(source)


def test_a_file_that_is_not_there_is_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refused:
        pickles.load(tmp_path / "none.pkl")
    assert str(refused.value).startswith(f"{tmp_path / 'none.pkl'}: cannot be read: ")


@pytest.mark.parametrize(
    "members", [[1], {1: torch.ones(1)}, {"x" * 300: torch.ones(1)}], ids=["list", "number", "long"]
)
def test_parameters_that_are_not_a_dict_of_names_are_refused(members: Any) -> None:
    with pytest.raises(CheckpointError) as refused:
        pickles.tensors(pickles.Record("Net", {"_parameters": members}))
    assert str(refused.value) == "Net: its _parameters are not a dict of names"
