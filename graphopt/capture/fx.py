"""FX to IR: a functional aten graph, traced with fake tensors, becomes a :class:`~graphopt.capture.captured.Captured`."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from graphopt.capture import (
    aten_activation,
    aten_attention,
    aten_complex,
    aten_create,
    aten_index,
    aten_nn,
    aten_pad,
    aten_pointwise,
    aten_quantize,
    aten_reduce,
    aten_scan,
    aten_scatter,
    aten_shape,
    aten_strided,
    aten_window,
    opaque,
)
from graphopt.capture.aten import TABLE, Context, Decline
from graphopt.capture.aten_strided import OF_STORAGE, of_memory, relative, root_of
from graphopt.capture.captured import (
    Argument,
    Captured,
    ConstResult,
    Mutation,
    Result,
    SizeArgument,
    SizeResult,
    TensorArgument,
    Uncapturable,
    UnusedArgument,
)
from graphopt.capture.results import Results
from graphopt.capture.source import clean_name, location
from graphopt.capture.symbols import SymbolTable
from graphopt.errors import TypeInferenceError
from graphopt.ir import dims
from graphopt.ir.builder import Builder
from graphopt.ir.dims import Dim, Shape
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.types import DType, TensorType

PAGES = (  # importing fills the table
    aten_pointwise, aten_activation, aten_shape, aten_strided, aten_pad, aten_create, aten_index, aten_scatter, aten_quantize, aten_reduce,
    aten_scan, aten_nn, aten_window, aten_attention, aten_complex,
)  # fmt: skip

_IGNORED = (  # checks of what tracing has established already
    "aten._assert_tensor_metadata.default", "aten._assert_scalar.default", "aten.sym_constrain_range.default",
    "aten.sym_constrain_range_for_size.default", "prims._sink_tokens.default", "prims._make_token.default",
)  # fmt: skip


def capture_fx(gm: torch.fx.GraphModule, *, weights: Mapping[int, str] | None = None, inputs: Mapping[int, str] | None = None,
               name: str = "main") -> Captured:  # fmt: skip
    """Capture a functional aten graph.

    Args:
        gm: every node carries fake tensors in ``meta["val"]``.
        weights: placeholder index -> name, of the frozen weights among the inputs.
        inputs: placeholder index -> name, of the user's arguments, where it is another than the placeholder's.
        name: of the graph, for texts and reports.

    Raises:
        Uncapturable: the IR cannot hold it; names the op and the user's source line.
    """
    return _Capture(gm, weights or {}, inputs or {}, name).run()


def capture_values(gm: torch.fx.GraphModule, name: str) -> tuple[Graph, list[Value | None]]:
    """The graph of an FX graph, and the value of each of its outputs: None where it is no tensor. The graph has no outputs yet.

    Raises:
        Uncapturable: as :func:`capture_fx`.
    """
    capture = _Capture(gm, {}, {}, name)
    outputs: list[Value | None] = []
    for node in gm.graph.nodes:
        if node.op != "output":
            capture.step(node)
            continue
        found = [capture.env.get(n) for n in node.args[0]]
        outputs = [v if isinstance(v, Value) else None for v in found]
    return capture.graph, outputs


class _Capture:
    def __init__(self, gm: torch.fx.GraphModule, weights: Mapping[int, str], inputs: Mapping[int, str], name: str) -> None:
        self.gm, self.weights, self.inputs = gm, weights, inputs
        self.graph = Graph(name)
        self.symbols = SymbolTable()
        self.symbols.ranges = self.graph.symbols
        self.env: dict[torch.fx.Node, Any] = {}
        self.fakes: dict[Value, torch.Tensor] = {}  # traced tensors of the operands of the node at hand
        self.arguments: list[Argument] = []
        self.placeholders: dict[torch.fx.Node, int] = {}
        self.mutated: list[tuple[int, Value]] = []  # argument, new value
        self.weight_names: dict[int, str] = {}
        self.input_names: dict[int, str] = {}
        self.literals: list[tuple[Value, torch.Tensor]] = []
        self.device: torch.device | None = None

    def run(self) -> Captured:
        for node in self.gm.graph.nodes:
            try:
                self.step(node)
            except Uncapturable as error:
                if error.loc is not None or node.op == "placeholder":
                    raise
                raise Uncapturable(error.reason, location(node.meta), error.target or str(node.target)) from error
        return self.captured

    def step(self, node: torch.fx.Node) -> None:
        match node.op:
            case "placeholder":
                self.placeholder(node)
            case "get_attr":
                self.literal(node)
            case "call_function":
                self.call(node)
            case "output":
                self.finish(node)
            case _:
                raise Uncapturable(f"an FX node of kind {node.op}")

    # --- inputs -------------------------------------------------------------------------------------------------------

    def placeholder(self, node: torch.fx.Node) -> None:
        index = len(self.arguments)
        self.placeholders[node] = index
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt) or (isinstance(val, int) and not isinstance(val, bool)):
            self.arguments.append(SizeArgument(self.symbols.dim(val)))
            return
        if not isinstance(val, torch.Tensor):
            if isinstance(val, torch.SymFloat | torch.SymBool) and node.users:
                raise Uncapturable(f"an argument of type {type(val).__name__}")
            self.arguments.append(UnusedArgument())
            return
        if not node.users and all(isinstance(n, int) for n in val.shape):
            self.arguments.append(UnusedArgument())
            return
        t = self.type_of(val, strided=True)
        name = self.weights.get(index)
        value = self.graph.add_input(t, clean_name(name or node.name), weight=name is not None)
        if name is not None:
            self.weight_names[value.index] = clean_name(name)
        else:
            self.input_names[value.index] = clean_name(self.inputs.get(index, node.name))
        self.env[node] = value
        self.arguments.append(TensorArgument(value.index))

    def literal(self, node: torch.fx.Node) -> None:
        """A tensor that is part of the program; a scalar becomes an IR constant, others become inputs after the arguments'."""
        tensor = self.gm
        for part in str(node.target).split("."):
            tensor = getattr(tensor, part)
        if not isinstance(tensor, torch.Tensor):
            self.env[node] = opaque.NotATensor(tensor)  # type: ignore[arg-type]
            return
        t = self.type_of(tensor, strided=True)
        if not t.shape and not t.dtype.is_complex:
            with unset_fake_temporarily():
                number = tensor.item()
            value = Builder(self.graph, loc=location(node.meta)).constant(number, t.dtype)
        else:
            # an input for now; moved behind the arguments' inputs at the end (placeholders all come first in FX)
            value = self.graph.add_input(t, clean_name(str(node.target)), weight=True)
            self.literals.append((value, tensor))
        self.env[node] = value
        self.fakes[value] = tensor

    def type_of(self, val: Any, strided: bool = False) -> TensorType:
        """The type of a traced tensor; with strides where they are not row-major."""
        if type(val) not in (FakeTensor, torch.Tensor, torch.nn.Parameter):
            raise Uncapturable(f"a tensor of the class {type(val).__name__}")
        if val.layout != torch.strided or val.is_quantized:
            raise Uncapturable("a sparse or quantized tensor")
        if self.device is None:
            self.device = val.device
        if val.device != self.device:
            raise Uncapturable(f"tensors on {self.device} and on {val.device}")
        try:
            dtype = DType.of(val.dtype)
        except KeyError:
            raise Uncapturable(f"the dtype {val.dtype}") from None
        shape = self.dims(val.shape)
        t = TensorType(dtype, shape, self.dims(val.stride()) if strided else None)
        return t if strided and not t.is_contiguous else t.logical

    def dims(self, sizes: Sequence[Any]) -> Shape:
        return tuple(self.symbols.dim(s) for s in sizes)

    # --- nodes --------------------------------------------------------------------------------------------------------

    def call(self, node: torch.fx.Node) -> None:
        val: Any = node.meta.get("val")
        target = node.target
        if target is operator.getitem:
            source = self.env[node.args[0]]  # type: ignore[index]
            self.env[node] = source[node.args[1]]
            return
        if str(target) in _IGNORED or isinstance(val, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool):
            return  # sizes are read from the traced values
        if target is torch.ops.higher_order.with_effects:
            b = Builder(self.graph, loc=location(node.meta))
            args, kwargs = self.convert(list(node.args[2:])), {k: self.convert(v) for k, v in node.kwargs.items()}
            self.env[node] = [None, *self.library_call(b, node.args[1], args, kwargs, list(val[1:]), effect="mutates")]
            return
        if not isinstance(target, torch._ops.OpOverload):
            raise Uncapturable(f"{target} has no counterpart")
        if target is torch.ops.aten.copy_.default and node.args[0] in self.placeholders:
            self.mutation(node)
            return
        several = isinstance(val, list | tuple)
        results = self.operator(node, target, node.args, node.kwargs, list(val) if several else [val])
        self.env[node] = results if several else results[0]

    def mutation(self, node: torch.fx.Node) -> None:
        """``copy_`` into an argument: the last thing that happens to it."""
        old, new = self.convert(node.args[0]), self.convert(node.args[1])
        b = Builder(self.graph, loc=location(node.meta))
        value = b.broadcast_to(b.cast(new, old.dtype), old.shape)
        index = self.placeholders[node.args[0]]  # type: ignore[index]
        self.mutated.append((index, value))
        self.env[node] = value

    def operator(self, node: torch.fx.Node, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], vals: list[Any]) -> list[Any]:
        """The results of an operator: by the table if it has an exact entry, else as a library call."""
        b = Builder(self.graph, loc=location(node.meta))
        args, kwargs = [self.convert(a) for a in args], {k: self.convert(v) for k, v in kwargs.items()}
        build = TABLE.get(str(target))
        used = self.used(node, len(vals))
        if build is not None and all(v is None or isinstance(v, torch.Tensor) or not u for v, u in zip(vals, used, strict=True)):
            last = self.graph._last
            try:
                return self.lower(node, b, build, args, kwargs, [v if isinstance(v, torch.Tensor) else None for v in vals])
            except (Decline, TypeInferenceError):
                self.erase_after(last)
        if str(target) in OF_STORAGE:
            args = self.of_storage(node, args)
            if target is torch.ops.aten.as_strided.default:
                try:
                    return self.lower(node, b, of_memory, args, {}, vals)
                except (Decline, TypeInferenceError):
                    self.erase_after(last)
        return self.library_call(b, target, args, kwargs, vals)

    def library_call(self, b: Builder, target: Any, args: Sequence[Any], kwargs: dict[str, Any], vals: list[Any],
                     effect: str | None = None) -> list[Any]:  # fmt: skip
        flat = opaque.tensors(vals)
        types = [self.type_of(v) if isinstance(v, torch.Tensor) else TensorType(DType.named("i64"), ()) for v in flat]
        values = opaque.build(b, target, args, kwargs, types, self.layout_of, effect)
        return opaque.structure(vals, iter(values))  # type: ignore[no-any-return]

    def lower(self, node: torch.fx.Node, b: Builder, build: Any, args: Sequence[Any], kwargs: Mapping[str, Any],
              vals: list[Any]) -> list[Any]:  # fmt: skip
        outs = [None if v is None else self.type_of(v) for v in vals]
        try:
            bound = inspect.signature(build).bind(None, *args, **kwargs)
        except TypeError as error:
            raise Decline(str(error)) from error
        c = Context(b, outs, self.used(node, len(vals)), self.traced_layout)
        result = build(c, *bound.args[1:], **bound.kwargs)
        results = result if isinstance(result, list) else [result]
        for value, t, used in zip(results, outs, c.used, strict=True):
            if value is None:
                c.require(not used or t is None)
                continue
            assert t is not None
            if value.dtype != t.dtype or not dims.same_shape(value.shape, t.shape, self.graph.symbols):
                raise Decline(f"the entry gives {value.type}, traced was {t}")
        return results

    @staticmethod
    def used(node: torch.fx.Node, count: int) -> list[bool]:
        if not isinstance(node.meta.get("val"), list | tuple):
            return [True]
        read = {u.args[1] for u in node.users if u.target is operator.getitem and u.users}
        everything = any(u.target is not operator.getitem for u in node.users)
        return [everything or i in read or i - count in read for i in range(count)]

    def erase_after(self, last: Node | None) -> None:
        """Remove what a declined entry had built."""
        while self.graph._last is not last:
            assert self.graph._last is not None
            self.graph.erase(self.graph._last)

    def convert(self, arg: Any) -> Any:
        """An FX argument with Values for tensors and Dims for sizes."""
        if isinstance(arg, torch.fx.Node):
            val = arg.meta.get("val")
            if isinstance(val, torch.SymInt):
                return self.symbols.dim(val)
            if isinstance(val, torch.SymFloat | torch.SymBool):
                raise Uncapturable(f"an argument of type {type(val).__name__}")
            if isinstance(val, int | float | bool):
                return val
            value = self.env.get(arg)
            if not isinstance(value, Value | list):
                raise Uncapturable(f"the value of {arg.name} is no tensor")
            if isinstance(value, Value) and isinstance(val, torch.Tensor):
                self.fakes[value] = val  # of this very node: a dropped copy has other strides than what it copied
            return value
        if isinstance(arg, list | tuple):
            return [self.convert(a) for a in arg]
        if isinstance(arg, torch.SymInt):
            return self.symbols.dim(arg)
        return arg

    # --- layouts ------------------------------------------------------------------------------------------------------

    def traced_layout(self, value: Value) -> tuple[Shape, Dim]:
        fake = self.fakes[value]
        return self.dims(fake.stride()), self.symbols.dim(fake.storage_offset())

    def layout_of(self, value: Value) -> Shape | None:
        """Traced strides, where a tensor can be allocated with them."""
        fake = self.fakes.get(value)
        if fake is None or not fake.dim():
            return None
        strides = self.dims(fake.stride())
        return None if any(s == 0 and n != 1 for n, s in zip(fake.shape, strides, strict=True)) else strides

    def of_storage(self, node: torch.fx.Node, args: list[Any]) -> list[Any]:
        """Operators that read or write storage: of the first tensor that was made in it, counted from that tensor's first element."""
        source, at = node.args[0], OF_STORAGE[str(node.target)]
        assert isinstance(source, torch.fx.Node)
        root = root_of(source, self.env) if at == 1 else source
        size, stride, offset, *_ = [*args[at:], None]
        if offset is not None and root in self.placeholders and self.placeholders[root] not in self.weights:
            # where an argument lies in its storage is not guarded: the next one may begin elsewhere
            raise Uncapturable("as_strided with an offset into an argument's storage, which need not be the same at the next call")
        offset = relative(root.meta["val"], source.meta["val"], size, stride, offset)
        self.fakes[self.env[root]] = root.meta["val"]
        return [self.env[root], *args[1:at], size, stride, offset]

    # --- results ------------------------------------------------------------------------------------------------------

    def finish(self, node: torch.fx.Node) -> None:
        (outputs,) = node.args
        assert isinstance(outputs, list | tuple)
        results = Results(self, self.gm.graph)
        mutations = [Mutation(index, results.output(value, None)) for index, value in self.mutated]
        listed: list[Result] = []
        for out in outputs:
            if not isinstance(out, torch.fx.Node):
                listed.append(ConstResult(out))
            elif isinstance(out.meta.get("val"), torch.SymInt):
                listed.append(SizeResult(self.symbols.dim(out.meta["val"])))
            elif isinstance(out.meta.get("val"), torch.Tensor):
                listed.append(results.of(out))
            else:
                raise Uncapturable(f"a result of type {type(out.meta.get('val')).__name__}")
        self.graph.set_outputs(results.values, results.strides)
        self.captured = Captured(
            self.graph, self.arguments, listed, mutations, self.weight_names, {v.index: t for v, t in self.literals},
            self.device or torch.device("cpu"), self.symbols.examples, self.input_names,
        )  # fmt: skip
