"""The worklist driver: applies rules until none fires, within fuel, and leaves no dead node behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice

from graphopt.errors import GraphoptError, PassError
from graphopt.ir import dims
from graphopt.ir.graph import Graph, Listener, Node, Value
from graphopt.rewrite.context import PassContext
from graphopt.rewrite.pattern import Match, Matcher
from graphopt.rewrite.rewriter import Rewriter
from graphopt.rewrite.rule import Reject, Rule

MAX_MATCHES = 16  # ways to match one rule at one node (operand orders) that are offered to its check


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
    run = _Run(graph, by_op, ctx, max_rewrites_per_node * (len(graph) + 16))
    while run.round():  # a pattern may reach further than the worklist looks: settled is when a whole round is idle
        pass
    for (rule_name, node), (reason, culprit) in run.misses.items():
        if not node.erased:
            ctx.missed(rule_name, reason, node if culprit is None or culprit.erased else culprit)
    return run.fired > 0


class _Run:
    """One application of rules to a graph: what fired, what fuel denied, and the misses of the round that is under way."""

    def __init__(self, graph: Graph, by_op: dict[str, list[Rule]], ctx: PassContext, limit: int) -> None:
        self.graph, self.by_op, self.ctx, self.limit = graph, by_op, ctx, limit
        self.fired = 0
        self.denied: set[tuple[str, Node]] = set()  # membership only
        self.misses: dict[tuple[str, Node], tuple[str, Node | None]] = {}

    def round(self) -> bool:
        """Look at every node, and at those that the rewrites made or touched; whether any rule fired."""
        self.misses.clear()  # the last round is idle, and so its misses are those of the finished graph
        work, before = Worklist(self.graph), self.fired
        self.graph.listeners.append(work)
        try:
            while (node := work.pop()) is not None:
                for rule in self.by_op.get(node.op.name, ()):
                    if self._try(rule, node):
                        break
                if self.fired > self.limit:
                    last = f"over {self.limit} rewrites, the last by {rule.name}"
                    raise GraphoptError(f"rules do not settle in {self.ctx.pass_name}: {last}")
        finally:
            self.graph.listeners.remove(work)
        return self.fired > before

    def _try(self, rule: Rule, node: Node) -> bool:
        """Apply a rule at a node if it matches in any way that its check accepts."""
        try:
            return self._apply(rule, node)
        except GraphoptError as error:
            error.add_note(f"in rule {rule.name} at {node!r}" + (f" ({node.loc})" if node.loc else ""))
            raise
        except Exception as error:  # a fault of the rule's author: say whose it is
            raise PassError(f"rule {rule.name} of pass {self.ctx.pass_name} failed at {node!r}: {type(error).__name__}: {error}") from error

    def _apply(self, rule: Rule, node: Node) -> bool:
        key = (rule.name, node)
        if key in self.denied:
            return False
        matcher = Matcher()
        for match in islice(matcher.matches(rule.pattern, node), MAX_MATCHES):
            reject = rule.check(match)
            if reject is not None and not isinstance(reject, Reject):
                returned = f"rule {rule.name} of pass {self.ctx.pass_name}: check returned {reject!r}"
                raise PassError(f"{returned}; return None to go on, or Reject(reason, value) to decline")
            if reject is None:
                number = self.ctx.fuel.take()
                if number is None:
                    self.denied.add(key)
                    return False
                _rewrite(self.graph, rule, match, self.ctx, number)
                self.fired += 1
                return True
            if reject.reason and key not in self.misses:
                culprit = reject.culprit.producer if isinstance(reject.culprit, Value) else reject.culprit
                self.misses[key] = (reject.reason, culprit)
        if matcher.miss.depth >= rule.near:
            self.misses.setdefault(key, (matcher.miss.reason, matcher.miss.node))
        return False


def _rewrite(graph: Graph, rule: Rule, match: Match, ctx: PassContext, number: int) -> None:
    root = match.root
    ctx.passed(rule.name, rule.equation, root, number)
    new = rule.rewrite(match, Rewriter(graph, root))
    _check_result(rule, root, new)
    graph.replace(root.results[0], new)
    erase_dead(graph, root)


def _check_result(rule: Rule, root: Node, new: object) -> None:
    """A rule must give a value of the root's own type."""
    if not isinstance(new, Value):
        raise PassError(f"rule {rule.name}: rewrite returned {new!r}, not a Value; is a `return` missing?")
    old = root.results[0]
    if new.dtype != old.dtype or not dims.same_shape(new.shape, old.shape, root.graph.symbols):
        raise PassError(f"rule {rule.name}: rewrite gives {new.type.logical} in the place of {old.type.logical}")


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
