"""take(w, i)  =>  take(unpack(wp), i),  where wp is the packed form of w that a matmul reads

Why: an embedding that is tied to the output layer is multiplied in packed form and looked up as it is: it would stay in memory
twice. Read through the packed form, the plain one can be let go: 147 MiB of GPT-2's 312.

When: after ``pack-weights``, only where the compiled model owns its weights (``own_weights=True``): otherwise the plain weight stays
in any case. For a weight that ``pack-weights`` has packed, and that everything else reads by rows, with ``take`` in pointwise
regions. A row of the packed form lies in pieces, and each element read is a cache line; so a lookup is declined that is known to
read as many lines as the whole weight has: more than the matmul reads. Declined with a remark, too: a reader of
another kind, as then the plain weight stays. It is all readers of a weight or none. The region's body unpacks by views, which
kernels turn into index arithmetic: the table is never put together.

Numerics: bitwise.   Reference: Press and Wolf, "Using the Output Embedding to Improve Language Models", EACL 2017 (tied weights).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from graphopt.ir import Builder, Graph, dims
from graphopt.ir.graph import Node, Value, copy_nodes, is_view
from graphopt.ir.stage import Staged, staged_values
from graphopt.pass_manager import Pass
from graphopt.passes.shared import reread
from graphopt.rewrite import PassContext, Reject

_LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class _Packed:
    """A weight in packed form.

    Attributes:
        weight: an input of the graph.
        value: the packed form.
        packing: the nodes that make it, in order; they depend on the weight alone.
        unpacking: nodes of a region's body that undo it, in order, from the body's input to the ``[K, N]`` that is multiplied.
        transposed: whether that is the weight's transpose.
    """

    weight: Value
    value: Value
    packing: list[Node]
    unpacking: list[Node]
    transposed: bool


class SharePacked(Pass):
    """Look up the rows of packed weights in their packed form. See the module's header.

    Args:
        owned: whether the compiled model owns its weights; None asks the context.
    """

    name = "share-packed"
    owned: bool | None = None

    def run(self, g: Graph, ctx: PassContext) -> bool:
        if not (ctx.owns_weights if self.owned is None else self.owned):
            return False
        staged, changed = staged_values(g), False
        for packed in _packed_weights(g):
            readers = list(_readers(packed.weight, packed, staged))
            found = next((r for r in (_reject(reader, packed) for reader in readers) if r is not None), None)
            if found is not None:
                ctx.missed(self.name, f"weight {packed.weight!r} stays in memory twice, packed and as it is: {found.reason}", readers[0])
            elif readers and (number := ctx.fuel.take()) is not None:
                ctx.passed(self.name, f"rows of weight {packed.weight!r} are read from its packed form", readers[0], number)
                _share(g, packed, readers)
                changed = True
        return changed


def _packed_weights(g: Graph) -> list[_Packed]:
    """Weights that products read in packed form; of one that is packed in several ways, the first form."""
    found: dict[Value, _Packed] = {}
    for region in g.nodes():
        if region.op.name != "fusion" or region.attrs["kind"] != "matmul":
            continue
        assert region.body is not None
        for product in region.body.nodes():
            packed = _packed(region, product.operands[1]) if product.op.name == "matmul" else None
            if packed is not None:
                found.setdefault(packed.weight, packed)
    return list(found.values())


def _packed(region: Node, factor: Value) -> _Packed | None:
    unpacking, source = _chain(factor, ("transpose", "reshape", "slice"))
    if not unpacking or not source.is_input:
        return None
    value = region.operands[source.index]
    packing, weight = _chain(value, ("transpose", "reshape", "pad"))
    if not packing or not weight.weight or weight.type.rank != 2:
        return None
    transposed = packing[0].op.name == "transpose" and packing[0].attrs["perm"] == (1, 0)
    plain = packing[0].results[0] if transposed else weight
    if not _inverse(packing[transposed:], unpacking, plain, factor):
        return None
    return _Packed(weight, value, packing, unpacking, transposed)


def _inverse(packing: list[Node], unpacking: list[Node], plain: Value, factor: Value) -> bool:
    """Whether the second chain undoes the first: [pad behind], reshape, transpose; transpose, reshape, slices from 0."""
    pads, slices = packing[:-2], unpacking[2:]
    if [n.op.name for n in packing[-2:]] != ["reshape", "transpose"] or [n.op.name for n in unpacking[:2]] != ["transpose", "reshape"]:
        return False
    if any(n.op.name != "pad" or any(n.attrs["low"]) for n in pads) or any(n.op.name != "slice" for n in slices):
        return False
    if any(n.attrs["start"] != 0 or n.attrs["step"] != 1 for n in slices):
        return False
    there, back = packing[-1].attrs["perm"], unpacking[0].attrs["perm"]
    wide = packing[-2].operands[0]
    return all(there[k] == i for i, k in enumerate(back)) and unpacking[1].results[0].shape == wide.shape and plain.shape == factor.shape


def _chain(v: Value, ops: tuple[str, ...]) -> tuple[list[Node], Value]:
    """The nodes of these ops that lead to a value, in order, and what they start from."""
    nodes = []
    while v.producer is not None and v.producer.op.name in ops:
        nodes.append(v.producer)
        v = v.producer.operands[0]
    return nodes[::-1], v


def _readers(v: Value, packed: _Packed, staged: Staged) -> Iterator[Node]:
    """What reads a weight's plain memory at each call: itself, or through a view. Copies made from it once do not."""
    for user in v.users:
        if not staged.node(user):
            yield user
        elif is_view(user) and user not in packed.packing:
            yield from _readers(user.results[0], packed, staged)


def _reject(reader: Node, packed: _Packed) -> Reject | None:
    w = packed.weight
    if w not in reader.operands or reader.body is None or reader.attrs["kind"] != "pointwise":
        return Reject(f"{reader.op.name} reads it, which is no lookup of rows", w)
    lines = _LINE // w.dtype.itemsize
    read_as = [v for v, operand in zip(reader.body.inputs, reader.operands, strict=True) if operand is w]
    for lookup, place in (use for v in read_as for use in v.uses):
        if lookup.op.name != "take" or place != 0:
            return Reject(f"{lookup.op.name} reads it, which is no lookup of rows", w)
        read = dims.mul(lookup.results[0].type.numel, lines)
        if dims.prove(read, "<=", w.type.numel, reader.body.symbols) is False:
            return Reject(f"a lookup of {lookup.results[0].type} would read a cache line an element, more than the whole weight", w)
    return None


def _share(g: Graph, packed: _Packed, readers: list[Node]) -> None:
    order = {node: i for i, node in enumerate(g.nodes())}
    first = min(readers, key=lambda node: order[node])
    if order[first] < order[packed.packing[-1]]:
        for node in packed.packing:
            g.move_before(node, first)
    for reader in readers:
        assert reader.body is not None
        reread(g, reader, reader.body.inputs[reader.operands.index(packed.weight)], [packed.value], partial(_unpacked, packed))


def _unpacked(packed: _Packed, b: Builder, given: Sequence[Value]) -> Value:
    """The weight as it was, by views of its packed form."""
    made = {packed.unpacking[0].operands[0]: given[0]}
    copy_nodes(packed.unpacking, made, b.graph, rename=lambda node: None)
    weight = made[packed.unpacking[-1].results[0]]
    return b.transpose(weight, perm=(1, 0)) if packed.transposed else weight  # type: ignore[no-any-return]
