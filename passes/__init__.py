"""Passes: one pass, one page. Importing this package registers them all, by name."""

from graphopt.passes import attention, expand, fusion, layout, precision, quantization, recompose, simplify

__all__ = ["attention", "expand", "fusion", "layout", "precision", "quantization", "recompose", "simplify"]
