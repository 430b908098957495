"""The table of recipes, and how a page adds to it."""

from __future__ import annotations

from collections.abc import Callable

from graphopt.ir import Value
from graphopt.testing.pool import Pool

Recipe = Callable[[Pool, str], Value]
RECIPES: dict[str, Recipe] = {}


def recipe(*names: str) -> Callable[[Recipe], Recipe]:
    """Register a recipe for some ops."""

    def register(fn: Recipe) -> Recipe:
        RECIPES.update(dict.fromkeys(names, fn))
        return fn

    return register


def random_axis(pool: Pool, x: Value) -> int:
    """One of a value's axes."""
    return pool.chooser.integer(0, x.type.rank - 1)
