"""Every pointwise op against torch, over dtypes and special values, under Triton's interpreter."""

from __future__ import annotations

import torch
from triton_check import SM_90, runner

from graphopt.autotune.space import Workload
from graphopt.backends.triton.backend import TritonBackend
from graphopt.errors import TypeInferenceError
from graphopt.ir import types
from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph
from graphopt.ir.interpreter import evaluate
from graphopt.ir.ops import OPS, Trait
from graphopt.ir.types import DType, TensorType

DTYPES = (types.f32, types.f64, types.f16, types.bf16, types.i64, types.i32, types.i8, types.u8, types.b1)
SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, 1e-30, 88.5, -88.0, 1e4, -1e4,
           0.62, 0.93, 2**-20, 7.0, 20.5, -3.5, 89.2, -89.2]  # fmt: skip
ZEROS_HAVE_SIGNS = ("sinh", "tanh", "log1p", "expm1", "round", "floor_div", "trunc", "floor", "ceil", "neg", "sin", "sqrt", "mul", "abs")


def numbers(dtype: DType, n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_bool:
        return torch.rand(n, generator=generator) < 0.5
    if dtype.is_float:
        special = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype.torch)
        order = torch.randperm(len(SPECIAL), generator=generator) if seed else torch.arange(len(SPECIAL))
        return torch.cat([special[order], (torch.randn(n - len(SPECIAL), generator=generator) * 3).to(dtype.torch)])
    info = torch.iinfo(dtype.torch)
    edge = torch.tensor([info.min, info.max, 0, 1, 2, max(info.min, -1)], dtype=dtype.torch)
    return torch.cat([edge, torch.randint(max(info.min, -50), 50, (n - 6,), generator=generator, dtype=dtype.torch)])


def one_op(name: str, dtype: DType) -> Graph | None:
    """A graph of one op at a dtype, or None if the op does not take it."""
    kinds = (types.b1, dtype, dtype) if name == "where" else (dtype,) * OPS[name].arity[0]
    graph = Graph("g")
    operands = [graph.add_input(TensorType(t, (75,))) for t in kinds]
    try:
        graph.set_outputs([Builder(graph).create(name, operands, {})])
    except TypeInferenceError:
        return None
    return graph


def agree(name: str, dtype: DType, got: torch.Tensor, own: torch.Tensor, true: torch.Tensor) -> bool:
    if not got.dtype.is_floating_point:
        return torch.equal(got, own)
    # where torch's vector code gives nan for a value that is defined (gelu(inf)), or overflows early (sinh(89)), the true value is right
    fits = true.to(own.dtype)
    target = torch.where((own.isnan() & ~true.isnan()) | (own.isinf() & fits.isfinite()), fits, own)
    finite = torch.isfinite(target)
    if not torch.equal(torch.where(finite, 0, got).nan_to_num(7), torch.where(finite, 0, target).nan_to_num(7)):
        return False
    zero = (got == 0) & (own == 0) & (true == 0)  # a true zero has a sign
    if name in ZEROS_HAVE_SIGNS and not torch.equal(got.signbit() & zero, own.signbit() & zero):
        return False
    size = true.abs().clamp_min(1.0 if name == "gelu" else torch.finfo(got.dtype).tiny)  # gelu's formula adds numbers of size one
    ulps = 1 if dtype.bits == 16 else 200 if (name, dtype.bits) == ("pow", 64) else 6  # y * log x is rounded before its exponential
    allowed = torch.maximum(ulps * torch.finfo(got.dtype).eps * size, 2 * (own.double() - true).abs())
    return bool(((got.double() - true).abs() <= allowed)[finite].all())


def test_every_op_at_every_dtype() -> None:
    """Special values included: nan, infinities, signed zeros, extreme integers."""
    failed, done = [], 0
    for name, dtype in ((n, d) for n, o in OPS.items() if o.has(Trait.POINTWISE) and n not in ("cast", "quantize") for d in DTYPES):
        graph = one_op(name, dtype)
        if graph is None:
            continue
        xs = [numbers(v.dtype, 75, k) for k, v in enumerate(graph.inputs)]
        try:
            (own,), (true,) = evaluate(graph, xs), evaluate(graph, xs, wide=True)
        except RuntimeError:  # torch itself does not have the op at this dtype
            continue
        w = Workload.of(graph, "pointwise")
        if not TritonBackend().templates(w, SM_90):
            assert not dtype.is_float, f"{name} {dtype}: {TritonBackend().reason(w, SM_90)}"
            continue
        (got,) = runner(graph, "pointwise")(xs, None)
        done += 1
        if not agree(name, dtype, got, own, true):
            bad = ~torch.isclose(got.double(), own.double(), rtol=1e-6, atol=0, equal_nan=True)
            failed.append(
                f"{name} {dtype}: at {[x[bad][:4].tolist() for x in xs]} got {got[bad][:4].tolist()} torch {own[bad][:4].tolist()}"
            )
    assert done > 200
    assert not failed, "\n".join(failed)
