"""Native code for the other side of TVM's RPC: it runs candidates there, in a process of their own each time; written as LLVM IR.

A server of TVM knows how to load a library and to call its functions, one at a time over the network. That is too far away to time a
kernel of microseconds, and a kernel that crashes would take the server's process with it, and the server. So this library is loaded
first. It has two functions:

``graphopt_c(f, a, b, ...)`` calls a function of C by address, with up to six integers, strings or tensors (the address of
their elements), and gives what it returns. Where ``f`` is 0 it gives the address of ``dlsym``, from which all others follow.

``graphopt_run(slices, n, width, seconds)`` forks. The child runs n slices, one after the other, and writes into each, in memory that the
two share, how long it took and how large the child has become; then it ends. The parent waits, and gives the child's status as of
``waitpid``. A child that has not ended after so many seconds is killed by SIGALRM, and one whose parent is gone by SIGKILL. A slice is::

    i64 kernel, i64 rows, i64 count, i64 first, i64 calls, f64 seconds, i64 kilobytes, i64 done

``rows`` are count rows of ``width`` arguments (``TVMFFIAny``); calls take one after the other, from ``first`` on, round and round.
"""

from __future__ import annotations

from pathlib import Path

from graphopt.backends.tvm.gomp import build_ir
from graphopt.target import Target

SLICE_WORDS = 8  # of 64 bits
SECONDS, KILOBYTES, DONE = 5, 6, 7  # words of a slice that the child writes
KERNEL_FAILED = 1  # exit status of a child whose kernel returned an error

IR = """target triple = "TRIPLE"
%record = type { i32, i32, i64 }
%slice = type { ptr, ptr, i64, i64, i64, double, i64, i64 }
%time = type { i64, i64 }
declare ptr @dlsym(ptr, ptr)
declare i32 @fork()
declare i32 @waitpid(i32, ptr, i32)
declare i32 @alarm(i32)
declare i32 @prctl(i32, i64, i64, i64, i64)
declare i32 @clock_gettime(i32, ptr)
declare i32 @getrusage(i32, ptr)
declare void @_exit(i32)
define internal i64 @word(ptr %args, i32 %n, i32 %i) {
entry:
  %there = icmp slt i32 %i, %n
  br i1 %there, label %read, label %none
read:
  %at = getelementptr %record, ptr %args, i32 %i
  %type = load i32, ptr %at
  %vp = getelementptr %record, ptr %at, i32 0, i32 2
  %v = load i64, ptr %vp
  %tensor = icmp eq i32 %type, 7
  br i1 %tensor, label %inside, label %plain
inside:
  %t = inttoptr i64 %v to ptr
  %data = load i64, ptr %t
  ret i64 %data
plain:
  ret i64 %v
none:
  ret i64 0
}
define internal void @give(ptr %result, i64 %v) {
  store i32 1, ptr %result
  %pad = getelementptr %record, ptr %result, i32 0, i32 1
  store i32 0, ptr %pad
  %vp = getelementptr %record, ptr %result, i32 0, i32 2
  store i64 %v, ptr %vp
  ret void
}
define i32 @__tvm_ffi_graphopt_c(ptr %self, ptr %args, i32 %n, ptr %result) {
entry:
  %f = call i64 @word(ptr %args, i32 %n, i32 0)
  %bare = icmp eq i64 %f, 0
  br i1 %bare, label %first, label %other
first:
  call void @give(ptr %result, i64 ptrtoint (ptr @dlsym to i64))
  ret i32 0
other:
  %a = call i64 @word(ptr %args, i32 %n, i32 1)
  %b = call i64 @word(ptr %args, i32 %n, i32 2)
  %c = call i64 @word(ptr %args, i32 %n, i32 3)
  %d = call i64 @word(ptr %args, i32 %n, i32 4)
  %e = call i64 @word(ptr %args, i32 %n, i32 5)
  %g = call i64 @word(ptr %args, i32 %n, i32 6)
  %function = inttoptr i64 %f to ptr
  %v = call i64 %function(i64 %a, i64 %b, i64 %c, i64 %d, i64 %e, i64 %g)
  call void @give(ptr %result, i64 %v)
  ret i32 0
}
define internal double @now() {
  %t = alloca %time
  %r = call i32 @clock_gettime(i32 1, ptr %t)
  %s = load i64, ptr %t
  %np = getelementptr %time, ptr %t, i32 0, i32 1
  %n = load i64, ptr %np
  %whole = sitofp i64 %s to double
  %part = sitofp i64 %n to double
  %nano = fmul double %part, 1.0e-9
  %sum = fadd double %whole, %nano
  ret double %sum
}
define internal i32 @one(ptr %s, i64 %width) {
entry:
  %result = alloca %record
  %usage = alloca [32 x i64]
  %kernel = load ptr, ptr %s
  %rowsp = getelementptr %slice, ptr %s, i32 0, i32 1
  %rows = load ptr, ptr %rowsp
  %countp = getelementptr %slice, ptr %s, i32 0, i32 2
  %count = load i64, ptr %countp
  %firstp = getelementptr %slice, ptr %s, i32 0, i32 3
  %first = load i64, ptr %firstp
  %callsp = getelementptr %slice, ptr %s, i32 0, i32 4
  %calls = load i64, ptr %callsp
  %width32 = trunc i64 %width to i32
  %begin = call double @now()
  br label %test
test:
  %i = phi i64 [0, %entry], [%next, %fine]
  %row = phi i64 [%first, %entry], [%following, %fine]
  %more = icmp slt i64 %i, %calls
  br i1 %more, label %run, label %over
run:
  %offset = mul i64 %row, %width
  %args = getelementptr %record, ptr %rows, i64 %offset
  store %record zeroinitializer, ptr %result
  %code = call i32 %kernel(ptr null, ptr %args, i32 %width32, ptr %result)
  %failed = icmp ne i32 %code, 0
  br i1 %failed, label %bad, label %fine
fine:
  %next = add i64 %i, 1
  %up = add i64 %row, 1
  %wraps = icmp sge i64 %up, %count
  %following = select i1 %wraps, i64 0, i64 %up
  br label %test
bad:
  ret i32 1
over:
  %end = call double @now()
  %seconds = fsub double %end, %begin
  %secondsp = getelementptr %slice, ptr %s, i32 0, i32 5
  store double %seconds, ptr %secondsp
  %r = call i32 @getrusage(i32 0, ptr %usage)
  %largest = getelementptr [32 x i64], ptr %usage, i32 0, i32 4
  %kilobytes = load i64, ptr %largest
  %kilobytesp = getelementptr %slice, ptr %s, i32 0, i32 6
  store i64 %kilobytes, ptr %kilobytesp
  %donep = getelementptr %slice, ptr %s, i32 0, i32 7
  store i64 1, ptr %donep
  ret i32 0
}
define internal void @child(ptr %slices, i64 %n, i64 %width, i64 %seconds) {
entry:
  %p = call i32 @prctl(i32 1, i64 9, i64 0, i64 0, i64 0)
  %seconds32 = trunc i64 %seconds to i32
  %al = call i32 @alarm(i32 %seconds32)
  br label %test
test:
  %i = phi i64 [0, %entry], [%next, %run]
  %more = icmp slt i64 %i, %n
  br i1 %more, label %run, label %over
run:
  %s = getelementptr %slice, ptr %slices, i64 %i
  %code = call i32 @one(ptr %s, i64 %width)
  %next = add i64 %i, 1
  %failed = icmp ne i32 %code, 0
  br i1 %failed, label %bad, label %test
bad:
  call void @_exit(i32 1)
  unreachable
over:
  call void @_exit(i32 0)
  unreachable
}
define i32 @__tvm_ffi_graphopt_run(ptr %self, ptr %args, i32 %n, ptr %result) {
entry:
  %status = alloca i32
  %at = call i64 @word(ptr %args, i32 %n, i32 0)
  %slices = inttoptr i64 %at to ptr
  %count = call i64 @word(ptr %args, i32 %n, i32 1)
  %width = call i64 @word(ptr %args, i32 %n, i32 2)
  %seconds = call i64 @word(ptr %args, i32 %n, i32 3)
  store i32 -1, ptr %status
  %pid = call i32 @fork()
  %is_child = icmp eq i32 %pid, 0
  br i1 %is_child, label %inside, label %parent
inside:
  call void @child(ptr %slices, i64 %count, i64 %width, i64 %seconds)
  unreachable
parent:
  %forked = icmp sgt i32 %pid, 0
  br i1 %forked, label %wait, label %over
wait:
  %got = call i32 @waitpid(i32 %pid, ptr %status, i32 0)
  %ended = icmp eq i32 %got, %pid
  br i1 %ended, label %over, label %wait
over:
  %code = load i32, ptr %status
  %code64 = sext i32 %code to i64
  call void @give(ptr %result, i64 %code64)
  ret i32 0
}
"""


def build_agent(output: Path, target: Target) -> bool:
    """Build the library for a machine of the target's architecture. False if there is no linker for it."""
    return build_ir(IR, output, target)
