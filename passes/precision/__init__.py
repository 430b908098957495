"""Precision: what is computed, or kept, in fewer bits than the model says."""

from graphopt.passes.precision.autocast import Autocast

__all__ = ["Autocast"]
