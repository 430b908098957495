"""torch.export to a functional aten graph, with what is needed to call it like the model."""

from __future__ import annotations

import inspect
import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch._export.utils import _collect_all_valid_cia_ops, _get_decomp_for_cia
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from graphopt.capture.decompositions import DECOMPOSITIONS
from graphopt.capture.source import short_path
from graphopt.errors import CaptureError, UsageError, counted, first_line
from graphopt.guards import InputError, Known

_BRANCHES = '; torch.export cannot branch on values of tensors, torch.compile(model, backend="graphopt") can'


class _Exporting:
    """One export at a time, and no look into a module while one goes on: torch.export swaps the module's tensors for fake ones.

    ``epoch`` is odd while an export goes on, so that a reader sees with two comparisons that it was not disturbed.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.epoch = 0

    def __enter__(self) -> None:
        self.lock.acquire()
        self.epoch += 1

    def __exit__(self, *_: object) -> None:
        self.epoch += 1
        self.lock.release()


_EXPORTING = _Exporting()


@dataclass(frozen=True)
class Slot:
    """Where a tensor of the model is to be found at a call: in the live module, so that replacing it is seen."""

    table: dict[str, Any]
    key: str
    name: str  # its path in the model

    def get(self) -> torch.Tensor:
        return self.table[self.key]  # type: ignore[no-any-return]


@dataclass
class ExportedGraph:
    """An exported model.

    Attributes:
        gm: functional aten; mutations of buffers and inputs are ``copy_`` nodes at its end.
        weights: placeholder index -> name, of parameters, constants, and the buffers that the graph does not update.
        slots: placeholder index -> where its tensor is; the user's inputs, in order, are the placeholders without one.
    """

    gm: torch.fx.GraphModule
    weights: dict[int, str]
    slots: dict[int, Slot] = field(repr=False)
    _users: list[tuple[int, str, Any]] = field(repr=False)  # the user's inputs: placeholder, name, traced value
    _in_spec: Any = field(repr=False)
    _out_spec: Any = field(repr=False)
    _names: tuple[str, ...] = field(default=(), repr=False)  # of the model's parameters, as far as they may be given by position

    def __post_init__(self) -> None:
        self._template: list[Any] = [None] * (len(self.slots) + len(self._users))
        self._live = [(i, s.table, s.key) for i, s in self.slots.items()]
        self._only_users = not self.slots and [i for i, _, _ in self._users] == [*range(len(self._users))]
        self._keywords = list(_children(self._in_spec)[1].context)
        positional = _children(_children(self._in_spec)[0])
        tensors = all(isinstance(traced, torch.Tensor) for _, _, traced in self._users)
        self._simple = not self._keywords and tensors and len(positional) == len(self._users) and all(p.is_leaf() for p in positional)
        self._positional = len(positional)
        self._places = [i for i, _, _ in self._users]
        self._known = Known()
        self._single = self._out_spec.is_leaf()
        shapes = [t.shape if isinstance(t, torch.Tensor) else () for _, _, t in self._users]
        self._sizes = [[n if isinstance(n, int) else None for n in shape] for shape in shapes]

    def take_graph(self) -> torch.fx.GraphModule:
        """The graph, for good: calls do not need it, and it takes some MiB."""
        gm, self.gm = self.gm, torch.fx.GraphModule({}, torch.fx.Graph())
        return gm

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The graph's arguments for a call of the model.

        Raises:
            TypeError: the arguments are not structured as the example was.
            ValueError: a tensor has another dtype, rank or fixed size than the example had, or a weight is gone.
        """
        leaves = args
        plain = self._simple and not kwargs and len(args) == len(self._users)
        if not plain or not self._known.check(*args):
            if not plain or not all(map(isinstance, args, repeat(torch.Tensor))):
                leaves, spec = pytree.tree_flatten(self._as_in_the_example(args, kwargs))
                if spec != self._in_spec:
                    raise TypeError(f"the model was compiled for {self._form(self._in_spec)}, and was given {self._form(spec)}")
            for (_, name, traced), sizes, given in zip(self._users, self._sizes, leaves, strict=True):
                _check(name, traced, sizes, given)
            if plain:
                self._known.learn(args)
        if self._only_users:
            return list(leaves)
        out = self._template.copy()
        for i, given in zip(self._places, leaves, strict=True):
            out[i] = given
        epoch = _EXPORTING.epoch
        try:
            for i, table, key in self._live:
                out[i] = table[key]
            disturbed = epoch & 1 or _EXPORTING.epoch != epoch
        except KeyError:
            disturbed = 1
        if disturbed:  # a thread exports, perhaps this very model: what was read may be fake; or a weight is gone
            with _EXPORTING.lock:
                self.require_weights()
                for i, table, key in self._live:
                    out[i] = table[key]
        return out

    def require_weights(self) -> None:
        """Raises InputError if the model has a weight no more that it was compiled with; calls look only when something failed."""
        for slot in self.slots.values():
            if not isinstance(slot.table.get(slot.key), torch.Tensor):
                why = "it was set to None, removed, pruned, or is computed at each call now"
                raise InputError(f"{slot.name} is gone from the model ({why}); compile again")

    def _as_in_the_example(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call whose arguments stand by position and by name where they stood in the example."""
        count = self._positional
        if len(args) != count and len(args) <= len(self._names):
            named = {**dict(zip(self._names, args, strict=False)), **kwargs}
            if len(named) == len(args) + len(kwargs) and set(named) == {*self._names[:count], *self._keywords}:
                args, kwargs = [named[n] for n in self._names[:count]], {k: named[k] for k in self._keywords}
        return tuple(args), {k: kwargs[k] for k in self._keywords if k in kwargs} | dict(kwargs)

    @staticmethod
    def _form(spec: Any) -> str:
        """The arguments of a call in words: how many by position and which by name; how they are nested, if they are."""
        positional, named = _children(spec)
        names = ", ".join(map(str, named.context))
        nested = [c for c in (*_children(positional), *_children(named)) if not c.is_leaf()]
        text = counted(len(_children(positional)), "positional argument") + (f" and the keywords {names}" if names else "")
        return text + (f" ({', '.join(map(_short, nested))})" if nested else "")

    def unflatten(self, results: Sequence[Any]) -> Any:
        """The model's result from the graph's."""
        return results[0] if self._single else pytree.tree_unflatten(list(results), self._out_spec)

    def hold(self, tensors: Mapping[int, Any]) -> None:
        """From now on hand these in at their placeholders, whatever becomes of the module."""
        for i, x in tensors.items():
            self._template[i] = x
            del self.slots[i]
        self._live = [(i, s.table, s.key) for i, s in self.slots.items()]


def multiplied(model: torch.nn.Module) -> list[torch.Tensor]:
    """The tensors of a module that may be factors of products: matrices and filters that are not only looked up."""
    owners = [m for m in model.modules() if not isinstance(m, torch.nn.Embedding | torch.nn.EmbeddingBag)]
    tensors = [t for m in owners for t in (*m._parameters.values(), *m._buffers.values()) if t is not None and not is_lazy(t)]
    return [t for t in tensors if t.ndim >= 2]


def _children(spec: Any) -> list[Any]:
    return list(spec.children() if hasattr(spec, "children") else spec.children_specs)


def exported_graph(model: torch.nn.Module | torch.export.ExportedProgram | str | Path, args: Sequence[Any] | torch.Tensor = (),
                   kwargs: Mapping[str, Any] | None = None, *, dynamic_shapes: Any = None) -> ExportedGraph:  # fmt: skip
    """Export a module, or take an exported program or a ``.pt2`` file. One thread at a time: torch.export cannot do more.

    Raises:
        CaptureError: export fails; names the user's source line.
        UsageError: the file does not exist.
    """
    with _EXPORTING:
        return _exported_graph(model, (args,) if isinstance(args, torch.Tensor) else tuple(args), dict(kwargs or {}), dynamic_shapes)


def _exported_graph(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> ExportedGraph:
    program = _program(model, args, kwargs, dynamic_shapes)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg|torch")  # of PyTorch about its own code
        composites = {op: _get_decomp_for_cia(op) for op in _collect_all_valid_cia_ops()}
        program = program.run_decompositions({**composites, **DECOMPOSITIONS})
    signature = program.graph_signature
    owner = model if isinstance(model, torch.nn.Module) else None
    _write_back(program.graph_module, signature)
    slots: dict[int, Slot] = {}
    users: list[tuple[int, str, Any]] = []
    weights: dict[int, str] = {}
    updated = {s.target for s in signature.output_specs if s.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)}
    placeholders = program.graph_module.graph.find_nodes(op="placeholder")
    for i, (spec, node) in enumerate(zip(signature.input_specs, placeholders, strict=True)):
        if spec.kind == InputKind.USER_INPUT:
            users.append((i, node.name, node.meta.get("val")))
            continue
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise CaptureError(f"the exported program has an input of kind {spec.kind.name} ({spec.target}), which is no tensor")
        assert spec.target is not None
        slots[i] = _slot(owner, program, spec.target)
        if spec.target not in updated:
            weights[i] = spec.target
    getattr(proxy_tensor, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {}).clear()  # PyTorch's, of the last export: it would keep the graph
    spec = program.call_spec
    return ExportedGraph(program.graph_module, weights, slots, users, spec.in_spec, spec.out_spec, _names(owner))


def _names(owner: torch.nn.Module | None) -> tuple[str, ...]:
    """The parameters of a module's ``forward`` that may be given by position."""
    try:
        found = inspect.signature(owner.forward).parameters.values() if owner is not None else ()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD)


def _program(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> torch.export.ExportedProgram:
    if isinstance(model, torch.export.ExportedProgram):
        return model
    if isinstance(model, str | Path):
        return _saved(model)
    try:
        with torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    except Exception as error:  # export raises whatever the model's code and torch's tracer raise
        hint = _BRANCHES if isinstance(error, GuardOnDataDependentSymNode) else ""
        raise CaptureError(f"{type(model).__name__} could not be exported: {_explain(error)}{hint}") from error


def _saved(file: str | Path) -> torch.export.ExportedProgram:
    if not Path(file).is_file():
        raise UsageError(f"there is no file {file}")
    try:
        return torch.export.load(file)
    except Exception as error:  # a zip without a program, no zip at all, another version: each raises its own
        raise UsageError(f"{file} is no exported program (torch.export.save writes one): {type(error).__name__}") from error


def example_inputs(file: str | Path) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that a ``.pt2`` file was exported with, by position and by name.

    Raises:
        UsageError: there is no such file, or it has none.
    """
    with _EXPORTING:
        found = _saved(file).example_inputs
    if found is None:
        raise UsageError(f"{file} has no example inputs to run it on; export the model with them (torch.export.save keeps what "
                         "torch.export.export was given), or give the model itself: file.py:factory")  # fmt: skip
    args, kwargs = found
    return tuple(args), dict(kwargs)


def _short(spec: Any) -> str:
    """A nested argument: its type, and how many values it holds."""
    return f"a {spec.type.__name__} of {spec.num_leaves}"


def _explain(error: BaseException) -> str:
    """The first line of an error, and the deepest line of the user's own code that it came from."""
    frames: list[tuple[str, int]] = []
    trace = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    quoted = [(f, int(n)) for f, n in re.findall(r'File "([^"]+)", line (\d+)', str(error))]
    here = str(Path(torch.__file__).parent), str(Path(__file__).parent.parent), str(Path(inspect.__file__).parent) + "/", "<"
    own = [f for f in [*frames, *quoted] if not f[0].startswith(here)]
    first = first_line(error)
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


def _slot(owner: torch.nn.Module | None, program: torch.export.ExportedProgram, name: str) -> Slot:
    """Where a parameter, buffer or constant is."""
    path, _, attribute = name.rpartition(".")
    if owner is not None:
        try:
            module = owner.get_submodule(path)
        except AttributeError:
            module = None
        for table in (module._parameters, module._buffers) if module is not None else ():
            if isinstance(table.get(attribute), torch.Tensor):
                return Slot(table, attribute, name)
    return Slot({name: program.state_dict[name] if name in program.state_dict else program.constants[name]}, name, name)


def _check(name: str, traced: Any, sizes: Sequence[int | None], given: Any) -> None:
    """An argument against its example: dtype, rank and fixed sizes (None for one that may change)."""
    if not isinstance(traced, torch.Tensor):
        if traced is not None and not isinstance(traced, torch.SymInt | torch.SymFloat | torch.SymBool) and traced != given:
            raise ValueError(f"argument {name} was {traced!r} when the model was compiled, and is {given!r} now")
        return
    if not isinstance(given, torch.Tensor):
        raise TypeError(f"argument {name} must be a tensor, got {type(given).__name__}")
    shape = given.shape
    if given.dtype != traced.dtype or len(shape) != len(sizes) or any(n is not None and n != m for n, m in zip(sizes, shape)):
        raise ValueError(
            f"argument {name} is {given.dtype}{list(given.shape)}, and the model was compiled for {traced.dtype}{[*traced.shape]}"
        )
