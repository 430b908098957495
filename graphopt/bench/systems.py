"""The systems that are compared, by their names on the command line."""

from __future__ import annotations

from graphopt.bench.float_systems import FLOATS
from graphopt.bench.quantized_systems import FLOAT, QUANTIZED, by_scheme
from graphopt.bench.system import System

__all__ = ["FLOAT", "PEERS", "QUANTIZED_PEERS", "SYSTEMS", "by_scheme", "system"]

SYSTEMS: dict[str, System] = {s.name: s for s in (*FLOATS, FLOAT, *QUANTIZED)}
PEERS = ("inductor", "onnxruntime", "openvino")  # in f32, if no others are asked for
QUANTIZED_PEERS = tuple(s.name for s in QUANTIZED)


def system(name: str) -> System:
    """A system by its name; ``graphopt-`` and a scheme of quantization is one, too. Raises KeyError."""
    return SYSTEMS[name] if name in SYSTEMS else by_scheme(name)
