"""Kernels that reach a machine's limits and do nothing else: multiply-adds in registers, products of AMX tiles, and reading memory.

What they measure is what a program's kernels, written by the same code generator and run in the same pool, could reach.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from graphopt.backends.base import KernelSource
from graphopt.backends.tvm import amx
from graphopt.backends.tvm.code import Code, Index, i64
from graphopt.target import Target

AHEAD, LINE = 2048, 64  # bytes
TASKS = 16  # each a part of equal size: whole numbers of them for 1, 2, 4, 8 and 16 threads
TILE_INPUT, TILES_OUT = 4 * 256, 4 * 256  # f32, or pairs of bf16, of four tiles of 16 rows
TILE_FLOPS = 2 * 16 * 16 * 32  # of a product of two tiles of bf16
CHAINS = {16: 12, 32: 16}  # vector registers -> independent sums: more than latency times units, fewer than registers


def fma_chains(target: Target) -> int:
    """Vectors that each task of :func:`multiply_add` holds in registers."""
    return CHAINS[target.vector_registers]


def multiply_add(target: Target, steps: int) -> KernelSource:
    """``kernel(x f32[2 * lanes], out f32[TASKS * chains * lanes])``: each task makes ``steps * chains`` vector multiply-adds.

    So a call does ``2 * TASKS * steps * chains * lanes`` floating-point operations, nearly all in registers.
    """
    lanes, chains, code = target.lanes(4), fma_chains(target), Code({})
    x, out = code.argument("float32", 4, "x"), code.argument("float32", 4, "out")
    with code.loop(TASKS, "parallel", "task") as task:
        acc = code.alloc(chains * lanes, "float32", "acc")
        factor, shift = (code.bind(_vector(x, q * lanes, lanes), "c") for q in range(2))
        for q in range(chains):
            _put(code, acc, q * lanes, lanes, tirx.Broadcast(tirx.const(q / chains, "float32"), lanes))
        with code.loop(steps, "serial", "k"):
            for q in range(chains):
                _put(code, acc, q * lanes, lanes, _vector(acc, q * lanes, lanes) * factor + shift)
        for q in range(chains):
            _put(code, out, (task * chains + q) * lanes, lanes, _vector(acc, q * lanes, lanes))
    return _source("peak_multiply_add", code)


def multiply_tiles(steps: int) -> KernelSource:
    """``kernel(x f32[TILE_INPUT], out f32[TASKS * TILES_OUT])``: each task multiplies ``4 * steps`` pairs of tiles of bf16.

    So a call does ``TASKS * steps * 4 * TILE_FLOPS`` floating-point operations.
    """
    code = Code({})
    x, out = code.argument("float32", 4, "x"), code.argument("float32", 4, "out")
    words = TILE_INPUT // 4
    with code.loop(TASKS, "parallel", "task") as task:
        amx.configure(code, dict.fromkeys(range(8), amx.ROWS))
        for k in range(4):
            amx.zero(code, k)
            amx.load(code, 4 + k, x, k * words, amx.BYTES)
        with code.loop(steps, "serial", "k"):
            for k in range(4):
                amx.multiply(code, k, 4 + k // 2, 6 + k % 2)
        for k in range(4):
            amx.store(code, k, out, code.simplify((task * 4 + k) * words), amx.BYTES)
        amx.release(code)
    return _source("peak_multiply_tiles", code)


def read(target: Target, elements: int) -> KernelSource:
    """``kernel(x f32[elements], out f32[TASKS * chains * lanes])``: adds all elements up; ``elements`` fill TASKS times 8 vectors.

    Lines are asked for before they are read, as kernels for products of one row do: alone, the hardware reads a tenth slower.
    """
    lanes, chains, code = target.lanes(4), 8, Code({})
    part = elements // TASKS
    x, out = code.argument("float32", 4, "x"), code.argument("float32", 4, "out")
    with code.loop(TASKS, "parallel", "task") as task:
        acc = code.alloc(chains * lanes, "float32", "acc")
        for q in range(chains):
            _put(code, acc, q * lanes, lanes, tirx.Broadcast(tirx.const(0.0, "float32"), lanes))
        with code.loop(part // (chains * lanes), "serial", "k") as k:
            for line in range(0, chains * lanes, LINE // 4):
                code.prefetch(x, code.simplify(task * part + k * (chains * lanes) + (AHEAD // 4 + line)))
            for q in range(chains):
                at = task * part + (k * chains + q) * lanes
                _put(code, acc, q * lanes, lanes, _vector(acc, q * lanes, lanes) + _vector(x, at, lanes))
        for q in range(chains):
            _put(code, out, (task * chains + q) * lanes, lanes, _vector(acc, q * lanes, lanes))
    return _source("peak_read", code)


def _vector(buffer: Any, at: Index, lanes: int) -> Any:
    return buffer[tirx.Ramp(i64(at), i64(1), lanes)]


def _put(code: Code, buffer: Any, at: Index, lanes: int, value: Any) -> None:
    code.emit(tirx.BufferStore(buffer, value, [tirx.Ramp(i64(at), i64(1), lanes)]))


def _source(name: str, code: Code) -> KernelSource:
    function = code.function(name)
    return KernelSource(name, "tvmscript", str(function), function)
