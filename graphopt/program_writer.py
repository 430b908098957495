"""Writing a program: every value gets a place, every step a line of Python.

Names in the text: ``x`` inputs, ``w`` staged values, ``t`` tensors in the arena (and views of them), ``v`` tensors made by
this run, ``k`` kernels, ``L`` library calls, ``s_`` sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from graphopt.bounds import IndexCheck, IndexOutOfRange
from graphopt.index_flags import Checked
from graphopt.ir import dims
from graphopt.ir.graph import Node, Value
from graphopt.ir.interpreter import restride
from graphopt.ir.strides import strides_of
from graphopt.ir.types import TensorType, f32
from graphopt.lower import KernelStep, LibraryStep, Lowered, Step, ViewStep, kernel_operand_types, may_alias
from graphopt.memory import Lifetime, Plan, plan
from graphopt.pages import LARGE_RESULT, Reused
from graphopt.sizes import accepted, refuse
from graphopt.tape import Joined, KernelFunction, Launch

try:
    from torch._C._dynamo.guards import _empty_strided_cpu as empty_strided_cpu  # type: ignore[attr-defined]  # as Inductor's programs
except ImportError:
    empty_strided_cpu = None

Call = Callable[[Sequence[torch.Tensor], Mapping[str, int]], list[torch.Tensor]]


@dataclass(frozen=True)
class Place:
    """Where a static value lives in the arena: a buffer, seen with a shape and strides."""

    buffer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0  # elements

    @property
    def is_contiguous(self) -> bool:
        return TensorType(f32, self.shape, self.strides).is_contiguous


class Storage:
    """Union-find over values that may share memory."""

    def __init__(self) -> None:
        self.parent: dict[Value, Value] = {}

    def find(self, v: Value) -> Value:
        root = v
        while (up := self.parent.get(root, root)) is not root:
            root = up
        while (up := self.parent.get(v, v)) is not root:
            self.parent[v] = root
            v = up
        return root

    def join(self, v: Value, into: Value) -> None:
        self.parent[self.find(v)] = self.find(into)


class ProgramWriter:
    """Gives every value a place and writes the program's text.

    Args:
        numbered: whether a check of an index is told its number in ``checks``, and not what to raise.
    """

    def __init__(self, lowered: Lowered, kernels: Sequence[KernelFunction], library: Callable[[Node], Call], device: torch.device,
                 numbered: bool = False) -> None:  # fmt: skip
        self.lowered, self.kernels, self.library, self._numbered = lowered, kernels, library, numbered
        self.namespace: dict[str, Any] = {
            "empty": torch.empty, "fresh": _fresh(device), "large": _large(device), "restride": restride, "check_index": check_index,
            "torch": torch, "device": device, "contiguous": _contiguous, "refuse_sizes": partial(refuse, lowered.graph),
            "IndexOutOfRange": IndexOutOfRange,
        }  # fmt: skip
        self.names: dict[Value, str] = {}
        self.places: dict[Value, Place] = {}
        self.arena: list[tuple[Place, torch.dtype]] = []
        self.buffers: list[int] = []
        self.lifetimes: list[tuple[int, int]] = []
        self.plan: Plan | None = None
        self.staged: list[tuple[Value, bool]] = []
        self._staged_names: dict[tuple[Value, bool], str] = {}
        self._kernel_names: dict[int, str] = {}
        self._boundary = dict.fromkeys(lowered.boundary)
        self.storage = Storage()
        self.last_use: dict[Value, int] = {}
        self.lines: list[str] = []
        self._head: list[str] = []  # after the names
        self._launches: dict[int, Launch] = {}  # by line
        self._early: list[int] = []  # lines
        self.calls: list[KernelStep | LibraryStep] = []  # in the order of their lines
        self.checks: list[Checked] = []
        self._count = 0

    # --- analysis -----------------------------------------------------------------------------------------------------

    def _analyse(self) -> None:
        """Who shares memory with whom, who escapes, and when each storage is used for the last time."""
        for i, step in enumerate(self.lowered.steps):
            if isinstance(step, ViewStep) or (isinstance(step, LibraryStep) and may_alias(step.node)):
                for r in step.node.results:
                    for v in step.node.operands:
                        self.storage.join(r, v)
            if isinstance(step, KernelStep) and step.in_place is not None:
                self.storage.join(step.node.result, step.node.operands[step.in_place])
            for v in step.node.operands:
                self.last_use[v] = i
            for r in step.node.results:
                self.last_use.setdefault(r, i)
        self.escaping = dict.fromkeys(self.storage.find(v) for v in self.lowered.graph.outputs)
        for v in self.lowered.graph.outputs:
            self.last_use[v] = len(self.lowered.steps)
        self.root_end: dict[Value, int] = {}
        for v, i in self.last_use.items():
            root = self.storage.find(v)
            self.root_end[root] = max(self.root_end.get(root, 0), i)

    # --- names --------------------------------------------------------------------------------------------------------

    def _new(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}{self._count}"

    def _operand(self, v: Value, contiguous: bool) -> str:
        """The expression of a value; ``contiguous`` where a kernel expects row-major memory."""
        if v in self._boundary:
            key = (v, contiguous)
            if key not in self._staged_names:
                self._staged_names[key] = f"w{len(self.staged)}"
                self.staged.append(key)
            return self._staged_names[key]
        name = self.names[v]
        if not contiguous or self._known_contiguous(v):
            return name
        return f"contiguous({name})"

    def _known_contiguous(self, v: Value) -> bool:
        if v in self.places:
            return self.places[v].is_contiguous
        if v.is_input:
            return v.type.strides is None
        return v in self._fresh

    def _lies(self, v: Value, strides: Sequence[dims.Dim] | None) -> bool:
        """Whether a value is known to have these strides; None: row-major."""
        return self._known_contiguous(v) if strides is None else strides_of(v) == strides

    # --- writing ------------------------------------------------------------------------------------------------------

    def write(self) -> str:
        self._analyse()
        self._fresh: dict[Value, None] = {}  # results of kernels: row-major by construction
        graph, steps = self.lowered.graph, self.lowered.steps
        for i, v in enumerate(graph.inputs):
            self.names[v] = f"x{i}"
        kernel = 0
        for i, step in enumerate(steps):
            if isinstance(step, KernelStep):
                self._kernel(step, self.kernels[kernel], i)
                kernel += 1
            elif isinstance(step, ViewStep):
                self._view(step)
            else:
                self._library(step)
            self._free(step, i)
        returned = self._outputs()
        self.plan = self._plan()
        head = ["def program(inputs, staged, arena, sizes):"]
        if graph.inputs:
            head.append(f"    {', '.join(f'x{i}' for i in range(len(graph.inputs)))}, = inputs")
        if self.staged:
            head.append(f"    {', '.join(f'w{i}' for i in range(len(self.staged)))}, = staged")
        if self.arena:
            head.append(f"    {', '.join(f't{i}' for i in range(len(self.arena)))}, = arena")
        checks = self._size_checks() if kernel else []
        lines = [*self.lines, returned, *checks]
        self._head = [f"s_{s} = sizes['{s}']" for s in sorted(graph.symbols) if any(f"s_{s}" in line for line in lines)]
        if checks:
            self._head.append(f"if not ({' and '.join(checks)}): refuse_sizes(inputs)")
        self.lines.append(returned)
        return "\n".join([*head, *(f"    {line}" for line in (*self._head, *self.lines))]) + "\n"

    def joined(self) -> Joined | None:
        """The same program with calls of kernels that follow one another joined; None if there are none. Once it is written."""
        weights = [v.index for v in self.lowered.graph.inputs if v.weight]
        joined = Joined(self._head, self.lines, self._launches, self._early, weights, len(self.staged))
        return joined if joined.runs else None

    def _size_checks(self) -> list[str]:
        """Conditions on symbolic sizes: kernels read by one input's size what another one holds."""
        graph = self.lowered.graph
        ranges = accepted(graph)
        bound: dict[str, None] = {}
        checks = []
        for i, v in enumerate(graph.inputs):
            for axis, d in enumerate(v.shape):
                if isinstance(d, int):
                    continue
                if d.is_Symbol and d.name not in bound:
                    bound[d.name] = None
                else:
                    checks.append(f"x{i}.shape[{axis}] == {expression(d)}")
        for s in bound:
            span = ranges[s]
            if span.lo > 0:
                checks.append(f"s_{s} >= {span.lo}")
            if span.hi is not None:
                checks.append(f"s_{s} <= {span.hi}")
        return checks

    def _kernel(self, step: KernelStep, kernel: KernelFunction, i: int) -> None:
        node = step.node
        name = self._kernel_names.setdefault(id(kernel), f"k{len(self._kernel_names)}")
        self.namespace[name] = kernel
        operands = [self._operand(v, t.strides is None) for v, t in zip(node.operands, kernel_operand_types(step), strict=True)]
        for check in step.checks:
            self.lines.append(self._check(check, operands[check.operand]))
        if step.in_place is not None:
            self._fresh[node.result] = None
            self.names[node.result] = operands[step.in_place]
            results = [operands[step.in_place]]
        else:
            results = [self._result(r, i) for r in node.results]
        if all(r.type.is_static and r.type.numel == 0 for r in node.results):
            return
        arguments = (*operands, *results, *(f"s_{s}" for s in step.symbols))
        call = f"{name}({', '.join(arguments)})"
        if not all(r.type.is_static for r in node.results):  # an empty result needs no launch
            call = f"if {results[0]}.numel(): {call}"
        elif all(a.isidentifier() for a in arguments):  # anything else is made when the call is
            self._launches[len(self.lines)] = Launch(kernel, arguments)
        where = f"  # {node.loc}" if node.loc else ""
        self.calls.append(step)
        self.lines.append(call + where)

    def _check(self, check: IndexCheck, operand: str) -> str:
        operand += "".join(view_expression(n) for n in check.views)
        told = check.error.__name__
        if self._numbered:
            assert check.node is not None
            told = str(len(self.checks))
            self.checks.append(Checked(check.node.op.name, str(check.node.loc or ""), check.error))
        return f"check_index({operand}, {expression(check.low)}, {expression(check.high)}, {told})"

    def _result(self, v: Value, i: int) -> str:
        """A place for a kernel's result: in the arena if its size is known and no caller will see it, else fresh."""
        self._fresh[v] = None
        root = self.storage.find(v)
        if v.type.is_static and root not in self.escaping and v.type.numel != 0:
            shape = dims_static(v.shape)
            self.buffers.append(int(v.type.nbytes()))
            self.lifetimes.append((i, self.root_end[root]))
            self.places[v] = Place(len(self.buffers) - 1, shape, dims_static(dims.contiguous_strides(shape)))
            return self._arena_name(v)
        name = self.names[v] = self._new("v")
        if root in self.escaping:
            self._early.append(len(self.lines))
        if v.type.is_static:
            strides = torch.empty(dims_static(v.shape), device="meta").stride()
            call = "large" if int(v.type.nbytes()) >= LARGE_RESULT else "fresh"
            self.lines.append(f"{name} = {call}({dims_static(v.shape)}, {strides}, {v.dtype.torch})")
        else:
            self.lines.append(f"{name} = empty({shape_expression(v.shape)}, dtype={v.dtype.torch}, device=device)")
        return name

    def _arena_name(self, v: Value) -> str:
        self.names[v] = f"t{len(self.arena)}"
        self.arena.append((self.places[v], v.dtype.torch))
        return self.names[v]

    def _view(self, step: ViewStep) -> None:
        node, v = step.node, step.node.result
        source = node.operands[0]
        if source in self.places:
            place = _view_place(self.places[source], node)
            if place is not None:
                self.places[v] = place
                self._arena_name(v)
                return
        name = self.names[v] = self._new("v")
        if self.names.get(source, "").startswith("v") and source in self._fresh and self.storage.find(source) in self.escaping:
            self._early.append(len(self.lines))  # of row-major memory: a view, whatever will be written there
        self.lines.append(f"{name} = {self._operand(source, False)}{view_expression(node)}")

    def _library(self, step: LibraryStep) -> None:
        node = step.node
        self.calls.append(step)
        call = self._new("L")
        self.namespace[call] = self.library(node)
        operands = "".join(self._operand(v, False) + ", " for v in node.operands)
        names = []
        for r in node.results:
            self.names[r] = self._new("v")
            names.append(self.names[r])
        where = f"  # {node.attrs.get('target', node.op.name)}" + (f" {node.loc}" if node.loc else "")
        self.lines.append(f"{''.join(n + ', ' for n in names)}{'= ' if names else ''}{call}(({operands}), sizes){where}")

    def _free(self, step: Step, i: int) -> None:
        """Let go of tensors of this run that nothing uses any more."""
        done = [v for v in dict.fromkeys((*step.node.operands, *step.node.results)) if self.last_use[v] == i]
        done = [v for v in done if self.storage.find(v) not in self.escaping]  # a caller gets that memory
        names = [self.names[v] for v in done if self.names.get(v, "").startswith("v")]
        if names:
            self.lines.append(f"del {', '.join(names)}")

    def _outputs(self) -> str:
        """The return statement; every output gets memory of its own, in the strides that eager gives it."""
        graph = self.lowered.graph
        seen: dict[Value, None] = {}
        returned = []
        inputs = {self.storage.find(v): self.names[v] for v in graph.inputs}
        boundary = dict.fromkeys(self.storage.find(v) for v in self._boundary)
        for k, (v, strides) in enumerate(zip(graph.outputs, graph.output_strides, strict=True)):
            root = self.storage.find(v)
            text = self._operand(v, False)
            if k in self.lowered.in_place:
                returned.append(text)
                continue
            wanted = shape_expression(strides if strides is not None else dims.contiguous_strides(v.shape))
            if root in seen or root in boundary:
                text = f"restride({text}, {wanted}, copy=True)"
            elif root in inputs:  # a reshape of what is not in its order has copied it
                text = f"restride({text}, {wanted}, apart={inputs[root]})"
            elif not self._lies(v, strides):
                text = f"restride({text}, {wanted})"
            seen[root] = None
            returned.append(text)
        return f"return [{', '.join(returned)}]"

    def _plan(self) -> Plan | None:
        if not self.buffers:
            return None
        return plan([Lifetime(size, start, end) for size, (start, end) in zip(self.buffers, self.lifetimes, strict=True)])


Fresh = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]
"""Memory for a result of static size: shape, strides, dtype -> a tensor."""


def _fresh(device: torch.device) -> Fresh:
    """On the CPU without PyTorch's dispatch, a third of its time."""
    if device.type == "cpu" and empty_strided_cpu is not None:
        return empty_strided_cpu  # type: ignore[no-any-return]
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _large(device: torch.device) -> Fresh:
    """For results of ``LARGE_RESULT`` bytes and more."""
    return Reused().empty_strided if device.type == "cpu" else _fresh(device)


def dims_static(shape: Sequence[dims.Dim]) -> tuple[int, ...]:
    """A shape of plain ints."""
    return tuple(int(d) for d in shape)


def expression(d: dims.Dim) -> str:
    """A size as a Python expression over ``s_`` names."""
    if isinstance(d, int):
        return str(d)
    renamed = d.subs({s: dims.symbol(f"s_{s.name}") for s in d.free_symbols})
    return dims.format_dim(dims.simplify(renamed))


def shape_expression(shape: Sequence[dims.Dim]) -> str:
    return "(" + "".join(expression(d) + ", " for d in shape) + ")"


def view_expression(node: Node) -> str:
    """The torch spelling of a view, to be put behind its operand."""
    a = node.attrs
    match node.op.name:
        case "reshape":
            return f".reshape({shape_expression(a['shape'])})"
        case "transpose":
            return f".permute({a['perm']})"
        case "broadcast_to":
            return f".expand({shape_expression(a['shape'])})"
    axis = a["axis"] % node.operands[0].type.rank
    step = f":{a['step']}" if a["step"] != 1 else ""
    return f"[{':, ' * axis}{expression(a['start'])}:{expression(a['stop'])}{step}]"


def _view_place(place: Place, node: Node) -> Place | None:
    """Where a view of a static place lies, or None if it would need a copy."""
    if not node.result.type.is_static:
        return None
    x = torch.empty_strided(place.shape, place.strides, device="meta")
    y = eval(f"x{view_expression(node)}", {"x": x})
    if y._base is None and y is not x:
        return None  # a reshape that has to copy
    return Place(place.buffer, tuple(y.shape), y.stride(), place.offset + y.storage_offset())


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous()


def check_index(index: torch.Tensor, low: int, high: int, error: type[Exception]) -> None:
    """Raise what eager raises for an index out of ``low .. high - 1``."""
    if index.numel() == 0:
        return
    if index.numel() <= 16:  # a tensor operation costs more than to look at each
        values = index.reshape(-1).tolist()
        least, most = min(values), max(values)
    else:
        least, most = torch.aminmax(index)
    if int(least) < low or int(most) >= high:
        raise error(f"index out of range in self: {int(least)} .. {int(most)} is not within {low} .. {high - 1}")
