"""The expression layer: the value of an IR Value at an index, as lines of Triton over tiles.

Views are index maps, pointwise ops are lines (:mod:`pointwise`), and values that were computed before (a reduction, a product's
accumulator) are read through a *source*. A value is written once for each index that it is used at, at the depth that its operands
allow. An index varies along axes of the tile, and so does what is read by it: a bias ``[1, N]`` stays one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from graphopt.backends.forms.support import constant_of
from graphopt.backends.triton.code import Code, Text, conditions
from graphopt.backends.triton.descriptors import Descriptors
from graphopt.backends.triton.index import NO_AXES, Places, Sum, Var, scale, shift, total, variable, variables
from graphopt.backends.triton.pointwise import NAMES, NARROW, Ops, cast, held, number, typed
from graphopt.errors import BuildError
from graphopt.ir import dims, types
from graphopt.ir.dims import Dim
from graphopt.ir.graph import Node, Value
from graphopt.ir.ops import Trait
from graphopt.ir.opset.quantize import LARGEST, integer_range, saturates
from graphopt.ir.types import DType

Index = Sequence[Sum]


@dataclass(frozen=True)
class Tile:
    """A value over lanes: a name or a number.

    Attributes:
        axes: the axes of the tile along which it varies.
        depth: loops within which it is defined.
        narrow: it is an f16, a bf16, or the bits of a float of 8 bits, as loaded or to be stored, not an f32.
        literal: it is a Python number.
        zero: conditions outside of which it is known to be 0.
    """

    text: str
    dtype: DType
    axes: frozenset[int] = NO_AXES
    depth: int = 0
    narrow: bool = False
    literal: bool = False
    zero: frozenset[str] = frozenset()


Source = Callable[[Index], Tile]


class Expressions:
    """Values at indices.

    Args:
        sources: how to read values that are already computed.

    Attributes:
        reads: where inputs were read, for a look at the access pattern.
        conditional: indices that conditions or values, not only addresses, depend on.
        descriptors: while set, tiles that a descriptor can tell are read by it.
        stores: if set, results that a descriptor can tell are written by it.
    """

    def __init__(self, code: Code) -> None:
        self.code, self.graph = code, code.graph
        self.places = Places(code.graph.symbols)
        self.sources: dict[Value, Source] = {}
        self.ops = Ops(code.helper)
        self.reads: list[tuple[Value, Sum]] = []
        self.conditional: list[Sum] = []
        self.descriptors: Descriptors | None = None
        self.stores: Descriptors | None = None
        self._names = {v: f"in{k}" for k, v in enumerate(code.graph.inputs)}
        self._guards: tuple[Text, ...] = ()
        self._memo: dict[tuple[Value, tuple[Sum, ...], tuple[Text, ...]], Tile] = {}
        self._wide: dict[str, Tile] = {}

    def at(self, v: Value, index: Index) -> Tile:
        """The value of ``v`` at an index of its own rank."""
        key = (v, tuple(index), self._guards)
        if key not in self._memo:
            self._memo[key] = self._compute(v, index)
        return self._memo[key]

    def wide(self, v: Value, index: Index) -> Tile:
        """The same, as it is computed with: narrow floats as f32."""
        tile = self.at(v, index)
        if not tile.narrow:
            return tile
        if tile.text not in self._wide:
            number = f"{self.code.helper(tile.dtype.name)}({tile.text})" if tile.dtype in LARGEST else f"{tile.text}.to(tl.float32)"
            self._wide[tile.text] = replace(tile, text=self.code.let("f", number, tile.depth), narrow=False)
        return self._wide[tile.text]

    def store(self, k: int, index: Index, lanes: Sequence[Var], shape: str, value: str = "") -> None:
        """Write the lanes of output k at an index.

        Args:
            lanes: the variables of the tile; what lies outside of their extents is not written.
            shape: of the tile, as text; empty for a scalar.
            value: what to write, as held; the output's value at the index unless given.
        """
        v = self.graph.outputs[k]
        tile = Tile(value, v.dtype) if value else self.at(v, index)
        text = tile.text if tile.narrow or v.dtype not in NARROW else f"{tile.text}.to({NAMES[v.dtype]})"
        name, at = f"out{k}", self.output_place(k, index)
        block = self.stores.block(name, v.dtype, at) if self.stores is not None and tile.axes == {0, 1} else None
        if block is not None:
            self.code.line(block.written(text))
        else:
            self.write(name, at, lanes, shape, text)

    def write(self, tensor: str, to: Sum, lanes: Sequence[Var], shape: str, value: str) -> None:
        """Write the lanes of a tile to a place in a tensor; ``value`` is of the tensor's type."""
        place, mask = self.lanes_at(tensor, to, lanes, shape)
        self.code.line(f"tl.store({place}, {value}{mask})")

    def stored(self, k: int, index: Index, lanes: Sequence[Var], shape: str) -> Tile:
        """What lies in the memory of output k now, as it is computed with; to be asked for where it is read."""
        v = self.graph.outputs[k]
        place, mask = self.lanes_at(f"out{k}", self.output_place(k, index), lanes, shape)
        name = self.code.let("old", f"tl.load({place}{mask})")
        text = self.code.let("f", f"{name}.to(tl.float32)") if v.dtype in NARROW else name
        return Tile(text, v.dtype, frozenset(a for lane in lanes for a in lane.axes), self.code.depth)

    def lanes_at(self, tensor: str, to: Sum, lanes: Sequence[Var], shape: str) -> tuple[str, str]:
        """Pointers of the lanes of a tile, and the argument that leaves out those outside of their extents."""
        at = self.code.place(to)
        place = f"{tensor} + {at.text}"
        if shape and at.axes != frozenset(a for lane in lanes for a in lane.axes):  # an axis of one element
            place = f"tl.broadcast_to({place}, {shape})"
        mask = conditions([c for lane in lanes for c in lane.inside])
        return place, f", mask={mask}" if mask else ""

    def output_place(self, k: int, index: Index) -> Sum:
        """Where in memory an element of output k lies."""
        v, strides = self.graph.outputs[k], self.graph.output_strides[k]
        return total(scale(i, s) for i, s in zip(index, strides or dims.contiguous_strides(v.shape), strict=True))

    # --- values -----------------------------------------------------------------------------------------------------------

    def _compute(self, v: Value, index: Index) -> Tile:
        if v in self.sources:
            return self.sources[v](index)
        node = v.producer
        if node is None:
            strides = v.type.strides or dims.contiguous_strides(v.shape)
            return self._load(v, total(scale(i, s) for i, s in zip(index, strides, strict=True)))
        move = _MOVES.get(node.name)
        if move is not None:
            return move(self, node, index)
        if not node.op.has(Trait.POINTWISE):
            raise BuildError(f"{node.name} was not computed before its use")
        args = [self.wide(x, self._broadcast(index, x)) for x in node.operands]
        raw = [constant_of(x) for x in node.operands]
        return self.apply(node.name, args, node.operands[-1].dtype, v.dtype, node.attrs, raw)

    def apply(self, name: str, args: Sequence[Tile], dtype: DType, result: DType, attrs: object = None, raw: Sequence[object] = ()) -> Tile:
        """A pointwise op on tiles, under a name of its own."""
        if name == "cast" and result in LARGEST:
            return self._to_f8(args[0], dtype, result)
        texts = [a.text for a in args]
        if args and all(a.literal for a in args):  # Triton's functions want tensors
            texts = [f"tl.full((), {a.text}, {held(a.dtype)})" for a in args]
        given = attrs if isinstance(attrs, dict) else {}
        text = self.ops.apply(name, texts, dtype, result, given, raw or [None] * len(args))
        axes = NO_AXES.union(*(a.axes for a in args))
        depth = max((a.depth for a in args), default=0)
        prefix = name if not name[-1].isdigit() else f"{name}_"
        return Tile(self.code.let(prefix, text, depth) if text not in texts else text, result, axes, depth)

    def _load(self, v: Value, at: Sum) -> Tile:
        self.reads.append((v, at))
        narrow = v.dtype in NARROW or v.dtype in LARGEST
        if self.descriptors is not None and not self._guards and (block := self.descriptors.block(self._names[v], v.dtype, at)) is not None:
            zero = frozenset(c for var in variables(at) for c in var.inside)
            return Tile(self.code.let("x", block.read, block.depth), v.dtype, frozenset([0, 1]), block.depth, narrow, zero=zero)
        place, of = self.code.place(at), variables(at)
        guards = [g for g in self._guards if g.axes <= place.axes]
        masks = list(dict.fromkeys([*(c for var in of for c in var.inside), *(g.text for g in guards)]))
        depth = max([place.depth, *(g.depth for g in guards)])
        if not place.axes and masks:  # the interpreter takes no mask for a single element: it is read from where there is one
            masks, where = [], f"tl.where({conditions(masks)}, {place.text}, 0)"
        else:
            where = place.text
        mask = f", mask={conditions(masks)}, other=0" if masks else ""
        text = self.code.let("x", f"tl.load({self._names[v]} + {where}{mask})", depth)
        return Tile(text, v.dtype, place.axes, depth, narrow, zero=frozenset(masks))

    def _broadcast(self, index: Index, x: Value) -> list[Sum]:
        tail = list(index)[len(index) - x.type.rank :]
        return [Sum() if d == 1 else i for i, d in zip(tail, x.shape, strict=True)]

    @contextmanager
    def guarded(self, guard: Text) -> Iterator[None]:
        """What is read within is read only where a condition holds."""
        before = self._guards
        self._guards = (*before, guard)
        yield
        self._guards = before

    def guard(self, at: Var, low: bool, size: Dim) -> Text:
        """The condition ``0 <= at < size``, or its second half alone."""
        text = f"{at.name} < {self.code.size(size)}"
        text = f"({at.name} >= 0) & ({text})" if low else text
        return Text(self.code.let("ok", text, at.depth), at.axes, at.depth)

    def select(self, guard: Text, inside: Tile, outside: Tile) -> Tile:
        """One value where a condition holds, else another."""
        if outside.text in ("0", "0.0", "False") and guard.text in inside.zero:
            return inside
        dtype = inside.dtype
        a, b = (self._as_held(x) for x in (inside, outside))
        depth, axes = max(guard.depth, a.depth, b.depth), guard.axes | a.axes | b.axes
        return Tile(self.code.let("where", f"tl.where({guard.text}, {a.text}, {b.text})", depth), dtype, axes, depth)

    def _as_held(self, x: Tile) -> Tile:
        if x.literal:
            return replace(x, text=f"tl.full((), {x.text}, {held(x.dtype)})")
        return replace(x, text=f"{x.text}.to(tl.float32)", narrow=False) if x.narrow else x

    # --- ops that move elements ---------------------------------------------------------------------------------------------

    def _constant(self, node: Node, index: Index) -> Tile:
        value, dtype = node.attrs["value"], node.attrs["dtype"]
        if isinstance(value, bool | int | float):
            literal = dtype == types.f32 or dtype in NARROW
            text = number(value, dtype) if literal else self.code.let("c", typed(value, dtype), 0)
            return Tile(text, dtype, literal=literal)
        size = self.code.let("c", f"tl.full((), {self.code.size(value)}, tl.int64)", 0)
        return Tile(self.code.let("c", cast(size, types.i64, dtype), 0), dtype)

    def _iota(self, node: Node, index: Index) -> Tile:
        dtype: DType = node.attrs["dtype"]
        self.conditional.append(index[0])
        at = self.code.place(shift(scale(index[0], node.attrs["step"]), node.attrs["start"]))
        text = f"tl.full((), {at.text}, tl.int64)" if not variables(index[0]) else f"{at.text}.to(tl.int64)"
        count = self.code.let("iota", text, at.depth)
        return Tile(cast(count, types.i64, dtype), dtype, at.axes, at.depth)

    def _reshape(self, node: Node, index: Index) -> Tile:
        x = node.operands[0]
        return self.at(x, self.places.unflatten(self.places.flatten(index, node.result.shape), x.shape))

    def _transpose(self, node: Node, index: Index) -> Tile:
        out = [Sum()] * len(index)
        for i, p in zip(index, node.attrs["perm"], strict=True):
            out[p] = i
        return self.at(node.operands[0], out)

    def _broadcast_to(self, node: Node, index: Index) -> Tile:
        return self.at(node.operands[0], self._broadcast(index, node.operands[0]))

    def _slice(self, node: Node, index: Index) -> Tile:
        axis = node.attrs["axis"] % len(index)
        at = shift(scale(index[axis], node.attrs["step"]), node.attrs["start"])
        return self.at(node.operands[0], [*index[:axis], at, *index[axis + 1 :]])

    def _flip(self, node: Node, index: Index) -> Tile:
        axes = [a % len(index) for a in node.attrs["axes"]] if index else []
        shape = node.result.shape
        back = [shift(scale(i, -1), dims.sub(n, 1)) if k in axes else i for k, (i, n) in enumerate(zip(index, shape, strict=True))]
        return self.at(node.operands[0], back)

    def _concat(self, node: Node, index: Index) -> Tile:
        axis = node.attrs["axis"] % len(index)
        start: Dim = 0
        self.conditional.append(index[axis])
        parts: list[tuple[Text, Tile]] = []
        for x in node.operands:
            size = x.shape[axis]
            if size == 0:
                continue
            at = self.code.derived(shift(index[axis], dims.sub(0, start)), size, "part")
            guard = self.guard(at, True, size)
            with self.guarded(guard):
                parts.append((guard, self.wide(x, [*index[:axis], variable(at) if size != 1 else Sum(), *index[axis + 1 :]])))
            start = dims.add(start, size)
        _, value = parts[-1]
        for guard, piece in reversed(parts[:-1]):
            value = self.select(guard, piece, value)
        return value

    def _pad(self, node: Node, index: Index) -> Tile:
        x = node.operands[0]
        fill = Tile(number(node.attrs["value"], x.dtype), x.dtype, literal=True)
        return self.padded(x, index, node.attrs["low"], node.attrs["high"], fill)

    def padded(self, x: Value, index: Index, low: Sequence[Dim], high: Sequence[Dim], fill: Tile) -> Tile:
        """x at ``index - low``, and a number where that lies outside of it."""
        at: list[Sum] = []
        guards: list[Text] = []
        for i, before, after, d in zip(index, low, high, x.shape, strict=True):
            if before == 0 and after == 0:
                at.append(i)
                continue
            self.conditional.append(i)
            inner = self.code.derived(shift(i, dims.sub(0, before)), d, "in_")
            guards.append(self.guard(inner, before != 0, d))
            at.append(variable(inner))
        return self.within(x, at, guards, fill)

    def within(self, x: Value, at: Index, guards: Sequence[Text], fill: Tile) -> Tile:
        """x at an index where all conditions hold, else a number."""
        if not guards:
            return self.at(x, at)
        with self.guarded(guards[0]):
            value = self.within(x, at, guards[1:], fill)
        return self.select(guards[0], value, fill)

    def _take(self, node: Node, index: Index) -> Tile:
        x, positions = node.operands
        axis = node.attrs["axis"] % x.type.rank
        inner = index[axis : axis + positions.type.rank]
        at = self.position(positions, inner, x.shape[axis])
        return self.at(x, [*index[:axis], at, *index[axis + positions.type.rank :]])

    def _gather(self, node: Node, index: Index) -> Tile:
        x, positions = node.operands
        if not index:
            return self.at(x, [])
        axis = node.attrs["axis"] % x.type.rank
        at = self.position(positions, index, x.shape[axis])
        return self.at(x, [*index[:axis], at, *index[axis + 1 :]])

    def position(self, positions: Value, index: Index, size: Dim) -> Sum:
        """A loaded index, kept within bounds for the sake of memory; that it is valid is the caller's check."""
        self.conditional.extend(index)
        tile = self.at(positions, index)
        last = self.code.size(dims.sub(size, 1))
        wide = tile.text if positions.dtype == types.i64 or not self.code.wide else f"{tile.text}.to(tl.int64)"
        text = self.code.let("at", f"tl.minimum(tl.maximum({wide}, 0), {last})", tile.depth)
        inside = tuple(dict.fromkeys(c for i in index for v in variables(i) if v.axes <= tile.axes for c in v.inside))
        return Sum(((Var(text, size, tile.axes, tile.depth, inside), 1),))

    def _wrap_index(self, node: Node, index: Index) -> Tile:
        x = self.wide(node.operands[0], index)
        text = f"tl.where({x.text} < 0, {x.text} + {self.code.size(node.attrs['size'])}, {x.text})"
        return replace(x, text=self.code.let("wrap", text, x.depth), zero=frozenset())

    # --- quantization ---------------------------------------------------------------------------------------------------------

    def _operand(self, node: Node, k: int, index: Index, dtype: DType) -> Tile:
        """An operand of a pointwise node, as another dtype."""
        x = node.operands[k]
        tile = self.wide(x, self._broadcast(index, x))
        return tile if x.dtype == dtype else self.apply("cast", [tile], x.dtype, dtype)

    def _dequantize(self, node: Node, index: Index) -> Tile:
        dtype = node.result.dtype
        value = self._operand(node, 0, index, dtype)
        if len(node.operands) == 3:
            value = self.apply("sub", [value, self._operand(node, 2, index, dtype)], dtype, dtype)
        return self.apply("mul", [value, self._operand(node, 1, index, dtype)], dtype, dtype)

    def _quantize(self, node: Node, index: Index) -> Tile:
        x, dtype = node.operands[0].dtype, node.result.dtype
        inverse = self.apply("reciprocal", [self._operand(node, 1, index, x)], x, x)
        value, most = self.apply("mul", [self._operand(node, 0, index, x), inverse], x, x), LARGEST.get(dtype)
        if most is None:
            value = self.apply("round", [value], x, x)
        if len(node.operands) == 3:
            value = self.apply("add", [value, self._operand(node, 2, index, x)], x, x)
        ends = integer_range(dtype, node.attrs["bits"]) if most is None else (-most, most)
        low, high = (Tile(number(n, x), x, literal=True) for n in ends)
        value = self.apply("minimum", [self.apply("maximum", [value, low], x, x), high], x, x)
        return self.apply("cast", [value], x, dtype)

    def _to_f8(self, x: Tile, dtype: DType, to: DType) -> Tile:
        """The bits of floats of 8 bits, as PyTorch casts to them: by way of f32."""
        text = f"tl.full((), {x.text}, {held(dtype)})" if x.literal else x.text
        wide = text if held(dtype) == held(types.f32) else f"{text}.to(tl.float32)"
        helper = f"to_{to.name}" if to != types.f8e4m3 or saturates() else f"to_{to.name}_or_nan"
        return Tile(self.code.let("bits", f"{self.code.helper(helper)}({wide})", x.depth), to, x.axes, x.depth, narrow=True)

    def _unpack_bits(self, node: Node, index: Index) -> Tile:
        (x,), axis, bits = node.operands, node.attrs["axis"] % len(index), node.attrs["bits"]
        dtype: DType = node.attrs["dtype"]
        count = x.dtype.bits // bits
        self.conditional.append(index[axis])
        word = self.at(x, [*index[:axis], self.places.quotient(index[axis], count), *index[axis + 1 :]])
        part = self.code.place(scale(self.places.remainder(index[axis], count), bits))
        depth, axes = max(word.depth, part.depth), word.axes | part.axes
        text = f"({word.text}.to(tl.int32) >> {part.text}) & {(1 << bits) - 1}"
        name = self.code.let("bits", text, depth)
        if dtype.kind == "i":
            name = self.code.let("bits", f"tl.where({name} >= {1 << (bits - 1)}, {name} - {1 << bits}, {name})", depth)
        return Tile(self.code.let("bits", f"{name}.to({NAMES[dtype]})", depth), dtype, axes, depth)


_MOVES: dict[str, Callable[[Expressions, Node, Index], Tile]] = {
    "constant": Expressions._constant, "iota": Expressions._iota, "reshape": Expressions._reshape,
    "transpose": Expressions._transpose, "broadcast_to": Expressions._broadcast_to, "slice": Expressions._slice,
    "flip": Expressions._flip, "concat": Expressions._concat, "pad": Expressions._pad, "take": Expressions._take,
    "gather": Expressions._gather, "wrap_index": Expressions._wrap_index, "dequantize": Expressions._dequantize,
    "quantize": Expressions._quantize, "unpack_bits": Expressions._unpack_bits,
}  # fmt: skip
