"""The benchmark models by their old name; they live in :mod:`graphopt.bench.models`, where the installed command finds them."""

from graphopt.bench.models import *  # noqa: F403
from graphopt.bench.models import MODELS, Model, redraw

__all__ = ["MODELS", "Model", "redraw"]
