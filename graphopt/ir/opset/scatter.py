"""Ops that write by index: the counterparts of ``take`` and ``gather``.

Updates happen in row-major order of the index: where positions repeat, ``set`` keeps the last one, the others combine all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.errors import TypeInferenceError
from graphopt.ir import dims
from graphopt.ir.ops import Attrs, EvalContext, define, normalize_axis, same_dtype
from graphopt.ir.types import TensorType

UPDATES = ("set", "add", "mul", "max", "min")
SCATTERS = ("put", "scatter")
_TORCH = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _check(name: str, ts: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, TensorType, TensorType, int]:
    x, index, source = ts
    same_dtype((x, source), name)
    if not index.dtype.is_integer:
        raise TypeInferenceError(f"{name}: the index must be an integer tensor, got {index.dtype}")
    if attrs["update"] not in UPDATES:
        raise TypeInferenceError(f"{name}: update must be one of {', '.join(UPDATES)}, got {attrs['update']!r}")
    if x.rank == 0:
        raise TypeInferenceError(f"{name}: needs an axis to index")
    return x, index, source, normalize_axis(attrs["axis"], x.rank, name)


def _infer_put(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    x, index, source, axis = _check("put", ts, attrs)
    if not dims.same_shape(source.shape, (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])):
        raise TypeInferenceError(f"put: {source} is not what {index} selects of axis {axis} of {x}")
    return [x.logical]


def _infer_scatter(ts: Sequence[TensorType], attrs: Attrs) -> list[TensorType]:
    x, index, source, axis = _check("scatter", ts, attrs)
    if not dims.same_shape(index.shape, source.shape) or x.rank != index.rank:
        raise TypeInferenceError(f"scatter: the index {index} and the source {source} do not fit {x}")
    for a, (n, m) in enumerate(zip(index.shape, x.shape, strict=True)):
        if a != axis and dims.prove(n, "<=", m) is False:
            raise TypeInferenceError(f"scatter: the index {index} is larger than {x} along axis {a}")
    return [x.logical]


def _evaluate_put(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    x, index, source = xs
    axis = attrs["axis"] % x.dim()
    shape = [1] * x.dim()
    shape[axis] = index.numel()
    flat = (*x.shape[:axis], index.numel(), *x.shape[axis + 1 :])
    return _scattered(x, index.reshape(shape).expand(flat).to(torch.int64), source.reshape(flat), axis, attrs["update"])


def _evaluate_scatter(xs: Sequence[torch.Tensor], attrs: Attrs, ctx: EvalContext) -> torch.Tensor:
    x, index, source = xs
    return _scattered(x, index.to(torch.int64), source, attrs["axis"] % x.dim(), attrs["update"])


def _scattered(x: torch.Tensor, index: torch.Tensor, source: torch.Tensor, axis: int, update: str) -> torch.Tensor:
    if update == "set":  # torch does not say which of several writers wins
        order = torch.arange(index.shape[axis]).reshape([-1 if a == axis else 1 for a in range(x.dim())]).expand(index.shape)
        last = torch.full(x.shape, -1).scatter_reduce(axis, index, order, "amax")
        sizes: list[Any] = [slice(None) if a == axis else slice(0, n) for a, n in enumerate(index.shape)]
        out, at = x.clone(), last[tuple(sizes)]
        if index.numel():
            out[tuple(sizes)] = torch.where(at >= 0, source.gather(axis, at.clamp_min(0)), x[tuple(sizes)])
        return out
    if x.dtype == torch.bool:
        update = "max" if update in ("add", "max") else "min"
        return _scattered(x.to(torch.uint8), index, source.to(torch.uint8), axis, update).to(torch.bool)
    return x.scatter_reduce(axis, index, source, _TORCH[update])


define(
    "put", 3, attrs={"axis": 0, "update": "set"}, infer=_infer_put, evaluate=_evaluate_put,
    doc="x with the elements that take(x, index) reads set to, or combined with (add, mul, max, min), a source of that result's shape; "
    "0 <= index < size, else IndexError",
)  # fmt: skip
define(
    "scatter", 3, attrs={"axis": 0, "update": "set"}, infer=_infer_scatter, evaluate=_evaluate_scatter,
    doc="out[index[i, j], j] = source[i, j] for axis 0, and so on, on a copy of x; or combined (add, mul, max, min); "
    "along other axes the index may be shorter than x",
)  # fmt: skip
