"""From emitted functions to machine code: TVM's lowering passes, the few that explicit loops need, and LLVM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
from tvm import tirx

from graphopt.backends.tvm.llvm_target import target_description
from graphopt.target import Target


def compile_functions(functions: Mapping[str, Any], target: Target) -> Any:
    """A runtime module with these functions. Indices stay 64 bits wide, so that no size overflows."""
    host = tvm.target.Target(target_description(target))
    mod = tvm.IRModule(dict(functions))
    mod = tirx.transform.BindTarget(host.with_host(host))(mod)
    passes = [
        tirx.transform.VectorizeLoop(True), tirx.transform.UnrollLoop(),
        tirx.transform.AnnotateEntryFunc(), tirx.transform.SplitHostDevice(), tirx.transform.MakePackedAPI(),
        tirx.transform.LowerTVMBuiltin(), tirx.transform.LowerIntrin(),
    ]  # fmt: skip
    lowered = tvm.ir.transform.Sequential(passes)(mod)
    return tvm.get_global_func("target.build.llvm")(lowered, host)
