"""The op attention: its reference against a plain loop over rows, its expansion against its reference, types, text, and work."""

from __future__ import annotations

import math

import pytest
import torch

from graphopt.errors import ParseError
from graphopt.ir import Builder, Graph, TensorType, dims, evaluate, parse_graph, print_graph, types, verify
from graphopt.ir.opset.attention import seen_pairs, sees_a_key
from graphopt.ir.work import flops
from graphopt.passes.expand import Expand
from graphopt.testing import check_pass

M, N, H = 5, 7, 4

FORMS: dict[str, dict[str, object]] = {
    "plain": {},
    "top-left causal": {"causal": True},
    "bottom-right causal": {"causal": True, "offset": N - M},
    "window": {"causal": True, "window": 3},
    "window, bottom-right": {"causal": True, "window": 2, "offset": N - M},
    "local": {"window": 2},
    "local, shifted": {"window": 2, "offset": 1},
    "soft cap": {"softcap": 1.5},
    "soft cap and bias": {"softcap": 1.5, "with": ("bias",)},
    "bias": {"with": ("bias",)},
    "bias of -inf rows, zero": {"with": ("-inf",)},
    "bias of -inf rows, nan": {"with": ("-inf",), "empty": "nan"},
    "mask": {"with": ("mask",)},
    "mask, nan": {"with": ("mask",), "empty": "nan"},
    "mask, mean": {"with": ("mask",), "empty": "mean"},
    "causal before the first key": {"causal": True, "offset": -2},
    "causal before the first key, mean": {"causal": True, "offset": -2, "empty": "mean"},
    "a window that ends before the last rows": {"window": 1, "causal": True, "offset": 4},
    "alibi": {"alibi": True, "causal": True},
    "sinks": {"sinks": True, "with": ("mask",)},
    "everything": {"causal": True, "offset": 1, "window": 4, "softcap": 2.0, "alibi": True, "sinks": True, "with": ("bias", "mask")},
    "grouped": {"heads": 2, "causal": True},
    "one head of keys": {"heads": 1, "alibi": True},
}

WHOLLY = Expand(keep=tuple(n for n in Expand.keep if n != "attention"))


def graph(form: str, dtype: types.DType = types.f32) -> Graph:
    attrs = dict(FORMS[form])
    given, heads = attrs.pop("with", ()), attrs.pop("heads", H)
    g = Graph("g")
    ins = [g.add_input(TensorType(dtype, s), n) for n, s in zip("qkv", ((2, H, M, 8), (2, heads, N, 8), (2, heads, N, 6)), strict=True)]
    if "bias" in given or "-inf" in given:
        ins.append(g.add_input(TensorType(dtype, (H, M, N)), "bias"))
    if "mask" in given:
        ins.append(g.add_input(TensorType(types.b1, (2, 1, M, N)), "mask"))
    ins += [g.add_input(TensorType(dtype, (H,)), name) for name in ("slopes", "sinks") if attrs.get("alibi" if name == "slopes" else name)]
    g.set_outputs([Builder(g).create("attention", ins, {"scale": 0.4, **attrs})])
    return g


def inputs(g: Graph, form: str) -> list[torch.Tensor]:
    """Random inputs; row 2 sees nothing by its bias or mask."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for v in g.inputs:
        shape = [int(d) for d in v.shape]
        x = torch.rand(shape, generator=generator) > 0.4 if v.dtype.is_bool else torch.randn(shape, generator=generator).to(v.dtype.torch)
        if v.hint == "mask" or (v.hint == "bias" and "-inf" in FORMS[form].get("with", ())):  # type: ignore[operator]
            x[..., 2, :] = False if v.dtype.is_bool else float("-inf")
        out.append(x)
    return out


def by_rows(form: str, named: dict[str, torch.Tensor]) -> torch.Tensor:
    """The definition, one row at a time, in f64."""
    attrs = {"causal": False, "offset": 0, "window": None, "softcap": None, "empty": "zero", **FORMS[form]}
    q, k, v = (named[n].double() for n in "qkv")
    out = torch.zeros(2, H, M, v.shape[-1], dtype=torch.float64)
    for batch, head, i in ((a, b, c) for a in range(2) for b in range(H) for c in range(M)):
        shared = head // (H // k.shape[1])
        scores = []
        for j in range(N):
            s = 0.4 * float(q[batch, head, i] @ k[batch, shared, j])
            s = s if attrs["softcap"] is None else attrs["softcap"] * math.tanh(s / attrs["softcap"])
            s += float(named["bias"][head, i, j]) if "bias" in named else 0.0
            s += float(named["slopes"][head]) * (j - i) if "slopes" in named else 0.0
            middle = i + attrs["offset"]
            seen = bool(named["mask"][batch, 0, i, j]) if "mask" in named else True
            seen &= not attrs["causal"] or j <= middle
            seen &= attrs["window"] is None or j > middle - attrs["window"]
            seen &= attrs["window"] is None or attrs["causal"] or j < middle + attrs["window"]
            scores.append(s if seen else -math.inf)
        if max(scores) == -math.inf and "sinks" not in named:
            value = {"zero": 0 * v[batch, shared, 0], "nan": math.nan * v[batch, shared, 0], "mean": v[batch, shared].mean(0)}
            out[batch, head, i] = value[attrs["empty"]]
            continue
        exps = [math.exp(s) for s in scores]
        total = sum(exps) + (math.exp(float(named["sinks"][head])) if "sinks" in named else 0.0)
        out[batch, head, i] = sum(e / total * v[batch, shared, j] for j, e in enumerate(exps))
    return out


@pytest.mark.parametrize("form", FORMS)
def test_reference(form: str) -> None:
    g = graph(form)
    data = inputs(g, form)
    expected = by_rows(form, {v.hint: x for v, x in zip(g.inputs, data, strict=True)})
    torch.testing.assert_close(evaluate(g, data, wide=True)[0], expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(evaluate(g, data)[0].double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
def test_expansion(form: str) -> None:
    g = graph(form)
    data = inputs(g, form)
    small = check_pass(WHOLLY, g) if FORMS[form].get("empty") != "nan" else g.clone()
    if FORMS[form].get("empty") == "nan":
        from graphopt.pass_manager import run_passes

        run_passes(small, [WHOLLY])
    assert "attention" not in {n.op.name for n in small}
    torch.testing.assert_close(evaluate(small, data, wide=True)[0], evaluate(g, data, wide=True)[0], rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("dtype", [types.f16, types.bf16])
@pytest.mark.parametrize("form", ["everything", "mask, mean", "grouped"])
def test_halves(form: str, dtype: types.DType) -> None:
    """Computed in f32 and rounded once."""
    g = graph(form, dtype)
    data = inputs(g, form)
    exact = evaluate(g, data, wide=True)[0]
    torch.testing.assert_close(evaluate(g, data)[0].double(), exact, rtol=1e-2, atol=1e-2)
    check_pass(WHOLLY, g)


SYMBOLIC = """
graph @g(%q: f32[B, 4, S, 8], %k: f32[B, 2, P + S, 8], %v: f32[B, 2, P + S, 8], %m: b1[B, 1, S, P + S]) -> f32[B, 4, S, 8]
where 1 <= B, 0 <= P <= 32, 1 <= S <= 64 {
  %0: f32[B, 4, S, 8] = attention(%q, %k, %v, %m) {scale = 0.5, causal = true, offset = P, window = 3}
  return %0
}"""


def test_symbolic_text_and_expansion() -> None:
    g = parse_graph(SYMBOLIC)
    verify(g)
    assert print_graph(parse_graph(print_graph(g))) == print_graph(g)
    check_pass(WHOLLY, g, bindings=[{"B": 2, "P": 0, "S": 3}, {"B": 1, "P": 5, "S": 1}])


def test_rows_that_see_a_key() -> None:
    attrs = {"causal": True, "offset": 0, "window": None}
    rows, keys = dims.symbol("S"), dims.symbol("N")
    assert sees_a_key(attrs, rows, keys)
    assert not sees_a_key({**attrs, "offset": -1}, 4, 4)
    assert not sees_a_key({**attrs, "offset": dims.sub(keys, rows)}, rows, keys)  # more rows than keys
    assert sees_a_key({**attrs, "window": 2}, 4, 4) and not sees_a_key({**attrs, "window": 2}, 6, 4)
    assert sees_a_key({"causal": False, "offset": -1, "window": 2}, 4, 4)
    assert not sees_a_key({"causal": False, "offset": -2, "window": 2}, 4, 4)


@pytest.mark.parametrize("attrs", [{"causal": True, "offset": 1}, {"window": 2}, {"causal": True, "window": 3, "offset": -1}, {}])
def test_work(attrs: dict[str, object]) -> None:
    full = {"causal": False, "offset": 0, "window": None, **attrs}
    middle = torch.arange(M)[:, None] + full["offset"]
    j = torch.arange(N)
    seen = torch.ones(M, N, dtype=torch.bool)
    if full["causal"]:
        seen &= j <= middle
    if full["window"] is not None:
        seen &= (j > middle - full["window"]) & ((j < middle + full["window"]) | bool(full["causal"]))
    assert seen_pairs(full, M, N) == int(seen.sum())
    g = Graph("g")
    q, k = g.add_input(TensorType(types.f32, (2, 4, M, 8))), g.add_input(TensorType(types.f32, (2, 2, N, 8)))
    node = Builder(g).attention(q, k, k, scale=1.0, **attrs).producer
    assert flops(node) == 2 * 2 * 4 * int(seen.sum()) * 16


WRONG = {
    "heads that do not divide": ("%k: f32[3, 7, 8]", "attention(%q, %k, %k) {scale = 1.0}", "cannot share"),
    "slopes without alibi": ("%k: f32[4, 7, 8], %s: f32[4], %b: f32[7]", "attention(%q, %k, %k, %b, %s) {scale = 1.0}", "do not fit"),
    "alibi without slopes": ("%k: f32[4, 7, 8]", "attention(%q, %k, %k) {scale = 1.0, alibi = true}", "do not fit"),
    "too many slopes": ("%k: f32[4, 7, 8], %s: f32[5]", "attention(%q, %k, %k, %s) {scale = 1.0, alibi = true}", "for 4 heads"),
    "a large bias": ("%k: f32[4, 7, 8], %b: f32[2, 4, 5, 7]", "attention(%q, %k, %k, %b) {scale = 1.0}", "does not broadcast"),
    "no such empty": ("%k: f32[4, 7, 8]", 'attention(%q, %k, %k) {scale = 1.0, empty = "none"}', "not one of"),
    "an empty window": ("%k: f32[4, 7, 8]", "attention(%q, %k, %k) {scale = 1.0, window = 0}", "a window of 0"),
    "a soft cap of 0": ("%k: f32[4, 7, 8]", "attention(%q, %k, %k) {scale = 1.0, softcap = 0.0}", "a soft cap of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_operands(case: str) -> None:
    ins, node, message = WRONG[case]
    with pytest.raises(ParseError, match=message):
        parse_graph(f"graph @g(%q: f32[4, 5, 8], {ins}) -> f32[4, 5, 8] {{\n %0: f32[4, 5, 8] = {node}\n return %0 }}")
