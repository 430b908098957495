"""The worklist driver: applies rules until none fires, within fuel, and leaves no dead node behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from graphopt.errors import GraphoptError
from graphopt.ir.graph import Graph, Listener, Node, Value
from graphopt.rewrite.context import PassContext
from graphopt.rewrite.pattern import Match, Matcher
from graphopt.rewrite.rewriter import Rewriter
from graphopt.rewrite.rule import Rule


class Worklist(Listener):
    """Nodes still to be looked at, in a deterministic order; kept up to date by the graph's own notices."""

    def __init__(self, graph: Graph) -> None:
        self.queue: deque[Node] = deque(graph.nodes())
        self.waiting: set[Node] = set(self.queue)  # membership only, never iterated

    def push(self, node: Node) -> None:
        if node not in self.waiting and not node.erased:
            self.waiting.add(node)
            self.queue.append(node)

    def pop(self) -> Node | None:
        while self.queue:
            node = self.queue.popleft()
            self.waiting.discard(node)
            if not node.erased:
                return node
        return None

    def created(self, node: Node) -> None:
        self.push(node)

    def replaced(self, old: Value, new: Value) -> None:
        for user in old.users:
            if user is not user.graph.ret:
                self.push(user)
                for r in user.results:  # a pattern may be rooted one step further down
                    for further in r.users:
                        if further is not further.graph.ret:
                            self.push(further)


def apply_rules(graph: Graph, rules: Sequence[Rule], ctx: PassContext, max_rewrites_per_node: int = 64) -> bool:
    """Apply rules everywhere until nothing changes.

    Args:
        max_rewrites_per_node: more than this many times the first size of the graph means that rules undo each other.

    Returns:
        Whether any rule fired.

    Raises:
        GraphoptError: the rules do not settle.
    """
    by_op: dict[str, list[Rule]] = {}
    for rule in rules:
        for op_name in rule.pattern.ops:
            by_op.setdefault(op_name, []).append(rule)
    work = Worklist(graph)
    graph.listeners.append(work)
    fired, limit = 0, max_rewrites_per_node * (len(graph) + 16)
    told: set[tuple[str, Node]] = set()
    try:
        while (node := work.pop()) is not None:
            for rule in by_op.get(node.op.name, ()):
                if _try(graph, rule, node, ctx, told):
                    fired += 1
                    break
            if fired > limit:
                raise GraphoptError(f"rules do not settle in {ctx.pass_name}: over {limit} rewrites, the last by {rule.name}")
    finally:
        graph.listeners.remove(work)
    return fired > 0


def _try(graph: Graph, rule: Rule, node: Node, ctx: PassContext, told: set[tuple[str, Node]]) -> bool:
    matcher = Matcher()
    match = matcher.match(rule.pattern, node)
    if match is None:
        miss = matcher.miss
        if miss.depth >= 2 and (rule.name, node) not in told:  # the root alone is no near miss
            told.add((rule.name, node))
            ctx.missed(rule.name, miss.reason, miss.node or node)
        return False
    reject = rule.check(match)
    if reject is not None:
        if (rule.name, node) not in told:
            told.add((rule.name, node))
            culprit = reject.culprit.producer if isinstance(reject.culprit, Value) else reject.culprit
            ctx.missed(rule.name, reject.reason, culprit or node)
        return False
    number = ctx.fuel.take()
    if number is None:
        return False
    _rewrite(graph, rule, match, ctx, number)
    return True


def _rewrite(graph: Graph, rule: Rule, match: Match, ctx: PassContext, number: int) -> None:
    root = match.root
    ctx.passed(rule.name, rule.equation, root, number)
    try:
        new = rule.rewrite(match, Rewriter(graph, root))
    except GraphoptError as error:
        error.add_note(f"in rule {rule.name} at {root!r}" + (f" ({root.loc})" if root.loc else ""))
        raise
    graph.replace(root.results[0], new)
    erase_dead(graph, root)


def erase_dead(graph: Graph, node: Node) -> None:
    """Erase a node if nothing uses it, and then its operands' producers, and so on."""
    stack = [node]
    while stack:
        n = stack.pop()
        if n.erased or n.has_effect or any(r.uses for r in n.results):
            continue
        producers = [v.producer for v in n.operands if v.producer is not None]
        graph.erase(n)
        stack += producers
