"""PyTorch's symbolic sizes to the IR's: sympy expressions over ``s0``-like symbols, with the ranges that guards gave them."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.utils._sympy.symbol import SymT, symbol_is_type

from graphopt.capture.captured import Uncapturable
from graphopt.ir import dims
from graphopt.ir.dims import Dim, Range
from graphopt.ir.types import DType

_RESERVED = ("none", "true", "false", "inf", "nan", "max", "min", "body", "weight", "where", "return", "graph")
_LEAST = -(2**62)  # stands for "unbounded below"


class SymbolTable:
    """Converts sizes; collects the symbols met, their ranges in ``ranges``, and their values in the example inputs in ``examples``."""

    def __init__(self) -> None:
        self.ranges: dict[str, Range] = {}
        self.examples: dict[str, int] = {}
        self._names: dict[str, str] = {}

    def dim(self, size: Any) -> Dim:
        """The size as the IR holds it: an int, a ``torch.SymInt`` or a sympy expression comes in.

        Raises:
            Uncapturable: a form that the IR's sizes do not have, or a data-dependent symbol.
        """
        if isinstance(size, int):
            return int(size)
        if isinstance(size, torch.SymInt):
            constant = size.node.maybe_as_int()
            if constant is not None:
                return int(constant)
            self._env = size.node.shape_env
            return dims.simplify(self._convert(size.node.expr))
        raise Uncapturable(f"a size of type {type(size).__name__}")

    def _convert(self, e: sympy.Expr) -> sympy.Expr:
        if e.is_Integer:
            return sympy.Integer(int(e))
        if e.is_Symbol:
            return dims.symbol(self._symbol(e))
        kind = type(e).__name__
        args = [self._convert(a) for a in e.args if kind not in ("Rational", "Half")]
        match kind:
            case "Add":
                return sympy.Add(*args)
            case "Mul":
                return sympy.Mul(*args)
            case "FloorDiv" | "CleanDiv":
                return dims.FloorDiv(*args)
            case "Mod" | "PythonMod":
                return sympy.Mod(*args)
            case "ModularIndexing":
                return sympy.Mod(dims.FloorDiv(args[0], args[1]), args[2])
            case "Pow" | "PowByNatural" if args[1].is_Integer and args[1] >= 0:
                return sympy.Pow(*args)
            case "Max" | "Min" if all(self._nonnegative(a) for a in args):
                return (sympy.Max if kind == "Max" else sympy.Min)(*args)
            case "CeilToInt" | "FloorToInt" | "ToFloat" if args[0].is_integer and kind != "ToFloat":
                return args[0]
        raise Uncapturable(f"a size of the form {e}")

    def _nonnegative(self, e: sympy.Expr) -> bool:
        """Whether no symbol in it may be negative (the IR's symbols are nonnegative: Max and Min would be simplified)."""
        return all(self.ranges[s.name].lo >= 0 for s in e.free_symbols)

    def _symbol(self, s: sympy.Symbol) -> str:
        if s.name in self._names:
            return self._names[s.name]
        values = self._env.var_to_range.get(s)
        if symbol_is_type(s, SymT.UNBACKED_INT):
            raise Uncapturable(f"the data-dependent size {s}")
        if symbol_is_type(s, SymT.FLOAT):
            raise Uncapturable(f"the symbolic float {s}")
        name = s.name + "_" if s.name in DType._registry or s.name in _RESERVED else s.name
        lo, hi = (0, None) if values is None else (_bound(values.lower, _LEAST), _bound(values.upper, None))
        self._names[s.name] = name
        self.ranges[name] = Range(_LEAST if lo is None else lo, hi)
        env = self._env
        known = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val  # the name in PyTorch before 2.12
        example = known.get(s)
        if example is not None:
            self.examples[name] = int(example)
        return name


def _bound(value: Any, unbounded: int | None) -> int | None:
    """A finite bound, or what stands for none."""
    if value.is_Integer and abs(int(value)) < 2**62:
        return int(value)
    return unbounded
