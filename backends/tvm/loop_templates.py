"""Templates of loops over elements and over rows: they take whatever has no products. Needs no tvm until ``emit``."""

from __future__ import annotations

from typing import Any

from graphopt.autotune.space import Param, Schedule, SearchSpace, Workload
from graphopt.backends.forms.support import ATTENTIONS, REDUCTIONS
from graphopt.backends.tvm.template import Template, lanes_of, loops_of
from graphopt.errors import BuildError
from graphopt.ir import dims
from graphopt.ir.graph import Node
from graphopt.target import Target

# --- nest --------------------------------------------------------------------------------------------------------------


_CHUNKS = (4096, 512, 1024, 2048, 8192, 16384, 32768, 65536)
_PIECES = (2, 4, 8, 16, 32, 64)
_LONG, _FEW = 4096, 256  # elements of a result, and results, for which it is worth dividing a reduction


def _unrolls(w: Workload) -> tuple[int, ...]:
    """Vectors that a reduction keeps in flight: extremes wait longer for each other than sums, as they look for nan and signed zeros."""
    found = [n.name for n in w.graph.nodes() if n.name in REDUCTIONS]
    return (8, 4, 1, 2) if found and all(n in ("max", "min") for n in found) else (4, 1, 2, 8)


def _nest_params(w: Workload, t: Target) -> tuple[Param, ...]:
    lanes = lanes_of(w.graph, t)
    written = [v.type.numel for v in w.graph.outputs]
    chunks = _CHUNKS if any(not isinstance(n, int) or n > _CHUNKS[1] for n in written) else _CHUNKS[:1]
    return (
        Param("lanes", tuple(dict.fromkeys((lanes, max(1, lanes // 2), 2 * lanes, 4 * lanes)))),
        Param("unroll", _unrolls(w)),
        Param("chunk", chunks, "tasks"),
        Param("parallel", (True, False), "tasks"),
    )


def _nest_spaces(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    """That of all regions; and of few sums of many elements, which all cores are to share, one that says how they are divided."""
    from graphopt.backends.forms.prepare import expand_rows

    params, loops = _nest_params(w, t), loops_of("element_loops")(w, t)
    plain = SearchSpace("nest", params=params, nest=loops)
    if not any(_is_divisible(n) for n in expand_rows(w.graph).nodes()):
        return (plain,)
    own = (*(p for p in params if p.name != "parallel"), Param("parallel", (True,)), Param("pieces", _PIECES, "tasks"))
    return plain, SearchSpace("nest", ("factored",), own, nest=loops)


def _is_divisible(node: Node) -> bool:
    if node.name not in REDUCTIONS or node.name.startswith("arg"):
        return False
    results, elements = node.result.type.numel, node.operands[0].type.numel
    return isinstance(results, int) and isinstance(elements, int) and 0 < results <= _FEW and elements >= results * _LONG


def _write_nest(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.tvm.loops import Tuning
    from graphopt.backends.tvm.nest import emit_nest

    pieces = s["pieces"] if s.sketch == "factored" else 0
    tuning = Tuning(s["lanes"], s["unroll"], s["chunk"], s["parallel"], t.cores, pieces)
    return emit_nest(expand_rows(w.graph), tuning, in_place=w.kind == "update")


# --- rows --------------------------------------------------------------------------------------------------------------


def _rows_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.forms.shapes import row_shape

    if w.kind not in ("rowwise", "reduction"):
        return "not a region over rows"
    shape = row_shape(expand_rows(w.graph))
    if isinstance(shape, str):
        return shape
    if w.kind == "reduction" and isinstance(shape[0], int) and shape[0] < 64:
        return "few rows"
    return None


def _rows_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.forms.shapes import row_shape

    shape = row_shape(expand_rows(w.graph))
    columns = shape[1] if not isinstance(shape, str) and isinstance(shape[1], int) else 1024
    step = max(1, min(16, 2048 // max(1, columns)))
    lanes = lanes_of(w.graph, t)
    return (
        Param("lanes", tuple(dict.fromkeys((lanes, max(1, lanes // 2), 2 * lanes)))),
        Param("unroll", _unrolls(w)),
        Param("rows", tuple(dict.fromkeys((step, 1, 2, 4, 8, 16, 32, 64))), "tasks"),
        Param("parallel", (True, False), "tasks"),
    )


def _write_rows(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.tvm.loops import Tuning
    from graphopt.backends.tvm.nest import emit_nest
    from graphopt.backends.tvm.rows import RowKernel

    graph, tuning = expand_rows(w.graph), Tuning(s["lanes"], s["unroll"], parallel=s["parallel"], cores=t.cores)
    try:
        return RowKernel(graph, tuning, s["rows"]).emit()
    except BuildError:  # a use across rows that shapes alone do not show
        return emit_nest(graph, tuning)


# --- columns -----------------------------------------------------------------------------------------------------------

_STRIP = 1 << 12  # elements of a strip, about: it stays in the first-level cache, twice
_WIDTHS = (16, 8, 4, 32, 64)  # vectors of a strip


def _columns_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.forms.shapes import column_axes

    found = column_axes(expand_rows(w.graph)) if w.kind == "rowwise" else "not a region over columns"
    return found if isinstance(found, str) else None


def _columns_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.forms.shapes import column_axes

    found, lanes = column_axes(expand_rows(w.graph)), lanes_of(w.graph, t)
    assert not isinstance(found, str)
    length = dims.numel([found[0][a] for a in found[1]])
    vectors = min(_WIDTHS, key=lambda n: abs(n * lanes * length - _STRIP)) if isinstance(length, int) else 8
    return (
        Param("lanes", tuple(dict.fromkeys((lanes, max(1, lanes // 2))))),
        Param("vectors", tuple(dict.fromkeys((vectors, *_WIDTHS))), "tile"),
        Param("parallel", (True, False), "tasks"),
    )


def _write_columns(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.forms.prepare import expand_rows
    from graphopt.backends.tvm.columns import ColumnKernel
    from graphopt.backends.tvm.loops import Tuning
    from graphopt.backends.tvm.nest import emit_nest

    graph, tuning = expand_rows(w.graph), Tuning(s["lanes"], parallel=s["parallel"], cores=t.cores)
    try:
        return ColumnKernel(graph, tuning, s["lanes"] * s["vectors"]).emit()
    except BuildError:  # addresses that do not let columns lie side by side
        return emit_nest(graph, tuning)


_OWN = ("conv", "conv-depthwise", *ATTENTIONS)  # kinds of which only their own templates know

ROWS = Template("rows", _rows_refuse, _rows_params, _write_rows, nest=loops_of("row_loops"))
COLUMNS = Template("columns", _columns_refuse, _columns_params, _write_columns)
NEST = Template("nest", lambda w, t: f"a region of kind {w.kind}" if w.kind in _OWN else None, _nest_params, _write_nest,
                _nest_spaces)  # fmt: skip
