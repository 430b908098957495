"""Regions under construction: who may join, and in words why not.

A region grows from its root towards the inputs. Its kind is settled by its *anchors* (reductions, row ops, a matmul or convolution); until
one joins it is pointwise. ``reject`` answers for one node whose users in the region are all known.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from graphopt.bounds import INDEXED, can_be_checked
from graphopt.ir import dims
from graphopt.ir.graph import Node, Value
from graphopt.ir.ops import Trait
from graphopt.passes.fusion.roles import (
    ARG_REDUCTIONS,
    PRODUCTS,
    ROW_REDUCTIONS,
    SCANS,
    SCATTERS,
    Role,
    Rows,
    is_cheap,
    is_scalar,
    rereads,
    role,
    rows_of,
)

# A value may be computed through at most this many different index maps (x read plainly, shifted, flipped ...): each is a
# copy of the work, and they multiply along a chain.
_MAX_FRAMES = 4
# Cheap work that a broadcast repeats, in nodes a region.
_MAX_REPEATED = 8
_LOOKAHEAD = 12

Frame = tuple[object, ...]
_ROOT_FRAME: Frame = ()


@dataclass(frozen=True)
class Limits:
    """Size limits of a region."""

    nodes: int
    inputs: int


@dataclass
class Region:
    """A region under construction.

    Attributes:
        kind: ``pointwise``, ``reduction``, ``rowwise``, ``scan``, ``scatter``, ``matmul`` or ``conv``.
        epoch: number of mutating calls before the root; nothing is moved across one.
        members: node -> the index maps through which the root reads it, root first, in reverse execution order.
        repeated: members whose elements a broadcast computes again.
        inputs: values read from outside.
        rows: the iteration space of a rowwise region, or of a reduction over trailing axes.
    """

    root: Node
    epoch: int
    kind: str = "pointwise"
    members: dict[Node, tuple[Frame, ...]] = field(default_factory=dict)
    repeated: dict[Node, None] = field(default_factory=dict)
    inputs: dict[Value, None] = field(default_factory=dict)
    anchors: list[Node] = field(default_factory=list)
    rows: Rows | None = None
    weight: int = 0  # members that count against the limit

    @staticmethod
    def at(root: Node, epoch: int) -> Region:
        """A region that is its root alone."""
        region = Region(root, epoch)
        region._include(root, (_ROOT_FRAME,), False)
        if role(root) is Role.ANCHOR:
            region.anchors.append(root)
            region.rows = rows_of(root)
            if root.op.name in PRODUCTS:
                region.kind = root.op.name
            elif root.op.name in (*SCANS, *SCATTERS):
                region.kind = "scan" if root.op.name in SCANS else "scatter"
            else:
                region.kind = "reduction" if _reduces(root) and root.op.name != "var" else "rowwise"
        return region

    # --- joining ------------------------------------------------------------------------------------------------------

    def reject(self, node: Node, epoch: int, limits: Limits) -> str | None:
        """Why a node may not join; None after it has joined. All of its users that are members must have joined before."""
        part = role(node)
        if epoch != self.epoch:
            return "a call that mutates stands between"
        if part is not Role.CREATION and (reason := self._crowded(node, limits)):
            return reason
        uses = [(u, i) for u, i in node.results[0].uses if u in self.members]
        if reason := _index_rejects(node, uses):
            return reason
        frames = self._frames(uses)
        if len(frames) > _MAX_FRAMES:
            return f"it would be computed through {len(frames)} different index maps"
        if part is Role.ANCHOR:
            if reason := self._admit_anchor(node, uses):
                return reason
            self._include(node, frames, False)
            return None
        users = list(dict.fromkeys(u for u, _ in uses))
        repeated = any(rereads(u, i) or u in self.repeated for u, i in uses) and not self._once_a_row(node, users)
        if reason := self._kind_rejects(node, part, users) or self._repeat_rejects(node, part, frames, repeated):
            return reason
        self._include(node, frames, repeated)
        return None

    def _include(self, node: Node, frames: tuple[Frame, ...], repeated: bool) -> None:
        self.members[node] = frames
        if repeated:
            self.repeated[node] = None
        for r in node.results:
            self.inputs.pop(r, None)
        for v in node.operands:
            if v.producer is None or v.producer.op.name != "constant":
                self.inputs[v] = None
        self.weight += role(node) is not Role.CREATION

    def _crowded(self, node: Node, limits: Limits) -> str | None:
        if self.weight >= limits.nodes:
            return f"the region has {limits.nodes} nodes, the most allowed"
        new = [v for v in dict.fromkeys(node.operands) if v not in self.inputs and (v.producer is None or v.producer.op.name != "constant")]
        if len(self.inputs) - 1 + len(new) > limits.inputs and len(new) > 1:
            return f"the region would read over {limits.inputs} values, the most allowed"
        return None

    def _frames(self, uses: Iterable[tuple[Node, int]]) -> tuple[Frame, ...]:
        found: dict[Frame, None] = {}
        for user, i in uses:
            own = role(user) in (Role.VIEW, Role.MOVER) or user.op.name in PRODUCTS
            for frame in self.members[user]:
                found[(user, i, frame) if own else frame] = None
        return tuple(found)

    def _repeat_rejects(self, node: Node, part: Role, frames: tuple[Frame, ...], repeated: bool) -> str | None:
        if part in (Role.VIEW, Role.CREATION):
            return None
        if not is_cheap(node) and part is Role.POINTWISE:
            if repeated:
                return f"its elements are read many times: {node.op.name} would be computed again for each"
            if len(frames) > 1:
                return f"it is read through {len(frames)} index maps: {node.op.name} would be computed again for each"
        if repeated and len(self.repeated) >= _MAX_REPEATED:
            return f"a broadcast would repeat the work of over {_MAX_REPEATED} nodes"
        return None

    # --- what each kind accepts ---------------------------------------------------------------------------------------

    def _kind_rejects(self, node: Node, part: Role, users: list[Node]) -> str | None:
        if self.kind in ("pointwise", "scan", "scatter") or part is Role.CREATION:
            return None
        if part is Role.MOVER and self.kind == "conv" and node.op.name == "pad" and node.results[0] is self.anchors[0].operands[0]:
            return None if users == self.anchors else "what is padded has other uses"
        if part is Role.MOVER:
            return f"a {self.kind} kernel does not read through {node.op.name}"
        if part is Role.VIEW:  # an index map; what lies below it is asked about in its turn
            return None
        if self.kind in PRODUCTS:
            return self._product_rejects(node, users)
        return _row_rejects(node, users, self.rows) if self.kind == "rowwise" and self.rows else None

    def _product_rejects(self, node: Node, users: list[Node]) -> str | None:
        product = self.anchors[0]
        for user in users:
            if user in self.anchors or role(user) in (Role.VIEW, Role.MOVER):
                what = f"an operand of the {self.kind}" if self._feeds_product(user) else "read through a view"
                return f"it is {what}: it would be computed again for every tile"
        if not is_scalar(node.results[0].shape) and not dims.same_shape(node.results[0].shape, product.results[0].shape):
            return f"its shape is not the {self.kind}'s: it would be computed again for every tile"
        return None

    def reads_in_order(self, node: Node) -> bool:
        """Whether no product reads the node's result as a factor: what reads it goes through it element by element."""
        return not any(self._feeds_product(u) for u in node.results[0].users if u in self.members)

    def _feeds_product(self, user: Node) -> bool:
        while role(user) in (Role.VIEW, Role.MOVER):
            user = next(u for u in user.results[0].users if u in self.members)
        return user in self.anchors and user.op.name in PRODUCTS

    def _once_a_row(self, node: Node, users: list[Node]) -> bool:
        """Whether a node is computed once a row although full rows read it: a statistic, or what is made of one."""
        shape = node.results[0].shape
        if self.kind == "rowwise" and self.rows is not None:
            return self.rows.form(shape) in ("kept", "reduced")
        if self.kind != "pointwise" or is_cheap(node):
            return False
        full = self.root.results[0].shape
        return not dims.same_shape(shape, full) and _statistic(node, full)

    def _downstream(self, uses: Iterable[tuple[Node, int]]) -> list[Node]:
        found = dict.fromkeys(u for u, _ in uses)
        for node in found.copy():
            stack = [node]
            while stack:
                for user in stack.pop().results[0].users:
                    if user in self.members and user not in found:
                        found[user] = None
                        stack.append(user)
        return list(found)

    def _admit_anchor(self, node: Node, uses: list[tuple[Node, int]]) -> str | None:
        after, shape, rows = self._downstream(uses), node.results[0].shape, rows_of(node)
        plain = all(role(n) is Role.POINTWISE and dims.same_shape(n.results[0].shape, shape) for n in after)
        if node.op.name in SCATTERS:
            return "its elements are written in the order of the index, before any of them can be read"
        if self.kind in ("scan", "scatter"):
            return f"its reader is a {self.kind} kernel already"
        if node.op.name in PRODUCTS:
            reason = self._product_unfit(node, after, plain)
            kind = node.op.name
        elif node.op.name in SCANS:
            reason = self._mover_in("scan") if plain and self.kind == "pointwise" else "what follows is no pointwise work of its shape"
            kind = "scan"
        elif self.kind == "pointwise" and _reduces(node) and node.op.name != "var" and plain:
            reason, kind = self._mover_in("reduction"), "reduction"
        else:
            reason, kind = self._rowwise_unfit(node, rows), "rowwise"
        if reason is None:
            self.kind, self.rows = kind, rows
            self.anchors.append(node)
            if kind == "rowwise":
                self.repeated = {n: None for n in self.repeated if rows and rows.form(n.results[0].shape) is None}
        return reason

    def _mover_in(self, kind: str) -> str | None:
        mover = next((n for n in self.members if role(n) is Role.MOVER), None)
        return f"a {kind} kernel does not read through {mover.op.name}" if mover else None

    def _product_unfit(self, node: Node, after: list[Node], plain: bool) -> str | None:
        if self.anchors and (reason := self._twin_unfit(node)):
            return reason
        if not plain:
            odd = next(n for n in after if role(n) is not Role.POINTWISE or not dims.same_shape(n.results[0].shape, node.results[0].shape))
            return f"{odd.op.name} after it is no pointwise op of its shape"
        if reason := self._mover_in(node.op.name):
            return reason
        for n in self.members:
            if role(n) is not Role.POINTWISE:
                continue
            if not is_scalar(n.results[0].shape) and not dims.same_shape(n.results[0].shape, node.results[0].shape):
                return f"{n.op.name} beside it has another shape"
            if any(role(u) is Role.VIEW for u in n.results[0].users if u in self.members):
                return f"{n.op.name} beside it is read through a view"
        return None

    def _twin_unfit(self, node: Node) -> str | None:
        """Why a product cannot share the kernel of the one that is there: one tile of each is summed, then they meet."""
        first = self.anchors[0]
        if first.op.name != "matmul" or node.op.name != "matmul":
            return f"its reader is a {self.kind} kernel already"
        if len(self.anchors) > 1:
            return "its reader is a kernel of two products already"
        if first.operands[0] is not node.operands[0]:
            return "it multiplies another matrix than the product that it meets"
        if first.operands[1].type.rank != 2 or node.operands[1].type.rank != 2:
            return "the products that meet are batches of matrices"
        if first.results[0].dtype != node.results[0].dtype or not dims.same_shape(first.results[0].shape, node.results[0].shape):
            return "the products that meet have not one type"
        return None

    def _rowwise_unfit(self, node: Node, rows: Rows | None) -> str | None:
        if self.kind in PRODUCTS:
            return f"its reader is a {self.kind} kernel already"
        if rows is None:
            return f"{node.op.name} does not reduce the trailing axes, and what follows is not of its shape"
        if any(a.op.name not in ROW_REDUCTIONS and _reduces(a) for a in self.anchors):
            return "its reader is a reduction already"
        if any((r := rows_of(a)) is None or not rows.same(r) for a in self.anchors):
            return "its rows are not those of the reduction that reads it"
        if not rows.reduced and _reduces(node):
            return "it has one row only: nothing to spread over the cores"
        if reason := self._mover_in("rowwise"):
            return reason
        for n in self.members:
            users = [u for u in n.results[0].users if u in self.members]
            if role(n) is Role.POINTWISE and (reason := _row_rejects(n, users, rows)):
                return f"{n.op.name} after it does not fit: {reason}"
        return _reader_rejects(node, [u for u, _ in node.results[0].uses if u in self.members], rows)


def _index_rejects(node: Node, uses: Iterable[tuple[Node, int]]) -> str | None:
    """An index is computed outside if it could not be checked before the launch inside."""
    if role(node) not in (Role.POINTWISE, Role.MOVER):
        return None
    for user, i in uses:
        if user.op.name not in INDEXED or i != 1 or user.attrs.get("clip"):
            continue
        symbols = node.graph.symbols
        if not can_be_checked(node.results[0], user.operands[0].shape[user.attrs["axis"]], symbols):
            return f"it is an index of {user.op.name} that must be checked before the kernel reads by it"
    return None


def _reduces(node: Node) -> bool:
    return node.op.has(Trait.REDUCTION) or node.op.name in ARG_REDUCTIONS


def _row_rejects(node: Node, users: list[Node], rows: Rows) -> str | None:
    """Why a pointwise node is no part of the rows."""
    if rows.form(node.results[0].shape) is None:
        return f"its shape {_text(node)} is neither that of the rows nor one element a row"
    return _reader_rejects(node, users, rows)


def _reader_rejects(node: Node, users: list[Node], rows: Rows) -> str | None:
    """Why the readers of a row-shaped value do not read it row by row."""
    form = rows.form(node.results[0].shape)
    for user in users:
        theirs = rows.form(user.results[0].shape)
        if role(user) is Role.VIEW:
            one_a_row = user.op.name == "reshape" and {form, theirs} <= {"kept", "reduced"}
            if not one_a_row and not (user.op.name == "broadcast_to" and form == "kept" and theirs in ("kept", "full")):
                return f"it is read through {user.op.name}, not row by row"
        elif role(user) is Role.POINTWISE:
            if theirs is None or (form not in (theirs, "scalar") and not (form == "kept" and theirs == "full")):
                return f"{user.op.name} reads it along other axes"
        elif user.operands[0] is not node.results[0] or form != "full":
            return f"it is the scale or shift of {user.op.name}"
    return None


def _text(node: Node) -> str:
    return "[" + ", ".join(map(dims.format_dim, node.results[0].shape)) + "]"


def _statistic(node: Node, full: dims.Shape) -> bool:
    """Whether a node is pointwise work on a statistic of rows of shape ``full`` (looking up a few nodes)."""
    stack, seen = [node], 0
    while stack and seen < _LOOKAHEAD:
        n = stack.pop()
        seen += 1
        rows = rows_of(n)
        if rows is not None and n.op.name in ROW_REDUCTIONS and rows.reduced and dims.same_shape(rows.shape, full):
            return rows.form(node.results[0].shape) in ("kept", "reduced")
        if role(n) in (Role.POINTWISE, Role.VIEW):
            stack += [v.producer for v in n.operands if v.producer is not None]
    return False
