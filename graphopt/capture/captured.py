"""What capture hands over: a graph, how a call's arguments feed it, and how its outputs become the call's results.

The calling convention, in order:

1. Each runtime argument is a tensor that feeds a graph input, an integer that binds a size, or unused.
2. The graph runs on those inputs, with the tensors of :attr:`Captured.constants` in its last inputs.
3. Each :class:`Mutation` copies a graph output into an argument.
4. Each result is a fresh tensor (never shared with an input or with another output), an argument itself, a view of
   either, a size, or a constant.

:func:`evaluate` is this convention, run by the reference interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphopt.ir import dims, interpreter
from graphopt.ir.dims import Dim, Shape
from graphopt.ir.graph import Graph, Loc


class Uncapturable(Exception):
    """The IR cannot hold this graph; the whole of it runs through library kernels, and the report says so.

    Args:
        reason: in words; names the op.
        loc: the user's source line.
        target: the operator.
    """

    def __init__(self, reason: str, loc: Loc | None = None, target: str = "") -> None:
        super().__init__(f"{reason} ({loc})" if loc else reason)
        self.reason, self.loc, self.target = reason, loc, target


# arguments -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorArgument:
    """The argument feeds graph input ``input``."""

    input: int


@dataclass(frozen=True)
class SizeArgument:
    """The argument is an int, the value of ``dim`` (a symbol, or an expression over symbols bound elsewhere)."""

    dim: Dim


@dataclass(frozen=True)
class UnusedArgument:
    """The graph does not read the argument."""


Argument = TensorArgument | SizeArgument | UnusedArgument


# results ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ValueResult:
    """Graph output ``output``, in a tensor of its own."""

    output: int


@dataclass(frozen=True)
class ArgumentResult:
    """Argument ``argument`` itself (after mutation)."""

    argument: int


@dataclass(frozen=True)
class AliasResult:
    """A view into ``base``: the elements at ``shape`` and ``strides``, ``offset`` elements after base's first one."""

    base: ValueResult | ArgumentResult
    shape: Shape
    strides: Shape
    offset: Dim


@dataclass(frozen=True)
class SizeResult:
    """The value of a size."""

    dim: Dim


@dataclass(frozen=True)
class ConstResult:
    """A Python constant: None, a number or a string."""

    value: Any


Result = ValueResult | ArgumentResult | AliasResult | SizeResult | ConstResult


@dataclass(frozen=True)
class Mutation:
    """After the graph ran, graph output ``output`` is copied into argument ``argument``."""

    argument: int
    output: int


@dataclass
class Captured:
    """A captured graph and its calling convention.

    Attributes:
        graph: its inputs are the tensor arguments in order, then the constants.
        arguments: one entry a runtime argument.
        results: one entry a result.
        mutations: in order.
        weight_names: graph input index -> the model's name of that weight.
        constants: graph input index -> a tensor that is part of the program (a literal of the user's code).
        device: where all of it lives.
        examples: symbol -> its value in the example inputs, where it is known.
        input_names: graph input index -> what the user calls that argument, where it is known.
    """

    graph: Graph
    arguments: list[Argument]
    results: list[Result]
    mutations: list[Mutation]
    weight_names: dict[int, str]
    constants: dict[int, torch.Tensor] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    examples: dict[str, int] = field(default_factory=dict)
    input_names: dict[int, str] = field(default_factory=dict)


def size_arguments(captured: Captured) -> dict[str, int]:
    """The symbols that integer arguments are, and the arguments' positions."""
    bare = {a.dim: i for i, a in enumerate(captured.arguments) if isinstance(a, SizeArgument) and not isinstance(a.dim, int)}
    return {dim.name: i for dim, i in bare.items() if dim.is_Symbol}


def evaluate(captured: Captured, args: Sequence[Any]) -> list[Any]:
    """Run a call by the reference interpreter; the definition of the calling convention."""
    graph = captured.graph
    inputs = {a.input: args[i] for i, a in enumerate(captured.arguments) if isinstance(a, TensorArgument)} | captured.constants
    tensors = [inputs[i] for i in range(len(graph.inputs))]
    given = {s: int(args[p]) for s, p in size_arguments(captured).items()}
    known = interpreter.bind_symbols(graph, [x.shape for x in tensors], given)
    with torch.no_grad():
        raw = interpreter.evaluate(graph, tensors, bindings=known)
        outputs = []
        for value, x, strides in zip(graph.outputs, raw, graph.output_strides, strict=True):
            layout = dims.contiguous_strides(value.shape) if strides is None else strides
            fresh = torch.empty_strided(x.shape, [dims.evaluate(s, known) for s in layout], dtype=x.dtype, device=x.device)
            outputs.append(fresh.copy_(x))
        for m in captured.mutations:
            args[m.argument].copy_(outputs[m.output])
    return [make_result(r, args, outputs, known) for r in captured.results]


def make_result(result: Result, args: Sequence[Any], outputs: Sequence[torch.Tensor], known: dict[str, int]) -> Any:
    """One result of a call, from the graph's outputs and the values of its symbols."""
    match result:
        case ValueResult(output=i):
            return outputs[i]
        case ArgumentResult(argument=i):
            return args[i]
        case AliasResult(base=base, shape=shape, strides=strides, offset=offset):
            tensor = make_result(base, args, outputs, known)
            start = tensor.storage_offset() + dims.evaluate(offset, known)
            with torch.no_grad():
                return tensor.as_strided([dims.evaluate(d, known) for d in shape], [dims.evaluate(s, known) for s in strides], start)
        case SizeResult(dim=dim):
            return dims.evaluate(dim, known)
        case ConstResult(value=value):
            return value
