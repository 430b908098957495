"""Layouts: how tensors lie in memory so that kernels read them straight."""

from graphopt.passes.layout.channel_norms import ChannelNorms
from graphopt.passes.layout.conv_layout import ConvLayout
from graphopt.passes.layout.halve_weights import HalveWeights
from graphopt.passes.layout.output_order import OutputOrder
from graphopt.passes.layout.pack_filters import PackFilters
from graphopt.passes.layout.pack_weights import PackWeights
from graphopt.passes.layout.pad_products import PadProducts
from graphopt.passes.layout.share_packed import SharePacked
from graphopt.passes.layout.split_reductions import SplitReductions
from graphopt.passes.layout.turn_bias import TurnBias
from graphopt.passes.layout.unflatten import Unflatten
from graphopt.passes.layout.weights_in_place import WeightsInPlace
from graphopt.passes.layout.winograd import WinogradFilters

__all__ = ["ChannelNorms", "ConvLayout", "HalveWeights", "OutputOrder", "PackFilters", "PackWeights", "PadProducts", "SharePacked",
           "SplitReductions", "TurnBias", "Unflatten", "WeightsInPlace", "WinogradFilters"]
