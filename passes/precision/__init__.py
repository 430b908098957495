"""Precision: what is computed, or kept, in fewer bits than the model says."""

from graphopt.passes.precision.autocast import Autocast
from graphopt.passes.precision.narrow_weights import NarrowWeights
from graphopt.passes.precision.widen_convolutions import WidenConvolutions

__all__ = ["Autocast", "NarrowWeights", "WidenConvolutions"]
