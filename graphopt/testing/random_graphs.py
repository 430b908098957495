"""Random well-typed graphs over the op table, from a seed (:func:`random_graph`) or by hypothesis (:func:`graphs`).

Under hypothesis a failing graph is shrunk to a small one. How to make a node of each op is in :mod:`graphopt.testing.recipes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from graphopt.errors import UsageError, nearest
from graphopt.ir import Graph, Node
from graphopt.testing.pool import Chooser, Drawn, Pool, Seeded
from graphopt.testing.recipes import IDIOMS, RECIPES, fuse_chain

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


WHEN_ASKED = ("attention_forward", "attention_backward", "dropout")  # large, or of training alone


def make_graph(chooser: Chooser, ops: Sequence[str] | None, max_nodes: int, symbolic: bool, fusion: bool,
               also: Sequence[Callable[[Pool], None]] = ()) -> Graph:  # fmt: skip
    """A random graph by a chooser's decisions; see :func:`random_graph`."""
    pool = Pool(chooser, symbolic)
    unknown = next((n for n in ops or () if n not in RECIPES), None)
    if unknown is not None:
        raise UsageError(f"there is no recipe for an op {unknown!r}{nearest(unknown, RECIPES)}")
    names = [n for n in RECIPES if (n not in WHEN_ASKED if ops is None else n in ops)]
    for _ in range(chooser.integer(1, max_nodes)):
        _step(pool, names, ops is None)
    for idiom in also:
        idiom(pool)
    made = [v for v in pool.values if v.producer is not None] or pool.values
    outputs = [made[-1], *(pool.pick(pool.values) for _ in range(chooser.integer(0, 2)))]
    pool.graph.set_outputs(outputs)
    if fusion:
        fuse_chain(pool)
    return pool.graph


def _step(pool: Pool, names: Sequence[str], idioms: bool) -> None:
    """Add a node, or a few."""
    last: Node | None = pool.values[-1].producer if pool.values else None
    if last is not None and pool.flag(12):  # the same node once more
        pool.values += pool.graph.create(last.op, last.operands, last.attrs, loc=pool.builder.loc).results
    elif idioms and pool.flag(6):
        pool.pick(IDIOMS)(pool)
    else:
        name = pool.pick(names)
        RECIPES[name](pool, name)


def random_graph(seed: int, *, ops: Sequence[str] | None = None, max_nodes: int = 12, symbolic: bool = True, fusion: bool = False,
                 also: Sequence[Callable[[Pool], None]] = ()) -> Graph:  # fmt: skip
    """One random well-typed graph.

    Args:
        seed: the same seed gives the same graph.
        ops: names of the ops to draw from; by default all that have inference but those ``WHEN_ASKED``.
        max_nodes: draws at most; a draw may make a few nodes (an op and a constant operand).
        symbolic: whether sizes may contain the symbols B and S.
        fusion: put a chain of pointwise nodes into a ``fusion`` node, where there is one.
        also: idioms that the graph has at its end.
    """
    return make_graph(Seeded(seed), ops, max_nodes, symbolic, fusion, also)


def graphs(ops: Sequence[str] | None = None, max_nodes: int = 12, symbolic: bool = True, fusion: bool = False) -> SearchStrategy[Graph]:
    """A hypothesis strategy of random well-typed graphs; the arguments are those of :func:`random_graph`.

    A failing example is shrunk to few nodes and simple operands, and printed as text that can be pasted::

        @given(graphs(max_nodes=6))
        def test_my_pass_on_any_graph(g):
            check_pass(MyPass(), g, fires=None)
    """
    from hypothesis import strategies as st

    @st.composite
    def build(draw: Callable[[Any], Any]) -> Graph:
        return make_graph(Drawn(draw, st.integers), ops, max_nodes, symbolic, fusion)

    return build()
