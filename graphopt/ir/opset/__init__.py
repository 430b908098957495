"""The op table, a page a family. Importing this package fills :data:`graphopt.ir.ops.OPS`."""

from graphopt.ir.opset import (
    attention,
    attention_training,
    composite,
    contract,
    creation,
    dropout,
    normalize,
    pointwise,
    quantize,
    reduce,
    scan,
    scatter,
    shape,
    structure,
    window,
)

__all__ = [
    "attention", "attention_training", "composite", "contract", "creation", "dropout", "normalize", "pointwise", "quantize", "reduce",
    "scan", "scatter", "shape", "structure", "window",
]  # fmt: skip
