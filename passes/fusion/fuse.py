"""pointwise chains, reductions with what feeds and follows them, matmul with epilogue  =>  one ``fusion`` node each

Why: a value that stays inside of a region is neither written to memory nor read back, and a region is one kernel launch.

When: nodes are visited once, users before producers. A node joins the region of its users if *all* of them are in that one
region and the region's kind accepts it; else it is the root of a region of its own.

- ``pointwise``: pointwise ops, views, concat, pad, take, gather, constant, iota.
- ``reduction``: pointwise and views -> one reduction -> pointwise ops on the reduced shape.
- ``rowwise``: softmax, log_softmax, layer_norm, rms_norm and reductions over the trailing axes, any number of them over the
  same rows, with pointwise ops on full rows or on one element a row before, between and after.
- ``scan``: anything pointwise -> one running sum, product or extreme -> pointwise ops of its shape.
- ``scatter``: anything pointwise -> updates by index; nothing can follow, since an element may be written several times.
- ``matmul``: views on the operands, cheap work on the left one, ``dequantize`` on the right one, one matmul, pointwise ops of the
  result's shape after it. A second matmul of the same left operand and type may meet it there: a gate, ``act(x a) * (x b)``, writes
  neither product. Of a product of integers the left operand is rounded there, each row by a scale made of it, and the sums become
  floats there.
- ``attention``: views, and what is made of a row of queries, keys or values alone, as a rotary embedding or an RMS norm of heads ->
  one attention -> transposes and reshapes, which the kernel writes through. Where queries are few, joins of keys and of values, read part
  by part.
  An attention for training, which has a second result, and ``attention_backward`` take views in before them alone.
- ``conv``: the same with one convolution whose channels come last; what it reads may be padded.

In the last two, cheap pointwise ops on single numbers (a scale, an epsilon) may stand beside.

Where a region would compute an element more than once (below a broadcast, through several index maps, for each tile of a
matmul), the cost model (:mod:`~graphopt.passes.fusion.cost`) compares that with a kernel of its own, and so it does where few
rows would keep a reduction and what follows it on few cores. Constants, iota and views cost nothing to repeat: each region
that reads one gets a copy, unless it only moves the cost elsewhere. Declined, with a remark: a value with other users; what the
cost model declines, with the numbers; work before a product that is dear, or that can follow the kernel before it;
a reduction over other rows; a region of ``max_nodes`` nodes or ``max_inputs`` inputs; a move across a call that mutates. Staged
values (of weights alone) are computed once and are inputs; only views of them join, and of those no transpose that is read
element by element: it is done once as well, and each call reads neighbours (a product's factor is packed later, from the
view). Complex numbers, 8-bit floats that are neither cast nor dequantized, other convolutions and library calls stay as they are. So do a
view or a constant that no region takes.

Legality, proven. Copying a constant or view for each reader keeps the graph acyclic and every value what it was. Afterwards each
member of a region but its root has all of its users inside; so from every member a path leads to the root *within* the region,
and every path that leaves the region leaves it from the root. If a path left and came back, it would lead from the root to some
member m; from m a path leads to the root; together they would be a cycle in the graph, which has none. So the region can
be one node, and since each of its inputs is defined before the member that reads it, which stands before the root, the
place of the root is a right place for it. Outlining one region leaves the others' members and users as they were, so the
argument holds for all of them at once. Work: every edge is looked at a bounded number of times, and asking a region costs at
most ``max_nodes``.

Numerics: bitwise in the IR; a kernel may keep intermediate values in registers at higher precision.
Reference: Li et al., "The Deep Learning Compiler: A Comprehensive Survey", arXiv:2002.03794, section 4.3; for the kinds,
Chen et al., TVM, OSDI 2018, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from graphopt.errors import UsageError
from graphopt.ir import dims
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Graph, Node
from graphopt.ir.stage import Staged, staged_values
from graphopt.pass_manager import Pass
from graphopt.passes.fusion.attention import view_of_attention
from graphopt.passes.fusion.cost import CostModel, size_text
from graphopt.passes.fusion.outline import outline
from graphopt.passes.fusion.region import Limits, Region
from graphopt.passes.fusion.roles import Role, role
from graphopt.rewrite import PassContext, erase_dead

_KEPT = 1 << 20  # elements of a staged value that are kept in another order

class Fuse(Pass):
    """Group nodes into fusion regions. See the module's header.

    Args:
        max_nodes: nodes of a region, constants aside.
        max_inputs: values that a region reads.
    """

    name = "fuse"
    max_nodes: int = 64
    max_inputs: int = 24

    def parts(self) -> Sequence[type]:
        return [type(self), Region, CostModel, Role]

    def run(self, g: Graph, ctx: PassContext) -> bool:
        if self.max_nodes < 1 or self.max_inputs < 1:
            raise UsageError(f"{self}: max_nodes and max_inputs must be positive")
        plan = Plan(g, Limits(self.max_nodes, self.max_inputs), CostModel(ctx.target, g.symbols))
        for node, reason in reversed(plan.cut):
            ctx.missed(self.name, f"{node.op.name} is not fused with its reader: {reason}", node)
        changed = False
        for region in reversed(plan.regions):
            number = ctx.fuel.take()
            if number is None:
                continue
            nodes = list(reversed(region.members))
            ctx.passed(self.name, describe(region), region.root, number)
            outline(g, nodes, region.kind)
            erase_dead(g, region.root)
            changed = True
        return changed


class Plan:
    """Which node goes where.

    Attributes:
        regions: in reverse execution order of their roots.
        cut: fusable nodes that a fusable reader did not take, and why.
    """

    def __init__(self, graph: Graph, limits: Limits, costs: CostModel) -> None:
        self.limits, self.costs, self.staged = limits, costs, staged_values(graph)
        self.regions: list[Region] = []
        self.cut: list[tuple[Node, str]] = []
        self._placed: dict[Node, list[Region]] = {}
        self._alone: dict[Node, None] = {graph.ret: None}
        epoch = 0  # counted from the end
        for node in reversed(graph):
            if node.attrs.get("effect") == "mutates":
                epoch -= 1
            self._visit(node, epoch, self.staged)

    def _visit(self, node: Node, epoch: int, staged: Staged) -> None:
        part = role(node)
        dead = not any(r.uses for r in node.results)
        if dead or part is Role.OTHER or (staged.node(node) and part not in (Role.VIEW, Role.CREATION)):
            self._alone[node] = None
            return
        if len(node.results) > 1:
            self._open(node, epoch)
            return
        readers = self._readers(node.results[0].users)
        outside = any(u in self._alone for u in node.results[0].users)
        if part is Role.VIEW and view_of_attention(node) and not staged.node(node):
            self._open(node, epoch)
            return
        if part in (Role.VIEW, Role.CREATION):
            self._place_copies(node, epoch, readers, outside)
            return
        if readers and all(node in r.rounding for r in readers):  # rows are rounded by each product that reads them
            self._placed[node] = [r for r in readers if r.reject(node, epoch, self.limits) is None]
            if outside or len(self._placed[node]) < len(readers):
                self._open(node, epoch)
            return
        if len(readers) == 1 and not outside:
            reason = readers[0].reject(node, epoch, self.limits)
            if reason is None:
                self._placed[node] = readers
                return
            self.cut.append((node, reason))
        elif readers:
            others = "something that stays outside of regions" if outside else "other regions"
            self.cut.append((node, f"its result is also used by {others}"))
        self._open(node, epoch)

    def _place_copies(self, node: Node, epoch: int, readers: list[Region], outside: bool) -> None:
        """A constant or a view joins every region that reads it; the original stays for the rest."""
        fixed = self.staged.node(node) and _reorders(node)
        taken = [r for r in readers if not (fixed and r.reads_in_order(node)) and r.reject(node, epoch, self.limits) is None]
        self._placed[node] = taken
        if not outside and len(taken) == len(readers):
            return
        if node.op.name == "flip" and not self.staged.node(node):  # no strides can express it
            self._open(node, epoch)
        else:
            self._alone[node] = None

    def _open(self, node: Node, epoch: int) -> None:
        region = Region.at(node, epoch, self.costs)
        self.regions.append(region)
        self._placed[node] = [*self._placed.get(node, ()), region]

    def _readers(self, users: Iterable[Node]) -> list[Region]:
        found: dict[int, Region] = {}
        for user in users:
            for region in self._placed.get(user, ()):
                found[id(region)] = region
        return list(found.values())


def _reorders(node: Node) -> bool:
    """Whether a view changes the order of its elements in memory, and is small enough to be kept a second time."""
    if node.op.name != "transpose" or not dims.is_static(node.results[0].shape):
        return False
    moved = [p for p in node.attrs["perm"] if node.operands[0].shape[p] != 1]
    return moved != sorted(moved) and int(node.results[0].type.numel) <= _KEPT


def describe(region: Region) -> str:
    """What a region saves, in words."""
    inner = [n for n in region.members if n is not region.root and role(n) not in (Role.VIEW, Role.CREATION)]
    names = ", ".join(n.op.name for n in reversed(region.members) if role(n) is not Role.CREATION)
    text = f"{region.kind} region: {names}"
    if not inner:
        return text
    saved: Dim = 0
    for n in inner:
        saved = dims.add(saved, dims.mul(2, n.results[0].type.nbytes()))
    return f"{text}; saves {len(inner)} {'launch' if len(inner) == 1 else 'launches'} and {size_text(saved)} of memory traffic"
