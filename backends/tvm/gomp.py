"""Native glue: it launches a kernel's parallel loop in the OpenMP pool of this process; written as LLVM IR.

``GOMP_parallel(body, c, 0, 0)`` runs ``body`` once in every thread of the team, whose size is the caller's: what
``torch.set_num_threads`` set. Each thread calls the loop's function with its number and the team's size.

Beside it, ``graphopt_run_tape`` calls one kernel after the other: see :mod:`graphopt.tape`, whose structures it reads.

``graphopt_changed_words`` compares words in memory with those that were seen before, without a branch between them, so that
the many cache misses of looking at every weight overlap.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from graphopt.backends.tvm.link import link
from graphopt.backends.tvm.llvm_target import target_description
from graphopt.errors import BuildError
from graphopt.target import Target, detect

_IR = """target triple = "TRIPLE"
%call = type { ptr, ptr }
%env = type { ptr, i32 }
%record = type { i32, i32, ptr }
%step = type { ptr, ptr, i64 }
%patch = type { ptr, i64 }
%tape = type { ptr, ptr, i64, ptr, i64, ptr, i64 }
declare i32 @omp_get_thread_num()
declare i32 @omp_get_num_threads()
declare void @GOMP_parallel(ptr, ptr, i32, i32)
define internal void @member(ptr %c) {
  %e = alloca %env
  %task = call i32 @omp_get_thread_num()
  %team = call i32 @omp_get_num_threads()
  store ptr null, ptr %e
  %tp = getelementptr %env, ptr %e, i32 0, i32 1
  store i32 %team, ptr %tp
  %f = load ptr, ptr %c
  %dp = getelementptr %call, ptr %c, i32 0, i32 1
  %d = load ptr, ptr %dp
  %r = call i32 %f(i32 %task, ptr %e, ptr %d)
  ret void
}
define i32 @graphopt_parallel_launch(ptr %f, ptr %d, i32 %n) {
  %c = alloca %call
  store ptr %f, ptr %c
  %dp = getelementptr %call, ptr %c, i32 0, i32 1
  store ptr %d, ptr %dp
  call void @GOMP_parallel(ptr @member, ptr %c, i32 %n, i32 0)
  ret i32 0
}
define i32 @graphopt_changed_words(ptr %at, ptr %seen, i64 %n) {
entry:
  br label %test
test:
  %i = phi i64 [0, %entry], [%next, %look]
  %all = phi i32 [0, %entry], [%some, %look]
  %more = icmp ult i64 %i, %n
  br i1 %more, label %look, label %done
look:
  %ap = getelementptr ptr, ptr %at, i64 %i
  %a = load ptr, ptr %ap
  %word = load i32, ptr %a
  %sp = getelementptr i32, ptr %seen, i64 %i
  %s = load i32, ptr %sp
  %x = xor i32 %word, %s
  %some = or i32 %all, %x
  %next = add i64 %i, 1
  br label %test
done:
  ret i32 %all
}
define internal void @place(ptr %tape, i32 %values, ptr %from) {
entry:
  %first = getelementptr %tape, ptr %tape, i32 0, i32 3
  %own = getelementptr %tape, ptr %tape, i32 0, i32 5
  %is = icmp ne i32 %values, 0
  %which = select i1 %is, ptr %first, ptr %own
  %patches = load ptr, ptr %which
  %np = getelementptr ptr, ptr %which, i64 1
  %n = load i64, ptr %np
  br label %test
test:
  %i = phi i64 [0, %entry], [%next, %put]
  %more = icmp ult i64 %i, %n
  br i1 %more, label %put, label %done
put:
  %pp = getelementptr %patch, ptr %patches, i64 %i
  %to = load ptr, ptr %pp
  %sp = getelementptr %patch, ptr %patches, i64 %i, i32 1
  %source = load i64, ptr %sp
  %record = getelementptr %record, ptr %from, i64 %source
  %both = load i128, ptr %record, align 8
  store i128 %both, ptr %to, align 8
  %next = add i64 %i, 1
  br label %test
done:
  ret void
}
define i32 @graphopt_run_tape(ptr %self, ptr %args, i32 %count, ptr %result) {
entry:
  %r = alloca %record
  %tp = getelementptr %record, ptr %args, i64 0, i32 2
  %tape = load ptr, ptr %tp
  %wp = getelementptr %record, ptr %args, i64 1, i32 2
  %weights = load ptr, ptr %wp
  %values = getelementptr %record, ptr %args, i64 2
  call void @place(ptr %tape, i32 1, ptr %values)
  call void @place(ptr %tape, i32 0, ptr %weights)
  %call = load ptr, ptr %tape
  %stp = getelementptr %tape, ptr %tape, i32 0, i32 1
  %steps = load ptr, ptr %stp
  %np = getelementptr %tape, ptr %tape, i32 0, i32 2
  %n = load i64, ptr %np
  br label %test
test:
  %i = phi i64 [0, %entry], [%next, %step]
  %error = phi i32 [0, %entry], [%code, %step]
  %more = icmp ult i64 %i, %n
  %fine = icmp eq i32 %error, 0
  %go = and i1 %more, %fine
  br i1 %go, label %step, label %done
step:
  store %record zeroinitializer, ptr %r
  %fp = getelementptr %step, ptr %steps, i64 %i
  %f = load ptr, ptr %fp
  %ap = getelementptr %step, ptr %steps, i64 %i, i32 1
  %a = load ptr, ptr %ap
  %cp = getelementptr %step, ptr %steps, i64 %i, i32 2
  %c = load i64, ptr %cp
  %c32 = trunc i64 %c to i32
  %code = call i32 %call(ptr %f, ptr %a, i32 %c32, ptr %r)
  %next = add i64 %i, 1
  br label %test
done:
  ret i32 %error
}
"""


def launcher_file(directory: Path, target: Target | None = None) -> Path:
    """Where the built glue for an architecture, this machine's unless given, lies in a kernel cache."""
    digest = hashlib.sha256((_IR + (target or detect()).arch).encode()).hexdigest()[:12]
    return directory / f"launch-{digest}.so"


def build_launcher(directory: Path, target: Target | None = None) -> Path | None:
    """Build the glue if it is not there (imports tvm). None if there is no linker."""
    output = launcher_file(directory, target)
    return output if output.exists() or build_ir(_IR, output, target or detect()) else None


def build_ir(text: str, output: Path, target: Target) -> bool:
    """Build a shared object from LLVM IR, in which ``TRIPLE`` stands for the target's (imports tvm). False if there is no linker."""
    import tvm

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        source = Path(scratch) / "glue.ll"
        source.write_text(text.replace("TRIPLE", target_description(target).get("mtriple", "")))
        module = tvm.runtime.load_module(str(source))
        module.write_to_file(str(source.with_suffix(".o")))
        if link(source.with_suffix(".o"), source.with_suffix(".so"), target) is None:
            return False
        os.replace(source.with_suffix(".so"), output)
    return True


def launcher(directory: Path) -> tuple[Any, int] | None:
    """(library, address of the launch function); None if it cannot be had."""
    try:
        path = launcher_file(directory)
        if not path.exists() and build_launcher(directory) is None:
            return None
        library = ctypes.CDLL(str(path))
        address = ctypes.cast(library.graphopt_parallel_launch, ctypes.c_void_p).value
    except (OSError, AttributeError, BuildError):
        return None
    return (library, address) if address else None
