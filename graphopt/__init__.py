"""graphopt: a graph compiler for PyTorch that people can read, verify and tune.

    compiled = torch.compile(model, backend="graphopt")     # needs no import of graphopt
    compiled = graphopt.compile(model, (x,))                # through torch.export, without Dynamo at run time
    print(graphopt.reports()[-1].summary())                 # what was done, what was declined, and why

Importing graphopt imports neither TVM nor Triton; a backend is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError

if TYPE_CHECKING:
    from graphopt.fake_quantization import fake_quantize
    from graphopt.index_flags import check_indices
    from graphopt.model import CompiledModel, compile
    from graphopt.options import Options
    from graphopt.quantization import quantize
    from graphopt.report import Report, clear_reports, reports
    from graphopt.weights import refresh

__version__ = "0.1.0"

_LAZY = {
    "CompiledModel": "graphopt.model", "compile": "graphopt.model", "Options": "graphopt.options", "Report": "graphopt.report",
    "reports": "graphopt.report", "clear_reports": "graphopt.report", "refresh": "graphopt.weights",
    "quantize": "graphopt.quantization", "fake_quantize": "graphopt.fake_quantization", "check_indices": "graphopt.index_flags",
}  # fmt: skip

__all__ = [
    "CompiledModel", "GraphoptError", "Options", "Report", "__version__", "check_indices", "clear_reports", "compile", "fake_quantize",
    "quantize", "refresh", "reports",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
