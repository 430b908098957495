"""``graphopt.compile``: a model through torch.export, for use without Dynamo at run time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from graphopt.asked import IN_TRAINING_MODE
from graphopt.built import Progress
from graphopt.capture.captured import Uncapturable
from graphopt.capture.export import ExportedGraph, exported_graph, multiplied
from graphopt.capture.fx import capture_fx
from graphopt.compiled import CompiledGraph, LibraryGraph
from graphopt.compiler import compile_fx
from graphopt.devices import prestart
from graphopt.errors import UsageError, WholeFallback
from graphopt.exact import exact_weights, mark
from graphopt.garbage import uncollected
from graphopt.ir.graph import Graph
from graphopt.lower import Lowered
from graphopt.options import Options
from graphopt.ownership import GivenUp, OwnershipError, give_back_memory, refuse_loading, replace_everywhere
from graphopt.prepared import lowered_programs
from graphopt.profile import Profile
from graphopt.report import Report
from graphopt.target import Target


def lowered(model: torch.nn.Module | str | Path, args: Sequence[Any] | torch.Tensor, kwargs: Mapping[str, Any] | None, target: Target,
            options: Options) -> list[tuple[Graph, Lowered]]:  # fmt: skip
    """The programs of a model for a target, which need not be a machine like this one: nothing is built or run.

    Raises:
        CaptureError: the model cannot be exported.
        WholeFallback: its graph cannot be held.
    """
    exported = exported_graph(model, args, kwargs, dynamic_shapes=None)
    try:
        captured = capture_fx(exported.gm, weights=exported.weights)
    except Uncapturable as error:
        raise WholeFallback(error.reason) from error
    mark(captured, exact_weights(_weights(exported, options)))
    return lowered_programs(captured, target, options)


def _weights(exported: ExportedGraph, options: Options) -> dict[int, torch.Tensor]:
    """The weights themselves, by placeholder, where they count as frozen."""
    return {i: exported.slots[i].get() for i in exported.weights if i in exported.slots} if options.freeze else {}


class CompiledModel:
    """A compiled model, called like the model it was made from. May be called from several threads at once.

    Attributes:
        report: what was done and why.
        given_up: names of the weights that exist only in packed form (``own_weights=True``).
    """

    def __init__(self, exported: ExportedGraph, compiled: CompiledGraph | LibraryGraph) -> None:
        self._exported, self._compiled = exported, compiled
        self.given_up: tuple[str, ...] = ()

    @property
    def report(self) -> Report:
        return self._compiled.report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat = self._exported.flatten(args, kwargs)
        try:
            results = self._compiled(flat)
        except (AttributeError, TypeError):  # of a None in the place of a weight
            self._exported.require_weights()
            raise
        return self._exported.unflatten(results)

    def eval(self) -> CompiledModel:
        """The model itself: it is for inference. It has no parameters of its own; those are the original model's."""
        return self

    def profile(self, *args: Any, runs: int = 20, **kwargs: Any) -> Profile:
        """What every call of the program costs on these arguments. Raises WholeFallback if there is no program."""
        return self._compiled.profile(self._exported.flatten(args, kwargs), runs)

    def refresh(self) -> None:
        """Compute what was folded from weights again: after writing to a few elements of one through ``.data`` or NumPy.

        Raises:
            OwnershipError: the weights were given up; there is nothing to compute from.
        """
        if self.given_up:
            raise OwnershipError(f"{self!r} (own_weights=True): {self.given_up[0]} is gone, and cannot be packed again")
        self._compiled.refresh()

    def __repr__(self) -> str:
        report = self.report
        calls = sum(k.calls for k in report.kernels)
        text = f"{calls} kernel calls of {len(report.kernels)} kernels, {len(report.fallbacks)} library calls"
        owned = f", owns {len(self.given_up)} weights" if self.given_up else ""
        return f"CompiledModel({report.name} for {report.target}: {text}{owned})"

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        raise UsageError(f"{self!r} cannot be copied: it shares the weights of its model. It may be called from any number of "
                         "threads; for other weights, copy the model and compile the copy (kernels come from the cache)")  # fmt: skip

    __copy__ = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError(f"{self!r} cannot be pickled: it holds machine code that was loaded into this process. Save the model "
                         "(torch.save, torch.export.save), and compile where it is loaded (kernels come from the cache)")  # fmt: skip

    def _own_weights(self, model: torch.nn.Module | None) -> None:
        """Take the weights over: pack them now, and leave the module without those that were packed."""
        if isinstance(self._compiled, LibraryGraph):
            self.report.notes.append("own_weights: nothing was packed, the model keeps its weights")
            return
        slots, modules = dict(self._exported.slots), list(model.modules()) if model is not None else []
        given_up = []

        def give_up(p: int) -> None:
            slot, name = slots[p], self._exported.weights[p]
            stand_in = GivenUp.of(slot.get(), name, f"the compiled {self.report.name}")
            replace_everywhere(modules, slot.get(), stand_in)
            slot.table[slot.key] = stand_in
            given_up.append(name)

        give_back_memory()  # what the export left: it refers to the weights
        held = self._compiled.own_weights(lambda p: slots[p].get(), give_up)
        self._exported.hold(held)
        self.given_up = tuple(given_up)
        refuse_loading(modules)
        give_back_memory()


def compile(model: torch.nn.Module | str | Path, args: Sequence[Any] | torch.Tensor = (), kwargs: Mapping[str, Any] | None = None, *,
            dynamic_shapes: Any = None, progress: Progress | None = None, **options: Any) -> CompiledModel:  # fmt: skip
    """Compile a model for inference.

    Args:
        model: a module, or the path of a ``.pt2`` file that ``torch.export.save`` wrote.
        args, kwargs: example inputs (one tensor alone will do); sizes are those of the examples unless ``dynamic_shapes`` says otherwise.
        dynamic_shapes: as in ``torch.export.export``.
        progress: told (stage, done, total) while kernels are built.
        options: see :class:`graphopt.Options`.

    Returns:
        A callable that takes what the model takes. It shares the parameters and buffers of the model's modules, and follows their
        changes, but not that a module is replaced by another; under ``own_weights=True`` it holds the weights itself: those that it
        packed leave the model.

    Raises:
        CaptureError: the model cannot be exported; the message names the user's source line.
        FallbackError: ``strict`` is on and an operation has no kernel.
        UsageError: there is no such option, or it cannot have that value.
    """
    if isinstance(given := options.get("options"), Mapping):
        raise UsageError(f"give options as keywords: graphopt.compile(model, args, {', '.join(f'{k}={v!r}' for k, v in given.items())})")
    chosen = Options.make(None, options)
    pages = prestart(chosen, tree_leaves((args, kwargs)), multiplied(model) if isinstance(model, torch.nn.Module) else ())
    if chosen.own_weights:
        give_back_memory()  # what earlier compilations left: this one comes to lie there
    with nullcontext() if chosen.own_weights else uncollected():  # there memory counts
        exported = exported_graph(model, args, kwargs, dynamic_shapes=dynamic_shapes)
        label = chosen.name or (Path(model).stem if isinstance(model, str | Path) else type(model).__name__)
        exact = exact_weights(_weights(exported, chosen))
        graph = compile_fx(exported.take_graph(), exported.weights, chosen, exact=exact, label=label, progress=progress)
        compiled = CompiledModel(exported, graph)
    if isinstance(model, torch.nn.Module) and model.training:
        compiled.report.notes.append(IN_TRAINING_MODE)
    if chosen.own_weights:
        compiled._own_weights(model if isinstance(model, torch.nn.Module) else None)
    else:
        compiled._compiled.stage_into(pages)
    return compiled
