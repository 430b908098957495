"""matmul(x, a), matmul(x, b) ...  =>  y = matmul(x, [a b ...]),  y[..., :A], y[..., A:A+B] ...

Why: the projections of an attention to queries, keys and values read one x. As one product they read it once, are one launch
instead of three, and waste no columns of a register tile where each alone would not fill its last one. ``[a b ...]`` depends on
weights alone: it is computed once. The slices are index maps of the kernels that read them.

When: two or more matmuls of one left operand, each with a frozen weight, plain or transposed, of two axes and known size on the
right. A bias (a frozen vector that is added, the result's only use) comes along if all of them have one. Declined, with a
remark: a weight that is computed; another dtype; a result that pointwise ops read (they join its own kernel, and two products
that meet there share one), that is returned, or that a library call reads (it would have to be copied).

Products that wait for their arithmetic and not for memory (:meth:`~graphopt.passes.fusion.cost.CostModel.is_bound_by_memory`:
about 30 rows with AVX-512, 7 with NEON) stay apart unless ``always``, or unless each would first rewrite the left operand
(:meth:`~graphopt.passes.fusion.cost.CostModel.prepares_rows`: with AMX, as thirds). Measured with 128 tokens on two Granite
Rapids cores, apart and as one (medians): on vector units BERT 45.8 and 45.3 ms, Llama 44.3 and 44.0, T5 21.9 and 22.0: what is
saved is small, and the kernels that read slices of a wide result pay for its longer rows. On AMX BERT 23.9 and 23.2, Llama 21.1
and 20.6, ViT 39.2 and 39.2. One token of a Llama, bound by reading weights, wins: 14.9 and 14.7 ms.

Numerics: bitwise in the IR: every element is the same sum.
Reference: the merged projections of Megatron-LM, Shoeybi et al., arXiv:1909.08053, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.ir import dims
from graphopt.ir.graph import Graph, Node, Value
from graphopt.pass_manager import Pass
from graphopt.passes.fusion.cost import CostModel
from graphopt.passes.fusion.roles import Role, role
from graphopt.rewrite import PassContext, Reject, Rewriter, erase_dead

_MOST_VIEWS = 8  # views that are followed to the kernel that reads a result


@dataclass(frozen=True)
class _Sibling:
    """One of the products.

    Attributes:
        weight: the input of the graph behind the right operand; ``transposed`` if it is read so.
        bias: the vector that is added, an input of the graph, and ``end`` what the sum is.
    """

    matmul: Node
    weight: Value
    transposed: bool
    bias: Value | None
    end: Value


class SiblingMatmuls(Pass):
    """Matmuls that share their left operand become one. See the module's header.

    Args:
        most: products that become one.
        always: also where memory is not what they wait for.
    """

    name = "sibling-matmuls"
    most: int = 8
    always: bool = False

    def parts(self) -> Sequence[type]:
        return [type(self), CostModel]

    def run(self, g: Graph, ctx: PassContext) -> bool:
        changed, costs = False, CostModel(ctx.target, g.symbols)
        for nodes in _families(g):
            if not self.always and not all(costs.is_bound_by_memory(n) or costs.prepares_rows(n) for n in nodes):
                ctx.missed(self.name, f"{len(nodes)} products of one left operand stay apart: they wait for their arithmetic", nodes[0])
                continue
            found: list[_Sibling] = []
            for node in nodes:
                sibling = _sibling(node)
                if isinstance(sibling, Reject):
                    ctx.missed(self.name, f"the matmul stays apart from its siblings: {sibling.reason}", node)
                elif len(found) < self.most and (not found or _alike(found[0], sibling)):
                    found.append(sibling)
            if len(found) < 2 or (number := ctx.fuel.take()) is None:
                continue
            first = found[0].matmul
            read = dims.mul(len(found) - 1, first.operands[0].type.nbytes())
            columns = ", ".join(str(s.end.shape[-1]) for s in found)
            text = f"products of {columns} columns become one: {len(found) - 1} launches and {dims.format_dim(read)} bytes of reads less"
            ctx.passed(self.name, text, first, number)
            _merge(g, found)
            changed = True
        return changed


def _families(g: Graph) -> list[list[Node]]:
    """The matmuls of one left operand, where there are several, in order."""
    found: dict[Value, list[Node]] = {}
    for node in g.nodes():
        if node.op.name == "matmul" and node.operands[1].type.rank == 2:
            found.setdefault(node.operands[0], []).append(node)
    return [nodes for nodes in found.values() if len(nodes) > 1]


def _sibling(matmul: Node) -> _Sibling | Reject:
    right = matmul.operands[1]
    view = right.defined_by("transpose")
    weight = view.operands[0] if view is not None else right
    if not (weight.is_input and weight.weight) or not dims.is_static(weight.shape):
        return Reject("its weight is no frozen matrix of known size", right)
    end, bias = matmul.results[0], None
    if end.has_one_use and (added := _added(end)) is not None:
        bias, end = added
    for user in end.users:
        if reason := _reader_rejects(user, end, matmul.graph, 0):
            return Reject(reason, user)
    return _Sibling(matmul, weight, view is not None, bias, end)


def _added(v: Value) -> tuple[Value, Value] | None:
    """The frozen vector that is added to a value, and the sum."""
    user = v.users[0]
    if user.op.name != "add":
        return None
    other = next((x for x in user.operands if x is not v), None)
    if other is None or not (other.is_input and other.weight) or other.type.rank != 1:
        return None
    same = dims.same(other.shape[0], v.shape[-1]) and other.dtype == v.dtype
    return (other, user.results[0]) if same else None


def _reader_rejects(user: Node, value: Value, g: Graph, depth: int) -> str | None:
    """Why a part of a wider result cannot stand in a value's place for a reader, looking through views."""
    if user is g.ret:
        return "it is returned"
    if role(user) is Role.VIEW and depth < _MOST_VIEWS:
        for further in user.results[0].users:
            if reason := _reader_rejects(further, user.results[0], g, depth + 1):
                return reason
        return None
    if role(user) is Role.OTHER:
        return f"{user.op.name} is no kernel: it would need a copy"
    if depth == 0 and role(user) is Role.POINTWISE:
        return f"{user.op.name} joins its own kernel"
    return None


def _alike(a: _Sibling, b: _Sibling) -> bool:
    return a.end.dtype == b.end.dtype and a.weight.dtype == b.weight.dtype and (a.bias is None) == (b.bias is None)


def _merge(g: Graph, siblings: list[_Sibling]) -> None:
    """One product in the place of the first; what is left of the others is dead."""
    first = siblings[0].matmul
    rw = Rewriter(g, first)
    if all(s.transposed for s in siblings):
        weight = rw.transpose(rw.concat(*(s.weight for s in siblings), axis=0), perm=(1, 0))
    else:
        weight = rw.concat(*(rw.transpose(s.weight, perm=(1, 0)) if s.transposed else s.weight for s in siblings), axis=1)
    y: Value = rw.create("matmul", [first.operands[0], weight], dict(first.attrs))
    if siblings[0].bias is not None:
        y = rw.add(y, rw.concat(*(s.bias for s in siblings), axis=0))
    start = 0
    for s in siblings:
        stop = start + int(s.end.shape[-1])
        part = rw.create("slice", [y], {"axis": y.type.rank - 1, "start": start, "stop": stop})
        g.replace(s.end, part)
        start = stop
    for s in siblings:
        assert s.end.producer is not None
        erase_dead(g, s.end.producer)
