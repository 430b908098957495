"""Which products are summed from bf16 on AMX tiles, with a weight that is bf16 in pairs, and their schedules. Looks at the IR only."""

from __future__ import annotations

from graphopt.autotune.space import Param
from graphopt.backends.tvm import panelform
from graphopt.backends.tvm.pairform import packed_pairs
from graphopt.backends.tvm.panelform import products_of
from graphopt.backends.tvm.quantform import MOST_ROWS
from graphopt.ir import types
from graphopt.ir.graph import Graph
from graphopt.ir.opset.quantize import LARGEST
from graphopt.ir.types import DType
from graphopt.target import Target

PARTS = {types.bf16: 1, types.f32: 3} | dict.fromkeys(LARGEST, 1)  # numbers of bf16 whose sum an element of the first factor is, exactly
ALONE = 128  # columns for each core from which on it makes all rows for itself, rather than read what another core wrote


def parts(dtype: DType) -> int:
    """How many tiles an element of the first factor takes."""
    return PARTS[dtype]


def refusal(graph: Graph, t: Target) -> str | None:
    """Why a region is not products of bf16, or of f32 and bf16, for tiles; or None."""
    nodes = products_of(graph)
    if t.bf16_products != "amx":
        return "the target has no AMX tiles"
    if not nodes or len(nodes) > 2:
        return "not one product, or two"
    rows = panelform.rows_of(graph)
    if nodes[0].operands[0].dtype == types.f32 and isinstance(rows, int) and rows <= MOST_ROWS:
        return f"at most {MOST_ROWS} rows: floats are made in registers"
    for n in nodes:
        x, w, y = n.operands[0].dtype, n.operands[1].dtype, n.result.dtype
        if w != types.bf16 or x not in PARTS or y not in (types.bf16, types.f32) or (y == types.bf16 and x != types.bf16):
            return f"a product of {x} and {w} in {y}"
    return panelform.refusal(graph, packed_pairs)


def params(graph: Graph, t: Target) -> tuple[Param, ...]:
    """The knobs, see :func:`graphopt.backends.tvm.panelform.tasks`."""
    node = products_of(graph)[0]
    alone = panelform.statistic_of(graph) is None and int(node.result.shape[-1]) >= ALONE * t.cores
    knobs = panelform.tasks(graph, t, "amx", panelform.TILE, size=2, parts=parts(node.operands[0].dtype), alone=alone)
    return *knobs, Param("apart", (alone, not alone), "tasks")
