"""The backend as lowering sees it. Looks at the IR only: triton is not imported before a kernel is built."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from graphopt.autotune.space import Workload
from graphopt.backends.base import Kernel, KernelSource
from graphopt.backends.forms.support import ATTENTIONS, DTYPES, MOVES, PRODUCTS, REDUCTIONS, ROW_OPS, SCANS, SCATTERS, VIEWS, constant_of
from graphopt.backends.triton.pointwise import unsupported
from graphopt.backends.triton.template import Template
from graphopt.backends.triton.templates import TEMPLATES
from graphopt.backends.versions import package_version, source_hash
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import Trait
from graphopt.ir.opset.quantize import LARGEST
from graphopt.target import Target

_DIVISIONS = ("floor_div", "trunc_div", "remainder", "fmod")


class TritonBackend:
    """GPU kernels by Triton; on CPU tensors, the same kernels under its interpreter."""

    name = "triton"

    def templates(self, w: Workload, t: Target) -> Sequence[Template]:
        """Templates that can compute the workload, the preferred one first."""
        return () if _refusal(w, t) is not None else _takers(w, t)

    def reason(self, w: Workload, t: Target) -> str:
        """Why ``templates`` is empty, in words."""
        if (reason := _refusal(w, t)) is not None:
            return reason
        return next((r for p in TEMPLATES if (r := p.takes(w, t)) is not None and not r.startswith("not a")),
                    f"there is no family of kernels for {w.kind} regions")  # fmt: skip

    def build(self, src: KernelSource, t: Target) -> Kernel:
        """A callable for tensors of a GPU, which compiles when it is first called."""
        from graphopt.backends.triton.build import load_source

        return load_source(src, interpret=False)

    def versions(self) -> tuple[tuple[str, str], ...]:
        """(name, version) of everything but workload, schedule and target that decides what is the fastest; sorted."""
        packages = tuple((name, package_version(name)) for name in ("graphopt", "torch", "triton"))  # PyTorch's kernels are candidates, too
        return (*packages, ("triton backend source", source_hash("triton")))


@lru_cache(maxsize=4096)
def _takers(w: Workload, t: Target) -> list[Template]:
    return [p for p in TEMPLATES if p.takes(w, t) is None]


@lru_cache(maxsize=4096)
def _refusal(w: Workload, t: Target) -> str | None:
    if not t.is_gpu:
        return f"the triton backend compiles for GPUs, not for {t.kind}"
    graph: Graph = w.graph
    for v in graph.inputs:
        if (why := _value(v)) is not None:
            return why
    return next((why for node in graph.nodes() if (why := _node(node)) is not None), None)


def _value(v: Value) -> str | None:
    return f"dtype {v.dtype} ({v.type})" if v.dtype not in (*DTYPES, *LARGEST) else None


def _node(node: Node) -> str | None:
    for r in node.results:
        if (why := _value(r)) is not None:
            return f"{node.name}: {why}"
    if node.name not in (*VIEWS, "dequantize", "cast") and any(v.dtype in LARGEST for v in node.operands):
        return f"{node.name} of 8-bit floats"
    if node.name not in (*VIEWS, "quantize", "cast") and any(v.dtype in LARGEST for v in node.results):
        return f"{node.name} to 8-bit floats"
    name, moved = node.name, (*MOVES, "wrap_index", "dequantize", "quantize")
    if name in (*moved, *REDUCTIONS, *ROW_OPS, *PRODUCTS, *ATTENTIONS, *SCANS, *SCATTERS):
        return "a complex constant" if name == "constant" and isinstance(node.attrs["value"], complex) else None
    if not node.op.has(Trait.POINTWISE):
        return f"{name} has no template"
    return _pointwise(node)


def _pointwise(node: Node) -> str | None:
    name, dtype = node.name, node.operands[0].dtype
    if name in _DIVISIONS and not dtype.is_float and constant_of(node.operands[1]) in (None, 0):
        return f"{name} on {dtype} by a divisor that is not a nonzero constant (eager raises on zero)"
    if name == "pow" and not dtype.is_float:
        exponent = constant_of(node.operands[1])
        if exponent is None or not 0 <= exponent <= 64:
            return f"pow on {dtype} with an exponent that is not a constant from 0 to 64"
    return unsupported(name, dtype)
