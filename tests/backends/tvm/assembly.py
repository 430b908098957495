"""Reading machine code: the innermost loop that holds the most of an instruction, and what of it touches the stack."""

from __future__ import annotations

import re

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.tvm.backend import TvmBackend
from graphopt.target import Target

_STACK = re.compile(r"\(%rsp|\[sp\b")


def assembly(w: Workload, t: Target, schedule: Schedule | None = None) -> str:
    """The preferred kernel of a workload for a target, as assembly text."""
    from graphopt.backends.tvm.lowering import compile_functions

    template = TvmBackend().templates(w, t)[0]
    source = template.emit(w, schedule or template.space(w, t).default(), t)
    return str(compile_functions({source.name: source.payload}, t).inspect_source("s"))


def loops(text: str) -> list[list[str]]:
    """The instructions of every loop without a branch inside: from a label to the jump back to it."""
    found, label, body = [], "", []
    for line in text.splitlines():
        if start := re.match(r"(\.LBB\w+):", line):
            label, body = start[1], []
        elif line.startswith("\t") and not line.strip().startswith((".", "#", "//")):
            body.append(line.strip())
            if re.match(r"\t(j\w+|b\.\w+|cbn?z|tbn?z)\b", line):
                if label and line.rstrip().endswith(label):
                    found.append(body)
                label, body = "", []
    return found


def hot_loop(text: str, instruction: str) -> list[str]:
    """The loop with the most matches of an instruction (a regular expression)."""
    return max(loops(text), key=lambda loop: count(loop, instruction), default=[])


def count(loop: list[str], instruction: str) -> int:
    return sum(bool(re.search(instruction, line)) for line in loop)


def stack_accesses(loop: list[str]) -> list[str]:
    """Instructions that read or write the stack: registers that were spilled."""
    return [line for line in loop if _STACK.search(line)]
