"""Runs of kernel calls that native code makes in one go.

A program is lines of Python, most of which call a kernel. Each such line costs a few microseconds of interpretation and of
converting tensors, with caches that are full of the kernel's data: as much as a small kernel itself. Calls that follow one
another are therefore written down once, on a *tape* an arena: which kernel, and for each argument a record that says where
its memory is. Native code goes through the tape. What a call of the program brings along is put into its places first:
fresh tensors and sizes, and where the weights lie.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

KernelFunction = Callable[..., Any]
_NAME = re.compile(r"\b([xwt])(\d+)\b")
_TENSOR = 7  # type of a record that points to a DLTensor; see tvm/ffi/c_api.h


class _Record(ctypes.Structure):
    """An argument of a kernel: TVMFFIAny."""

    _fields_ = (("type", ctypes.c_int32), ("zero", ctypes.c_uint32), ("value", ctypes.c_void_p))


class _Tensor(ctypes.Structure):
    """A DLTensor, of which kernels read the address of the memory alone."""

    _fields_ = (("data", ctypes.c_void_p), ("rest", ctypes.c_uint64 * 5))


class _Step(ctypes.Structure):
    _fields_ = (("kernel", ctypes.c_void_p), ("arguments", ctypes.c_void_p), ("count", ctypes.c_int64))


class _Patch(ctypes.Structure):
    """The record to overwrite, and the number of the one that it becomes."""

    _fields_ = (("place", ctypes.c_void_p), ("source", ctypes.c_int64))


class _Tape(ctypes.Structure):
    _fields_ = (
        ("call", ctypes.c_void_p), ("steps", ctypes.c_void_p), ("step_count", ctypes.c_int64),
        ("values", ctypes.c_void_p), ("value_count", ctypes.c_int64), ("weights", ctypes.c_void_p), ("weight_count", ctypes.c_int64),
    )  # fmt: skip


@dataclass(frozen=True)
class Native:
    """What runs tapes.

    Attributes:
        run: ``run(address of a tape, address of a table of weights, *values)``; raises what a kernel raises.
        call: address of the C function that calls a kernel, which a tape holds.
        handle: a kernel, as that function wants it.
    """

    run: Callable[..., Any]
    call: int
    handle: Callable[[KernelFunction], int]


@dataclass(frozen=True)
class Launch:
    """A line that calls a kernel and does nothing else; ``operands`` are the expressions of its arguments."""

    kernel: KernelFunction
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """Launches with nothing between them. ``values``: the expressions among their operands that each call evaluates anew."""

    launches: tuple[Launch, ...]
    values: tuple[str, ...]


class Table:
    """Where weights lie: a record each. The tensors are not kept alive."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = (_Tensor * len(tensors))(*(_Tensor(x.data_ptr()) for x in tensors))
        self._records = _records(self._tensors)
        self.address = ctypes.addressof(self._records)


class Joined:
    """A program's text with its runs of launches joined, and what is needed to make their tapes.

    Args:
        head: lines that come first, whatever else does.
        lines: of the program's body.
        launches: line -> the launch that it is.
        early: lines that give results their memory, which may as well be done before the launches in front of them.
        weights: positions of the inputs that are weights.
        staged: number of staged values.

    Attributes:
        source: the text: ``program(inputs, staged, arena, sizes, tapes, table)``.
        runs: one a tape.
        direct: the weights that launches read as they are: their input's position, in the order in which a table has them,
            behind the staged values.
    """

    def __init__(self, head: Sequence[str], lines: Sequence[str], launches: Mapping[int, Launch], early: Sequence[int],
                 weights: Sequence[int], staged: int) -> None:  # fmt: skip
        self._weights, self._staged = dict.fromkeys(weights), staged
        self.direct: list[int] = []
        self.runs: list[Run] = []
        body: list[str] = []
        waiting: list[int] = []  # launches of the run that goes on
        before: list[str] = []

        def close() -> None:
            body.extend(before)
            if len(waiting) > 1:
                body.append(self._join([launches[i] for i in waiting]))
            else:
                body.extend(lines[i] for i in waiting)
            before.clear()
            waiting.clear()

        early_lines = dict.fromkeys(early)
        for i, line in enumerate(lines):
            if i in launches:
                waiting.append(i)
            elif i in early_lines:
                before.append(line)
            else:
                close()
                body.append(line)
        close()
        body = [*head, *body]
        names = sorted({(m[1], int(m[2])) for line in body for m in _NAME.finditer(line.partition("  # ")[0])})
        source = {"x": "inputs", "w": "staged", "t": "arena"}
        body = [*(f"{kind}{i} = {source[kind]}[{i}]" for kind, i in names), *body]
        self.source = "\n".join(["def program(inputs, staged, arena, sizes, tapes, table):", *(f"    {line}" for line in body)]) + "\n"

    def _join(self, launches: Sequence[Launch]) -> str:
        operands = dict.fromkeys(o for launch in launches for o in launch.operands)
        values = tuple(o for o in operands if not o.startswith("t") and self._weight(o) is None)
        self.runs.append(Run(tuple(launches), values))
        return f"run({', '.join([f'tapes[{len(self.runs) - 1}]', 'table', *values])})  # {len(launches)} kernels"

    def _weight(self, operand: str) -> int | None:
        """The number of an operand in a table of weights; None if it is no weight as it is."""
        if operand.startswith("w"):
            return int(operand[1:])
        if not operand.startswith("x") or int(operand[1:]) not in self._weights:
            return None
        position = int(operand[1:])
        if position not in self.direct:
            self.direct.append(position)
        return self._staged + self.direct.index(position)

    def table(self, staged: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Table:
        """Where the weights of a call lie."""
        return Table([*staged, *(inputs[i] for i in self.direct)])

    def tapes(self, arena: Sequence[torch.Tensor], native: Native) -> Tapes:
        """The runs over an arena. Only one call of the program may use them at a time."""
        return Tapes([self._tape(run, arena, native) for run in self.runs])

    def _tape(self, run: Run, arena: Sequence[torch.Tensor], native: Native) -> tuple[_Tape, list[Any]]:
        places = [i for i, x in enumerate(arena) if f"t{i}" in {o for launch in run.launches for o in launch.operands}]
        tensors = (_Tensor * len(places))(*(_Tensor(arena[i].data_ptr()) for i in places))
        address = {f"t{i}": ctypes.addressof(tensors[k]) for k, i in enumerate(places)}
        steps, kept = (_Step * len(run.launches))(), list[Any]([tensors])
        patches: tuple[list[_Patch], list[_Patch]] = ([], [])
        for step, launch in zip(steps, run.launches, strict=True):
            records = (_Record * len(launch.operands))()
            kept.append(records)
            for record, operand in zip(records, launch.operands, strict=True):
                if operand in address:
                    record.type, record.value = _TENSOR, address[operand]
                    continue
                weight, place = self._weight(operand), ctypes.addressof(record)
                patches[weight is not None].append(_Patch(place, run.values.index(operand) if weight is None else weight))
            step.kernel, step.arguments, step.count = native.handle(launch.kernel), ctypes.addressof(records), len(records)
        values, weights = ((_Patch * len(found))(*found) for found in patches)
        kept += [steps, values, weights]
        tape = _Tape(native.call, ctypes.addressof(steps), len(steps), ctypes.addressof(values), len(values),
                     ctypes.addressof(weights), len(weights))  # fmt: skip
        return tape, kept


class Tapes:
    """The tapes of an arena; ``addresses`` is what a program's text is handed as ``tapes``."""

    def __init__(self, tapes: Sequence[tuple[_Tape, list[Any]]]) -> None:
        self._kept = tapes
        self.addresses = [ctypes.addressof(tape) for tape, _ in tapes]


def _records(tensors: Any) -> Any:
    return (_Record * len(tensors))(*(_Record(_TENSOR, 0, ctypes.addressof(x)) for x in tensors))
