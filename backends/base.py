"""What lowering asks of a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from graphopt.autotune.space import Schedule, SearchSpace, Workload
from graphopt.target import Target


@dataclass(frozen=True)
class KernelSource:
    """A kernel as text, before it is built: emitted without a device, so that it can be read and golden-tested.

    Attributes:
        name: entry point, unique by workload and schedule.
        language: ``tvmscript``, ``triton`` ...
        text: the readable kernel.
        payload: what ``build`` of the same backend takes, if that is not the text.
    """

    name: str
    language: str
    text: str
    payload: Any = None


def refused(find: Callable[[Workload], Any]) -> Callable[[Workload, Target], str | None]:
    """Why a region is not for a template, or None if it is: what ``find`` says in the place of the form that the template works on."""

    def takes(w: Workload, t: Target) -> str | None:
        form = find(w)
        return form if isinstance(form, str) else None

    return takes


class KernelTemplate(Protocol):
    """A family of kernels for some workloads."""

    @property
    def name(self) -> str:
        """As in ``Schedule.template``."""

    def space(self, w: Workload, t: Target) -> SearchSpace:
        """The schedules of the default's structure; the default needs no tuning."""

    def spaces(self, w: Workload, t: Target) -> Sequence[SearchSpace]:
        """All schedules: ``space`` first, then those of other structures (sketches)."""

    def emit(self, w: Workload, s: Schedule, t: Target) -> KernelSource:
        """Source of the kernel. Pure: needs no device."""


class Kernel(Protocol):
    """A built kernel, in destination-passing style.

    ``kernel(*operands, *outputs, *sizes)``: operands and outputs are torch tensors in the layouts of the workload's
    text (outputs allocated by the caller), sizes the values of its symbols in sorted order of name.
    """

    def __call__(self, *args: Any) -> Any: ...


class Backend(Protocol):
    """Turns workloads into kernels."""

    name: str

    def templates(self, w: Workload, t: Target) -> Sequence[KernelTemplate]:
        """Templates that can compute the workload, the preferred one first; empty if there is none."""

    def reason(self, w: Workload, t: Target) -> str:
        """Why ``templates`` is empty, in words."""

    def build(self, src: KernelSource, t: Target) -> Kernel:
        """Compile in this process."""

    def versions(self) -> tuple[tuple[str, str], ...]:
        """(name, version) of everything but workload, schedule and target that decides which kernel is the fastest; sorted."""
