"""torch.export to a functional aten graph, with what is needed to call it like the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._export.utils import _collect_all_valid_cia_ops, _get_decomp_for_cia
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from graphopt.capture.source import short_path
from graphopt.errors import CaptureError, UsageError

Fetch = Callable[[], torch.Tensor]


@dataclass
class ExportedGraph:
    """An exported model.

    Attributes:
        gm: functional aten; mutations of buffers and inputs are ``copy_`` nodes at its end.
        weights: placeholder index -> name, of parameters, constants, and the buffers that the graph does not update.
    """

    gm: torch.fx.GraphModule
    weights: dict[int, str]
    _fetch: list[Fetch | None] = field(repr=False)  # a placeholder: how to get its tensor; None for the user's next input
    _users: list[tuple[str, Any]] = field(repr=False)  # traced values of the user's inputs, by name
    _in_spec: Any = field(repr=False)
    _out_spec: Any = field(repr=False)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The graph's arguments for a call of the model.

        Raises:
            TypeError: the arguments are not structured as the example was.
            ValueError: a tensor has another dtype, rank or fixed size than the example had.
        """
        ordered = {k: kwargs[k] for k in self._keywords if k in kwargs} | dict(kwargs)
        leaves, spec = pytree.tree_flatten((tuple(args), ordered))
        if spec != self._in_spec:
            raise TypeError(f"the model was compiled for arguments of the form {self._in_spec}, and was given {spec}")
        for (name, traced), given in zip(self._users, leaves, strict=True):
            _check(name, traced, given)
        rest = iter(leaves)
        return [next(rest) if fetch is None else fetch() for fetch in self._fetch]

    @property
    def _keywords(self) -> list[str]:
        children = self._in_spec.children() if hasattr(self._in_spec, "children") else self._in_spec.children_specs
        return list(children[1].context)

    def unflatten(self, results: Sequence[Any]) -> Any:
        """The model's result from the graph's."""
        return pytree.tree_unflatten(list(results), self._out_spec)


def exported_graph(model: torch.nn.Module | torch.export.ExportedProgram | str | Path, args: Sequence[Any] = (),
                   kwargs: Mapping[str, Any] | None = None, *, dynamic_shapes: Any = None) -> ExportedGraph:  # fmt: skip
    """Export a module, or take an exported program or a ``.pt2`` file.

    Raises:
        CaptureError: export fails; names the user's source line.
        UsageError: the file does not exist.
    """
    program = _program(model, tuple(args), dict(kwargs or {}), dynamic_shapes)
    with torch.no_grad():
        program = program.run_decompositions({op: _get_decomp_for_cia(op) for op in _collect_all_valid_cia_ops()})
    signature = program.graph_signature
    owner = model if isinstance(model, torch.nn.Module) else None
    _write_back(program.graph_module, signature)
    fetch: list[Fetch | None] = []
    users: list[tuple[str, Any]] = []
    weights: dict[int, str] = {}
    updated = {s.target for s in signature.output_specs if s.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)}
    placeholders = program.graph_module.graph.find_nodes(op="placeholder")
    for i, (spec, node) in enumerate(zip(signature.input_specs, placeholders, strict=True)):
        if spec.kind == InputKind.USER_INPUT:
            fetch.append(None)
            users.append((node.name, node.meta.get("val")))
            continue
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise CaptureError(f"the exported program has an input of kind {spec.kind.name} ({spec.target}), which is no tensor")
        assert spec.target is not None
        fetch.append(_fetcher(owner, program, spec.target))
        if spec.target not in updated:
            weights[i] = spec.target
    return ExportedGraph(program.graph_module, weights, fetch, users, program.call_spec.in_spec, program.call_spec.out_spec)


def _program(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> torch.export.ExportedProgram:
    if isinstance(model, torch.export.ExportedProgram):
        return model
    if isinstance(model, str | Path):
        if not Path(model).is_file():
            raise UsageError(f"there is no file {model}")
        try:
            return torch.export.load(model)
        except Exception as error:  # a zip without a program, no zip at all, another version: each raises its own
            raise UsageError(f"{model} is no exported program (torch.export.save writes one): {type(error).__name__}") from error
    try:
        with torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    except Exception as error:  # export raises whatever the model's code and torch's tracer raise
        raise CaptureError(f"{type(model).__name__} could not be exported: {_explain(error)}") from error


def _explain(error: BaseException) -> str:
    """The first line of an error, and the deepest line of the user's own code that it came from."""
    frames: list[tuple[str, int]] = []
    trace = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    quoted = [(f, int(n)) for f, n in re.findall(r'File "([^"]+)", line (\d+)', str(error))]
    here = str(Path(torch.__file__).parent), str(Path(__file__).parent.parent), "<"
    own = [f for f in [*frames, *quoted] if not f[0].startswith(here)]
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    inside = [f for f in own if f in quoted] or own
    where = f" ({short_path(inside[-1][0])}:{inside[-1][1]})" if inside else ""
    return f"{type(error).__name__}: {first}{where}"


def _write_back(gm: torch.fx.GraphModule, signature: Any) -> None:
    """Turn the outputs that are new values of buffers and inputs into ``copy_`` nodes; the user's outputs remain."""
    names = {s.target: s.arg.name for s in signature.input_specs if s.target is not None and hasattr(s.arg, "name")}
    placeholders = {n.name: n for n in gm.graph.find_nodes(op="placeholder")}
    (output,) = gm.graph.find_nodes(op="output")
    kept = []
    for spec, value in zip(signature.output_specs, output.args[0], strict=True):
        if spec.kind == OutputKind.USER_OUTPUT:
            kept.append(value)
            continue
        if spec.kind not in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
            raise CaptureError(f"the exported program has an output of kind {spec.kind.name}")
        target = placeholders[names.get(spec.target, spec.target)]
        with gm.graph.inserting_before(output):
            copy = gm.graph.call_function(torch.ops.aten.copy_.default, (target, value))
        copy.meta = {**value.meta, "val": target.meta["val"]}
    output.args = (tuple(kept),)
    gm.recompile()


def _fetcher(owner: torch.nn.Module | None, program: torch.export.ExportedProgram, name: str) -> Fetch:
    """How to get a parameter, buffer or constant at call time: from the live module, so that replacing it is seen."""
    path, _, attribute = name.rpartition(".")
    if owner is not None:
        try:
            module = owner.get_submodule(path)
        except AttributeError:
            module = None
        for table in (module._parameters, module._buffers) if module is not None else ():
            if isinstance(table.get(attribute), torch.Tensor):
                return lambda: table[attribute]  # type: ignore[return-value]
    tensor = program.state_dict[name] if name in program.state_dict else program.constants[name]
    return lambda: tensor


def _check(name: str, traced: Any, given: Any) -> None:
    """An argument against its example: dtype, rank and fixed sizes."""
    if not isinstance(traced, torch.Tensor):
        if traced is not None and not isinstance(traced, torch.SymInt | torch.SymFloat | torch.SymBool) and traced != given:
            raise ValueError(f"argument {name} was {traced!r} when the model was compiled, and is {given!r} now")
        return
    if not isinstance(given, torch.Tensor):
        raise TypeError(f"argument {name} must be a tensor, got {type(given).__name__}")
    sizes = [n if isinstance(n, int) else None for n in traced.shape]
    fits = len(sizes) == given.dim() and all(n is None or n == m for n, m in zip(sizes, given.shape))
    if given.dtype != traced.dtype or not fits:
        raise ValueError(
            f"argument {name} is {given.dtype}{list(given.shape)}, and the model was compiled for {traced.dtype}{[*traced.shape]}"
        )
