"""``graphopt.compile``: a model through torch.export, for use without Dynamo at run time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from graphopt.capture.export import ExportedGraph, exported_graph
from graphopt.compiler import CompiledGraph, LibraryGraph, Progress, compile_fx
from graphopt.options import Options
from graphopt.profile import Profile
from graphopt.report import Report


class CompiledModel:
    """A compiled model, called like the model it was made from.

    Attributes:
        report: what was done and why.
    """

    def __init__(self, exported: ExportedGraph, compiled: CompiledGraph | LibraryGraph) -> None:
        self._exported, self._compiled = exported, compiled

    @property
    def report(self) -> Report:
        return self._compiled.report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat = self._exported.flatten(args, kwargs)
        return self._exported.unflatten(self._compiled(flat))

    def profile(self, *args: Any, runs: int = 20, **kwargs: Any) -> Profile:
        """What every call of the program costs on these arguments. Raises UsageError if there is no program."""
        return self._compiled.profile(self._exported.flatten(args, kwargs), runs)

    def refresh(self) -> None:
        """Compute what was folded from weights again: after writing to a few elements of one through ``.data`` or NumPy."""
        self._compiled.refresh()


def compile(model: torch.nn.Module | str | Path, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *,
            dynamic_shapes: Any = None, progress: Progress | None = None, **options: Any) -> CompiledModel:  # fmt: skip
    """Compile a model for inference.

    Args:
        model: a module, or the path of a ``.pt2`` file that ``torch.export.save`` wrote.
        args, kwargs: example inputs; sizes are those of the examples unless ``dynamic_shapes`` says otherwise.
        dynamic_shapes: as in ``torch.export.export``.
        progress: told (stage, done, total) while kernels are built.
        options: see :class:`graphopt.Options`.

    Returns:
        A callable that takes what the model takes. It shares the model's parameters and buffers, and follows their changes.

    Raises:
        CaptureError: the model cannot be exported; the message names the user's source line.
        FallbackError: ``strict`` is on and an operation has no kernel.
    """
    chosen = Options.make(None, options)
    exported = exported_graph(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    label = chosen.name or (Path(model).stem if isinstance(model, str | Path) else type(model).__name__)
    return CompiledModel(exported, compile_fx(exported.gm, exported.weights, chosen, label=label, progress=progress))
