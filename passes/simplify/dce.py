"""A node without users and without effects  =>  nothing

Why: work that nobody reads.
When: no result is used, and the node has no effect (random numbers and mutations stay).
Numerics: bitwise.
Reference: Cooper and Torczon, Engineering a Compiler, section 10.2 (useless code).
"""

from __future__ import annotations

from graphopt.ir import Graph
from graphopt.pass_manager import Pass, PassContext


class DeadCode(Pass):
    """Erase what is not used, users before their operands."""

    name = "dce"

    def run(self, g: Graph, ctx: PassContext) -> bool:
        changed = False
        for node in reversed(g):
            if node.has_effect or any(r.uses for r in node.results):
                continue
            number = ctx.fuel.take()
            if number is None:
                continue
            ctx.passed("DeadCode", "nothing uses it", node, number)
            g.erase(node)
            changed = True
        return changed
