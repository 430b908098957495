"""Testing passes: what graphopt's own tests use, public, so that you can test yours the same way.

- :func:`check_pass`: one call a test case. Verifies, compares values against f64, checks ``changed``, runs the pass again.
- :func:`check_rules_fire`: every rule of a pass is seen to fire.
- :func:`assert_equivalent`: two graphs compute the same.
- :func:`graphs`: a hypothesis strategy for random graphs over the whole op table, with symbolic sizes (needs ``hypothesis``).
- :func:`random_graph`: one such graph from a seed, without hypothesis.

See docs/writing_a_pass.md.
"""

from graphopt.testing.checks import assert_equivalent, assert_same_structure, check_pass, check_rules_fire, check_settled, diff
from graphopt.testing.random_graphs import graphs, random_graph

__all__ = [
    "assert_equivalent", "assert_same_structure", "check_pass", "check_rules_fire", "check_settled", "diff", "graphs", "random_graph",
]  # fmt: skip
