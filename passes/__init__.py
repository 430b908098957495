"""Passes: one pass, one page. Importing this package registers them all, by name."""

from graphopt.passes import expand, fusion, layout, quantization, recompose, simplify

__all__ = ["expand", "fusion", "layout", "quantization", "recompose", "simplify"]
