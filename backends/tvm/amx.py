"""AMX tiles: two-dimensional registers of 16 rows by 64 bytes, and the product of two of them.

A tile is named by its number, 0 to 7. Their shapes are set for the thread by ``configure`` and given up by ``release``; both
belong inside of a parallel loop. The process must have been granted the registers: ``graphopt.target.request_amx``.

Reference: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import tirx

from graphopt.backends.tvm.code import Code, Index, i64

ROWS, BYTES = 16, 64  # the most that a tile holds
_COLUMN_BYTES, _ROW_COUNTS = 16, 48  # where the shapes lie in the 64 bytes of a configuration


def _do(code: Code, name: str, *args: Any) -> None:
    code.emit(tirx.Evaluate(tirx.call_llvm_intrin("int32", f"llvm.x86.{name}", *args)))


def _tile(number: int) -> Any:
    return tirx.const(number, "int8")


def _at(buffer: Any, at: Index) -> Any:
    return tirx.address_of(buffer[i64(at)])


def configure(code: Code, rows: Mapping[int, int]) -> None:
    """Set the shapes of this thread's tiles: rows by 64 bytes each."""
    shape = code.alloc(64, "uint8", "tiles", scope="local")
    content = {0: 1}  # the palette
    for number, count in rows.items():
        content |= {_COLUMN_BYTES + 2 * number: BYTES, _ROW_COUNTS + number: count}
    for k in range(64):
        code.store(shape, k, tirx.const(content.get(k, 0), "uint8"))
    _do(code, "ldtilecfg", _at(shape, 0))


def release(code: Code) -> None:
    """Leave the tiles as they were before: unused, so that nobody saves or expects anything of them."""
    _do(code, "tilerelease")


def zero(code: Code, tile: int) -> None:
    _do(code, "tilezero", _tile(tile))


def load(code: Code, tile: int, buffer: Any, at: Index, step: Index, once: bool = False) -> None:
    """Rows of 64 bytes, from element ``at``, ``step`` bytes apart. What is read ``once`` need not stay in the nearest cache."""
    _do(code, "tileloaddt164" if once else "tileloadd64", _tile(tile), _at(buffer, at), i64(step))


def store(code: Code, tile: int, buffer: Any, at: Index, step: Index) -> None:
    """Inverse of :func:`load`."""
    _do(code, "tilestored64", _tile(tile), _at(buffer, at), i64(step))


def multiply(code: Code, total: int, a: int, b: int) -> None:
    """``total[m, n] += a[m, 2 k] * b[k, 2 n] + a[m, 2 k + 1] * b[k, 2 n + 1]`` over k: bf16 pairs, summed in f32 (TDPBF16PS)."""
    _do(code, "tdpbf16ps", _tile(total), _tile(a), _tile(b))


def multiply_halves(code: Code, total: int, a: int, b: int) -> None:
    """``total[m, n] += a[m, 2 k] * b[k, 2 n] + a[m, 2 k + 1] * b[k, 2 n + 1]`` over k: f16 pairs, summed in f32 (TDPFP16PS)."""
    _do(code, "tdpfp16ps", _tile(total), _tile(a), _tile(b))


def multiply_bytes(code: Code, total: int, a: int, b: int) -> None:
    """``total[m, n] += sum over p < 4 of a[m, 4 k + p] * b[k, 4 n + p]`` over k: i8, summed in i32 with wrap-around (TDPBSSD)."""
    _do(code, "tdpbssd", _tile(total), _tile(a), _tile(b))
