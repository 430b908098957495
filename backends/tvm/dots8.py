"""Dot instructions on 8-bit integers: four neighbours of one factor are broadcast, and multiplied with four of each column of the other.

- ``vnni``: VPDPBUSD, unsigned by signed.
- ``sdot``: Arm's SDOT, signed by signed.
- ``mul``: the four of a word one after the other, by 32-bit multiplications that every processor has.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from graphopt.backends.tvm.code import Code, Index, i64

WORD = 4  # bytes that an instruction multiplies and adds at a time
ALL_128 = -0x7F7F7F80  # 128 in each byte of a word


def zeros(code: Code, vectors: int, lanes: int) -> list[Any]:
    """Vectors of sums that begin at zero, each a buffer: one for all would be memory that is asked for and given back at every tile."""
    sums = [code.alloc(lanes, "int32", "sums") for _ in range(vectors)]
    for own in sums:
        code.emit(tirx.BufferStore(own, tirx.Broadcast(tirx.const(0, "int32"), lanes), [ramp(0, lanes)]))
    return sums


def ramp(at: Index, lanes: int) -> Any:
    """The indices of neighbours."""
    return tirx.Ramp(i64(at), i64(1), lanes)


def words(code: Code, weight: Any, at: Index, lanes: int) -> Any:
    """Fours of neighbouring columns, as words."""
    return code.bind(tirx.reinterpret(f"int32x{lanes}", weight[ramp(at, WORD * lanes)]), "w", hidden=False)


def four(code: Code, left: Any, at: Index, lanes: int) -> Any:
    """Four neighbours, in every word."""
    return code.bind(tirx.Broadcast(tirx.reinterpret("int32", left[ramp(at, WORD)]), lanes), "x", hidden=False)


def vector(sums: Any, lanes: int) -> Any:
    """What a buffer holds."""
    return sums[ramp(0, lanes)]


def add(code: Code, engine: str, sums: Any, x: Any, w: Any, lanes: int) -> None:
    """Add products to a vector of sums."""
    code.emit(tirx.BufferStore(sums, dot(engine, vector(sums, lanes), x, w, lanes), [ramp(0, lanes)]))


def add_excess(code: Code, engine: str, sums: Any, w: Any, lanes: int) -> None:
    """Add what rows with 128 added have too much: 128 times each element of a column."""
    add(code, engine, sums, tirx.Broadcast(tirx.const(ALL_128, "int32"), lanes), w, lanes)


def excess(code: Code, engine: str, weight: Any, start: Index, step: int, count: int, vectors: int, lanes: int) -> list[Any]:
    """What rows with 128 added have too much, for neighbouring columns: of ``count`` fours of rows, ``step`` elements apart.

    An instruction waits for the one before of its own chain alone.
    """
    chains = 4
    assert count % chains == 0, "a line has 16 fours"
    sums = [zeros(code, vectors, lanes) for _ in range(chains)]
    with code.loop(count // chains, "serial", "k") as k:
        for q, own in enumerate(sums):
            for v in range(vectors):
                at = code.simplify(start + (k * chains + q) * step + v * lanes * WORD)
                add_excess(code, engine, own[v], words(code, weight, at, lanes), lanes)
    return [code.bind(sum(vector(own[v], lanes) for own in sums), "taken", hidden=False) for v in range(vectors)]


def dot(engine: str, total: Any, x: Any, w: Any, lanes: int) -> Any:
    """``total + x . w`` of the four bytes in each word; ``vnni`` takes those of x as unsigned."""
    vector, bytes_ = f"int32x{lanes}", f"int8x{WORD * lanes}"
    if engine == "vnni":
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        return tirx.call_llvm_pure_intrin(vector, name, total, tirx.reinterpret(bytes_, x), tirx.reinterpret(bytes_, w))
    if engine == "sdot":
        name = "llvm.aarch64.neon.sdot"
        return tirx.call_llvm_pure_intrin(vector, name, total, tirx.reinterpret(bytes_, x), tirx.reinterpret(bytes_, w))
    for p in range(WORD):
        total = total + _byte(x, p, lanes) * _byte(w, p, lanes)
    return total


def _byte(vector: Any, p: int, lanes: int) -> Any:
    """The ``p``-th byte of each word, with its sign."""

    def by(bits: int) -> Any:
        return tirx.Broadcast(tirx.const(bits, "int32"), lanes)

    up = tirx.shift_left(vector, by(24 - 8 * p)) if p < WORD - 1 else vector
    return tirx.shift_right(up, by(24))
