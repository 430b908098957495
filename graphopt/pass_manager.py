"""Passes, and running them: contracts checked, time taken, structure verified, `changed` kept honest."""

from __future__ import annotations

import ast
import gc
import inspect
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import entry_points
from types import CodeType
from typing import Any, ClassVar

from typing_extensions import dataclass_transform

from graphopt.errors import EquivalenceError, GraphoptError, PassError, UsageError, nearest
from graphopt.ir.graph import Graph
from graphopt.ir.verify import verify
from graphopt.rewrite import Rule, apply_rules
from graphopt.rewrite.context import Fuel, PassContext, PassRun

PASSES: dict[str, type[Pass]] = {}


@dataclass_transform(frozen_default=True)
class Pass(ABC):
    """A graph-to-graph rewrite. A subclass is made a frozen dataclass; its fields are its options.

    A subclass with a ``name`` is registered under it, for pipelines. ``run`` works in place and returns True if and
    only if it changed something.
    """

    name: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclass(frozen=True)(cls)
        if "name" in cls.__dict__:
            PASSES[cls.name] = cls

    def requires(self, g: Graph) -> None:
        """Raise if the graph is not fit for this pass."""

    @abstractmethod
    def run(self, g: Graph, ctx: PassContext) -> bool:
        """Rewrite in place; True iff something changed."""

    def ensures(self, g: Graph) -> None:
        """Raise if the pass did not reach what it promises."""

    def key(self) -> str:
        """Identity for cache keys: name, options, and the source that decides what the pass does."""
        return "\n".join([str(self), *dict.fromkeys(map(_source, self.parts()))])

    def parts(self) -> Sequence[type]:
        """The classes whose code the pass runs, its own first."""
        return [type(self)]

    def __str__(self) -> str:
        options = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default)  # type: ignore[arg-type]
        return self.name + (f"{{{options}}}" if options else "")


@cache
def _source(part: type) -> str:
    """The text of the file that a class stands in, helpers included; without a file, of the class, or its code."""
    for found in (sys.modules.get(part.__module__), part):
        try:
            return inspect.getsource(found)  # type: ignore[arg-type]
        except (OSError, TypeError, SyntaxError):  # SyntaxError: found in a file that is no module, a page of documentation
            pass
    return repr({k: _code(v.__code__) for k, v in vars(part).items() if hasattr(v, "__code__")})


def _code(code: CodeType) -> tuple[object, ...]:
    """What a function does, without the addresses that ``repr`` of a code object has."""
    constants = [_code(c) if isinstance(c, CodeType) else c for c in code.co_consts]
    return code.co_code, constants, code.co_names


class RewritePass(Pass):
    """A pass that is a list of rules, applied until none fires."""

    @abstractmethod
    def rules(self) -> Sequence[Rule]:
        """The rules, in order of preference at a node."""

    def run(self, g: Graph, ctx: PassContext) -> bool:
        return apply_rules(g, self.rules(), ctx)

    def parts(self) -> Sequence[type]:
        return [type(self), *dict.fromkeys(type(r) for r in self.rules())]


class Instrument:
    """Looks on while passes run; override what is needed."""

    def before(self, p: Pass, g: Graph, ctx: PassContext) -> None: ...
    def after(self, p: Pass, g: Graph, ctx: PassContext, changed: bool) -> None: ...


def run_passes(g: Graph, passes: Sequence[Pass], ctx: PassContext | None = None, instruments: Sequence[Instrument] = (),
               structure: bool = True) -> bool:  # fmt: skip
    """Run passes in order.

    Args:
        structure: check the graph's structure after every pass that changed it, and that a pass that denies it did not.

    Returns:
        Whether any pass changed the graph.

    Raises:
        GraphoptError: from a pass; the message is extended by the pass's name.
    """
    ctx = ctx or PassContext()
    with _without_collection():
        return _run_passes(g, passes, ctx, instruments, structure)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Pause the cyclic garbage collector: it would walk the whole process's heap again and again while graphs grow."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _run_passes(g: Graph, passes: Sequence[Pass], ctx: PassContext, instruments: Sequence[Instrument], structure: bool) -> bool:
    any_changed = False
    links = _links(g) if structure else []
    for p in passes:
        ctx.pass_name = p.name
        for i in instruments:
            i.before(p, g, ctx)
        start, first = time.perf_counter(), len(ctx.remarks)
        try:
            p.requires(g)
            changed = run_pass(p, g, ctx)
            p.ensures(g)
            if structure and changed:
                verify(g)
            if structure:
                before, links = links, _links(g)
                if not changed and links != before:
                    raise EquivalenceError(f"pass {p} changed @{g.name} but says that it did not")
        except GraphoptError as error:
            error.add_note(f"in pass {p}")
            raise
        ctx.runs.append(PassRun(p.name, time.perf_counter() - start, changed, first, len(ctx.remarks)))
        for i in instruments:
            i.after(p, g, ctx, changed)
        any_changed |= changed
    return any_changed


def run_pass(p: Pass, g: Graph, ctx: PassContext) -> bool:
    """``p.run(g, ctx)``. Raises PassError, which names the pass, where it fails by a fault of its own or does not return a bool."""
    try:
        changed = p.run(g, ctx)
    except GraphoptError:
        raise
    except Exception as error:  # a fault of the pass's author: say whose it is
        raise PassError(f"pass {p} failed on @{g.name}: {type(error).__name__}: {error}") from error
    if not isinstance(changed, bool):
        raise PassError(f"pass {p}: run returned {changed!r}; return True if it changed the graph, else False")
    return changed


def _links(g: Graph) -> list[tuple[Any, ...]]:
    """The nodes in order with their operands, and the outputs: what nearly every change of a graph shows in."""
    return [*((node, node.operands) for node in g.nodes()), (None, g.outputs)]


# --- pipelines by name -------------------------------------------------------------------------------------------------


def load_entry_points() -> None:
    """Register the passes that installed packages offer in the entry-point group ``graphopt.passes``."""
    for point in entry_points(group="graphopt.passes"):
        if point.name not in PASSES:
            PASSES[point.name] = point.load()


def make_pass(name: str, options: Mapping[str, Any] | None = None) -> Pass:
    """A pass by name. Raises UsageError for an unknown pass or option, with the nearest name."""
    if name not in PASSES:
        load_entry_points()
    if name not in PASSES:
        raise UsageError(f"there is no pass {name!r}{nearest(name, PASSES)}; `graphopt opt --list-passes` shows all")
    known = {f.name: f for f in fields(PASSES[name])}  # type: ignore[arg-type]
    for option in options or {}:
        if option not in known:
            having = ", ".join(known) or "none"
            raise UsageError(f"pass {name} has no option {option!r}{nearest(option, known)}; it has: {having}")
        default = known[option].default
        if isinstance(default, int | str | tuple) and not isinstance(options[option], type(default)):  # type: ignore[index]
            raise UsageError(f"pass {name}: {option}={options[option]!r} must be a {type(default).__name__}, such as {default!r}")  # type: ignore[index]
    return PASSES[name](**(options or {}))


__all__ = [
    "PASSES", "Fuel", "Instrument", "Pass", "PassContext", "RewritePass", "load_entry_points", "make_pass",
    "parse_pipeline", "run_pass", "run_passes",
]  # fmt: skip

_ITEM = re.compile(r"\s*(?P<name>[\w-]+)\s*(?:\{(?P<options>[^}]*)\})?\s*(?:,|$)")


def parse_pipeline(text: str) -> list[Pass]:
    """Passes of a text such as ``canonicalize,fuse{max_nodes=8}``; option values are Python literals."""
    out, at = [], 0
    while at < len(text):
        match = _ITEM.match(text, at)
        if not match:
            raise UsageError(f"pipeline {text!r}: expected a pass such as name{{option=value}} at {text[at:]!r}")
        options = {}
        for part in filter(None, map(str.strip, (match["options"] or "").split(","))):
            key, sign, value = part.partition("=")
            if not sign:
                raise UsageError(f"pipeline {text!r}: {part!r} is not of the form option=value")
            try:
                options[key.strip()] = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError):
                options[key.strip()] = value.strip()
        out.append(make_pass(match["name"], options))
        at = match.end()
    return out
