"""recognise-attention: spellings that it finds, near misses that it declines with the true reason, both checked by value."""

from __future__ import annotations

import math

import pytest
from attending import SPELLINGS, attentions, captured, check_values, recognise
from nearly_attending import BIASES, MISSES

from graphopt.ir.opset.attention import DEFAULTS, parts


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name: str) -> None:
    case = SPELLINGS[name]
    old, inputs = captured(case)
    new, remarks = recognise(old)
    found = attentions(new)
    assert len(found) == 1, "\n".join(map(str, remarks)) + f"\n{new}"
    check_values(case, old, new, inputs)
    (node,) = found
    wanted = dict(case.found)
    if (heads := wanted.pop("heads", None)) is not None:
        p = parts(node.operands, node.attrs)
        assert (p.k.shape[-3], p.v.shape[-3]) == (heads, heads)
    assert math.isclose(node.attrs["scale"], wanted.pop("scale", node.attrs["scale"]), rel_tol=1e-6)
    for attr in ("causal", "offset", "window", "softcap", "alibi", "sinks"):
        assert node.attrs[attr] == wanted.get(attr, DEFAULTS[attr]), attr
    assert node.attrs["empty"] == wanted.get("empty", node.attrs["empty"])


@pytest.mark.parametrize("name", MISSES)
def test_near_miss(name: str) -> None:
    case = MISSES[name]
    old, inputs = captured(case)
    new, remarks = recognise(old)
    assert not attentions(new), f"{new}"
    assert any(r.kind == "missed" and case.why in r.message for r in remarks) or not case.why, "\n".join(map(str, remarks))
    check_values(case, old, new, inputs)


@pytest.mark.parametrize("name", BIASES)
def test_what_stays_a_bias(name: str) -> None:
    case = BIASES[name]
    old, inputs = captured(case)
    new, remarks = recognise(old)
    (node,) = attentions(new)
    check_values(case, old, new, inputs)
    p = parts(node.operands, node.attrs)
    assert p.bias is not None and p.mask is None and not node.attrs["causal"]
    assert any(r.kind == "missed" and case.why in r.message for r in remarks) or not case.why, "\n".join(map(str, remarks))
