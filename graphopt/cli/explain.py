"""``graphopt explain``: compile a model, and tell what was done to it, what was declined, and why."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from enum import Enum
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer

import graphopt
from graphopt.errors import UsageError, nearest
from graphopt.report import Report

FORMS = "MODEL is file.py:factory, package.module:factory, or a .pt2 file"


class Remarks(str, Enum):
    """Which remarks to show."""

    none = "none"
    passed = "passed"
    missed = "missed"
    all = "all"


def explain(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="file.py:factory, package.module:factory, or a .pt2 file of torch.export.save.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    remarks: Annotated[Remarks, typer.Option(help="Which remarks to show.")] = Remarks.missed,
    strict: Annotated[bool, typer.Option(help="Fail if an operation runs through a library kernel that was not asked for.")] = False,
    verify: Annotated[str, typer.Option(help="off, structure, or each-pass (compare values after every pass).")] = "structure",
    backend: Annotated[str, typer.Option(help="auto, tvm, or eager (library kernels only, nothing is built).")] = "auto",
    pipeline: Annotated[str | None, typer.Option("--pipeline", "-p", help="Other passes than the default: a,b{option=1}.")] = None,
    show: Annotated[list[str] | None, typer.Option(help="Also print: before, after (the IR), program. May be given again.")] = None,
    profile: Annotated[bool, typer.Option(help="Run it, and tell what every call costs.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Lines of each kind at most.")] = 20,
) -> None:
    """Compile a model and print the report: passes, kernels, library fallbacks with source lines, remarks.

    The factory takes no arguments and returns (module, example inputs):

    \b
    def make():
        return torch.nn.Linear(8, 4), (torch.randn(2, 8),)

    \b
    graphopt explain model.py:make                      passes, kernels, fallbacks, what was nearly done
    graphopt explain mypackage.models:make --strict     an error that names each library fallback
    graphopt explain model.pt2 --remarks all            what was done, too
    graphopt explain model.py:make --verify each-pass   every pass checked against f64
    graphopt explain model.py:make --show after         the IR that kernels are made from
    graphopt explain model.py:make --profile            time, GFLOP/s and GB/s of every kernel
    graphopt explain model.py:make --json > report.json
    """
    wanted = _sections(show or [])
    module, args, kwargs = load(model)
    options: dict[str, Any] = {"strict": strict, "verify": verify, "pipeline": pipeline, "backend": backend}
    with _quiet(bool(ctx.parent and ctx.parent.params.get("debug"))):
        compiled = graphopt.compile(module, args, kwargs, name=model, **options)
    report: Report = compiled.report
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2, default=str))
        return
    typer.echo(report.summary(remarks=remarks.value, limit=limit), nl=False)
    for title, text in wanted.items():
        typer.echo(f"\n// {title}\n{getattr(report, text)}")
    if profile:
        typer.echo("\n" + compiled.profile(*args, **kwargs).table(limit), nl=False)


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Keep away what PyTorch prints and warns of while it captures: what matters is in the report, or in the error."""
    if debug:
        yield
        return
    log = logging.getLogger("torch")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _sections(names: list[str]) -> dict[str, str]:
    known = {"before": "text_before", "after": "text_after", "program": "program"}
    for name in names:
        if name not in known:
            raise UsageError(f"--show {name!r} is none of {', '.join(known)}{nearest(name, known)}")
    return {name: known[name] for name in names}


# --- from a name to a model --------------------------------------------------------------------------------------------


def load(spec: str) -> tuple[torch.nn.Module | Path, tuple[Any, ...], dict[str, Any]]:
    """The module (or the path of a .pt2 file) and its example arguments.

    Raises:
        UsageError: nothing is there, or the factory fails or returns something else.
    """
    if spec.endswith(".pt2"):
        if not Path(spec).is_file():
            raise UsageError(f"there is no file {spec}")
        return Path(spec), (), {}
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise UsageError(f"{spec!r} names no model; {FORMS}")
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module_named(place)
    return _checked(spec, _call(spec, _factory(module, place, name)))


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
    ours = str(Path(__file__).parent)
    own = [f for f in frames if not any(part in f.filename for part in ("site-packages", "importlib", ours))]
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return f"{text} ({error.filename}:{error.lineno})"
    return text + (f"\n  {own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else "")
