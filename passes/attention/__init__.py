"""Attention, found by what it means."""

from graphopt.passes.attention.causal import CausalLinearAttention
from graphopt.passes.attention.linear import LinearAttention
from graphopt.passes.attention.mask_blocks import MaskBlocks
from graphopt.passes.attention.recognise import RecogniseAttention

__all__ = ["CausalLinearAttention", "LinearAttention", "MaskBlocks", "RecogniseAttention"]
