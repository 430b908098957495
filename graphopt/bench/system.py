"""What a compared system is: how it turns a module and example inputs into a callable."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphopt.errors import GraphoptError

Run = Callable[[], Any]
ONNX, OPENVINO = "model.onnx", "model.xml"  # what is converted, in the folder of a job


class SystemFailure(GraphoptError):
    """A system cannot run a model; the message says why, in a line."""


@dataclass
class Job:
    """What a system is given.

    Attributes:
        module, args, kwargs: the model and example inputs.
        threads: how many it may use.
        folder: a folder of its own, for what it writes.
        cache_dir: graphopt's kernel cache; None for the user's own.
    """

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    threads: int
    folder: Path
    cache_dir: Path | None = None

    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the inputs, in the order of the arguments."""
        return [x for x in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(x, torch.Tensor)]

    def arrays(self, wanted: int) -> list[Any]:
        """The input tensors as NumPy arrays that share their memory. Raises SystemFailure if they are not as many as wanted."""
        tensors = self.tensors()
        if len(tensors) != wanted:
            raise SystemFailure(f"the converted model takes {wanted} inputs, not {len(tensors)}")
        return [t.detach().numpy() for t in tensors]


@dataclass
class Prepared:
    """A model that is ready to run.

    Attributes:
        run: takes nothing; returns the results.
        capture_seconds: of the preparation: until the compiler had the graph.
        keeps_module: whether it still needs the module's weights. If not, they are freed.
        notes: what a reader should know.
    """

    run: Run
    capture_seconds: float = 0.0
    keeps_module: bool = True
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class System:
    """A system by its name on the command line.

    Attributes:
        title: how people write it.
        packages: what must be installed; ``cached``: whether it keeps compiled code from one process to the next.
        load: imports what it needs, before the memory's baseline is taken.
        prepare: compiles, or loads what was converted, and runs once.
        convert: writes a file for ``prepare`` into the job's folder, in another process; returns notes.
        extra: of graphopt's installation, with which its packages come.
        narrow: whether weights have fewer bits than the model's.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    cached: bool
    load: Callable[[], None]
    prepare: Callable[[Job], Prepared]
    convert: Callable[[Job], list[str]] | None = None
    extra: str = "bench"
    narrow: bool = False

    @property
    def is_graphopt(self) -> bool:
        """Whether it is graphopt, in some form."""
        return self.name.startswith("graphopt")

    def missing(self) -> str | None:
        """What to install, or None."""
        absent = [p for p in self.packages if importlib.util.find_spec(p) is None]
        return f"{', '.join(absent)} not installed: pip install {' '.join(absent)} (or 'graphopt[{self.extra}]')" if absent else None


def in_a_line(error: BaseException, limit: int = 160) -> str:
    """An exception in one line: the first line of its message that says something."""
    lines = [x.strip() for x in str(error).splitlines()]
    text = next((x for x in lines if len(x.split()) > 2), lines[0] if lines else "")
    whole = f"{type(error).__name__}: {text}".rstrip(": ")
    return whole if len(whole) <= limit else whole[: limit - 3] + "..."
