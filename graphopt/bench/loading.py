"""From the name of a model on the command line to the model: a built-in one, a factory in a file or module, a ``.pt2`` file."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from graphopt.bench.models import MODELS
from graphopt.errors import UsageError, nearest

FORMS = f"MODEL is file.py:factory, package.module:factory, a .pt2 file, or one of {', '.join(MODELS)}"


def load(spec: str) -> tuple[torch.nn.Module | Path, tuple[Any, ...], dict[str, Any]]:
    """The module (or the path of a .pt2 file) and its example arguments.

    Raises:
        UsageError: nothing is there, or the factory fails or returns something else.
    """
    if spec.endswith(".pt2"):
        if not Path(spec).is_file():
            raise UsageError(f"there is no file {spec}")
        return Path(spec), (), {}
    if spec in MODELS:
        return _checked(spec, _call(spec, MODELS[spec]))
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        if Path(spec).is_file():
            raise UsageError(f"{spec} is a file: which factory in it? {spec}:{_factory_in(Path(spec))}")
        raise UsageError(f"{spec!r} names no model{nearest(spec, MODELS)}; {FORMS}")
    return _checked(spec, _made(spec))


def _factory_in(file: Path) -> str:
    """The name of a function without arguments in a file, or ``factory``. The file is read, not run."""
    try:
        nodes = ast.parse(file.read_text()).body
    except (OSError, ValueError, SyntaxError):
        return "factory"
    return next((n.name for n in nodes if isinstance(n, ast.FunctionDef) and not n.args.args), "factory")


def load_samples(spec: str) -> list[Any]:
    """What a factory, ``file.py:factory`` or ``package.module:factory``, returns or yields: calls of a model.

    Raises:
        UsageError: nothing is there, or the factory fails or returns nothing to go through.
    """
    if not all(spec.rpartition(":")):
        raise UsageError(f"{spec!r} names no samples; give file.py:factory, or package.module:factory")
    made = _made(spec)
    if not isinstance(made, Iterable) or isinstance(made, str | Mapping | torch.Tensor):
        raise UsageError(f"{spec} must return or yield calls of the model, for instance [torch.randn(2, 8)]; it returns {_describe(made)}")
    return list(made)


def load_function(spec: str) -> Callable[[torch.nn.Module], float]:
    """A function of a model, ``file.py:function`` or ``package.module:function``. Raises UsageError if nothing is there."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise UsageError(f"{spec!r} names no function; give file.py:function, or package.module:function")
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module_named(place)
    function: Callable[..., Any] = _factory(module, place, name)
    return function


def _made(spec: str) -> Any:
    """What the factory of a file or module returns."""
    place, _, name = spec.rpartition(":")
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module_named(place)
    return _call(spec, _factory(module, place, name))


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # so that the file can import its neighbours
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path} fails when it is imported: {_where(error)}") from error
    return module


def _module_named(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(f"there is no module {error.name!r} (looking for {name}); {FORMS}") from error
    except Exception as error:
        raise UsageError(f"module {name} fails when it is imported: {_where(error)}") from error


def _factory(module: ModuleType, place: str, name: str) -> Callable[[], Any]:
    found = getattr(module, name, None)
    if found is None:
        having = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise UsageError(f"{place} has no {name!r}{nearest(name, having)}; it has: {', '.join(having) or 'nothing to call'}")
    if not callable(found):
        raise UsageError(f"{place}:{name} is {_describe(found)}, not a function that returns (module, example inputs)")
    return found  # type: ignore[no-any-return]


def _call(spec: str, factory: Callable[[], Any]) -> Any:
    try:
        return factory()
    except Exception as error:
        raise UsageError(f"{spec} fails when it is called: {_where(error)}") from error


def _checked(spec: str, made: Any) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Module, positional and keyword example inputs of what a factory returned."""
    want = f"{spec} must return (module, example inputs), for instance (model, (torch.randn(2, 8),))"
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise UsageError(f"{want}; what it returns is {_describe(made)}")
    module, inputs = made
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"{want}; the first is {_describe(module)}, not a torch.nn.Module")
    if isinstance(inputs, torch.Tensor):
        return module, (inputs,), {}
    if isinstance(inputs, dict):
        return module, (), inputs
    if isinstance(inputs, tuple | list):
        return module, tuple(inputs), {}
    raise UsageError(f"{want}; the second is {_describe(inputs)}, not a tuple, a dict or a tensor")


def _describe(x: Any) -> str:
    if isinstance(x, tuple | list):
        return f"a {type(x).__name__} of {len(x)}"
    return "None" if x is None else f"of type {type(x).__name__}"


def _where(error: Exception) -> str:
    """An exception in one line, with the user's own source line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(part in f.filename for part in ("site-packages", "importlib", __file__))]
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return f"{text} ({error.filename}:{error.lineno})"
    return text + (f"\n  {own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else "")
