"""Every pass checked as it runs: structure, honesty about changes, and values, with the rewrite that broke them."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.errors import EquivalenceError, GraphoptError
from graphopt.ir import Graph, structural_hash, verify
from graphopt.pass_manager import Fuel, Instrument, Pass, PassContext, RewritePass
from graphopt.remarks import Remark
from graphopt.rewrite import Numerics
from graphopt.verification import check_equivalent


def numerics_of(p: Pass) -> Numerics:
    """The numerics class of a pass: its own ``numerics``, or the loosest of its rules', or REASSOCIATES."""
    own = getattr(p, "numerics", None)
    if isinstance(own, Numerics):
        return own
    if isinstance(p, RewritePass):
        return max((r.numerics for r in p.rules()), key=lambda n: n.value, default=Numerics.BITWISE)
    return Numerics.REASSOCIATES


def check_changed(p: Pass, before_hash: str, after: Graph, changed: bool) -> None:
    """Raise EquivalenceError if a pass lies about having changed the graph."""
    truly = structural_hash(after) != before_hash
    if truly and not changed:
        raise EquivalenceError(f"pass {p} changed @{after.name} but says that it did not")
    if changed and not truly:
        raise EquivalenceError(f"pass {p} says that it changed @{after.name}, which is as it was before")


class ValueCheck(Instrument):
    """Runs the graph before and after every pass; stops at the first pass that breaks it, and names rule and node.

    After each pass the structure is verified, ``changed`` is compared with the structural hash, and values are compared at
    random inputs. When they differ, the pass is run again on the graph it was given with less and less fuel, until the
    first rewrite that does it is found. Graphs with random ops or effects are not compared; an analysis remark says so.

    Args:
        max_elements: sizes for the symbols are chosen so that the graph's values hold no more elements than this in total.
        seeds: of the random inputs.
    """

    def __init__(self, max_elements: int = 1 << 22, seeds: Sequence[int] = (0,)) -> None:
        self.max_elements, self.seeds = max_elements, tuple(seeds)
        self._snapshot: Graph | None = None
        self._hash, self._fuel = "", 0

    def before(self, p: Pass, g: Graph, ctx: PassContext) -> None:
        self._hash, self._fuel = structural_hash(g), ctx.fuel.used
        self._snapshot = g.clone()

    def after(self, p: Pass, g: Graph, ctx: PassContext, changed: bool) -> None:
        assert self._snapshot is not None, "before() was not called"
        verify(g)
        check_changed(p, self._hash, g, changed)
        if changed:
            self._compare(p, self._snapshot, g, ctx)
        self._snapshot = None

    def _compare(self, p: Pass, before: Graph, g: Graph, ctx: PassContext) -> None:
        numerics = numerics_of(p)
        try:
            done = check_equivalent(before, g, seeds=self.seeds, numerics=numerics, what=f"pass {p}", max_elements=self.max_elements)
        except EquivalenceError as error:
            culprit = self._culprit(p, before, ctx, numerics)
            raise EquivalenceError(f"{culprit}\n{error}" if culprit else str(error)) from error
        for why in dict.fromkeys(c.not_compared for c in done if c.not_compared):
            ctx.analysis("verify", f"values were not compared: {why}")

    def _culprit(self, p: Pass, before: Graph, ctx: PassContext, numerics: Numerics) -> str:
        """The first rewrite with which the values differ, found by bisecting the fuel; empty if rewrites are not numbered."""

        def run(limit: int | None) -> tuple[bool, list[Remark]]:
            skip = [n - self._fuel for n in ctx.fuel.skip if n > self._fuel]
            trial = PassContext(target=ctx.target, fuel=Fuel(limit, skip), pass_name=p.name)
            graph = before.clone()
            try:
                p.run(graph, trial)
                check_equivalent(before, graph, seeds=self.seeds, numerics=numerics, max_elements=self.max_elements)
            except GraphoptError:
                return False, trial.remarks
            return True, trial.remarks

        numbers = [r.number for r in run(None)[1] if r.kind == "passed" and r.number is not None]
        if not numbers or run(0)[0] is False:
            return ""
        good, bad = 0, numbers[-1]  # good: equivalent with that much fuel
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if run(middle)[0] else (good, middle)
        remark = next((r for r in run(bad)[1] if r.number == bad), None)
        if remark is None:
            return ""
        where = f" ({remark.loc})" if remark.loc else ""
        number = bad + self._fuel
        return (
            f"rule {remark.rule} of pass {p} is the first to go wrong: rewrite number {number}, {remark.message}, at\n"
            f"  {remark.node.strip()}{where}\n(`--skip-rewrite {number}`, or `skip_rewrites=[{number}]`, leaves it out)"
        )
