"""Value checks: does a graph still compute what it did? Judged against the f64 interpreter, the graph's own error as yardstick.

Two questions are asked of every output:

1. *Wide*: both graphs evaluated in f64 agree up to f64 rounding. This finds wrong formulas, however small the slip.
2. *Native*: in its own precision, the new graph is no further from the f64 result of the old one than the old one is itself,
   times the factor of the numerics class, plus a few units of rounding. This finds lost precision.

A rewrite that claims the same bits is asked a third one where it can be: *bits*. Where every op of both graphs is rounded once, or not at
all (no sums, no functions), the results in native precision are the same numbers.

Inputs are drawn from a normal distribution; those that are no weights once for a graph again, with magnitudes from 1e-3 to 1e2, and, where
the same bits are claimed, with zeros of both signs, infinities, and nan among them; where they are compared, numbers at the ends of the
dtype's range, too.

Eager's error is that of one run, which may have been lucky. Where the answer is no and roundings may differ, the old graph is run with
other roundings (:mod:`graphopt.monte_carlo`), and what they change in an element is allowed, too; the message counts these elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from graphopt.errors import EquivalenceError
from graphopt.ir import Graph, Node, Trait, dims, evaluate, print_graph
from graphopt.ir.printer import print_lines, print_node
from graphopt.monte_carlo import DRAWS, MOST_DRAWN, draw_results, pardon
from graphopt.rewrite import Numerics
from graphopt.sampling import Draw, random_inputs, sample_bindings

WIDE_TOLERANCE = {Numerics.BITWISE: 1e-12, Numerics.REASSOCIATES: 1e-9, Numerics.APPROXIMATE: 1e-6, Numerics.LOSSY: math.inf}
"""Error allowed in f64, relative to the largest element; 1e-6 lets constants be rounded to f32."""

ROUNDINGS = 8
"""Units of rounding of the output's dtype that are always allowed in native precision."""

ILL_CONDITIONED = 1e-8
"""Share of the old graph's native error that is allowed in f64: where f32 loses digits, f64 loses them too."""

NOISE = 1e-12
"""Difference in f64 that is always allowed, relative to the largest input: what cancels leaves rounding errors of that size."""

_ENOUGH, _MOST_DRAWS = 256, 16  # numbers of an input at magnitudes of all kinds, and draws of them at most

STRAY = 0.02
"""Share of the elements that may fall to the other side of a step."""

_STEPS = ("floor", "ceil", "trunc", "round", "sign", "floor_div", "trunc_div", "remainder", "fmod", "eq", "ne", "lt", "le", "gt", "ge",
          "argmax", "argmin", "argcummax", "argcummin", "argmax_pool", "adaptive_argmax_pool", "isnan", "isinf", "quantize")  # fmt: skip


_ROUNDED_ONCE = ("constant", "iota", "neg", "abs", "floor", "ceil", "trunc", "round", "sqrt", "reciprocal", "div", "add", "sub", "mul",
                 "where", "cast", "concat", "pad", "take", "gather", "sign")  # fmt: skip
_MOVED = ("constant", "where", "concat", "pad", "take", "gather", "neg", "add", "sub")
_EITHER_ZERO = ("maximum", "minimum", "relu", "max", "min", "max_pool")  # of zeros of both signs PyTorch's vectors may take another


_PRECISIONS = {"wide": "computed in f64", "native": "in its own precision", "bits": "bit by bit"}


@dataclass(frozen=True)
class OutputCheck:
    """One output at one precision (``wide``, ``native``, or its ``bits``): the largest error and what was allowed, relative to the largest
    element.

    ``pardoned`` elements have errors that other roundings of the old graph explain, in whole or in part: those do not count.
    """

    output: int
    precision: str
    error: float
    budget: float
    message: str = ""
    pardoned: int = 0

    @property
    def ok(self) -> bool:
        return not self.message and self.error <= self.budget

    def __str__(self) -> str:
        verdict = "agrees" if self.ok else "differs"
        rest = f", beside what other roundings of the old graph explain in {self.pardoned} elements" if self.pardoned else ""
        what = self.message or f"relative error {self.error:.2e}, allowed {self.budget:.2e}"
        return f"output {self.output} {verdict} ({_PRECISIONS[self.precision]}): {what}{rest}"


@dataclass(frozen=True)
class Comparison:
    """What comparing two graphs at one seed and binding gave.

    Attributes:
        draw: which inputs.
        not_compared: why values could not be compared (random numbers, effects, inputs that the graph refuses); empty if they were.
        checks: one entry an output and precision.
    """

    seed: int
    bindings: Mapping[str, int]
    checks: tuple[OutputCheck, ...] = ()
    not_compared: str = ""
    draw: Draw = "normal"

    @property
    def ok(self) -> bool:
        """Whether no difference was found. True also if nothing was compared: ask ``not_compared``."""
        return all(c.ok for c in self.checks)

    @property
    def first_bad(self) -> OutputCheck | None:
        return next((c for c in self.checks if not c.ok), None)


def incomparable(graph: Graph) -> str:
    """Why two runs of this graph need not give the same values, or an empty string."""
    for node in graph.nodes():
        inner = incomparable(node.body) if node.body is not None else ""
        if inner:
            return inner
        if node.has_effect:
            return f"{print_node(node).strip()} has the effect {node.attrs['effect']!r}"
    return ""


def compare(before: Graph, after: Graph, *, bindings: Mapping[str, int] | None = None, seed: int = 0,
            numerics: Numerics = Numerics.REASSOCIATES, draw: Draw = "normal") -> Comparison:  # fmt: skip
    """Evaluate two graphs on the same random inputs, in f64 and in native precision.

    Args:
        before: the reference.
        after: the graph to judge; must have the same input types.
        bindings: values of the symbols.
        numerics: what the rewrite was allowed to do, which sets the budget.
        draw: which inputs, see :func:`~graphopt.sampling.random_inputs`.

    Raises:
        EquivalenceError: the two graphs do not have the same interface.
    """
    known = dict(bindings or {})
    check_interface(before, after)
    why = incomparable(before) or incomparable(after)
    if why:
        return Comparison(seed, known, not_compared=why, draw=draw)
    inputs = random_inputs(before, known, seed, draw)
    try:
        reference = _run(before, inputs, known, wide=True)
        native = _run(before, inputs, known, wide=False)
    except (RuntimeError, IndexError, ValueError) as error:
        return Comparison(seed, known, not_compared=f"the graph refuses the random inputs: {error}", draw=draw)
    try:
        wide_after, native_after = _run(after, inputs, known, wide=True), _run(after, inputs, known, wide=False)
    except (RuntimeError, IndexError, ValueError) as error:
        return Comparison(seed, known, (OutputCheck(0, "wide", math.inf, 0.0, f"the new graph cannot be evaluated: {error}"),), draw=draw)
    steps, calls = has_steps(before) or has_steps(after), _has(before, ("aten",))
    bits = _bits_compared(before, after, numerics)
    signs = not (_has(before, _EITHER_ZERO) or _has(after, _EITHER_ZERO))
    tolerance = max(WIDE_TOLERANCE[numerics], 1e-6 if calls else 0.0)  # a library call may refuse f64
    scale = max([1.0, *(float(x.abs().max()) for x in inputs if x.is_floating_point() and x.numel() and bool(x.isfinite().all()))])

    def judge(wide_after: Sequence[torch.Tensor], native_after: Sequence[torch.Tensor]) -> Comparison:
        checks: list[OutputCheck] = []
        for i, (ref, own, wide, new) in enumerate(zip(reference, native, wide_after, native_after, strict=True)):
            own_error, _ = _error(own, ref)
            slack = own_error * ILL_CONDITIONED if math.isfinite(own_error) and not _exact(own) else 0.0
            checks.append(judge_wide(i, wide, ref, tolerance + slack, NOISE * scale))
            if own.dtype not in (torch.float64, torch.complex128):  # those are their own wide form
                checks.append(judge_native(i, new, own, ref, numerics, steps))
            if bits and checks[-1].ok:
                checks.append(judge_bits(i, new, own, signs))
        return Comparison(seed, known, tuple(checks), draw=draw)

    found = judge(wide_after, native_after)
    for count in DRAWS if numerics not in (Numerics.BITWISE, Numerics.LOSSY) else ():
        if found.ok or (count > DRAWS[0] and count * sum(x.numel() for x in reference) > MOST_DRAWN):
            break
        pardoned: dict[tuple[int, str], int] = {}
        left: dict[str, list[torch.Tensor]] = {}
        for precision, results in (("wide", wide_after), ("native", native_after)):
            draws = draw_results(before, inputs, known, wide=precision == "wide", seed=seed, count=count)
            judged = pardon(results, reference, draws, factor=numerics.value, scale=scale, steps=has_steps(before))
            left[precision] = [x for x, _ in judged]
            pardoned |= {(i, precision): elements for i, (_, elements) in enumerate(judged)}
        found = judge(left["wide"], left["native"])
        found = replace(found, checks=tuple(replace(c, pardoned=pardoned[c.output, c.precision]) for c in found.checks))
    return found


def check_interface(before: Graph, after: Graph) -> None:
    """Raise EquivalenceError unless both graphs take and return the same types."""
    for what, old, new in (("input", before.inputs, after.inputs), ("output", before.outputs, after.outputs)):
        if len(old) != len(new):
            raise EquivalenceError(f"the graph had {len(old)} {what}s, now it has {len(new)}")
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            if a.dtype != b.dtype or a.type.rank != b.type.rank:
                raise EquivalenceError(f"{what} {i} was {a.type}, now it is {b.type}")
    if before.output_strides != after.output_strides:
        raise EquivalenceError(f"the output layouts were {before.output_strides}, now they are {after.output_strides}")


def _run(graph: Graph, inputs: Sequence[torch.Tensor], bindings: Mapping[str, int], wide: bool) -> list[torch.Tensor]:
    with torch.no_grad():
        return evaluate(graph, inputs, bindings=bindings, wide=wide)


def _has(graph: Graph, ops: Sequence[str]) -> bool:
    return any(n.op.name in ops or (n.body is not None and _has(n.body, ops)) for n in graph.nodes())


def has_steps(graph: Graph) -> bool:
    """Whether a small difference in a value may become a large one in a result."""
    return _has(graph, _STEPS)


def _exact(x: torch.Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex())


def _error(x: torch.Tensor, ref: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Largest error relative to the largest element, and the errors; for exact dtypes, the share of elements that differ."""
    if _exact(ref):
        differs = (x != ref).to(torch.float64)
        return (float(differs.mean()) if differs.numel() else 0.0), differs
    kind = torch.complex128 if ref.is_complex() else torch.float64
    x, ref = x.to(kind), ref.to(kind)
    finite = torch.isfinite(ref)
    scale = float(ref[finite].abs().max()) if bool(finite.any()) else 0.0
    gap = torch.where(finite, (x - ref).abs(), 0.0) / (scale or 1.0)
    gap = torch.where(torch.isnan(gap), torch.inf, gap)
    return (float(gap.max()) if gap.numel() else 0.0), gap


def judge_wide(i: int, new: torch.Tensor, ref: torch.Tensor, budget: float, noise: float) -> OutputCheck:
    """Output i, computed in f64, against the f64 result: an error relative to the largest element, or a difference below ``noise``."""
    if new.shape != ref.shape or new.dtype != ref.dtype:
        return OutputCheck(i, "wide", math.inf, budget, f"was {_kind(ref)}, now it is {_kind(new)}")
    error, _ = _error(new, ref)
    lossy = math.isinf(budget)
    if _exact(ref):
        return OutputCheck(i, "wide", error, budget if lossy else 0.0, f"{error:.2%} of the elements differ" if error and not lossy else "")
    a, b = ref.resolve_conj(), new.resolve_conj()
    odd = ~torch.isfinite(a) | ~torch.isfinite(b)
    same = (torch.isnan(a) & torch.isnan(b)) | (a == b)
    if int((~same[odd]).sum()) > (1 + STRAY * ref.numel() if lossy else 0):  # other numbers leave a domain (of acos) at other places
        return OutputCheck(i, "wide", math.inf, budget, "nan and infinity stand at other places")
    finite = ~odd
    if lossy:
        return OutputCheck(i, "wide", error, budget)
    if not bool(((a - b)[finite].abs() > noise).any()):  # e.g. x - mean(x) of one element: zero, but for rounding
        return OutputCheck(i, "wide", 0.0, budget)
    return OutputCheck(i, "wide", error, budget)


def judge_native(i: int, new: torch.Tensor, own: torch.Tensor, ref: torch.Tensor, numerics: Numerics, steps: bool) -> OutputCheck:
    """Output i, computed in its own precision, against the f64 result, with eager's error as the yardstick.

    Args:
        own: what eager computes in that precision.
        steps: whether a few elements may fall to the other side of a step (:func:`has_steps`).
    """
    if new.shape != own.shape or new.dtype != own.dtype:
        return OutputCheck(i, "native", math.inf, 0.0, f"was {_kind(own)}, now it is {_kind(new)}")
    (own_error, own_gap), (error, gap) = _error(own, ref), _error(new, ref)
    if numerics is Numerics.LOSSY:
        return OutputCheck(i, "native", error, math.inf)
    stray = STRAY if steps or (numerics is not Numerics.BITWISE and _exact(ref)) else 0.0
    if _exact(ref):  # a value near a step of floor or of a comparison may fall to the other side
        return OutputCheck(i, "native", error, numerics.value * own_error + stray + (1.0 / max(gap.numel(), 1) if stray else 0.0))
    budget = numerics.value * own_error + ROUNDINGS * torch.finfo(own.dtype).eps
    if stray and gap.numel():
        allowed = 1 + int(stray * gap.numel())
        error = float(gap.flatten().sort().values[:-allowed].max()) if gap.numel() > allowed else 0.0
    elif not math.isfinite(own_error):  # the old graph overflows where f64 does not: judge it where it does not
        gap = gap[torch.isfinite(own_gap)]
        budget = numerics.value * float(own_gap[torch.isfinite(own_gap)].max()) if gap.numel() else math.inf
        budget += ROUNDINGS * torch.finfo(own.dtype).eps
        error = float(gap.max()) if gap.numel() else 0.0
    return OutputCheck(i, "native", error, budget)


def judge_bits(i: int, new: torch.Tensor, own: torch.Tensor, signs: bool) -> OutputCheck:
    """Output i against the old graph's, both in their own precision: the same numbers; ``signs``: with the same signs of zeros."""
    a, b = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in (own, new))
    if a.is_floating_point():
        a, b = a.double(), b.double()  # exact; not all of them have all functions
    same = (a == b) | ((a != a) & (b != b))
    if signs and a.is_floating_point():
        same &= (a != 0) | (a.signbit() == b.signbit())
    wrong = 1.0 - float(same.double().mean()) if same.numel() else 0.0
    return OutputCheck(i, "bits", wrong, 0.0, f"{wrong:.2%} of the elements are not the same bits, which is claimed" if wrong else "")


def _bits_compared(before: Graph, after: Graph, numerics: Numerics) -> bool:
    return numerics is Numerics.BITWISE and _rounded_once(before) and _rounded_once(after)


def _rounded_once(graph: Graph) -> bool:
    """Whether each op of a graph gives the number that is nearest to its result, wherever an element stands in memory."""
    return all(_rounded_once(n.body) if n.body is not None else _is_rounded_once(n) for n in graph.nodes())


def _is_rounded_once(node: Node) -> bool:
    values = (*node.operands, *node.results)
    if node.op.has(Trait.VIEW) or not any(v.dtype.is_float or v.dtype.is_complex for v in values):
        return True
    if any(v.dtype.is_complex for v in values):  # PyTorch's vectors and scalars multiply them otherwise
        return node.op.name in _MOVED
    return node.op.name in (*_ROUNDED_ONCE, *_EITHER_ZERO) or node.op.has(Trait.BOOLEAN)


def _kind(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


# --- many bindings, and what to say on failure -------------------------------------------------------------------------


def check_equivalent(before: Graph, after: Graph, *, bindings: Sequence[Mapping[str, int]] | None = None, seeds: Sequence[int] = (0,),
                     numerics: Numerics = Numerics.REASSOCIATES, what: str = "the rewrite", max_elements: int = 1 << 24,
                     ) -> list[Comparison]:  # fmt: skip
    """Compare two graphs at several bindings and seeds.

    Args:
        bindings: values of the symbols; by default a few are drawn.
        what: who is judged, for the message.

    Returns:
        All comparisons; those with ``not_compared`` say why.

    Raises:
        EquivalenceError: names the first bad output, and shows the node, and a reproducer.
    """
    out = []
    extreme: Draw = "wide" if numerics is not Numerics.BITWISE else "ends" if _bits_compared(before, after, numerics) else "special"
    for k, values in enumerate(bindings if bindings is not None else sample_bindings(before, max_elements=max_elements)):
        cases: list[tuple[int, Draw]] = [(seed, "normal") for seed in seeds]
        if k == 0:
            cases += [(seed + n, extreme) for seed in seeds[:1] for n in range(_extreme_draws(before, values))]
        for seed, draw in cases:
            try:
                found = compare(before, after, bindings=values, seed=seed, numerics=numerics, draw=draw)
            except EquivalenceError as error:
                raise EquivalenceError(f"{what} changed the graph's interface: {error}\n{excerpt(after, 0)}") from error
            if found.first_bad is not None:
                raise EquivalenceError(explain(before, after, found, what))
            out.append(found)
    return out


def _extreme_draws(graph: Graph, bindings: Mapping[str, int]) -> int:
    """How many, so that of each input there are enough numbers for a few of each kind."""
    sizes = [math.prod(dims.evaluate(d, bindings) for d in v.shape) for v in graph.inputs if v.dtype.is_float and not v.weight]
    return max(1, min(_MOST_DRAWS, -(-_ENOUGH // max(1, min(sizes, default=_ENOUGH)))))


_INPUTS: Mapping[Draw, str] = {
    "normal": "", "wide": ", at magnitudes from 1e-3 to 1e2",
    "special": ", at magnitudes from 1e-3 to 1e2, zeros of both signs, infinities and nan",
    "ends": ", at magnitudes from 1e-3 to 1e2, zeros of both signs, infinities, nan, and numbers at the ends of the range",
}  # fmt: skip


def explain(before: Graph, after: Graph, found: Comparison, what: str) -> str:
    """The message of a failed comparison: the first bad output, the IR around its node, and a reproducer."""
    bad = found.first_bad
    assert bad is not None
    return (
        f"{what} changed what @{before.name} computes: {bad}{_INPUTS[found.draw]}\n{excerpt(after, bad.output)}\n"
        f"to reproduce, with the seed {found.seed} and bindings {dict(found.bindings)}:\n{reproducer(before, found)}"
    )


def excerpt(graph: Graph, output: int, lines: int = 6) -> str:
    """The node that yields an output and those that feed it, nearest last."""
    if output >= len(graph.outputs):
        return ""
    value = graph.outputs[output]
    if value.producer is None:
        return f"  output {output} is the input {value!r}"
    near: dict[Node, None] = {value.producer: None}
    for node in reversed(graph):
        if node in near and len(near) < lines:
            near.update({v.producer: None for v in node.operands if v.producer is not None})
    return "\n".join(f"  {line}" for node, line in print_lines(graph).items() if node in near)


def reproducer(before: Graph, found: Comparison) -> str:
    """Python text that runs the same comparison again for a pass of one's own."""
    text = print_graph(before)
    seeds, values = f"seeds=[{found.seed}]", f"bindings=[{dict(found.bindings)!r}]"
    return f'from graphopt.testing import check_pass\n\ncheck_pass(the_pass, r"""\n{text}""", {values}, {seeds})\n'
