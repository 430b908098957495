"""The judgement of a kernel: its error against f64, with eager's own error as the yardstick."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from graphopt.ir import dims
from graphopt.ir.graph import Graph
from graphopt.ir.interpreter import evaluate

Run = Callable[[Sequence[torch.Tensor], "dict[str, int] | None"], "list[torch.Tensor]"]


def check(graph: Graph, run: Run, inputs: Sequence[torch.Tensor], bindings: dict[str, int] | None = None, factor: float = 2.0,
          slack: float = 0.0) -> None:  # fmt: skip
    """The error against f64 is at most ``factor`` times eager's own, plus a few units in the last place.

    Args:
        slack: units in the last place of the greatest number of inputs and result that may be off besides: where sums cancel, eager may be
            right by chance.
    """
    greatest = max([1.0, *(float(x.double().abs().max()) for x in inputs if x.is_floating_point() and x.numel())])
    wide, eager = (evaluate(graph, inputs, bindings=bindings, wide=w) for w in (True, False))
    for got, true, own in zip(run(inputs, bindings), wide, eager, strict=True):
        if not got.dtype.is_floating_point:
            assert torch.equal(got, own), f"{graph}\n{got}\n{own}"
            continue
        finite = torch.isfinite(own)
        assert torch.equal(torch.isnan(got), torch.isnan(own)), f"{graph}\n{got}\n{own}"
        same = (got == own) | torch.isnan(own) | finite
        assert bool(same.all()), f"{graph}\n{got[~same]}\n{own[~same]}"
        error, allowed = (got.double() - true).abs(), (own.double() - true).abs()
        scale = true.abs().clamp_min(torch.finfo(got.dtype).tiny) * torch.finfo(got.dtype).eps
        limit = factor * allowed[finite].max() if finite.any() else torch.tensor(0.0)
        if got.dtype == torch.float64 and finite.any():  # eager is its own reference: another order of summation is allowed
            limit = torch.maximum(limit, 64 * torch.finfo(got.dtype).eps * true[finite].abs().max())
        limit = torch.maximum(limit, torch.tensor(slack * torch.finfo(got.dtype).eps * greatest, dtype=torch.float64))
        bad = finite & (error > torch.maximum(limit, 4 * scale))
        assert not bool(bad.any()), f"{graph}\n{got[bad][:5]}\n{own[bad][:5]}\n{true[bad][:5]}"


def values(graph: Graph, nan: bool = False, **bindings: int) -> list[torch.Tensor]:
    """Random inputs of a graph of floats, with one nan if asked for."""
    generator = torch.Generator().manual_seed(0)
    shapes = [[d if isinstance(d, int) else dims.evaluate(d, bindings) for d in v.shape] for v in graph.inputs]
    out = [torch.randn(s, generator=generator).to(v.dtype.torch) for s, v in zip(shapes, graph.inputs, strict=True)]
    if nan:
        out[0].view(-1)[7] = float("nan")
    return out


def sizes(graph: Graph) -> list[dict[str, int]]:
    """A few values of the symbols B and H."""
    if not graph.symbols:
        return [{}]
    return [{s: n for s, n in (("B", b), ("H", h)) if s in graph.symbols} for b, h in ((1, 7), (3, 10), (2, 32))]
