"""Which results are fresh tensors, which are arguments, and which are views that share memory with one another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from graphopt.capture.captured import AliasResult, ArgumentResult, Result, ValueResult
from graphopt.ir import dims
from graphopt.ir.dims import Shape
from graphopt.ir.graph import Value

if TYPE_CHECKING:
    from graphopt.capture.fx import _Capture


class Results:
    """Collects the outputs of the graph while its results are described.

    A result is a tensor of its own, unless tracing saw it share memory: with an argument (it is a view of that, or
    itself), or with other results (all are views of the tensor that they were cut from, which becomes the output).
    """

    def __init__(self, capture: _Capture, graph: torch.fx.Graph) -> None:
        self.capture = capture
        self.values: list[Value] = []
        self.strides: list[Shape | None] = []
        self.roots: dict[int, torch.fx.Node] = {}  # storage -> the first node in it
        self.made: dict[torch.fx.Node, int] = {}  # node -> output
        self.given: dict[torch.fx.Node, Result] = {}
        for n in graph.nodes:
            if isinstance(n.meta.get("val"), torch.Tensor) and n.op != "output":
                self.roots.setdefault(_storage(n.meta["val"]), n)
        *_, last = graph.nodes
        self.readers: dict[int, dict[torch.fx.Node, None]] = {}
        for out in last.all_input_nodes:
            if isinstance(out.meta.get("val"), torch.Tensor):
                self.readers.setdefault(_storage(out.meta["val"]), {})[out] = None

    def output(self, value: Value, strides: Shape | None) -> int:
        self.values.append(value)
        self.strides.append(strides)
        return len(self.values) - 1

    def of(self, node: torch.fx.Node) -> Result:
        """How to return this tensor; the same tensor twice is returned as the same object."""
        if node not in self.given:
            self.given[node] = self._of(node)
        return self.given[node]

    def _of(self, node: torch.fx.Node) -> Result:
        capture, val = self.capture, node.meta["val"]
        root = self.roots[_storage(val)]
        origin = root.meta["val"]
        viewable = val.dtype == origin.dtype and val.is_conj() == origin.is_conj() and val.is_neg() == origin.is_neg()
        if root in capture.placeholders and viewable and root.op == "placeholder":
            base: ValueResult | ArgumentResult = ArgumentResult(capture.placeholders[root])
            return base if self._geometry(val) == self._geometry(origin) else self._view(base, val, origin)
        shared = len(self.readers[_storage(val)]) > 1
        if not viewable or root.op == "get_attr" or not isinstance(capture.env.get(root), Value):
            return self._fresh(node)
        if node is root or (not shared and self._allocatable(val)):
            return self._fresh(node)
        self._fresh(root)
        return self._view(ValueResult(self.made[root]), val, origin)

    def _fresh(self, node: torch.fx.Node) -> ValueResult:
        if node not in self.made:
            val = node.meta["val"]
            shape, strides = self.capture.dims(val.shape), self.capture.dims(val.stride())
            overlapping = any(s == 0 and n != 1 for s, n in zip(strides, shape, strict=True))
            wanted = None if strides == dims.contiguous_strides(shape) or overlapping else strides
            self.made[node] = self.output(self.capture.convert(node), wanted)
        return ValueResult(self.made[node])

    def _geometry(self, val: Any) -> tuple[Any, ...]:
        c = self.capture
        return c.dims(val.shape), c.dims(val.stride()), c.symbols.dim(val.storage_offset())

    def _view(self, base: ValueResult | ArgumentResult, val: Any, origin: Any) -> AliasResult:
        shape, strides, offset = self._geometry(val)
        return AliasResult(base, shape, strides, dims.sub(offset, self.capture.symbols.dim(origin.storage_offset())))

    def _allocatable(self, val: Any) -> bool:
        """Whether a tensor of these strides has a place of its own for each element, without gaps."""
        shape, strides = self.capture.dims(val.shape), self.capture.dims(val.stride())
        if any(n == 0 for n in shape):
            return True
        pairs = [(s, n) for n, s in zip(shape, strides, strict=True) if n != 1]
        step: Any = 1
        while pairs:
            found = next((p for p in pairs if dims.same(p[0], step)), None)
            if found is None:
                return False
            pairs.remove(found)
            step = dims.mul(step, found[1])
        return True


def _storage(val: torch.Tensor) -> int:
    return int(val.untyped_storage()._cdata)
