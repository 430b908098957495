"""Scans: running reductions along an axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from graphopt.errors import TypeInferenceError
from graphopt.ir import types
from graphopt.ir.ops import REQUIRED, Attrs, EvalContext, define, normalize_axis
from graphopt.ir.types import TensorType

SCANS = ("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp")
ARG_SCANS = ("argcummax", "argcummin")


def _scan(name: str, fn: Callable[[torch.Tensor, int], torch.Tensor], doc: str, float_only: bool = False) -> None:
    def infer(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
        (t,) = ts
        normalize_axis(attrs["axis"], t.rank, name)
        if float_only and not t.dtype.is_float:
            raise TypeInferenceError(f"{name}: needs a float operand, got {t.dtype}")
        return [TensorType(types.i64, t.shape) if name in ARG_SCANS else t.logical]

    def evaluate(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
        return fn(xs[0], attrs["axis"])

    define(name, 1, attrs={"axis": REQUIRED}, infer=infer, evaluate=evaluate, doc=doc)


_scan("cumsum", lambda x, axis: torch.cumsum(x, axis, dtype=x.dtype), "running sum along an axis, in the operand's dtype")
_scan("cumprod", lambda x, axis: torch.cumprod(x, axis, dtype=x.dtype), "running product along an axis, in the operand's dtype")
_scan("cummax", lambda x, axis: torch.cummax(x, axis).values, "largest so far along an axis; nan once one was met")
_scan("cummin", lambda x, axis: torch.cummin(x, axis).values, "smallest so far along an axis; nan once one was met")
_scan("argcummax", lambda x, axis: torch.cummax(x, axis).indices, "index of the last largest element so far along an axis")
_scan("argcummin", lambda x, axis: torch.cummin(x, axis).indices, "index of the last smallest element so far along an axis")
_scan("logcumsumexp", torch.logcumsumexp, "log of the running sum of exp(x) along an axis", float_only=True)
