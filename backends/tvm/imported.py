"""Functions that kernels import as LLVM IR: instructions whose operand types TensorIR has no form of.

TensorIR holds bf16 as 16-bit integers (its LLVM backend has no such float), so an instruction on bf16 is wrapped into a
function on integers, which LLVM inlines.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.ir import StringImm

from graphopt.backends.tvm.code import Code

_DOT = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define <16 x float> @graphopt_dot_bf16(<16 x float> %sum, <32 x i16> %a, <32 x i16> %b) alwaysinline {
  %x = bitcast <32 x i16> %a to <32 x bfloat>
  %y = bitcast <32 x i16> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
"""


def import_dots(code: Code) -> None:
    """Make :func:`dot` known to the kernel. Once, before the first use."""
    nothing = tirx.Evaluate(tirx.const(0, "int32"))
    code.emit(tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", StringImm(_DOT), nothing))


def dot(total: Any, a: Any, b: Any) -> Any:
    """``total[i] + a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1]`` of 16 f32 and twice 32 bf16 (held as u16): VDPBF16PS.

    Denormal numbers count as zero, and are not produced, as in all dot instructions on bf16.
    """
    return tirx.call_pure_extern("float32x16", "graphopt_dot_bf16", total, a, b)
