"""Ops of attention in training: expansions are what is evaluated, and gradients are those of autograd through the definition."""

from __future__ import annotations

import pytest
import torch

from graphopt.errors import ParseError
from graphopt.ir.interpreter import evaluate
from graphopt.ir.text import parse_graph
from graphopt.passes.expand import Expand
from graphopt.testing import check_pass

OUT, LSE = "f32[2, 4, 5, 6]", "f32[2, 4, 5]"
QKV = "%q: f32[2, 4, 5, 3], %k: f32[2, 2, 7, 3], %v: f32[2, 2, 7, 6]"
FORMS = {  # further inputs, those that are read, attributes
    "plain": ("", "", ""),
    "dropout": (", %s: i64[]", ", %s", ", dropout = 0.4, causal = true"),
    "a bias": (", %b: f32[2, 4, 5, 7]", ", %b", ", bias_gradient = true"),
    "a bias of heads": (", %b: f32[4, 5, 7]", ", %b", ", bias_gradient = true, softcap = 1.5"),
    "a bias of keys, dropout": (", %b: f32[7], %s: i64[]", ", %b, %s", ", bias_gradient = true, dropout = 0.2"),
    "a bias of rows": (", %b: f32[1, 4, 5, 1]", ", %b", ", bias_gradient = true"),
    "everything": (
        ", %b: f32[4, 1, 7], %m: b1[5, 7], %a: f32[4], %c: f32[4], %s: i64[]", ", %b, %m, %a, %c, %s",
        ", bias_gradient = true, alibi = true, sinks = true, window = 4, softcap = 2.0, dropout = 0.3",
    ),
}  # fmt: skip


def backward(form: str) -> str:
    more, names, attrs = FORMS[form]
    bias = more.split("%b: ")[1].split("]")[0] + "]" if "bias_gradient" in attrs else ""
    results = ["f32[2, 4, 5, 3]", "f32[2, 2, 7, 3]", "f32[2, 2, 7, 6]", *([bias] if bias else [])]
    left = ", ".join(f"%{i}: {t}" for i, t in enumerate(results))
    return f"""graph @g(%dout: {OUT}, %out: {OUT}, %lse: {LSE}, {QKV}{more}) -> ({", ".join(results)}) {{
      {left} = attention_backward(%dout, %out, %lse, %q, %k, %v{names}) {{scale = 0.7{attrs}}}
      return {", ".join(f"%{i}" for i in range(len(results)))}
    }}"""


@pytest.mark.parametrize("form", FORMS)
def test_expansion(form: str) -> None:
    g = check_pass(Expand(keep=()), backward(form))
    assert not {"attention_backward", "dropout"} & {n.name for n in g.nodes()}


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_definition(form: str) -> None:
    more, names, attrs = FORMS[form]
    own = attrs.replace(", bias_gradient = true", "")
    definition = parse_graph(f"""graph @g({QKV}{more}) -> {OUT} {{
      %0: {OUT} = attention(%q, %k, %v{names}) {{scale = 0.7{own}}}
      return %0
    }}""")
    forward = parse_graph(f"""graph @g({QKV}{more}) -> ({OUT}, {LSE}) {{
      %0: {OUT}, %1: {LSE} = attention_forward(%q, %k, %v{names}) {{scale = 0.7{own}}}
      return %0, %1
    }}""")
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn([int(d) for d in v.shape], generator=generator, dtype=torch.float64) for v in definition.inputs]
    xs = [x > -0.5 if v.dtype.is_bool else x.long() if v.dtype.is_integer else x for v, x in zip(definition.inputs, xs, strict=True)]
    by = [x.requires_grad_() for x in xs[: 4 if "bias_gradient" in attrs else 3]]
    (y,) = evaluate(definition, xs, wide=True)
    dout = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(y, by, dout)
    xs = [x.detach() for x in xs]
    out, lse = evaluate(forward, xs, wide=True)
    torch.testing.assert_close(out, y.detach())
    for got, true in zip(evaluate(parse_graph(backward(form)), [dout, out, lse, *xs], wide=True), wanted, strict=True):
        torch.testing.assert_close(got, true)


@pytest.mark.parametrize("form", ["plain", "dropout"])
def test_halves(form: str) -> None:
    text = backward(form).replace("f32", "bf16").replace(LSE.replace("f32", "bf16"), LSE)
    check_pass(Expand(keep=()), text)


def test_a_gradient_of_no_bias() -> None:
    with pytest.raises(ParseError, match="a bias that there is not"):
        parse_graph(backward("plain").replace("scale = 0.7", "scale = 0.7, bias_gradient = true"))
