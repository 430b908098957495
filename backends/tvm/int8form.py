"""Which products of 8-bit integers have the kernel of integer instructions, and its schedules. Looks at the IR only."""

from __future__ import annotations

from graphopt.autotune.space import Param
from graphopt.backends.tvm import panelform
from graphopt.backends.tvm.panelform import COLUMNS, TILE, products_of
from graphopt.ir import types
from graphopt.ir.graph import Graph, Value
from graphopt.target import Target

STEP = panelform.LINE  # of the summed axis: what a row of a tile holds

def packed_fours(v: Value) -> Value | None:
    """The packed input ``[panels, depth / 4, 32, 4]`` that a factor ``[K, N]`` is unpacked from, or None."""
    for name in ("slice", "slice", "reshape", "transpose"):
        node = v.producer
        if node is None or node.name != name:
            return None
        v = node.operands[0]
    if not v.is_input or v.type.rank != 4 or v.type.strides is not None or v.shape[2:] != (COLUMNS, 4) or v.dtype != types.i8:
        return None
    return v if node is not None and node.attrs["perm"] == (1, 3, 0, 2) else None


def refusal(graph: Graph, t: Target) -> str | None:
    """Why a region is not one integer product, or two of one first factor, with an epilogue of its shape, or None."""
    nodes = products_of(graph)
    if not nodes or len(nodes) > 2 or any(n.attrs["acc"] != types.i32 or n.operands[0].dtype != types.i8 for n in nodes):
        return "not products of i8 in i32"
    return panelform.refusal(graph, packed_fours)


def params(graph: Graph, t: Target) -> tuple[Param, ...]:
    """The knobs; the default engine is the target's best.

    ``lanes``: sums of a vector. ``rows``: of a tile. ``group``: row tiles (``amx``: pairs of them) of a task. ``panels``: of a task.
    ``block``: of the summed axis, after which sums are put aside (``amx``). ``ahead``: whether the next panel is asked for.
    ``beside``: whether a panel is written while the next one is multiplied (``amx``).
    """
    engine = t.int8_products
    engines = tuple(dict.fromkeys((engine, *(e for e in ("vnni",) if t.has("avx512_vnni") and t.has("avx512f")), "mul")))
    most = TILE if engine == "amx" else 10 if t.vector_registers == 32 else 4
    return Param("engine", engines), *panelform.tasks(graph, t, engine, most, size=1)
