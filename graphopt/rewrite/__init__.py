"""Rewriting: patterns, rules, and the driver that applies them."""

from graphopt.rewrite.context import Fuel, PassContext
from graphopt.rewrite.driver import apply_rules, erase_dead
from graphopt.rewrite.pattern import Match, any_of, attr, const, op_in, pat, scalar_of, through, value
from graphopt.rewrite.rewriter import Rewriter
from graphopt.rewrite.rule import Numerics, Reject, Rule

__all__ = [
    "Fuel", "Match", "Numerics", "PassContext", "Reject", "Rewriter", "Rule", "any_of", "apply_rules", "attr", "const",
    "erase_dead", "op_in", "pat", "scalar_of", "through", "value",
]  # fmt: skip
