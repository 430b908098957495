"""Quantization: weights, or both factors of products, as small integers, and the form in which kernels read them."""

from graphopt.passes.quantization import pack_quantized, quantize_convolutions, quantize_products, quantize_weights

__all__ = ["pack_quantized", "quantize_convolutions", "quantize_products", "quantize_weights"]
