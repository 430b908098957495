"""A program whose launches are recorded once and replayed: a CUDA graph for each combination of sizes.

What a graph reads and writes lies where it lay when it was recorded. So:

- inputs are copied into memory of the graph's own, which is not part of its pool;
- outputs are copied out of it: no later call changes what an earlier one returned;
- weights, and what is staged from them, are not copied. A recording belongs to one state of them, and is let go with it;
- an argument that the program updates in place (a key-value cache) is not copied either. Where it lies is part of what a recording is for.

The first call of its kind is made as it always was, the second one too, over the memory that is then recorded over: so all that is
compiled or allocated at a first launch is there before a recording, which may do neither. The third one is a replay.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from graphopt.errors import counted, first_line
from graphopt.ir.interpreter import resolve_aten
from graphopt.lower import KernelStep, LibraryStep, Lowered
from graphopt.recorders import CpuRecorder, CudaRecorder, Recorder, Recording
from graphopt.remarks import Remark
from graphopt.report import GraphCalls, Report
from graphopt.weights import Values

if TYPE_CHECKING:
    from graphopt.program import Program

NAME = "cuda-graphs"
MOST = 16  # recordings of a program: each has copies of its inputs, and a pool
_SEEN = 256  # kinds of calls that are remembered as having come once
_PATIENCE = 32  # calls without a recording, after which the report says so
_NAMESPACES = ("aten", "prims", "graphopt")  # of operators that are known to do all that they do on the device
_WAITS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)  # not in every PyTorch


def record_calls(program: Program, lowered: Lowered, report: Report, device: torch.device, interpreted: bool) -> None:
    """Let the calls of a program be recorded and replayed, and the report say what comes of it.

    Args:
        interpreted: whether the kernels are a GPU's, interpreted for CPU tensors.
    """
    if device.type == "cuda":
        program.graphed = Graphed(program, lowered, CudaRecorder(device), report)
    elif interpreted:
        program.graphed = Graphed(program, lowered, CpuRecorder(), report)
    else:
        not_recorded(report, f"the model is on {device}")


def not_recorded(report: Report, why: str) -> None:
    """Say in the report that no call is recorded, and why."""
    report.graphs = GraphCalls(stopped=why)
    report.remarks.append(Remark("missed", NAME, NAME, f"each call is launched: {why}"))


def unrecordable(lowered: Lowered) -> str | None:
    """Why no call of a program can be recorded; None if nothing is known to be in the way."""
    calls = [s for s in lowered.steps if isinstance(s, KernelStep | LibraryStep)]
    if not calls:
        return "it launches nothing"
    return next((why for s in calls if (why := _unfit(s)) is not None), None)


def _unfit(step: KernelStep | LibraryStep) -> str | None:
    where = f" [{step.node.loc}]" if step.node.loc else ""
    if isinstance(step, KernelStep) or step.node.op.name != "aten":
        return None
    target = resolve_aten(step.node.attrs["target"])
    if target.namespace not in _NAMESPACES:
        return f"{target} may do what a recording does not have, as it is no operator of PyTorch's{where}"
    if step.node.attrs["effect"] == "mutates":
        return f"{target} has effects beside its results{where}"
    if any(tag in target.tags for tag in _WAITS):
        return f"{target} waits for the device{where}"
    truth = target.namespace == "aten" and "index_put" in target._schema.name and any(v.dtype.is_bool for v in step.node.operands[1:])
    if truth or _UNSAFE in target.tags or (torch.version.hip is not None and target == torch.ops.aten.topk.default):
        return f"{target} cannot be recorded{where}"  # topk: a fault of ROCm's at the second replay, says PyTorch
    return None


class _Static:
    """The memory that a recording reads its inputs from: the input's position -> tensor.

    ``streams``: those that the recorder has told PyTorch's allocator of.
    """

    def __init__(self, tensors: dict[int, torch.Tensor]) -> None:
        self.tensors = tensors
        self.streams: set[Any] = set()  # membership only
        self._places = [_once(x) for x in tensors.values()]

    def fill(self, inputs: Sequence[torch.Tensor]) -> None:
        """Copy a call's inputs to where they are read."""
        if self._places:
            torch._foreach_copy_(self._places, [_once(inputs[i]) for i in self.tensors])

    @property
    def nbytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.tensors.values())


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _once(x: torch.Tensor) -> torch.Tensor:
    """A tensor without the axes that repeat its elements, which cannot be written to."""
    if 0 not in x.stride():
        return x
    return x.as_strided([1 if s == 0 else n for n, s in zip(x.shape, x.stride(), strict=True)], x.stride())


class _Recorded(NamedTuple):
    """A recording, and the memory that its inputs are copied into."""

    memory: _Static
    recording: Recording


class Graphed:
    """Makes the calls of a program by replays, where it can.

    Args:
        program: what is recorded; a copy of it that runs over an arena of its own is.
        lowered: its steps.
        report: told what was recorded and what was not, and why; counts calls.
    """

    def __init__(self, program: Program, lowered: Lowered, recorder: Recorder, report: Report) -> None:
        self._program, self._recorder, self._report = program, recorder, report
        self._lock = threading.Lock()
        self._inside: int | None = None  # the thread that has the lock
        self._alone: Callable[..., list[torch.Tensor]] | None = None
        self._alive: weakref.WeakSet[Recording] = weakref.WeakSet()
        self._said: dict[str, None] = {}
        self._in_place = lowered.in_place
        inputs = program.graph.inputs
        read = dict.fromkeys(v for step in lowered.steps for v in step.node.operands) | dict.fromkeys(lowered.graph.outputs)
        watched = dict.fromkeys(program.weights.positions)  # a recording is let go when one of these changes or moves
        self._held = [*program.written, *(v.index for v in inputs if v.weight and v in read and v.index not in watched)]
        self._copied = [v.index for v in inputs if not v.weight and v in read and v.index not in program.written]
        self._by_size = not program.guarded or bool(program.graph.symbols)
        self.calls = report.graphs = GraphCalls()
        if (why := unrecordable(lowered)) is not None:
            self._stop(why)

    def __call__(self, values: Values | None, inputs: Sequence[torch.Tensor], staged: Sequence[torch.Tensor], sizes: Mapping[str, int],
                 ) -> list[torch.Tensor] | None:  # fmt: skip
        """The outputs of a call that is replayed, or made over memory to be recorded over; None for one that is to be made as ever.

        Args:
            values: the state of the weights that ``staged`` is of, recordings are kept with it; None for one that lasts for this call only.
            inputs: in the layout that kernels expect.
        """
        if self.calls.stopped or self._inside == threading.get_ident():  # or called by what it calls itself
            return None
        why = self._recorder.why_not_now() or (self._unfit_inputs(inputs) if self._by_size else None)
        if values is None:
            why = "a weight lies in another layout than kernels expect, and is copied for each call"
        if why is not None or values is None:
            self.calls.launched += 1
            self._say(f"not replayed: {why}")
            return None
        with self._lock:
            self._inside = threading.get_ident()
            try:
                return self._recorded_call(values, inputs, staged, sizes)
            finally:
                self._inside = None

    def _recorded_call(self, values: Values, inputs: Sequence[torch.Tensor], staged: Sequence[torch.Tensor], sizes: Mapping[str, int],
                       ) -> list[torch.Tensor] | None:  # fmt: skip
        kinds: dict[Any, _Recorded | None] = values.made.setdefault(self, {})
        kind = self._kind(inputs, sizes)
        if (found := kinds.get(kind)) is not None:
            self.calls.replayed += 1
            return self._replay(found, inputs)
        self.calls.launched += 1
        if kind in kinds and self._room():
            return self._record(kinds, kind, inputs, staged, sizes)
        if len(kinds) >= _SEEN:
            values.made[self] = kinds = {k: r for k, r in kinds.items() if r is not None}
        kinds.setdefault(kind, None)
        if self.calls.launched == _PATIENCE and not self.calls.recorded:
            self._say("none of the first calls had the sizes, the weights and the addresses of what is updated in place of another one")
        return None

    def _kind(self, inputs: Sequence[torch.Tensor], sizes: Mapping[str, int]) -> tuple[Any, ...]:
        """What calls have in common that one recording can make."""
        held = [inputs[i].data_ptr() for i in self._held]
        if not self._by_size:
            return tuple(held)
        forms = [(x.shape, x.stride(), x.dtype, x.device) for x in (inputs[i] for i in (*self._held, *self._copied))]
        return (*held, *sizes.values(), *forms)

    def _room(self) -> bool:
        """Whether one more may be recorded."""
        if len(self._alive) < MOST:
            return True
        self._say(f"no more than {MOST} are recorded: calls of other sizes, or that update other memory in place, are launched one by one")
        return False

    def _replay(self, found: _Recorded, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self._recorder.in_order(found.memory.tensors.values(), found.memory.streams)
        found.memory.fill(inputs)
        found.recording.replay()
        return [inputs[self._in_place[k]] if k in self._in_place else x.clone() for k, x in enumerate(found.recording.outputs)]

    def _record(self, kinds: dict[Any, _Recorded | None], kind: Any, inputs: Sequence[torch.Tensor], staged: Sequence[torch.Tensor],
                sizes: Mapping[str, int]) -> list[torch.Tensor]:  # fmt: skip
        """Make a call over memory of a recording's own, and record it."""
        if self._alone is None:
            self._alone = self._program.alone(self._recorder.kernel)
        run, placed = self._alone, list(inputs)
        with torch.inference_mode(False):  # tensors that any later call may write to
            memory = _Static({i: _like(inputs[i]) for i in self._copied})
        for i, x in memory.tensors.items():
            placed[i] = x
        self._recorder.in_order(memory.tensors.values(), memory.streams)
        memory.fill(inputs)
        outputs = run(placed, staged, sizes)
        try:
            recording = self._recorder.record(lambda: run(placed, staged, sizes), [inputs[i] for i in self._program.written])
        except Exception as error:  # whatever a driver, a library or an operator may raise: the call itself was made
            self._stop(f"recording failed: {first_line(error)}")
        else:
            for k in self._in_place:
                recording.outputs[k] = torch.empty(0)  # the caller's memory, which must not live as long as a recording
            kinds[kind] = _Recorded(memory, recording)
            self._alive.add(recording)
            self.calls.recorded += 1
            self._report.memory["graphs"] = (self._report.memory.get("graphs") or 0) + recording.nbytes + memory.nbytes
            where = f" of {', '.join(f'{s} = {n}' for s, n in sizes.items())}" if sizes else ""
            self._say(f"recorded: {counted(len(self._program.calls), 'call')} of kernels and the library{where}", "passed")
        return [inputs[self._in_place[k]] if k in self._in_place else x for k, x in enumerate(outputs)]

    def _unfit_inputs(self, inputs: Sequence[torch.Tensor]) -> str | None:
        """Why the inputs cannot be copied to where a recording reads them."""
        for i in self._copied:
            x, name = inputs[i], self._program.graph.inputs[i].hint or f"input {i}"
            if x.device != self._program.device:
                return f"{name} is on {x.device}, where a recording would not read it again"
            if x.layout is not torch.strided or x.is_nested:
                return f"{name} is no strided tensor"
        return None

    def _stop(self, why: str) -> None:
        self.calls.stopped, self._alone = why, None
        self._say(f"each call is launched: {why}")

    def _say(self, message: str, kind: Literal["passed", "missed"] = "missed") -> None:
        if message not in self._said:
            self._said[message] = None
            self._report.remarks.append(Remark(kind, NAME, NAME, message))
