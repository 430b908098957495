"""Ops that hold a graph together: return, fusion, and calls of library operators."""

from __future__ import annotations

from graphopt.ir.ops import REQUIRED, Trait, define

RETURN = define("return", (0, None), doc="the results of the graph")

FUSION = define(
    "fusion", (0, None), attrs={"kind": "pointwise"},
    doc="a region that becomes one kernel: its meaning is its nested graph, whose inputs are the operands",
)  # fmt: skip

ATEN = define(
    "aten", (0, None), traits=(Trait.OPAQUE,),
    attrs={"target": REQUIRED, "args": REQUIRED, "kwargs": (), "effect": "none", "layouts": ()},
    doc="a call of a PyTorch operator: args is a template in which $i stands for operand i; effect is none, random or "
    "mutates; operands are given row-major, or with the strides in layouts where the operator's meaning depends on them; an offset "
    "of storage counts from the operand's first element",
)  # fmt: skip
