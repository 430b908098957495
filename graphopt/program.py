"""The program: straight-line Python over kernels, views and library calls, with planned memory.

The text of the program is generated, kept in the report, and compiled once; a run does nothing that could be done before.
Names in it: ``x`` inputs, ``w`` staged values, ``t`` tensors in the arena (and views of them), ``v`` tensors made by this
run, ``k`` kernels, ``L`` library calls, ``s_`` sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.bounds import IndexCheck
from graphopt.ir import dims
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.interpreter import bind_symbols, restride
from graphopt.ir.types import TensorType, f32
from graphopt.lower import KernelStep, LibraryStep, Lowered, Step, ViewStep, kernel_operand_types, may_alias
from graphopt.memory import Lifetime, Plan, plan
from graphopt.weights import StagedValues

KernelFunction = Callable[..., Any]
Call = Callable[[Sequence[torch.Tensor], Mapping[str, int]], list[torch.Tensor]]


@dataclass(frozen=True)
class _Place:
    """Where a static value lives in the arena: a buffer, seen with a shape and strides."""

    buffer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0  # elements

    @property
    def is_contiguous(self) -> bool:
        return TensorType(f32, self.shape, self.strides).is_contiguous


class _Storage:
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


class Program:
    """A compiled graph: ``program(inputs, sizes) -> outputs``.

    Safe for concurrent and re-entrant calls: each call takes an arena of its own from a pool. Outputs are fresh memory.

    Args:
        lowered: steps and staged nodes.
        kernels: one loaded kernel a KernelStep, in order.
        library: makes the call of a node that PyTorch runs.
        device: where buffers live.

    Attributes:
        source: the generated text.
        plan: the arena's plan; None when no buffer has a static size.
    """

    def __init__(self, lowered: Lowered, kernels: Sequence[KernelFunction], library: Callable[[Node], Call], device: torch.device) -> None:
        self.device = device
        self._graph = lowered.graph
        writer = _Writer(lowered, kernels, library, device)
        self.source = writer.write()
        self.plan = writer.plan
        self._layout = writer.arena
        self._buffers = writer.buffers
        self._arenas: list[list[torch.Tensor]] = []
        used = dict.fromkeys(v for node in lowered.staged for v in node.operands)
        self._weights = [v.index for v in lowered.graph.inputs if v in used]
        self.staged = StagedValues(_StagedCompute(lowered, writer.staged, library)) if writer.staged else None
        self._symbols = bool(lowered.graph.symbols)
        namespace = dict(writer.namespace)
        exec(compile(self.source, f"<graphopt program {lowered.graph.name}>", "exec"), namespace)
        self._run: Callable[..., list[torch.Tensor]] = namespace["program"]

    def __call__(self, inputs: Sequence[torch.Tensor], sizes: Mapping[str, int] | None = None) -> list[torch.Tensor]:
        """Run.

        Args:
            inputs: one tensor an input of the graph.
            sizes: values of symbols; those that an input has as a size of its own may be left out.
        """
        staged: Sequence[torch.Tensor] = ()
        if self.staged is not None:
            staged = self.staged.get([inputs[i] for i in self._weights])
        bound = bind_symbols_fast(self._graph, inputs, sizes) if self._symbols else {}
        arena = self._arenas.pop() if self._arenas else self._make_arena()
        try:
            return self._run(inputs, staged, arena, bound)
        finally:
            self._arenas.append(arena)

    def _make_arena(self) -> list[torch.Tensor]:
        if self.plan is None:
            return []
        memory = torch.empty(self.plan.peak, dtype=torch.uint8, device=self.device)
        out = []
        for place, dtype in self._layout:
            start = self.plan.offsets[place.buffer]
            flat = memory[start : start + self._buffers[place.buffer]].view(dtype)
            out.append(flat.as_strided(place.shape, place.strides, flat.storage_offset() + place.offset))
        return out


def bind_symbols_fast(graph: Graph, inputs: Sequence[torch.Tensor], sizes: Mapping[str, int] | None) -> dict[str, int]:
    """Values of the graph's symbols; only solves equations when a symbol is given neither by name nor as a bare size."""
    bound = dict(sizes or {})
    if all(s in bound for s in graph.symbols):
        return bound
    for v, x in zip(graph.inputs, inputs):
        for i, d in enumerate(v.shape):
            if not isinstance(d, int) and d.is_Symbol and d.name not in bound:
                bound[d.name] = x.shape[i]
    if all(s in bound for s in graph.symbols):
        return bound
    used = dims.free_symbols([d for v in graph.inputs for d in v.shape])
    return bind_symbols(graph, [x.shape for x in inputs], bound) if any(s not in bound for s in used) else bound


class _StagedCompute:
    """Computes the staged values that a program uses, by library calls; contiguous where a kernel reads them."""

    def __init__(self, lowered: Lowered, wanted: Sequence[tuple[Value, bool]], library: Callable[[Node], Call]) -> None:
        used = dict.fromkeys(v for node in lowered.staged for v in node.operands)
        self._inputs = [v for v in lowered.graph.inputs if v in used]
        self._calls = [(node, library(node)) for node in lowered.staged]
        self._wanted = wanted

    def __call__(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        env: dict[Value, torch.Tensor] = dict(zip(self._inputs, weights, strict=True))
        for node, call in self._calls:
            env.update(zip(node.results, call([env[v] for v in node.operands], {}), strict=True))
        return [env[v].contiguous() if contiguous else env[v] for v, contiguous in self._wanted]


class _Writer:
    """Gives every value a place and writes the program's text."""

    def __init__(self, lowered: Lowered, kernels: Sequence[KernelFunction], library: Callable[[Node], Call], device: torch.device) -> None:
        self.lowered, self.kernels, self.library = lowered, kernels, library
        self.namespace: dict[str, Any] = {
            "empty": torch.empty, "restride": restride, "check_index": check_index, "torch": torch, "device": device,
            "contiguous": _contiguous,
        }  # fmt: skip
        self.names: dict[Value, str] = {}
        self.places: dict[Value, _Place] = {}
        self.arena: list[tuple[_Place, torch.dtype]] = []
        self.buffers: list[int] = []
        self.lifetimes: list[tuple[int, int]] = []
        self.plan: Plan | None = None
        self.staged: list[tuple[Value, bool]] = []
        self._staged_names: dict[tuple[Value, bool], str] = {}
        self._kernel_names: dict[int, str] = {}
        self._boundary = dict.fromkeys(lowered.boundary)
        self.storage = _Storage()
        self.last_use: dict[Value, int] = {}
        self.lines: list[str] = []
        self._count = 0

    # --- analysis -----------------------------------------------------------------------------------------------------

    def _analyse(self) -> None:
        """Who shares memory with whom, who escapes, and when each storage is used for the last time."""
        for i, step in enumerate(self.lowered.steps):
            if isinstance(step, ViewStep) or (isinstance(step, LibraryStep) and may_alias(step.node)):
                for r in step.node.results:
                    for v in step.node.operands:
                        self.storage.join(r, v)
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
        head += [f"    s_{s} = sizes['{s}']" for s in sorted(graph.symbols) if any(f"s_{s}" in line for line in [*self.lines, returned])]
        return "\n".join([*head, *(f"    {line}" for line in self.lines), f"    {returned}"]) + "\n"

    def _kernel(self, step: KernelStep, kernel: KernelFunction, i: int) -> None:
        node = step.node
        name = self._kernel_names.setdefault(id(kernel), f"k{len(self._kernel_names)}")
        self.namespace[name] = kernel
        operands = [self._operand(v, t.strides is None) for v, t in zip(node.operands, kernel_operand_types(step), strict=True)]
        for check in step.checks:
            self.lines.append(self._check(check, operands[check.operand]))
        results = [self._result(r, i) for r in node.results]
        if all(r.type.is_static and r.type.numel == 0 for r in node.results):
            return
        call = f"{name}({', '.join([*operands, *results, *(f's_{s}' for s in step.symbols)])})"
        if not all(r.type.is_static for r in node.results):  # an empty result needs no launch
            call = f"if {results[0]}.numel(): {call}"
        where = f"  # {node.loc}" if node.loc else ""
        self.lines.append(call + where)

    def _check(self, check: IndexCheck, operand: str) -> str:
        return f"check_index({operand}, {expression(check.low)}, {expression(check.high)}, {check.error.__name__})"

    def _result(self, v: Value, i: int) -> str:
        """A place for a kernel's result: in the arena if its size is known and no caller will see it, else fresh."""
        self._fresh[v] = None
        root = self.storage.find(v)
        if v.type.is_static and root not in self.escaping and v.type.numel != 0:
            shape = dims_static(v.shape)
            self.buffers.append(int(v.type.nbytes()))
            self.lifetimes.append((i, self.root_end[root]))
            self.places[v] = _Place(len(self.buffers) - 1, shape, dims_static(dims.contiguous_strides(shape)))
            return self._arena_name(v)
        name = self.names[v] = self._new("v")
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
        self.lines.append(f"{name} = {self._operand(source, False)}{view_expression(node)}")

    def _library(self, step: LibraryStep) -> None:
        node = step.node
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
        names = [self.names[v] for v in done if self.names.get(v, "").startswith("v")]
        if names:
            self.lines.append(f"del {', '.join(names)}")

    def _outputs(self) -> str:
        """The return statement; every output gets memory of its own, in the strides that eager gives it."""
        graph = self.lowered.graph
        seen: dict[Value, None] = {}
        returned = []
        inputs = dict.fromkeys(self.storage.find(v) for v in graph.inputs)
        boundary = dict.fromkeys(self.storage.find(v) for v in self._boundary)
        for v, strides in zip(graph.outputs, graph.output_strides, strict=True):
            root = self.storage.find(v)
            text = self._operand(v, False)
            wanted = shape_expression(strides if strides is not None else dims.contiguous_strides(v.shape))
            shared = root in seen or root in inputs or root in boundary
            seen[root] = None
            if shared:
                text = f"restride({text}, {wanted}, copy=True)"
            elif strides is not None or not self._known_contiguous(v):
                text = f"restride({text}, {wanted})"
            returned.append(text)
        return f"return [{', '.join(returned)}]"

    def _plan(self) -> Plan | None:
        if not self.buffers:
            return None
        return plan([Lifetime(size, start, end) for size, (start, end) in zip(self.buffers, self.lifetimes, strict=True)])


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


def _view_place(place: _Place, node: Node) -> _Place | None:
    """Where a view of a static place lies, or None if it would need a copy."""
    if not node.result.type.is_static:
        return None
    x = torch.empty_strided(place.shape, place.strides, device="meta")
    y = eval(f"x{view_expression(node)}", {"x": x})
    if y._base is None and y is not x:
        return None  # a reshape that has to copy
    return _Place(place.buffer, tuple(y.shape), y.stride(), place.offset + y.storage_offset())


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous()


def check_index(index: torch.Tensor, low: int, high: int, error: type[Exception]) -> None:
    """Raise what eager raises for an index out of ``low .. high - 1``."""
    if index.numel() == 0:
        return
    least, most = torch.aminmax(index)
    if int(least) < low or int(most) >= high:
        raise error(f"index out of range in self: {int(least)} .. {int(most)} is not within {low} .. {high - 1}")
