"""The expression layer: the value of an IR Value at an index, as a TensorIR expression.

Views are index maps, pointwise ops are expressions (:mod:`scalar`), and values that were computed before (a reduction, an
accumulator tile) are read through a *source*. Shared values are bound to a variable once for each index they are used at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import tirx

from graphopt.backends.forms.support import constant_of, is_softmax_exp
from graphopt.backends.tvm import pointwise, scalar
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.errors import BuildError
from graphopt.ir import dims, types
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import Trait
from graphopt.ir.opset.quantize import LARGEST, integer_range
from graphopt.ir.types import DType

Source = Callable[[Sequence[Index]], Any]


def always(value: Any) -> Source:
    """A value that is known already, at any index."""
    return lambda _: value


class Arguments:
    """The kernel's tensors: one flat buffer an input and an output, and how to address them."""

    def __init__(self, code: Code, graph: Graph) -> None:
        self.code, self.graph = code, graph
        self.inputs = {v: code.argument(scalar.STORAGE[v.dtype], v.dtype.itemsize, f"in{k}") for k, v in enumerate(graph.inputs)}
        self.outputs = [code.argument(scalar.STORAGE[v.dtype], v.dtype.itemsize, f"out{k}") for k, v in enumerate(graph.outputs)]

    def strides(self, v: Value) -> list[Index]:
        return [self.code.size(s) for s in (v.type.strides or dims.contiguous_strides(v.shape))]

    def output_strides(self, k: int) -> list[Index]:
        given = self.graph.output_strides[k]
        return [self.code.size(s) for s in (given if given is not None else dims.contiguous_strides(self.graph.outputs[k].shape))]

    def store(self, k: int, index: Sequence[Index], value: Any) -> None:
        """Write an element of output k."""
        self.code.store(self.outputs[k], self.place(k, index), scalar.store(value, self.graph.outputs[k].dtype))

    def ask(self, k: int, index: Sequence[Index]) -> None:
        """Ask for the cache line of an element of output k, which will be written soon: it comes beside other work."""
        self.code.prefetch(self.outputs[k], self.place(k, index), write=True)

    def place(self, k: int, index: Sequence[Index]) -> Index:
        """Where in its buffer an element of output k lies."""
        return _address(self.code, index, self.output_strides(k))


def _address(code: Code, index: Sequence[Index], strides: Sequence[Index]) -> Index:
    at: Index = 0
    for i, s in zip(index, strides, strict=True):
        if not (isinstance(i, int) and i == 0) and not (isinstance(s, int) and s == 0):
            at = at + i * s
    return at if isinstance(at, int) else code.simplify(at)


def broadcast_index(v: Value, index: Sequence[Index]) -> list[Index]:
    """The index of a value that is broadcast, given that of the whole."""
    return [0 if d == 1 else i for i, d in zip(index[len(index) - v.type.rank :], v.shape, strict=True)]


def at_place(args: Arguments, place: Sequence[Index], value: Any) -> Source:
    """How a result that was summed for one place is read: there, and nowhere else."""

    def source(asked: Sequence[Index]) -> Any:
        if not all(args.code.equal(p, q) for p, q in zip(asked, place, strict=True)):
            raise BuildError(f"what was summed for {list(place)} is used at {list(asked)}")
        return value

    return source


def store_computed(args: Arguments, place: Sequence[Index], computed: Mapping[Value, Any],
                   known: Mapping[Value, Source] | None = None) -> None:  # fmt: skip
    """Compute and store one place of all outputs, given results that were summed for that place alone.

    Args:
        computed: elements of products or convolutions; an output may use them at no other place.
        known: how other values are read.
    """
    sources = {**(known or {}), **{v: at_place(args, place, value) for v, value in computed.items()}}
    for k, v in enumerate(args.graph.outputs):
        args.store(k, place, Expressions(args, dict(sources)).at(v, place))


class Expressions:
    """Values at indices, within one block of statements.

    Args:
        sources: how to read values that are already computed.
        probe: only find out what would be read: nothing is bound, every address goes to ``addresses``, those of inputs,
            with the input, to ``reads`` too, what conditions depend on to ``conditions``, and to ``ends`` each index that is
            compared, with the place where another part of a join or of a padding begins.
    """

    def __init__(self, args: Arguments, sources: dict[Value, Source], probe: bool = False) -> None:
        self.args, self.code, self.sources, self.probe = args, args.code, sources, probe
        self.ops = pointwise.Ops(self.let)
        self.addresses: list[Any] = []
        self.reads: list[tuple[Value, Any]] = []
        self.conditions: list[Any] = []
        self.ends: list[tuple[Index, Index]] = []
        self._memo: dict[tuple[Value, tuple[Any, ...]], Any] = {}
        self._alive: list[Any] = []  # keeps index objects alive while their ids are keys

    @property
    def scalar_only(self) -> bool:
        return self.ops.scalar_only

    def at(self, v: Value, index: Sequence[Index]) -> Any:
        """The value of ``v`` at an index of its own rank."""
        key = (v, tuple(i if isinstance(i, int) else id(i) for i in index))
        if key not in self._memo:
            self._alive.append(tuple(index))
            value = self._compute(v, index)
            self._memo[key] = self.let(value)
        return self._memo[key]

    def let(self, value: Any) -> Any:
        """Name an intermediate result, so that it is computed once."""
        if self.probe or isinstance(value, tirx.Var | tirx.FloatImm | tirx.IntImm):
            return value
        return self.code.bind(value)

    def _compute(self, v: Value, index: Sequence[Index]) -> Any:
        if v in self.sources:
            self.addresses.extend(i for i in index if not isinstance(i, int))
            return self.sources[v](index)
        node = v.producer
        if node is None:
            return self._read(v, _address(self.code, index, self.args.strides(v)))
        move = _MOVES.get(node.name)
        if move is not None:
            return move(self, node, index)
        if not node.op.has(Trait.POINTWISE):
            raise BuildError(f"{node.name} was not computed before its use")
        args = [self.at(x, broadcast_index(x, index)) for x in node.operands]
        name = "exp_shifted" if is_softmax_exp(node) else node.name
        return self.ops.apply(name, args, node.operands[-1].dtype, v.dtype, node.attrs, [constant_of(x) for x in node.operands])

    def factors(self, v: Value, index: Sequence[Index]) -> tuple[Any, Any] | None:
        """The factors of a float product at an index, for who adds it to a sum, with one rounding for both; None if it is none."""
        node = v.producer
        if node is None or v in self.sources or v.dtype not in (types.f32, types.f64):
            return None
        squared = node.name == "pow" and constant_of(node.operands[1]) == 2.0
        if node.name != "mul" and not squared:
            return None
        a, b = (node.operands[0], node.operands[0]) if squared else node.operands
        return self.at(a, broadcast_index(a, index)), self.at(b, broadcast_index(b, index))

    def _read(self, v: Value, at: Index) -> Any:
        """An input's element by its place in memory."""
        self.addresses.append(at)
        self.reads.append((v, at))
        return scalar.load(self.code.load(self.args.inputs[v], at), v.dtype)

    def sizes(self, v: Value) -> list[Index]:
        return [self.code.size(d) for d in v.shape]

    def _conditional(self, *indices: Index) -> None:
        """Note that conditions, not only addresses, depend on these indices."""
        found = [tirx.floormod(i64(i), i64(3)) for i in indices if not isinstance(i, int)]
        self.addresses.extend(found)
        self.conditions.extend(found)

    # --- ops that move elements ----------------------------------------------------------------------------------------

    def _constant(self, node: Node, index: Sequence[Index]) -> Any:
        value, dtype = node.attrs["value"], node.attrs["dtype"]
        if isinstance(value, bool | int | float):
            return scalar.constant(value, dtype)
        size = i64(self.code.size(value))
        return scalar.rounded(size.astype(scalar.COMPUTE[dtype]), dtype)

    def _iota(self, node: Node, index: Sequence[Index]) -> Any:
        dtype: DType = node.attrs["dtype"]
        self._conditional(*index)
        count = i64(self.code.size(node.attrs["start"])) + i64(self.code.size(node.attrs["step"])) * i64(index[0])
        return count if scalar.COMPUTE[dtype] == "int64" else scalar.rounded(count.astype(scalar.COMPUTE[dtype]), dtype)

    def _reshape(self, node: Node, index: Sequence[Index]) -> Any:
        x = node.operands[0]
        if x.is_input and x not in self.sources and x.type.is_contiguous:  # memory is what it was: nothing is divided
            return self._read(x, self.code.flatten(index, self.sizes(node.result)))
        out: list[Index] = []
        for old, new in reshape_groups(x.shape, node.result.shape):
            flat = self.code.flatten([index[k] for k in new], [self.code.size(node.result.shape[k]) for k in new])
            out += self.code.unflatten(flat, [self.code.size(x.shape[k]) for k in old])
        return self.at(x, broadcast_index(x, out))

    def _transpose(self, node: Node, index: Sequence[Index]) -> Any:
        out: list[Index] = [0] * len(index)
        for i, p in zip(index, node.attrs["perm"], strict=True):
            out[p] = i
        return self.at(node.operands[0], out)

    def _broadcast_to(self, node: Node, index: Sequence[Index]) -> Any:
        return self.at(node.operands[0], broadcast_index(node.operands[0], index))

    def _slice(self, node: Node, index: Sequence[Index]) -> Any:
        axis = node.attrs["axis"] % len(index)
        at = self.code.simplify(self.code.size(node.attrs["start"]) + index[axis] * node.attrs["step"])
        return self.at(node.operands[0], [*index[:axis], at, *index[axis + 1 :]])

    def _flip(self, node: Node, index: Sequence[Index]) -> Any:
        axes = [a % len(index) for a in node.attrs["axes"]] if index else []
        sizes = self.sizes(node.result)
        return self.at(node.operands[0], [self.code.simplify(n - 1 - i) if k in axes else i for k, (i, n) in enumerate(zip(index, sizes))])

    def _concat(self, node: Node, index: Sequence[Index]) -> Any:
        axis = node.attrs["axis"] % len(index)
        i, start = index[axis], 0
        parts: list[tuple[Any, Any]] = []
        if not isinstance(i, int):
            self._conditional(i)
        for x in node.operands:
            size = self.code.size(x.shape[axis])
            if isinstance(size, int) and size == 0:
                continue
            inside = self._clamp(i - start, size)
            parts.append((start + size, lambda x=x, at=inside: self.at(x, [*index[:axis], at, *index[axis + 1 :]])))
            start = start + size
            self.ends.append((i, start))
        tests: list[tuple[Any, Any]] = []
        chosen = parts[-1][1]
        for end, piece in parts[:-1]:
            condition = self.code.simplify(i64(i) < i64(end))
            if not isinstance(condition, int):
                tests.append((condition, piece))
            elif condition:
                chosen = piece
                break
        value = chosen()
        for condition, piece in reversed(tests):
            value = tirx.Select(condition, piece(), value)
        return value

    def _pad(self, node: Node, index: Sequence[Index]) -> Any:
        x = node.operands[0]
        fill = scalar.constant(node.attrs["value"], x.dtype)
        at, conditions = [], []
        if any(d == 0 for d in x.shape):
            return fill
        for i, low, high, d in zip(index, node.attrs["low"], node.attrs["high"], x.shape, strict=True):
            if low == 0 and high == 0:
                at.append(i)
                continue
            shifted, size = self.code.simplify(i - self.code.size(low)), self.code.size(d)
            if not isinstance(i, int):
                self._conditional(i)
            conditions += [i64(shifted) >= i64(0), i64(shifted) < i64(size)]
            self.ends += [(shifted, 0), (shifted, size)]
            at.append(self._clamp(shifted, size))
        value = self.at(x, at)
        for c in conditions:
            known = self.code.simplify(c)
            if isinstance(known, int):
                value = value if known else fill
            else:
                value = tirx.Select(known, value, fill)
        return value

    def _clamp(self, i: Index, size: Index) -> Index:
        return self.code.greatest(self.code.least(i, size - 1), 0)

    def _take(self, node: Node, index: Sequence[Index]) -> Any:
        x, positions = node.operands
        axis = node.attrs["axis"] % x.type.rank
        inner = index[axis : axis + positions.type.rank]
        at = self.position(positions, inner, self.code.size(x.shape[axis]))
        return self.at(x, [*index[:axis], at, *index[axis + positions.type.rank :]])

    def _gather(self, node: Node, index: Sequence[Index]) -> Any:
        x, positions = node.operands
        axis = node.attrs["axis"] % max(x.type.rank, 1)
        if not index:
            return self.at(x, [])
        at = self.position(positions, index, self.code.size(x.shape[axis]))
        return self.at(x, [*index[:axis], at, *index[axis + 1 :]])

    def _wrap_index(self, node: Node, index: Sequence[Index]) -> Any:
        at, size = self.at(node.operands[0], index), i64(self.code.size(node.attrs["size"]))
        return tirx.Select(at < tirx.const(0, at.ty.dtype), at + size.astype(at.ty.dtype), at)

    # --- quantization ---------------------------------------------------------------------------------------------------

    def _operand(self, node: Node, k: int, index: Sequence[Index], dtype: DType) -> Any:
        """An operand of a pointwise node, as another dtype."""
        x = node.operands[k]
        value = self.at(x, broadcast_index(x, index))
        return value if x.dtype == dtype else self.let(scalar.cast(value, x.dtype, dtype, self.let))

    def _dequantize(self, node: Node, index: Sequence[Index]) -> Any:
        dtype = node.result.dtype
        value = self._operand(node, 0, index, dtype)
        if len(node.operands) == 3:
            value = self.ops.apply("sub", [value, self._operand(node, 2, index, dtype)], dtype, dtype, {}, [None, None])
        return self.ops.apply("mul", [value, self._operand(node, 1, index, dtype)], dtype, dtype, {}, [None, None])

    def _quantize(self, node: Node, index: Sequence[Index]) -> Any:
        x, dtype = node.operands[0].dtype, node.result.dtype

        def apply(name: str, *args: Any, bound: float | None = None) -> Any:
            return self.let(self.ops.apply(name, list(args), x, x, {}, [None] * (len(args) - 1) + [bound]))

        value = apply("mul", self._operand(node, 0, index, x), apply("reciprocal", self._operand(node, 1, index, x)))
        if (most := LARGEST.get(dtype)) is not None:
            value = apply("maximum", value, scalar.constant(-most, x), bound=-most)
            value = apply("minimum", value, scalar.constant(most, x), bound=most)
            return scalar.to_f8(value if x.name == "f32" else self.let(value.astype("float32")), dtype)
        value = apply("round", value)
        if len(node.operands) == 3:
            value = apply("add", value, self._operand(node, 2, index, x))
        low, high = integer_range(dtype, node.attrs["bits"])
        value = apply("maximum", value, scalar.constant(low, x), bound=low)
        value = apply("minimum", value, scalar.constant(high, x), bound=high)
        return scalar.cast(value, x, dtype, self.let)

    def _unpack_bits(self, node: Node, index: Sequence[Index]) -> Any:
        (x,), axis, bits = node.operands, node.attrs["axis"] % len(index), node.attrs["bits"]
        count = x.dtype.bits // bits
        place, part = self.code.unflatten(index[axis], [self.code.size(x.shape[axis]), count])
        word = self.at(x, [*index[:axis], place, *index[axis + 1 :]])
        word = word if x.dtype.bits == 32 else self.let(word.astype("int32"))
        return bits_of(word, part if isinstance(part, int) else part.astype("int32"), bits, node.attrs["dtype"])

    def position(self, positions: Value, index: Sequence[Index], size: Index) -> Any:
        """A loaded index, kept within bounds for the sake of memory; that it is valid is the caller's check."""
        at = self.at(positions, index)
        at = at if positions.dtype.name == "i64" else at.astype("int64")
        at = tirx.max(tirx.min(at, i64(size) - i64(1)), i64(0))
        return at if self.probe else self.code.bind(at, "at")


_MOVES: dict[str, Callable[[Expressions, Node, Sequence[Index]], Any]] = {
    "constant": Expressions._constant, "iota": Expressions._iota, "reshape": Expressions._reshape,
    "transpose": Expressions._transpose, "broadcast_to": Expressions._broadcast_to, "slice": Expressions._slice,
    "flip": Expressions._flip, "concat": Expressions._concat, "pad": Expressions._pad, "take": Expressions._take,
    "gather": Expressions._gather, "wrap_index": Expressions._wrap_index, "dequantize": Expressions._dequantize,
    "quantize": Expressions._quantize, "unpack_bits": Expressions._unpack_bits,
}  # fmt: skip


def bits_of(word: Any, part: Any, bits: int, dtype: DType, lanes: int = 1) -> Any:
    """The ``part``-th integer of so many bits of an int32, counted from the lowest, as i8 or u8; or of each of a vector of int32."""

    def number(value: Any) -> Any:
        one = tirx.const(value, "int32") if isinstance(value, int) else value
        return one if lanes == 1 else tirx.Broadcast(one, lanes)

    vector = f"x{lanes}" if lanes > 1 else ""
    if dtype.kind == "u":
        return tirx.bitwise_and(tirx.shift_right(word, number(part * bits)), number((1 << bits) - 1)).astype(f"uint8{vector}")
    return tirx.shift_right(tirx.shift_left(word, number(32 - bits - part * bits)), number(32 - bits)).astype(f"int8{vector}")


def reshape_groups(old: dims.Shape, new: dims.Shape) -> list[tuple[list[int], list[int]]]:
    """The finest split of both shapes into runs of axes with equal products: each run is reshaped by itself.

    Returns:
        (axes of old, axes of new) for each run, in order.
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left: list[int] = []
        right: list[int] = []
        a: dims.Dim = 1
        b: dims.Dim = 1
        while True:
            if i < len(old) and (not left or (isinstance(a, int) and isinstance(b, int) and a < b)):
                a, left, i = dims.mul(a, old[i]), [*left, i], i + 1
            elif j < len(new) and (not right or (isinstance(a, int) and isinstance(b, int) and b < a)):
                b, right, j = dims.mul(b, new[j]), [*right, j], j + 1
            elif dims.same(a, b) or (i == len(old) and j == len(new)):
                break
            elif i < len(old) and not (isinstance(a, int) and not isinstance(b, int) and j < len(new)):
                a, left, i = dims.mul(a, old[i]), [*left, i], i + 1
            else:
                b, right, j = dims.mul(b, new[j]), [*right, j], j + 1
        groups.append((left, right))
    return groups
