"""The whole edit as one ONNX file, for hosts that are not Python: guide in, picture out.

Inputs; the batch B is dynamic, and so are H and W of a model for any size:

    guide       uint8 [B, H, W, C], RGB or grey; or float32 [B, C, H, W] in [-1, 1]. Always at the model's size
    mask        where exported with one: uint8 [B, H, W], 255 = repaint; or float32 [B, 1, H, W] in [0, 1]
    seed        uint64 [B], one an image; an image is the same alone or in any batch
    further inputs of the network, [B], under their own names (class_label, say)

With noise as input there is no seed, but, as float32 standard normals:

    noise       [K·N, B, C, H, W]. Entry repeat·N + step: step 0 noises the guide, step s = 1 … N-1 is added after row s
                of the table, counted from 1; the last row adds none. Where no row does (`ddim` with η = 0) it is
                [K, B, C, H, W]: entry repeat, step 0
    mask_noise  with a mask and N > 1, [K·N, B, C, H, W]: what kept pixels are noised with after row s, at entry
                repeat·N + s. Entries of step 0 are not used

N is the number of steps, K of repeats, repeat = 0 … K-1. Output:

    image       for a uint8 guide: uint8 [B, H, W, C], clipped and rounded; with a mask it is pasted into the guide,
                whose kept pixels leave byte for byte. For a float32 guide: float32 [B, C, H, W], the last D(x; σ),
                about [-1, 1], unclipped and not pasted, as `sdedit edit -o OUT.npy` writes it

NaN is not looked for: a network that overflows shows in a float32 image only.

Inside are the step table, float32 [N] constants `edit/table.sigma`, `.a`, `.b`, `.c`, `.d`, `.sigma_next`; a Loop over
its rows, whose body holds the network once, its names behind `denoiser/`; and, where there are repeats, a Loop around
that. The noise made inside is `philox-bm24-v1` (sdedit.noise), in uint64, uint32 and float32 operators: the same bits
wherever +, -, ·, / and √ round as IEEE 754 says. It is, entry by entry, what `noise` (stream 0) and `mask_noise`
(stream 1) take: fed with those normals, both kinds of graph give the same image. The update is sdedit.loop's, in its
order.

Metadata property `sdedit_loop`, one JSON object:

    {"format": 1, "artifact": {"name": "church-256", "sha256": "…"},
     "image": {"channels": 3, "height": 256, "width": 256},               # as in the artifact
     "t0": 0.5, "steps": 20, "sampler": "ancestral", "eta": null, "repeats": 1,
     "mask": false, "guide": "uint8", "noise": "graph",                   # or "float32"; or "input"
     "noise_specification": "philox-bm24-v1", "table_version": 1,
     "precision": "fp32", "license": "…", "inputs": {…}, "sdedit_engine": "…"}   # the artifact's, where it has them

A reader refuses a higher format and ignores what it does not know.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper

from sdedit import __version__, output
from sdedit.artifact import Artifact
from sdedit.errors import OptionError
from sdedit.export import to_onnx
from sdedit.export.expressions import Value, Writer
from sdedit.export.graph import OPSETS, add_prefix, set_opset
from sdedit.export.noise_graph import Draw, NoiseGraph
from sdedit.noise import SPECIFICATION, STREAM_MASK, STREAM_STATE
from sdedit.output import writing
from sdedit.schedule import COLUMNS, StepTable, plan

FORMAT = 1
PROPERTY = "sdedit_loop"
GUIDES = ("uint8", "float32")
NOISES = ("graph", "input")
OURS = ("guide", "mask", "seed", "noise", "mask_noise", "image")
NETWORK = "denoiser/"  # before every name in the artifact's own graph
FLOAT, BOOL, INT64 = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64
UINT8, UINT64 = TensorProto.UINT8, TensorProto.UINT64
ONE = np.float32(1)

Type = tuple[int, Sequence[int | str]]  # element and dimensions


def write(
    opened: Artifact,
    path: Path,
    schedule: Mapping[str, Any],
    *,
    repeats: int = 1,
    mask: bool = False,
    guide: str = "uint8",
    noise: str = "graph",
    force: bool = False,
) -> dict[str, Any]:
    """Write the edit as one file, whole or not at all. Returns its metadata.

    schedule: the keywords of sdedit.plan. guide: one of GUIDES, noise: one of NOISES. Raises OptionError, OutputError.
    """
    for name, value, known in (("guide", guide, GUIDES), ("noise", noise, NOISES)):
        if value not in known:
            raise OptionError(f"{name} is {value!r}; wanted {' or '.join(known)}", hint=f"--{name} {known[0]}")
    if taken := [name for name in opened.extra_inputs if name in OURS]:
        raise OptionError(
            f"{opened.path}: its input {taken[0]} has the name of one of the edit's own",
            hint="export it again, renamed",
        )
    output.check([path], force=force, inputs=[opened.path])
    described = opened.metadata
    metadata = {
        "format": FORMAT,
        "artifact": {"name": opened.name, "sha256": opened.sha256},
        "image": described["image"],
        **schedule,
        "repeats": repeats,
        "mask": mask,
        "guide": guide,
        "noise": noise,
        "noise_specification": SPECIFICATION,
        "table_version": (table := plan(opened.sde, **schedule)).version,
        "precision": opened.precision,
        **{name: described[name] for name in ("license", "inputs") if name in described},
        "sdedit_engine": __version__,
    }
    edit = _Edit(opened, table, repeats=repeats, masked=mask, pixels=guide == "uint8", drawn=noise == "graph")
    model = edit.around(onnx.load(opened.path))
    with writing(path), tempfile.TemporaryDirectory(prefix=".sdedit-", dir=path.parent) as scratch:
        files = to_onnx.write(model, Path(scratch) / path.name, {PROPERTY: json.dumps(metadata)})
        output.check([path.with_name(file.name) for file in files], force=force, inputs=[opened.path, *opened.external])
        for file in reversed(files):  # the graph itself last
            os.replace(file, path.with_name(file.name))
    return metadata


class _Edit:
    """One edit's graph, written in the order of sdedit.executor, sdedit.loop and sdedit.image."""

    def __init__(
        self, opened: Artifact, table: StepTable, *, repeats: int, masked: bool, pixels: bool, drawn: bool
    ) -> None:
        self._w = w = Writer("edit/")
        self._extra = tuple(opened.extra_inputs)
        self._steps, self._repeats = table.steps, repeats
        self._masked, self._pixels, self._drawn = masked, pixels, drawn
        self._noisy, self._two_step = (bool(table.column(name).any()) for name in ("c", "d"))
        self._table = {n: w.value(table.column(n).astype(np.float32), f"table.{n}") for n in COLUMNS}
        dynamic = opened.metadata["image"].get("dynamic")
        self._size = ("H", "W") if dynamic else (opened.height, opened.width)
        self._state: Type = FLOAT, ("B", opened.channels, *self._size)
        self._picture: Type = (UINT8, ("B", *self._size, opened.channels)) if pixels else self._state

    def around(self, model: ModelProto) -> ModelProto:
        """The edit around an artifact's graph, whose names it changes."""
        if to_onnx.opset_of(model) < OPSETS[0]:  # bitwise operators begin there
            model = set_opset(model, OPSETS[0])
        w, network = self._w, add_prefix(model, NETWORK).graph
        given = Value("guide", w)
        x = self._to_model(given)
        self._start(x)
        edited = self._passes(network, x)
        self._to_picture(edited, given)

        extra = [tensor for tensor in network.input if tensor.name.removeprefix(NETWORK) in self._extra]
        for tensor in extra:
            tensor.name = tensor.name.removeprefix(NETWORK)
        inputs = [*(helper.make_tensor_value_info(name, *kind) for name, kind in self._inputs().items()), *extra]
        image = helper.make_tensor_value_info("image", *self._picture)
        edit = ModelProto(
            graph=helper.make_graph(w.nodes, "edit", inputs, [image], w.weights),
            ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions,
            producer_name="sdedit-engine", producer_version=__version__,
        )  # fmt: skip
        # Weights lie in the body itself: elsewhere ONNX Runtime does not lay them out for its convolutions, which costs
        # a fifth of the time. Last, since whatever holds them is copied at great cost.
        body = body_of(edit.graph, "edit/steps.x")
        body.initializer.extend(network.initializer)
        body.sparse_initializer.extend(network.sparse_initializer)
        return edit

    def _inputs(self) -> dict[str, Type]:
        inputs: dict[str, Type] = {"guide": self._picture}
        if self._masked:
            inputs["mask"] = (UINT8, ("B", *self._size)) if self._pixels else (FLOAT, ("B", 1, *self._size))
        if self._drawn:
            return inputs | {"seed": (UINT64, ("B",))}
        inputs["noise"] = FLOAT, (self._repeats * (self._steps if self._noisy else 1), *self._state[1])
        if self._masked and self._steps > 1:
            inputs["mask_noise"] = FLOAT, (self._repeats * self._steps, *self._state[1])
        return inputs

    # --- sdedit.image: pixels to tensors and back -----------------------------------------------------------------

    def _to_model(self, guide: Value) -> Value:
        if not self._pixels:
            return guide
        return self._w("Transpose", guide.to(FLOAT) / np.float32(127.5) - ONE, perm=[0, 3, 1, 2])

    def _to_picture(self, x: Value, guide: Value) -> None:
        """The output. TensorRT wants the uint8 tensor itself to be it."""
        w = self._w
        if not self._pixels:
            w("Identity", x, name="image")
            return
        levels = (w("Transpose", x, perm=[0, 2, 3, 1]) + ONE) * np.float32(127.5)
        if self._masked:
            omega = w("Transpose", self._omega, perm=[0, 2, 3, 1])
            levels = (w.value(ONE) - omega) * guide.to(FLOAT) + omega * levels
        w("Cast", w("Round", w("Clip", levels, np.float32(0), np.float32(255))), name="image", to=UINT8)

    # --- sdedit.executor: noise, mask, repeats --------------------------------------------------------------------

    def _start(self, guide: Value) -> None:
        """What stays the same from step to step."""
        w = self._w
        self._batch = w("Shape", guide, end=1)
        if self._drawn:
            self._noise = NoiseGraph(w, Value("seed", w), guide)
        if self._masked:
            mask = Value("mask", w)
            self._omega = w("Unsqueeze", mask.to(FLOAT) / np.float32(255), np.int64([1])) if self._pixels else mask
            self._kept = (w.value(ONE) - self._omega) * guide
            self._weight = w("Sqrt", w.value(ONE) - self._omega * self._omega)

    def _source(self, repeat: Value, stream: int) -> Draw:
        """The noise of one repeat, an int64 scalar."""
        if self._drawn:
            return self._noise.stream(repeat, stream)
        w, steps = self._w, np.int64(self._steps)
        if stream == STREAM_STATE and not self._noisy:
            return lambda step: w("Gather", Value("noise", w), repeat)
        given = Value("noise" if stream == STREAM_STATE else "mask_noise", w)
        return lambda step: w("Gather", given, repeat * steps + step)

    def _passes(self, network: GraphProto, guide: Value) -> Value:
        """Every repeat; each but the first starts from the last one's result."""
        w = self._w
        if self._repeats == 1:
            return self._denoise(network, guide, w.value(np.int64(0)))
        with self._loop("passes", self._repeats, {"start": guide, "edited": guide}) as (repeat, (start, _), results):
            edited = self._denoise(network, start, repeat)
            results[:] = [self._kept + self._omega * edited if self._masked else edited, edited]
        return Value("edit/passes.edited", w)

    # --- sdedit.loop ----------------------------------------------------------------------------------------------

    def _denoise(self, network: GraphProto, start: Value, repeat: Value) -> Value:
        """One pass: perturb, then every step of the table."""
        w = self._w
        state_noise = self._source(repeat, STREAM_STATE)
        mask_noise = self._source(repeat, STREAM_MASK) if self._masked and self._steps > 1 else None
        x = start + w("Gather", self._table["sigma"], np.int64(0)) * state_noise(w.value(np.int64(0)))
        states = {"x": x} | ({"previous": start} if self._two_step else {})
        with self._loop("steps", self._steps, states) as (row, given, results):
            x, *previous = given
            w("Identity", x, name=f"{NETWORK}x")
            w("Expand", w("Gather", self._table["sigma"], row), self._batch, name=f"{NETWORK}sigma")
            for name in self._extra:
                w("Identity", Value(name, w), name=f"{NETWORK}{name}")
            w.nodes.extend(network.node)
            denoised = Value(f"{NETWORK}denoised", w)
            results[:] = [self._step(x, denoised, previous, row, state_noise, mask_noise), denoised][: len(states)]
        return Value("edit/steps.x", w)

    def _step(
        self, x: Value, denoised: Value, previous: Sequence[Value], row: Value, noise: Draw, mask_noise: Draw | None
    ) -> Value:
        """x after a row of the table: D after the last."""
        w = self._w
        if self._steps == 1:
            return denoised
        number = row + np.int64(1)
        with w.body() as last:
            w("Identity", denoised, name="edit/x_last")
        with w.body() as other:
            a, b, c, d, sigma_next = (w("Gather", self._table[name], row) for name in COLUMNS[1:])
            work = denoised * b
            for before in previous:
                work = work + (denoised - before) * d
            x = x * a + work
            if self._noisy:
                x = x + noise(number) * c
            if mask_noise:
                x = x * self._omega + self._kept
                x = x + mask_noise(number) * self._weight * sigma_next
            w("Identity", x, name="edit/x_other")
        branches = {
            f"{which}_branch": helper.make_graph(nodes, name, [], [self._typed(f"edit/{name}")])
            for which, name, nodes in (("then", "x_last", last), ("else", "x_other", other))
        }
        return w("If", w("Equal", number, np.int64(self._steps)), **branches)

    # --- ONNX -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _loop(
        self, name: str, count: int, states: Mapping[str, Value]
    ) -> Iterator[tuple[Value, list[Value], list[Value]]]:
        """What is written inside is the body of a Loop: (iteration, states, list to fill with the states' next values).

        The results are named edit/NAME.STATE.
        """
        w = self._w
        inside = [f"edit/{name}.{state}_in" for state in states]
        results: list[Value] = []
        with w.body() as nodes:
            yield Value(f"edit/{name}.number", w), [Value(each, w) for each in inside], results
            w("Identity", Value(f"edit/{name}.go_in", w), name=f"edit/{name}.go")
            next_names = [f"edit/{name}.{state}_next" for state in states]
            for value, next_name in zip(results, next_names, strict=True):
                w("Identity", value, name=next_name)
        flag, number = ((f"edit/{name}.{what}", kind, ()) for what, kind in (("go", BOOL), ("number", INT64)))
        body = helper.make_graph(
            nodes, name,
            [helper.make_tensor_value_info(*number), helper.make_tensor_value_info(f"{flag[0]}_in", BOOL, ()),
             *map(self._typed, inside)],
            [helper.make_tensor_value_info(*flag), *map(self._typed, next_names)],
        )  # fmt: skip
        given = [w.value(np.int64(count)), w.value(np.bool_(True)), *states.values()]
        w.nodes.append(
            helper.make_node(
                "Loop", [value.name for value in given], [f"edit/{name}.{state}" for state in states], name, body=body
            )
        )

    def _typed(self, name: str) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, *self._state)


def body_of(graph: GraphProto, result: str) -> GraphProto:
    """The body of the Loop, in this graph or in a Loop of it, that has this output."""
    (loop,) = (node for node in graph.node if node.op_type == "Loop")
    return loop.attribute[0].g if result in loop.output else body_of(loop.attribute[0].g, result)
