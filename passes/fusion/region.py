"""Regions under construction: who may join, and in words why not.

A region grows from its root towards the inputs. Its kind is settled by its *anchors* (reductions, row ops, a matmul or convolution); until
one joins it is pointwise. ``reject`` answers for one node whose users in the region are all known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from graphopt.bounds import INDEXED, can_be_checked
from graphopt.ir import dims
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Node, Value
from graphopt.ir.ops import Trait
from graphopt.passes.fusion import cost
from graphopt.passes.fusion.attention import reads_rows
from graphopt.passes.fusion.cost import CostModel, Load
from graphopt.passes.fusion.prologue import row_reject
from graphopt.passes.fusion.roles import (
    ARG_REDUCTIONS,
    PRODUCTS,
    ROW_REDUCTIONS,
    SCANS,
    SCATTERS,
    TRAINING,
    Role,
    Rows,
    is_scalar,
    role,
    rows_of,
)
from graphopt.passes.fusion.rounding import product_of_integers, rounding_of

# A value may be computed through at most this many different index maps (x read plainly, shifted, flipped ...): each is a
# copy of the code, and they multiply along a chain. What they cost to run is the cost model's to say.
_MAX_FRAMES = 4
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
        members: node -> the index maps through which the root reads it, and how many elements are computed through each; root
            first, in reverse execution order.
        spent: cycles that computing elements again costs, as :mod:`~graphopt.passes.fusion.cost` counts them.
        rounding: what makes integers of a product's left factor, which the kernel does once a row.
        before: members that products read, through others or at once, and as which operand; -1 for several.
        inputs: values read from outside.
        of: members that an attention reads, and as which operand; -1 for several.
        rows: the iteration space of a rowwise region, or of a reduction over trailing axes.
    """

    root: Node
    epoch: int
    costs: CostModel
    kind: str = "pointwise"
    members: dict[Node, dict[Frame, Dim]] = field(default_factory=dict)
    spent: tuple[float, float] = (0.0, 0.0)
    before: dict[Node, int] = field(default_factory=dict)
    of: dict[Node, int] = field(default_factory=dict)
    inputs: dict[Value, None] = field(default_factory=dict)
    anchors: list[Node] = field(default_factory=list)
    rows: Rows | None = None
    rounding: dict[Node, None] = field(default_factory=dict)
    weight: int = 0  # members that count against the limit

    @staticmethod
    def at(root: Node, epoch: int, costs: CostModel) -> Region:
        """A region that is its root alone."""
        region = Region(root, epoch, costs)
        region._include(root, {_ROOT_FRAME: root.results[0].type.numel})
        if role(root) is Role.ANCHOR:
            region.anchors.append(root)
            region.rows, region.rounding = rows_of(root), region._rounding_of(root)
            if root.op.name in (*PRODUCTS, "attention", *TRAINING):
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
        if node in self.rounding:
            self._include(node, {_ROOT_FRAME: node.results[0].type.numel})
            self.before[node] = 0
            return None
        uses = [(u, i) for u, i in node.results[0].uses if u in self.members]
        if reason := _index_rejects(node, uses):
            return reason
        frames = self._evaluations(node, uses)
        if len(frames) > _MAX_FRAMES and node.op.name != "constant":  # a number is the same through all of them
            return f"it would be computed through {len(frames)} different index maps"
        if self.kind == "attention":
            return self._before_attention(node, part, uses, frames)
        if part is Role.ANCHOR:
            if reason := self._admit_anchor(node, uses):
                return reason
            self._include(node, frames)
            return None
        if (product := product_of_integers(node)) is not None and (reason := self._sums_reject(product, uses)):
            return reason
        users = list(dict.fromkeys(u for u, _ in uses))
        before = self._before(uses)
        if reason := self._kind_rejects(node, part, users, before):
            return reason
        if part in (Role.POINTWISE, Role.MOVER) and (reason := self._price_rejects(node, frames, before)):
            return reason
        self._include(node, frames)
        if before is not None:
            self.before[node] = before
        return None

    def _include(self, node: Node, frames: dict[Frame, Dim]) -> None:
        self.members[node] = frames
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

    # --- what computing again costs -------------------------------------------------------------------------------------

    def _evaluations(self, node: Node, uses: list[tuple[Node, int]]) -> dict[Frame, Dim]:
        """The index maps through which a node is read, and how many elements are computed through each."""
        found: dict[Frame, Dim] = {}
        once = self._once_a_row(node)
        for user, i in uses:
            own = role(user) in (Role.VIEW, Role.MOVER) or user.op.name in PRODUCTS
            for frame, count in self.members[user].items():
                key: Frame = (user, i, frame) if own else frame
                n = node.results[0].type.numel if once else self.costs.reads(user, i, count)
                found[key] = self.costs.larger(found[key], n) if key in found else n
        return found

    def _price_rejects(self, node: Node, frames: dict[Frame, Dim], before: int | None) -> str | None:
        """Why a node is better computed by a kernel of its own: its elements would be computed again; None, and paid, if not."""
        if role(node) is Role.MOVER and before is not None:  # a padding around what a convolution reads: not computed, but left out
            return None
        if self._is_quantized_factor(node, before):  # the integers are what is read, whatever it costs to make floats of them
            return None
        total = _total(frames)
        if dims.same(total, node.results[0].type.numel):
            return None
        price, _ = self.costs.join(self._load(), node, total, self.spent, None if before is None else 1)
        if not price.pays:
            return cost.describe(node, total, price)
        self.spent = price.costs
        return None

    def _load(self) -> Load:
        """The region as a kernel, so far."""
        total = self.costs.traffic((*self.inputs, *self.root.results))
        for node, frames in self.members.items():
            total += self.costs.work(node) if node in self.anchors else self.costs.work(node, _total(frames))
        return total

    def _before(self, uses: list[tuple[Node, int]]) -> int | None:
        """As which operand products read a node, through others or at once; -1 for several, None where none does."""
        found = {self.before[u]: None for u, _ in uses if u in self.before}
        found |= {i: None for u, i in uses if u in self.anchors and u.op.name in PRODUCTS}
        return None if not found else next(iter(found)) if len(found) == 1 else -1

    # --- what each kind accepts ---------------------------------------------------------------------------------------

    def _kind_rejects(self, node: Node, part: Role, users: list[Node], before: int | None) -> str | None:
        if self.kind in ("pointwise", "scan", "scatter") or part is Role.CREATION:
            return None
        if part is Role.MOVER and self.kind == "conv" and node.op.name == "pad" and node.results[0] is self.anchors[0].operands[0]:
            return None if users == self.anchors else "what is padded has other uses"
        if part is Role.MOVER:
            return f"a {self.kind} kernel does not read through {node.op.name}"
        if part is Role.VIEW:  # an index map; what lies below it is asked about in its turn
            return None
        if self.kind in TRAINING:
            return "the kernel of an attention in training computes nothing of its operands"
        if self.kind in PRODUCTS:
            return self._product_rejects(node, users, before)
        return _row_rejects(node, users, self.rows) if self.kind == "rowwise" and self.rows else None

    def _before_attention(self, node: Node, part: Role, uses: list[tuple[Node, int]], frames: dict[Frame, Dim]) -> str | None:
        """Why an attention's kernel does not do a node when it reads a row; None after the node has joined."""
        found = {self.of[u]: None for u, _ in uses if u in self.of} | {i: None for u, i in uses if u in self.anchors}
        operand = next(iter(found)) if len(found) == 1 else -1
        if reads_rows(node):
            reason = self._price_rejects(node, frames, None)
        elif part in (Role.VIEW, Role.CREATION):
            reason = None
        elif (home := _home(node)) is not None and home.op.name != "rms_norm":
            reason = f"it follows {home.op.name} without a pass over memory"
        else:
            reason = row_reject(node, self.anchors[0], operand, [u for u, _ in uses], self.costs)
        if reason is None:
            self._include(node, frames)
            self.of[node] = operand
        return reason

    def _product_rejects(self, node: Node, users: list[Node], before: int | None) -> str | None:
        if before is not None:
            return self._factor_rejects(node, before)
        if any(role(u) in (Role.VIEW, Role.MOVER) for u in users):
            return "it is read through a view: it would be computed again for every tile"
        if not is_scalar(node.results[0].shape) and not dims.same_shape(node.results[0].shape, self.anchors[0].results[0].shape):
            return f"its shape is not the {self.kind}'s: it would be computed again for every tile"
        return None

    def _factor_rejects(self, node: Node, operand: int) -> str | None:
        """Why a product's kernel does not compute its factor on the way: only a matmul does, one instruction on its left one."""
        if self._is_quantized_factor(node, operand):
            return None
        if (home := _home(node)) is not None:
            return f"it is an operand of the {self.kind}, and follows {home.op.name} without a pass over memory"
        if self.kind == "matmul" and operand == 0 and cost.instructions(node) <= 1:
            return None
        total = _total(self._evaluations(node, [(u, i) for u, i in node.results[0].uses if u in self.members]))
        price, _ = self.costs.join(self._load(), node, total, self.spent, 1)
        why = f"whose kernel takes no {node.op.name} on the way" if price.pays else cost.describe(node, total, price)
        return f"it is an operand of the {self.kind}, {why}"

    def _is_quantized_factor(self, node: Node, operand: int | None) -> bool:
        """Whether a node makes floats of the small integers that a matmul's second factor is stored as."""
        return node.op.name == "dequantize" and self.kind == "matmul" and operand == 1

    def reads_in_order(self, node: Node) -> bool:
        """Whether no product reads the node's result as a factor: what reads it goes through it element by element."""
        return self._before([(u, i) for u, i in node.results[0].uses if u in self.members]) is None

    def _once_a_row(self, node: Node) -> bool:
        """Whether a node is computed once a row although full rows read it: a statistic, or what is made of one."""
        shape = node.results[0].shape
        if self.kind == "rowwise" and self.rows is not None:
            return self.rows.form(shape) in ("kept", "reduced")
        if self.kind != "pointwise" or role(node) is not Role.POINTWISE:
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
        if node.op.name == "attention":
            alone = self.kind == "pointwise" and all(n.op.name in ("transpose", "reshape") for n in self.members)
            reason, kind = (None if alone else "an attention's kernel does nothing behind it but writing another layout"), "attention"
        elif self.kind in TRAINING:
            reason, kind = "its reader is the kernel of an attention in training", self.kind
        elif node.op.name in PRODUCTS:
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
            self.rounding |= self._rounding_of(node)
            if kind == "rowwise":
                self._settle_rows()
        return reason

    def _rounding_of(self, product: Node) -> dict[Node, None]:
        """What a product's kernel does before it multiplies: a CPU's rounds all rows, to floats of 8 bits where it multiplies on tiles."""
        found = rounding_of(product) if self.costs.for_cpu else {}
        floats = any(n.op.name == "quantize" and n.result.dtype.is_float for n in found)
        return {} if floats and self.costs.target.bf16_products != "amx" else found

    def _settle_rows(self) -> None:
        """Rows are known: what was taken for repeated work is done once a row."""
        for node in self.members:
            if self._once_a_row(node):
                self.members[node] = {_ROOT_FRAME: node.results[0].type.numel}
        self.spent = (0.0, 0.0)

    def _sums_reject(self, product: Node, uses: list[tuple[Node, int]]) -> str | None:
        """Why a region that cannot take an integer product itself does not make floats of its sums, either."""
        after, shape = self._downstream(uses), product.results[0].shape
        plain = all(role(n) is Role.POINTWISE and dims.same_shape(n.results[0].shape, shape) for n in after)
        fits = self.kind == "pointwise" or (self.kind == product.op.name == "matmul" and self._before(uses) is None)
        if fits and self._product_unfit(product, after, plain) is None:
            return None
        return "it follows an integer product, whose kernel writes floats, not sums"

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
        if _reduces(node) and not (price := self.costs.one_after_another(self._load(), node, dims.numel(rows.reduced))).pays:
            return f"its rows are too few to spread both over the cores: {price.text}"
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


def _home(node: Node) -> Node | None:
    """The reduction or product, in a kernel of its own in any case, that a pointwise node can follow in that kernel."""
    shape = node.results[0].shape
    stack, seen = [node], 0
    while stack and seen < _LOOKAHEAD:
        n = stack.pop()
        seen += 1
        if role(n) is Role.ANCHOR:
            return n
        for v in n.operands:
            p = v.producer
            if p is not None and role(p) in (Role.POINTWISE, Role.ANCHOR) and v.has_one_use and dims.same_shape(v.shape, shape):
                stack.append(p)
    return None


def _total(frames: Mapping[Frame, Dim]) -> Dim:
    """Elements that are computed through all index maps together."""
    total: Dim = 0
    for n in frames.values():
        total = dims.add(total, n)
    return total


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
