"""y = f(x); z = f(x)  =>  y = f(x); z = y

Why: the second computation, its launch and its memory.
When: op, operands and attributes are the same, and the node has no effect: two draws of random numbers stay two. Operands of
a commutative op may be exchanged. An attribute is compared by its text, which keeps 1, 1.0 and true, 0.0 and -0.0 apart.
Numerics: bitwise.
Reference: hash-consing; Cooper and Torczon, Engineering a Compiler, section 8.4.1 (value numbering).
"""

from __future__ import annotations

from typing import Any

from graphopt.ir import Graph, Node, Trait, Value
from graphopt.ir.hashing import canonical_text
from graphopt.ir.printer import format_attr
from graphopt.pass_manager import Pass, PassContext


class CommonSubexpressions(Pass):
    """One walk; each value has a number, and a node that is like an earlier one takes the earlier one's results."""

    name = "cse"

    def run(self, g: Graph, ctx: PassContext) -> bool:
        numbers: dict[Value, int] = {v: i for i, v in enumerate(g.inputs)}
        seen: dict[tuple[Any, ...], Node] = {}
        changed = False
        for node in g.nodes():
            key = None if node.has_effect else _key(node, numbers)
            twin = seen.get(key) if key is not None else None
            fuel = ctx.fuel.take() if twin is not None else None
            if twin is None or fuel is None:
                for r in node.results:
                    numbers[r] = len(numbers)
                if key is not None:
                    seen.setdefault(key, node)
                continue
            ctx.passed("CommonSubexpressions", "computed before", node, fuel)
            for old, new in zip(node.results, twin.results, strict=True):
                g.replace(old, new)
            g.erase(node)
            changed = True
        return changed


def _key(node: Node, numbers: dict[Value, int]) -> tuple[Any, ...]:
    """What two nodes must agree in to compute the same."""
    operands = [numbers[v] for v in node.operands]
    if node.op.has(Trait.COMMUTATIVE):
        operands[:2] = sorted(operands[:2])
    attrs = tuple((k, format_attr(v)) for k, v in node.attrs.items())
    body = canonical_text(node.body) if node.body is not None else ""
    return node.name, tuple(operands), attrs, body
