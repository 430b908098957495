"""Ops without operands."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt.ir import types
from graphopt.ir.ops import REQUIRED, Attrs, EvalContext, Trait, define
from graphopt.ir.types import TensorType


def _evaluate_constant(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    value = attrs["value"]
    if not isinstance(value, int | float | complex):
        value = ctx.dim(value)
    return torch.tensor(value, dtype=ctx.dtype(attrs["dtype"]), device=ctx.device)


define(
    "constant", 0, traits=(Trait.CREATION,), attrs={"value": REQUIRED, "dtype": types.f32},
    infer=lambda ts, attrs: [TensorType(attrs["dtype"], ())], evaluate=_evaluate_constant,
    doc="a scalar: a number, or a size expression",
)  # fmt: skip


def _evaluate_iota(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    n, start, step = ctx.dim(attrs["size"]), ctx.dim(attrs["start"]), ctx.dim(attrs["step"])
    counts = torch.arange(n, dtype=torch.int64, device=ctx.device)
    return (start + step * counts).to(ctx.dtype(attrs["dtype"]))


define(
    "iota", 0, traits=(Trait.CREATION,), attrs={"size": REQUIRED, "start": 0, "step": 1, "dtype": types.i64},
    infer=lambda ts, attrs: [TensorType(attrs["dtype"], (attrs["size"],))], evaluate=_evaluate_iota,
    doc="start + step * i for i in 0 .. size - 1 (integer start and step)",
)  # fmt: skip
