"""graphopt's own operators of attention in training."""

from __future__ import annotations

from typing import Any

from graphopt.capture.aten import Context, lowers
from graphopt.ir.graph import Value
from graphopt.trained_attention import OPERANDS, attributes, given, named


@lowers("graphopt.attention_forward")
def attention_forward(c: Context, *args: Any) -> list[Value]:
    p = named(args)
    return list(c.b.attention_forward(*given(p), **attributes(p, args[OPERANDS:])))


@lowers("graphopt.attention_backward")
def attention_backward(c: Context, dout: Value, out: Value, lse: Value, *args: Any) -> list[Value]:
    p = named(args)
    return list(c.b.attention_backward(dout, out, lse, *given(p), **attributes(p, args[OPERANDS:])))
