"""``graphopt.fake_quantize``: training with rounding, by layers that round in floats as the quantized ones will.

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018,
arXiv:1712.05877.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphopt.calibration import OBSERVERS, samples_of, try_out
from graphopt.errors import UsageError, nearest
from graphopt.fake_quantized import FakeQuantized, without_fakes
from graphopt.linears import is_convolution, layers_of, left_in_float, linears_of, replaced, schemes_of
from graphopt.quantization import LEAST, set_steps


def fake_quantize(model: nn.Module, args: Sequence[Any] | torch.Tensor = (), kwargs: Mapping[str, Any] | None = None, *,
                  scheme: str | Mapping[str, str] = "int8-dynamic", calibration: Iterable[Any] | None = None, observer: str = "minmax",
                  keep: Iterable[str] = (), least: int = LEAST) -> nn.Module:  # fmt: skip
    """A model that computes as :func:`graphopt.quantize` would have it, in floats, and can be trained.

    It shares its parameters with ``model``: train the result, then give it, or ``model``, to :func:`graphopt.quantize` with the same
    scheme. Weights are rounded to the nearest: there is no ``method``. Batch norms stay apart from convolutions, as they are still
    learning. Ranges of a static scheme are those of the calibration, and are not trained.

    Args:
        model: stays as it is, but for what training does to its parameters.
        args, kwargs: example inputs (one tensor alone will do); only static schemes without ``calibration`` need them.
        scheme, calibration, observer, keep, least: as of :func:`graphopt.quantize`.

    Raises:
        UsageError: there is no such scheme or observer, a pattern fits nothing, or a static scheme has nothing to calibrate on, or nothing
            that the model takes.
    """
    if observer not in OBSERVERS:
        raise UsageError(f"there is no observer {observer!r}{nearest(str(observer), OBSERVERS)}; observers are {', '.join(OBSERVERS)}")
    model, _ = without_fakes(model)
    schemes = schemes_of(scheme, list(layers_of(model)))
    left = left_in_float(model, schemes, tuple(keep), least)
    layers = layers_of(model)
    made: dict[str, Any] = {n: FakeQuantized(layers[n], str(s)) for n, s in schemes.items() if n not in left}
    if any(m.activations == "static" for m in made.values()):
        linears = layers if any(is_convolution(layers[n]) for n in made) else linears_of(model)
        args, kwargs = (args,) if isinstance(args, torch.Tensor) else args, dict(kwargs or {})
        samples = samples_of(calibration, args, kwargs)
        try_out(model, args, kwargs, [] if calibration is None else samples)
        set_steps(model, linears, made, samples, observer, lambda *_: None, left)
    return replaced(model, made)
