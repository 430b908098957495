"""Passes that find composite operations in their primitive spellings."""

from graphopt.passes.recompose.gelu import RecomposeGelu
from graphopt.passes.recompose.layer_norm import RecomposeLayerNorm
from graphopt.passes.recompose.lerp import RecomposeLerp
from graphopt.passes.recompose.rms_norm import RecomposeRmsNorm
from graphopt.passes.recompose.rope import RecomposeRope
from graphopt.passes.recompose.silu import RecomposeSilu
from graphopt.passes.recompose.softmax import RecomposeSoftmax

__all__ = [
    "RecomposeGelu", "RecomposeLayerNorm", "RecomposeLerp", "RecomposeRmsNorm", "RecomposeRope", "RecomposeSilu", "RecomposeSoftmax",
]  # fmt: skip
