"""Attention, found by what it means."""

from graphopt.passes.attention.linear import LinearAttention
from graphopt.passes.attention.recognise import RecogniseAttention

__all__ = ["LinearAttention", "RecogniseAttention"]
