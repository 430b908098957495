"""Graph, Node, Value. The graph is the sole owner of def-use links: every mutation goes through it.

**Mutation while iterating.** ``for node in graph.nodes()`` is safe under any mutation. A node erased before its turn is
skipped. A node inserted after the current one is visited; one inserted before it is not. Erasing the current node is
allowed. ``reversed(graph)`` behaves alike in the other direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.errors import TypeInferenceError, VerifyError
from graphopt.ir.dims import Range, Shape
from graphopt.ir.ops import OpDef, Trait
from graphopt.ir.opset.structure import RETURN
from graphopt.ir.printer import print_graph
from graphopt.ir.types import DType, TensorType


@dataclass(frozen=True)
class Loc:
    """The user's source line, ``function`` being the module path or function; without a file, the module that ``function`` names."""

    file: str
    line: int
    function: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else self.function


class Value:
    """A tensor in the graph: an input, or a result of a node. ``uses`` maps (node, operand index) in order of creation.

    Attributes:
        type: dtype, shape, and layout where it is a contract.
        producer: the node, or None for a graph input.
        index: which result of the producer, or which input.
        hint: a readable name, not necessarily unique; printing makes it so.
        weight: for an input: a frozen weight, the same on every call until it is changed in place.
        exact: for a weight: a narrower float that holds all of its elements, which are finite; None if none is known.
    """

    __slots__ = ("_uses", "exact", "hint", "index", "producer", "type", "weight")

    def __init__(self, type: TensorType, producer: Node | None, index: int, hint: str = "", weight: bool = False,
                 exact: DType | None = None) -> None:  # fmt: skip
        self.type, self.producer, self.index, self.hint, self.weight = type, producer, index, hint, weight
        self.exact = exact
        self._uses: dict[tuple[Node, int], None] = {}

    @property
    def shape(self) -> Shape:
        return self.type.shape

    @property
    def dtype(self) -> DType:
        return self.type.dtype

    @property
    def uses(self) -> list[tuple[Node, int]]:
        """(user, operand index), in a deterministic order. The return node is a user too."""
        return list(self._uses)

    @property
    def users(self) -> list[Node]:
        """The distinct users, in order."""
        return list(dict.fromkeys(node for node, _ in self._uses))

    @property
    def has_one_use(self) -> bool:
        return len(self._uses) == 1

    @property
    def is_input(self) -> bool:
        return self.producer is None

    def defined_by(self, *ops: str) -> Node | None:
        """The producer if it is one of these ops, else None."""
        return self.producer if self.producer is not None and self.producer.op.name in ops else None

    def __repr__(self) -> str:
        return f"%{self.hint or '?'}: {self.type}"


class Node:
    """One operation. Operands, attributes and links change only through the graph."""

    __slots__ = ("_erased", "_next", "_prev", "attrs", "body", "graph", "loc", "op", "operands", "results")

    def __init__(self, graph: Graph, op: OpDef, operands: Sequence[Value], attrs: Mapping[str, Any], types: Sequence[TensorType],
                 loc: Loc | None, body: Graph | None) -> None:  # fmt: skip
        self.graph, self.op, self.attrs, self.loc, self.body = graph, op, attrs, loc, body
        self.operands: tuple[Value, ...] = tuple(operands)
        self.results: tuple[Value, ...] = tuple(Value(t, self, i) for i, t in enumerate(types))
        self._prev: Node | None = None
        self._next: Node | None = None
        self._erased = False

    @property
    def result(self) -> Value:
        """The only result."""
        (value,) = self.results
        return value

    @property
    def name(self) -> str:
        return self.op.name

    @property
    def erased(self) -> bool:
        return self._erased

    @property
    def has_effect(self) -> bool:
        """Whether removing, doubling or reordering the node could be observed."""
        return bool(self.attrs.get("effect", "none") != "none")

    def __repr__(self) -> str:
        results = ", ".join(repr(r) for r in self.results)
        return f"{results} = {self.op.name}({', '.join('%' + (o.hint or '?') for o in self.operands)})"


class Listener:
    """Told of every mutation; override what is needed."""

    def created(self, node: Node) -> None: ...
    def erasing(self, node: Node) -> None: ...
    def replaced(self, old: Value, new: Value) -> None: ...


class Graph:
    """Inputs, a list of nodes in execution order, outputs, and the ranges of the symbols in its sizes."""

    def __init__(self, name: str = "main", symbols: Mapping[str, Range] | None = None) -> None:
        self.name = name
        self.symbols: dict[str, Range] = dict(symbols or {})
        self.inputs: list[Value] = []
        self.output_strides: list[Shape | None] = []
        self.listeners: list[Listener] = []
        self.ret = Node(self, RETURN, (), {}, (), None, None)
        self._first: Node | None = None
        self._last: Node | None = None
        self._count = 0

    # --- reading ------------------------------------------------------------------------------------------------------

    @property
    def outputs(self) -> tuple[Value, ...]:
        return self.ret.operands

    def __len__(self) -> int:
        return self._count

    def nodes(self) -> Iterator[Node]:
        """The nodes in execution order, without the return. See the module docstring for mutation while iterating."""
        return self._walk(self._first, forward=True)

    def __iter__(self) -> Iterator[Node]:
        return self.nodes()

    def __reversed__(self) -> Iterator[Node]:
        return self._walk(self._last, forward=False)

    @staticmethod
    def _walk(node: Node | None, forward: bool) -> Iterator[Node]:
        while node is not None:
            if not node._erased:
                yield node
            # links of an erased node still lead onwards; they may lead to another erased one, which is skipped
            node = node._next if forward else node._prev

    # --- building -----------------------------------------------------------------------------------------------------

    def add_input(self, type: TensorType, hint: str = "", weight: bool = False, exact: DType | None = None) -> Value:
        value = Value(type, None, len(self.inputs), hint, weight, exact)
        self.inputs.append(value)
        return value

    def remove_input(self, value: Value) -> None:
        """Remove an unused input."""
        if value._uses:
            raise VerifyError(f"input {value!r} is still used")
        self.inputs.remove(value)
        for i, v in enumerate(self.inputs):
            v.index = i

    def set_outputs(self, values: Sequence[Value], strides: Sequence[Shape | None] | None = None) -> None:
        """Set the results; ``strides`` is the layout each must be returned in (None: row-major)."""
        self._set_operands(self.ret, values)
        self.output_strides = list(strides) if strides is not None else [None] * len(values)
        if len(self.output_strides) != len(self.ret.operands):
            raise VerifyError("one entry of strides an output is needed")

    def create(self, op: OpDef, operands: Sequence[Value], attrs: Mapping[str, Any] | None = None, *, before: Node | None = None,
               loc: Loc | None = None, types: Sequence[TensorType] | None = None, body: Graph | None = None) -> Node:  # fmt: skip
        """Create a node and put it before another one (default: at the end).

        Args:
            types: result types; only for ops without inference (``aten``).
            body: nested graph; only for ``fusion``, whose result types are the body's.

        Raises:
            TypeInferenceError: operands or attributes do not fit the op.
        """
        least, most = op.arity
        if len(operands) < least or (most is not None and len(operands) > most):
            raise TypeInferenceError(f"{op.name} takes {least if least == most else f'{least} to {most}'} operands, got {len(operands)}")
        full = op.complete(attrs or {})
        if body is not None:
            types = [v.type for v in body.outputs]
        elif op.infer is not None:
            types = op.infer([v.type for v in operands], full)
        elif types is None:
            raise TypeInferenceError(f"{op.name} needs its result types")
        node = Node(self, op, operands, full, types, loc, body)
        self.append(node, before)
        return node

    def append(self, node: Node, before: Node | None = None) -> None:
        """Put a node that was made for this graph at the end, or before another one. Nothing is inferred."""
        self._link(node, before)
        for i, v in enumerate(node.operands):
            v._uses[(node, i)] = None
        for listener in self.listeners:
            listener.created(node)

    def erase(self, node: Node) -> None:
        """Remove a node whose results have no uses."""
        for r in node.results:
            if r._uses:
                raise VerifyError(f"{node!r} is erased but still used by {r.users[0]!r}")
        for listener in self.listeners:
            listener.erasing(node)
        for i, v in enumerate(node.operands):
            del v._uses[(node, i)]
        self._unlink(node)
        node._erased = True

    def replace(self, old: Value, new: Value) -> None:
        """Let every user of ``old`` use ``new``. Types must agree in dtype and rank."""
        if old is new:
            return
        if old.dtype != new.dtype or old.type.rank != new.type.rank:
            raise VerifyError(f"{old!r} cannot be replaced by {new!r}")
        for listener in self.listeners:
            listener.replaced(old, new)
        if not new.hint and old.producer is not None:
            new.hint = old.hint
        for node, i in old.uses:
            self._set_operands(node, [*node.operands[:i], new, *node.operands[i + 1 :]])

    def set_operand(self, node: Node, index: int, value: Value) -> None:
        self._set_operands(node, [*node.operands[:index], value, *node.operands[index + 1 :]])

    def move_before(self, node: Node, anchor: Node) -> None:
        """Move a node in the execution order."""
        if node is not anchor:
            self._unlink(node)
            self._link(node, anchor)

    def clone(self, name: str | None = None) -> Graph:
        """A deep copy (nested graphs too)."""
        out = Graph(name or self.name, self.symbols)
        mapping: dict[Value, Value] = {v: out.add_input(v.type, v.hint, v.weight, v.exact) for v in self.inputs}
        copy_nodes(self.nodes(), mapping, out)
        out.set_outputs([mapping[v] for v in self.outputs], self.output_strides)
        return out

    # --- links --------------------------------------------------------------------------------------------------------

    def _set_operands(self, node: Node, operands: Sequence[Value]) -> None:
        for i, v in enumerate(node.operands):
            v._uses.pop((node, i))
        node.operands = tuple(operands)
        for i, v in enumerate(node.operands):
            v._uses[(node, i)] = None

    def _link(self, node: Node, before: Node | None) -> None:
        if before is self.ret:
            before = None
        prev = self._last if before is None else before._prev
        node._prev, node._next = prev, before
        if prev is None:
            self._first = node
        else:
            prev._next = node
        if before is None:
            self._last = node
        else:
            before._prev = node
        self._count += 1

    def _unlink(self, node: Node) -> None:
        if node._prev is None:
            self._first = node._next
        else:
            node._prev._next = node._next
        if node._next is None:
            self._last = node._prev
        else:
            node._next._prev = node._prev
        self._count -= 1

    def __str__(self) -> str:
        return print_graph(self)

    def __repr__(self) -> str:
        return f'parse_graph(r"""\n{self}""")'  # can be pasted


def copy_nodes(nodes: Iterable[Node], mapping: dict[Value, Value], into: Graph, before: Node | None = None,
               rename: Callable[[Node], Loc | None] | None = None) -> None:  # fmt: skip
    """Copy nodes into a graph; ``mapping`` gives the new operands and is extended by the new results."""
    for node in nodes:
        body = node.body.clone() if node.body is not None else None
        new = into.create(node.op, [mapping[v] for v in node.operands], node.attrs, before=before, loc=rename(node) if rename else node.loc,
                          types=[r.type for r in node.results], body=body)  # fmt: skip
        for old_result, new_result in zip(node.results, new.results, strict=True):
            new_result.hint = old_result.hint
            mapping[old_result] = new_result


def is_view(node: Node) -> bool:
    return node.op.has(Trait.VIEW)
