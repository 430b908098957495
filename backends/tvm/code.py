"""A small writer of TensorIR statements: loops, stores, local buffers, with an integer analyzer that knows the loops.

Kernels are written as explicit loops over flat, one-dimensional buffers, so that what is emitted is what runs; there is
no scheduling step in between. Indices are int64 throughout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
import tvm
from tvm import tirx
from tvm.ir import PointerType, PrimType

from graphopt.errors import BuildError
from graphopt.ir import dims
from graphopt.ir.dims import Dim, Range

Index = Any  # an int, or an int64 TensorIR expression
_KINDS = {
    "serial": tirx.ForKind.SERIAL, "parallel": tirx.ForKind.PARALLEL,
    "vectorized": tirx.ForKind.VECTORIZED, "unrolled": tirx.ForKind.UNROLLED,
}  # fmt: skip
_DEEP = 1000  # nodes of a value, with definitions in the place of names, from which on it is kept in memory
ARRAY_DATA = 1  # field number of the data pointer in tvm_struct_get


def i64(value: Index) -> Any:
    """An int64 expression."""
    return tirx.const(value, "int64") if isinstance(value, int) else value


class Code:
    """Collects the statements of one kernel.

    Args:
        symbols: ranges of the symbolic sizes; each becomes an int64 argument.
    """

    def __init__(self, symbols: dict[str, Range]) -> None:
        self.symbols = {name: tirx.Var(name, "int64") for name in sorted(symbols)}
        self.analyzer = tvm.sym.Analyzer()
        for name, var in self.symbols.items():
            r = symbols[name]
            hi = r.hi if r.hi is not None else 2**40
            self.analyzer.bind(var, tvm.ir.Range.from_min_extent(i64(r.lo), i64(hi - r.lo + 1)))
        self.params: list[Any] = []
        self._blocks: list[list[Any]] = [[]]
        self._names: dict[str, int] = {}
        self._vectors: list[tuple[int, Any, Index]] = []  # of vectorized loops: the block they stand in, the lane and how many there are
        self._nodes: dict[Any, int] = {}  # of bound floats, definitions in the place of names

    # --- names, sizes and index arithmetic -----------------------------------------------------------------------------

    def fresh(self, name: str) -> str:
        """A name that no other variable of the kernel has."""
        n = self._names.get(name, 0)
        self._names[name] = n + 1
        return f"{name}_{n}" if n else name

    def size(self, d: Dim) -> Index:
        """The value of a size: an int, or an expression of the symbol arguments."""
        if isinstance(d, int):
            return d
        if d.is_Integer:
            return int(d)
        if d.is_Symbol:
            return self.symbols[d.name]
        parts = [self.size(a) for a in d.args]
        if d.is_Add:
            return _fold(parts, lambda a, b: a + b)
        if d.is_Mul:
            numerator, denominator = d.as_numer_denom()
            if denominator != 1:
                return self.div(self.size(numerator), self.size(denominator))
            return _fold(parts, lambda a, b: a * b)
        if isinstance(d, dims.FloorDiv):
            return self.div(*parts)
        if isinstance(d, sympy.Mod):
            return self.mod(*parts)
        if d.is_Pow and d.args[1].is_Integer and d.args[1] > 0:
            return _fold([parts[0]] * int(d.args[1]), lambda a, b: a * b)
        if isinstance(d, sympy.Max | sympy.Min):
            fn = tirx.max if isinstance(d, sympy.Max) else tirx.min
            return _fold(parts, lambda a, b: fn(i64(a), i64(b)))
        raise BuildError(f"a size of the form {d} cannot be computed in a kernel")

    def simplify(self, e: Index) -> Index:
        """Simplify with what is known of loop variables and sizes; an int if it is constant."""
        if isinstance(e, int):
            return e
        e = self.analyzer.simplify(e)
        return int(e.value) if isinstance(e, tirx.IntImm) else e

    def div(self, a: Index, b: Index) -> Index:
        if isinstance(a, int) and isinstance(b, int):
            return a // b
        return a if _is(b, 1) else self.simplify(tirx.floordiv(i64(a), i64(b)))

    def mod(self, a: Index, b: Index) -> Index:
        if isinstance(a, int) and isinstance(b, int):
            return a % b
        return 0 if _is(b, 1) else self.simplify(tirx.floormod(i64(a), i64(b)))

    def ceildiv(self, a: Index, b: int) -> Index:
        """ceil(a / b), by a name of its own where it is symbolic: divisions by divisions are hard to reason about."""
        count = self.div(a + (b - 1), b)
        if isinstance(count, int | tirx.Var):
            return count
        var = self._veil(count, "count")
        self.analyzer.bind(var, tvm.ir.Range.from_min_extent(i64(0), i64(2**40)))
        return var

    def ceildiv_plain(self, a: Index, b: int) -> Index:
        """ceil(a / b) as an expression, for an ``a`` that changes from loop to loop."""
        return self.div(a + (b - 1), b)

    def least(self, a: Index, b: Index) -> Index:
        return min(a, b) if isinstance(a, int) and isinstance(b, int) else self.simplify(tirx.min(i64(a), i64(b)))

    def greatest(self, a: Index, b: Index) -> Index:
        return max(a, b) if isinstance(a, int) and isinstance(b, int) else self.simplify(tirx.max(i64(a), i64(b)))

    def equal(self, a: Index, b: Index) -> bool:
        """Whether two indices are proven equal."""
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        return bool(self.analyzer.can_prove_equal(i64(a), i64(b)))

    def flatten(self, index: Sequence[Index], shape: Sequence[Index]) -> Index:
        """Row-major position of an index."""
        flat: Index = 0
        for i, n in zip(index, shape, strict=True):
            flat = flat * n + i
        return flat if isinstance(flat, int) else self.simplify(flat)

    def unflatten(self, flat: Index, shape: Sequence[Index]) -> list[Index]:
        """Inverse of :meth:`flatten`."""
        out: list[Index] = []
        for k in reversed(range(len(shape))):
            if k == 0 or all(_is(n, 1) for n in shape[:k]):
                out.append(self.simplify(flat))
                flat = 0
            else:
                out.append(self.mod(flat, shape[k]))
                flat = self.div(flat, shape[k])
        return out[::-1]

    # --- statements -----------------------------------------------------------------------------------------------------

    def emit(self, statement: Any) -> None:
        self._blocks[-1].append(statement)

    def _close(self) -> Any:
        statements = self._blocks.pop()
        if not statements:
            return tirx.Evaluate(tirx.const(0, "int32"))
        return statements[0] if len(statements) == 1 else tirx.SeqStmt(statements)

    @contextmanager
    def loop(self, extent: Index, kind: str = "serial", name: str = "i", start: Index = 0) -> Iterator[Any]:
        """A loop of ``extent`` steps from ``start``; yields the variable. A constant extent of 1 makes no loop."""
        if _is(extent, 1) and kind != "parallel":
            yield start
            return
        var = tirx.Var(self.fresh(name), "int64")
        self.analyzer.bind(var, tvm.ir.Range.from_min_extent(i64(start), i64(extent)))
        start, extent = (x if isinstance(x, int | tirx.Var) else self._veil(x, name) for x in (start, extent))
        self._blocks.append([])
        if kind == "vectorized":
            self._vectors.append((len(self._blocks) - 2, self.simplify(var - start), extent))
        yield var
        if kind == "vectorized":
            self._vectors.pop()
        self.emit_loop(var, start, extent, kind)

    def emit_loop(self, var: Any, start: Index, extent: Index, kind: str) -> None:
        body = self._close()
        self.emit(tirx.For(var, i64(start), i64(extent), _KINDS[kind], body))

    @contextmanager
    def when(self, condition: Any) -> Iterator[None]:
        """Statements that run only if the condition holds."""
        held = condition
        if self.symbols:  # see _veil
            twin = tirx.Var(self.fresh("holds"), "uint32")
            self.emit(tirx.Bind(twin, tirx.Select(truncating(condition), tirx.const(1, "uint32"), tirx.const(0, "uint32"))))
            held = tirx.NE(twin, tirx.const(0, "uint32"))
        self._blocks.append([])
        with self.analyzer.constraint_scope(condition):
            yield
        self.emit(tirx.IfThenElse(held, self._close(), None))

    def bind(self, value: Any, name: str = "v", hidden: bool = True) -> Any:
        """Give an expression a name in the current block."""
        if hasattr(value, "asobject"):  # `==` and `!=` give a deferred comparison
            value = value.asobject()
        if value.ty.dtype == "bool":  # TVM's analyzer cannot hold vectors of bool
            bit = tirx.Select(value, tirx.const(1, "int32"), tirx.const(0, "int32"))
            return tirx.NE(self.bind(bit, name), tirx.const(0, "int32"))
        # What is bound is hidden from TVM's analyzer, which otherwise puts definitions in the place of names: its interval
        # sets of chained selections grow without bound. It does not look into calls, so those are bound as they are; a float
        # goes through a call that does nothing, an integer through memory, or in a vector through its bits.
        # Chains whose steps read a value several times grow in front of it with each of them: those go through memory.
        held = str(value.ty.dtype)
        floats, call = held.startswith("float"), isinstance(value, tvm.ir.Call)
        if floats and isinstance(value, tirx.Select | tirx.Max | tirx.Min):
            value, call = tirx.call_llvm_pure_intrin(value.ty, "llvm.arithmetic.fence", value), True
        elif not floats and not hidden:
            return self._named(value, name)
        elif not (floats or call or self._vectors):
            # among symbolic sizes even hidden integers are reasoned about; what is read from memory is not, and LLVM
            # turns the memory into a register again (that of the scope "local" would be asked for and given back each time)
            cell = self.alloc(1, held, f"{name}_cell")
            self.store(cell, 0, value)
            return self.load(cell, 0)
        count = self._count(value)
        if count > _DEEP and (kept := self._kept(value, name)) is not None:
            if not floats:
                return kept
            value, count = kept, 1
        twin = None if floats or call else held[1:] if held.startswith("u") else f"u{held}"
        var = self._named(tirx.reinterpret(twin, value) if twin else value, name)
        self._nodes[var] = count
        return tirx.reinterpret(held, var) if twin else var

    def _named(self, value: Any, name: str) -> Any:
        var = tirx.Var(self.fresh(name), value.ty)
        self.emit(tirx.Bind(var, value))
        return var

    def _count(self, value: Any) -> int:
        """Nodes of a value with definitions in the place of names, as the analyzer sees it; it stops beyond ``_DEEP``."""
        count, pending = 0, [value]
        while pending and count <= _DEEP:
            e = pending.pop()
            if isinstance(e, tirx.Var):
                count += self._nodes.get(e, 1)
                continue
            count += 1
            if isinstance(e, tvm.ir.Call):
                pending.extend(e.args)
            elif isinstance(e, tirx.Select):
                pending += (e.condition, e.true_value, e.false_value)
            else:  # of arithmetic, comparisons and conversions; what is read from memory has none of them
                pending += [getattr(e, name) for name in ("a", "b", "value") if hasattr(e, name)]
        return count

    def _kept(self, value: Any, name: str) -> Any:
        """A value, read from memory that it is written to, which LLVM makes a register again: the analyzer does not look behind it.

        Chains whose steps read a value several times, as each rounding to bf16 does, would take it minutes. None where no memory of
        their own can be had for the lanes.
        """
        held, _, wide = str(value.ty.dtype).partition("x")
        lanes = int(wide or 1)
        if self._vectors:
            if len(self._vectors) > 1 or lanes > 1 or not isinstance(self._vectors[0][2], int):
                return None
            block, at, extent = self._vectors[0]
            cell = tirx.decl_buffer((i64(extent),), held, self.fresh(f"{name}_cell"), layout=None)
            self._blocks[block].append(tirx.stmt.AllocBuffer(cell))
        else:
            at = tirx.Ramp(i64(0), i64(1), lanes) if lanes > 1 else i64(0)
            cell = self.alloc(lanes, held, f"{name}_cell")
        self.emit(tirx.BufferStore(cell, value, [at]))
        return cell[at]

    def bind_index(self, value: Index, name: str = "i", extent: Index | None = None) -> Index:
        """Name an index; with an extent, it is known to lie in ``0 .. extent - 1``."""
        if isinstance(value, int | tirx.Var):
            return value
        var = self._veil(value, name)
        if extent is not None:
            self.analyzer.bind(var, tvm.ir.Range.from_min_extent(i64(0), i64(extent)))
        return var

    def _veil(self, value: Any, name: str) -> Any:
        """Name an index in two steps, through an unsigned twin, when sizes are symbolic.

        TVM's later passes put an index's definition in the place of its name whenever they reason about it; definitions
        by symbolic sizes grow without bound that way (minutes for a small kernel). They do not look through the twin, and
        what the names' ranges tell has been used here already.
        """
        if not self.symbols:
            return self.bind(value, name, hidden=False)
        twin = tirx.Var(self.fresh(f"{name}_bits"), "uint64")
        self.emit(tirx.Bind(twin, tirx.reinterpret("uint64", truncating(i64(value)))))
        var = tirx.Var(self.fresh(name), "int64")
        self.emit(tirx.Bind(var, tirx.reinterpret("int64", twin)))
        return var

    def alloc(self, size: Index, dtype: str, name: str, scope: str = "global") -> Any:
        """A flat scratch buffer in the current block."""
        buffer = tirx.decl_buffer((i64(size),), dtype, self.fresh(name), scope=scope, layout=None)
        self.emit(tirx.stmt.AllocBuffer(buffer))
        return buffer

    def argument(self, dtype: str, itemsize: int, name: str) -> Any:
        """A tensor argument, as a flat buffer at its data pointer. Sizes and layout are the caller's promise."""
        handle = tirx.Var(name, "handle")
        self.params.append(handle)
        pointer_type = PointerType(PrimType(dtype))
        pointer = tirx.Var(f"{name}_data", pointer_type)
        self.emit(tirx.Bind(pointer, tirx.tvm_struct_get(handle, 0, ARRAY_DATA, pointer_type)))
        buffer = tirx.decl_buffer((i64(2**40),), dtype, self.fresh(f"{name}_flat"), data_alignment=itemsize, layout=None)
        self.emit(tirx.stmt.DeclBuffer(buffer, data=pointer))
        return buffer

    def load(self, buffer: Any, at: Index) -> Any:
        return buffer[self._address(at)]

    def store(self, buffer: Any, at: Index, value: Any) -> None:
        self.emit(tirx.BufferStore(buffer, value, [self._address(at)]))

    def prefetch(self, buffer: Any, at: Index, level: int = 2, write: bool = False) -> None:
        """Ask for the cache line of an element. The element may lie outside of the buffer.

        Args:
            level: 1 brings it into all caches; 2 into the second level and beyond.
            write: it will be written: no other core keeps a copy.
        """
        address = tirx.address_of(buffer[self._address(at)])
        use, locality, data = (tirx.const(n, "int32") for n in (int(write), 4 - level, 1))  # operands of llvm.prefetch
        self.emit(tirx.Evaluate(tirx.call_intrin("void", "tirx.prefetch", address, use, locality, data)))

    def _address(self, at: Index) -> Any:
        return truncating(i64(at)) if self.symbols else i64(at)

    def function(self, name: str) -> Any:
        """The finished kernel."""
        body = self._close()
        for key, value in (("device_id", 0), ("device_type", 1)):  # where scratch memory is: the CPU
            body = tirx.AttrStmt(tirx.const(0, "int32"), key, tirx.const(value, "int32"), body)
        func = tirx.PrimFunc([*self.params, *self.symbols.values()], body)
        return func.with_attr("global_symbol", name).with_attr("tirx.noalias", True)


_BINARY = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Min, tirx.Max, tirx.EQ, tirx.NE, tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.And, tirx.Or)


def truncating(e: Any) -> Any:
    """An index expression with divisions that round toward zero, which is the same: no index is negative.

    TVM lowers a division that rounds down, where it cannot prove signs, to selections that its simplifier then takes apart
    case by case: minutes where divisions by symbolic sizes are nested.
    """
    if isinstance(e, tirx.FloorDiv):
        return tirx.Div(truncating(e.a), truncating(e.b))
    if isinstance(e, tirx.FloorMod):
        return tirx.Mod(truncating(e.a), truncating(e.b))
    return type(e)(truncating(e.a), truncating(e.b)) if isinstance(e, _BINARY) else e


def _fold(parts: Sequence[Index], fn: Any) -> Index:
    total = parts[0]
    for p in parts[1:]:
        total = fn(total, p)
    return total


def _is(n: Index, value: int) -> bool:
    return isinstance(n, int) and n == value
