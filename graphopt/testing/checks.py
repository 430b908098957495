"""``check_pass`` and its kin: everything that a pass test should check, in one call."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from graphopt.errors import EquivalenceError
from graphopt.ir import Graph, Node, Value, parse_graph, print_graph, structural_hash, structurally_equal, verify
from graphopt.ir.graph import copy_nodes
from graphopt.ir.hashing import canonical_text
from graphopt.pass_manager import Pass, PassContext, RewritePass, run_pass
from graphopt.rewrite import Numerics, Rule, apply_rules
from graphopt.value_check import check_changed, numerics_of
from graphopt.verification import Comparison, check_equivalent

Seeds = Sequence[int]
Bindings = Sequence[Mapping[str, int]]


class Rules(Pass):
    """A few rules as a pass without a name, so that a rule can be tested before it has one.

    Options: ``given``, the rules.
    """

    given: tuple[Rule, ...] = ()

    def run(self, g: Graph, ctx: PassContext) -> bool:
        return apply_rules(g, self.given, ctx)

    @property
    def numerics(self) -> Numerics:
        """The loosest class of the rules."""
        return max((r.numerics for r in self.given), key=lambda n: n.value, default=Numerics.BITWISE)

    def __str__(self) -> str:
        return ", ".join(r.name for r in self.given)


def as_graph(g: Graph | str) -> Graph:
    """A graph of one's own from text or from a graph (which is copied)."""
    return parse_graph(g) if isinstance(g, str) else g.clone()


def as_pass(p: Pass | Rule | Sequence[Rule]) -> Pass:
    """A pass from a pass, a rule, or several rules."""
    if isinstance(p, Pass):
        return p
    return Rules((p,) if isinstance(p, Rule) else tuple(p))


def check_pass(p: Pass | Rule | Sequence[Rule], before: Graph | str, after: Graph | str | None = None, *, fires: bool | None = True,
               reason: str | None = None, bindings: Bindings | None = None, seeds: Seeds = (0, 1),
               numerics: Numerics | None = None) -> Graph:  # fmt: skip
    """Run a pass on a graph and check all that a pass owes.

    The result is structurally sound; it computes the same, in f64 and, within the budget of the numerics class, in its own
    precision, at several sizes; ``changed`` is honest; a second run changes nothing. A test is then as short as this::

        check_pass(MergeTransposes(), '''
            graph @g(%x: f32[B, 3, 4]) -> f32[4, B, 3] where 1 <= B {
              %0: f32[3, 4, B] = transpose(%x) {perm = [1, 2, 0]}
              %1: f32[4, B, 3] = transpose(%0) {perm = [1, 2, 0]}
              return %1
            }''', '''
            graph @g(%x: f32[B, 3, 4]) -> f32[4, B, 3] where 1 <= B {
              %0: f32[4, B, 3] = transpose(%x) {perm = [2, 0, 1]}
              return %0
            }''')

    A pass needs such a test with a symbolic dimension, and a near miss: ``fires=False, reason="has other uses"``.

    Args:
        p: a pass, or a rule or several.
        before: text or a graph (which is not changed).
        after: the expected result; names, source lines and the order of independent nodes do not matter.
        fires: whether the pass must change the graph; None if it may or may not.
        reason: must be part of a ``missed`` remark: why the pass declined. Works with ``fires=True`` too.
        bindings: values of the symbols; by default a few are drawn.
        seeds: of the random inputs.
        numerics: the budget; by default the class that the pass or its rules state.

    Returns:
        The graph after the pass, for further assertions.

    Raises:
        AssertionError: the pass did not do what was expected; shows a diff.
        EquivalenceError: the pass changed what the graph computes, or lied about ``changed``; shows a reproducer.
        VerifyError: the graph is broken.
    """
    the_pass, old = as_pass(p), as_graph(before)
    verify(old)
    new, ctx = old.clone(), PassContext(pass_name=the_pass.name or str(the_pass))
    the_pass.requires(new)
    changed = run_pass(the_pass, new, ctx)
    the_pass.ensures(new)
    verify(new)
    check_changed(the_pass, structural_hash(old), new, changed)
    _check_remarks(the_pass, ctx, changed, fires, reason, new)
    if after is not None:
        assert_same_structure(new, as_graph(after))
    if changed:
        compared = check_equivalent(
            old, new, bindings=bindings, seeds=seeds, numerics=numerics or numerics_of(the_pass), what=f"pass {the_pass}"
        )
        _some_compared(compared, str(the_pass))
        check_settled(the_pass, new)
    return new


def _check_remarks(p: Pass, ctx: PassContext, changed: bool, fires: bool | None, reason: str | None, g: Graph) -> None:
    missed = [r for r in ctx.remarks if r.kind == "missed"]
    said = "\n".join(f"  {r}" for r in missed) or "  (nothing)"
    if fires and not changed:
        raise AssertionError(f"pass {p} did not fire. It says:\n{said}\non\n{g}")
    if fires is False and changed:
        done = "\n".join(f"  {r}" for r in ctx.remarks if r.kind == "passed")
        raise AssertionError(f"pass {p} fired but should not have:\n{done}\nand made\n{g}")
    if reason is not None and not any(reason in r.message for r in missed):
        raise AssertionError(f"pass {p} gave no reason with {reason!r}; it says:\n{said}")


def _some_compared(done: Sequence[Comparison], what: str) -> None:
    """A test whose values could not be compared proves nothing: say so."""
    if done and all(c.not_compared for c in done):
        raise EquivalenceError(f"{what}: values were not compared: {done[0].not_compared}")


def check_settled(p: Pass, g: Graph) -> None:
    """Assert that a pass has nothing more to do on a graph that it has just been run on."""
    again = g.clone()
    ctx = PassContext(pass_name=p.name or str(p))
    if p.run(again, ctx) or not structurally_equal(again, g):
        done = "\n".join(f"  {r}" for r in ctx.remarks if r.kind == "passed")
        raise AssertionError(f"pass {p} has not settled; a second run made\n{done}\n{diff(g, again)}")


def check_rules_fire(p: RewritePass | Sequence[Rule], graphs: Iterable[Graph | str]) -> None:
    """Assert that every rule of a pass fires on at least one of some graphs: a rule that never fires is dead or misspelt."""
    rules = list(p.rules()) if isinstance(p, RewritePass) else list(p)
    idle = {r.name: None for r in rules}
    for text in graphs:
        ctx = PassContext()
        apply_rules(as_graph(text), rules, ctx)
        for r in ctx.remarks:
            if r.kind == "passed":
                idle.pop(r.rule, None)
    if idle:
        raise AssertionError(f"these rules fired on none of the graphs: {', '.join(idle)}")


def assert_equivalent(a: Graph | str, b: Graph | str, *, bindings: Bindings | None = None, seeds: Seeds = (0, 1),
                      numerics: Numerics = Numerics.REASSOCIATES) -> None:  # fmt: skip
    """Assert that two graphs compute the same; ``a`` is the reference.

    Raises:
        EquivalenceError: they do not (with a reproducer), or cannot be compared.
    """
    old, new = as_graph(a), as_graph(b)
    verify(old)
    verify(new)
    _some_compared(check_equivalent(old, new, bindings=bindings, seeds=seeds, numerics=numerics, what="@" + new.name), "@" + new.name)


def assert_same_structure(actual: Graph, expected: Graph) -> None:
    """Assert that two graphs are the same but for names, source lines and the order of independent nodes."""
    verify(expected)
    if canonical_text(ordered(actual)) != canonical_text(ordered(expected)):
        lines = diff(expected, actual)
        raise AssertionError(f"the graph is not as expected (- expected, + found):\n{lines}\nfound:\n{print_graph(actual)}")


def diff(expected: Graph, actual: Graph) -> str:
    """The lines in which two graphs differ, with canonical names."""
    a, b = canonical_text(ordered(expected)).splitlines(), canonical_text(ordered(actual)).splitlines()
    return "\n".join(line for line in difflib.unified_diff(a, b, lineterm="", n=2) if not line.startswith(("---", "+++", "@@")))


def ordered(g: Graph) -> Graph:
    """A copy whose nodes stand in the order in which the outputs need them, dead ones last; as it is where order matters."""
    if any(n.has_effect for n in g.nodes()):
        return g
    order: dict[Node, None] = {}
    for root in (*(v for v in g.outputs), *(r for n in g.nodes() for r in n.results)):
        _visit(root, order)
    order.update(dict.fromkeys(g.nodes()))  # nodes without results
    out = Graph(g.name, g.symbols)
    mapping: dict[Value, Value] = {v: out.add_input(v.type, v.hint, v.weight, v.exact) for v in g.inputs}
    copy_nodes(order, mapping, out)
    out.set_outputs([mapping[v] for v in g.outputs], g.output_strides)
    return out


def _visit(root: Value, order: dict[Node, None]) -> None:
    """Put a value's producers into an order, operands first."""
    stack = [(root.producer, False)]
    while stack:
        node, ready = stack.pop()
        if node is None or node in order:
            continue
        if ready:
            order[node] = None
        else:
            stack.append((node, True))
            stack += [(v.producer, False) for v in reversed(node.operands)]
