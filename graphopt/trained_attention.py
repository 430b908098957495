"""Attention as an operator with a gradient: ``graphopt::attention_forward``, whose backward is ``graphopt::attention_backward``.

Put into a graph before autograd looks at it, it keeps queries, keys, values, the result and one number a row for the backward, in the
place of weights ``[M, N]``. The IR has ops of the same names (:mod:`graphopt.ir.opset.attention_training`); a call in eager is their
reference evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.ir.ops import OPS, EvalContext
from graphopt.ir.opset.attention import Parts

Optional = torch.Tensor | None

_OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? slopes, Tensor? sinks, Tensor? seed"
_ATTRS = "float scale, bool causal, SymInt offset, SymInt? window, float? softcap, str empty, float dropout"
ATTRS = ("scale", "causal", "offset", "window", "softcap", "empty", "dropout")
NAMES = ("q", "k", "v", "bias", "mask", "slopes", "sinks", "seed")
OPERANDS = len(NAMES)

_LIBRARY = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"attention_forward({_OPERANDS}, {_ATTRS}) -> (Tensor, Tensor)")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"attention_backward(Tensor dout, Tensor out, Tensor lse, {_OPERANDS}, {_ATTRS}, bool bias_gradient) -> Tensor[]")  # type: ignore[no-untyped-call]


def attributes(p: Parts[Any], values: Sequence[Any]) -> dict[str, Any]:
    """The attributes of the IR op, of the operator's last arguments; there is one more of a backward."""
    names = (*ATTRS, "bias_gradient")
    return {**dict(zip(names, values, strict=False)), "alibi": p.slopes is not None, "sinks": p.sinks is not None}


def named(args: Sequence[Any]) -> Parts[Any]:
    """The operands among an operator's arguments."""
    return Parts(**dict(zip(NAMES, args, strict=False)))


def given(p: Parts[Any]) -> list[Any]:
    """The operands that there are."""
    return [x for name in NAMES if (x := getattr(p, name)) is not None]


def _evaluate(name: str, before: Sequence[torch.Tensor], args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    p = named(args)
    evaluate = OPS[name].evaluate
    assert evaluate is not None
    results = evaluate([*before, *given(p)], attributes(p, args[OPERANDS:]), EvalContext({}, device=p.q.device))
    return tuple(x.contiguous() for x in results)


def attention_forward(*args: Any) -> tuple[torch.Tensor, ...]:
    return _evaluate("attention_forward", (), args)


def attention_backward(dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, *args: Any) -> list[torch.Tensor]:
    return list(_evaluate("attention_backward", (dout, out, lse), args))


def _fake_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _fake_backward(dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, *args: Any) -> list[torch.Tensor]:
    p, bias_gradient = named(args), args[-1]
    return [x.new_empty(x.shape) for x in (p.q, p.k, p.v, *([p.bias] if bias_gradient else []))]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *inputs[:OPERANDS])
    ctx.attrs = inputs[OPERANDS:]


def _backward(ctx: Any, dout: torch.Tensor, _: Any) -> tuple[Any, ...]:
    out, lse, *operands = ctx.saved_tensors
    p, needs = named(operands), named(ctx.needs_input_grad)
    dq, dk, dv, *dbias = torch.ops.graphopt.attention_backward(dout, out, lse, *operands, *ctx.attrs, needs.bias)
    dsinks = _of_sinks(p.sinks, dout, out, lse) if needs.sinks and p.sinks is not None else None
    found = Parts(dq, dk, dv, dbias[0] if dbias else None, sinks=dsinks)
    return (*(getattr(found, name) for name in NAMES), *[None] * len(ATTRS))


def _of_sinks(sinks: torch.Tensor, dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """A sink is a key whose value is zero: ``ds = w * (0 - rowsum(dout * out))``, added up over rows and batch."""
    ds = -torch.exp(sinks[:, None].to(lse.dtype) - lse) * (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    return ds.sum(-1).sum_to_size(sinks.shape).to(sinks.dtype)


_LIBRARY.impl("attention_forward", attention_forward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY.impl("attention_backward", attention_backward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("graphopt::attention_forward", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("graphopt::attention_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("graphopt::attention_forward", _backward, setup_context=_setup, lib=_LIBRARY)
