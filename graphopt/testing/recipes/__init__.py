"""How to make a random, well-typed node of each op: one recipe a family, one page a kind.

Recipes keep to what has a value: they divide integers by what is not zero, index within bounds, and cast floats to integers
only where the range is known. Every op of the table that has inference must have a recipe; a test checks it.
"""

from graphopt.testing.recipes import elements, layers, moves, quantized  # noqa: F401  (fills the table, in this order)
from graphopt.testing.recipes.idioms import IDIOMS, fuse_chain
from graphopt.testing.recipes.registry import RECIPES, Recipe, recipe

__all__ = ["IDIOMS", "RECIPES", "Recipe", "fuse_chain", "recipe"]
