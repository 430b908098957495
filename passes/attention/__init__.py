"""Attention, found by what it means."""

from graphopt.passes.attention.recognise import RecogniseAttention

__all__ = ["RecogniseAttention"]
