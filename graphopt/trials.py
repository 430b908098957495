"""Cases that the tuner tries kernels on: random inputs that a workload admits, and what must come out, judged against f64.

The reference is computed once a case, not once a candidate. The budget is that of :mod:`graphopt.verification`: four times the error
that eager has itself, plus a few units of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from graphopt.autotune.measure import Case, Output, Verdict
from graphopt.autotune.space import Workload
from graphopt.backends.forms.convform import ConvForm, conv_of
from graphopt.in_place import updated_operand
from graphopt.ir import Builder, dims
from graphopt.ir.graph import Graph
from graphopt.ir.interpreter import evaluate
from graphopt.passes.layout.winograd import restore, transform
from graphopt.rewrite import Numerics
from graphopt.sampling import random_inputs, sample_bindings
from graphopt.verification import WIDE_TOLERANCE, has_steps, incomparable, judge_native, judge_wide

_F64_NOISE = 1e-12
CPU = torch.device("cpu")


def cannot_be_tried(w: Workload) -> str:
    """Why a kernel of a workload cannot be judged, in words; empty if it can."""
    return incomparable(w.graph)


def case_maker(w: Workload, sizes: Mapping[str, int] | None = None, device: torch.device = CPU) -> Callable[[int], Case]:
    """Seed -> case. Seeds that 2 divides have the given sizes; others, where sizes are symbolic, different ones.

    Args:
        sizes: values of the symbols of the workload's graph.
        device: where the reference is computed.

    Raises:
        GraphoptError: no other sizes make sense, so nobody would know whether a kernel is right there.
    """
    graph = w.graph
    known = dict(sizes or {})
    if set(known) != set(graph.symbols):
        known = sample_bindings(graph, count=1)[0]
    others = [b for b in sample_bindings(graph, max_elements=1 << 20) if b != known] or [known]

    def make(seed: int) -> Case:
        return make_case(w, known if seed % 2 == 0 else others[seed // 2 % len(others)], seed, device)

    return make


def make_case(w: Workload, sizes: Mapping[str, int], seed: int, device: torch.device = CPU) -> Case:
    """Random inputs of a workload, and the judge of its results on them; both are the host's, wherever the reference was computed."""
    graph = w.graph
    inputs = _with_transformed_weight(w, random_inputs(graph, sizes, seed))
    with torch.no_grad():
        reference, native = (_results(graph, inputs, sizes, wide, device) for wide in (True, False))
    outputs = tuple(_output(x, s, sizes) for x, s in zip(native, graph.output_strides, strict=True))
    in_place = updated_operand(graph) if w.kind == "update" else None

    def judge(results: Sequence[torch.Tensor]) -> Verdict:
        return _judge(graph, results, native, reference)

    return Case(tuple(inputs), outputs, judge, tuple(n for _, n in sorted(sizes.items())), in_place)


def _with_transformed_weight(w: Workload, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The inputs; if one holds a weight by Winograd's transform, then that of some weight. Of other numbers, the kernel that works on the
    transform makes something else than the region, which takes it back."""
    form = conv_of(w.graph) if w.kind == "conv" else None
    u = form.transformed if isinstance(form, ConvForm) else None
    if u is None:
        return inputs
    g = Graph("transformed")
    b = Builder(g)
    g.set_outputs([transform(b, restore(b, g.add_input(u.type)), int(u.shape[-1]))])
    made = [x.contiguous() for x in evaluate(g, [inputs[u.index]])]
    return [*inputs[: u.index], *made, *inputs[u.index + 1 :]]


def _results(graph: Graph, inputs: Sequence[torch.Tensor], sizes: Mapping[str, int], wide: bool,
             device: torch.device) -> list[torch.Tensor]:  # fmt: skip
    """The results in f64 if ``wide``, else eager's own; computed on a device, or here if it has not the room: f64 takes a lot."""
    if device.type != "cpu":
        try:
            return _computed(graph, inputs, sizes, wide, device)
        except torch.OutOfMemoryError:
            pass  # computed below, when what it holds is let go
        finally:
            torch.cuda.empty_cache()  # the process that runs candidates needs the room
        if not wide and torch.get_float32_matmul_precision() != "highest":
            inputs = [_as_tf32(x) for x in inputs]  # as the GPU may round factors: a processor does not
    return _computed(graph, inputs, sizes, wide, CPU)


def _computed(graph: Graph, inputs: Sequence[torch.Tensor], sizes: Mapping[str, int], wide: bool,
              device: torch.device) -> list[torch.Tensor]:  # fmt: skip
    there = [x.to(device) for x in inputs]
    return [x.cpu() for x in evaluate(graph, there, bindings=sizes, wide=wide, device=device)]


def _as_tf32(x: torch.Tensor) -> torch.Tensor:
    """Numbers of f32 rounded to the 10 bits behind the point that tf32 has; others as they are."""
    if x.dtype != torch.float32:
        return x
    return ((x.view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32)


def _output(x: torch.Tensor, strides: Sequence[dims.Dim] | None, sizes: Mapping[str, int]) -> Output:
    fixed = torch.empty(x.shape, device="meta").stride() if strides is None else tuple(dims.evaluate(s, sizes) for s in strides)
    return Output(tuple(x.shape), fixed, x.dtype)


def _judge(graph: Graph, results: Sequence[torch.Tensor], native: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> Verdict:
    worst = 0.0
    for i, (new, own, ref) in enumerate(zip(results, native, reference, strict=True)):
        if new.dtype == torch.bool and bool((new.view(torch.uint8) > 1).any()):
            return Verdict(1.0, f"output {i}: elements were not written")
        if own.dtype in (torch.float64, torch.complex128):  # eager is its own reference
            check = judge_wide(i, new, ref, WIDE_TOLERANCE[Numerics.REASSOCIATES], _F64_NOISE)
        else:
            check = judge_native(i, new, own, ref, Numerics.REASSOCIATES, has_steps(graph))
        worst = max(worst, check.error)
        if not check.ok:
            return Verdict(check.error, str(check))
    return Verdict(worst)
