"""Indices out of range, found on a GPU that nobody waits for.

Kernels read within bounds whatever an index says, and write nothing where it is out of range. Beside them a kernel looks through the index
and leaves word of it in memory. That is copied to the host behind each call, and looked at, without waiting, when a call begins and when
it ends: so an error comes with one of the next calls, or from :func:`check_indices`, which waits.
"""

from __future__ import annotations

import ctypes
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

_FIELDS = 4  # of a check: whether it found one, which, and its bounds
_ALIVE: weakref.WeakSet[IndexFlags] = weakref.WeakSet()

Look = Callable[[torch.Tensor, torch.Tensor, int, int, int], None]
"""(index, flags, row, low, high): looks through an index; see ``graphopt.backends.triton.indices``."""


@dataclass(frozen=True)
class Checked:
    """What an index is read by: the operation, the user's source line, and what eager raises."""

    op: str
    loc: str
    error: type[Exception]

    def message(self, value: int, low: int, high: int) -> str:
        where = f" ({self.loc})" if self.loc else ""
        return f"index out of range in {self.op}{where}: {value} is not within {low} .. {high - 1}"


class IndexFlags:
    """What the checks of one program found.

    Args:
        look: the kernel.
        device: of the indices.
        late: whether kernels may go on when a call has returned; on the CPU they are done.
    """

    def __init__(self, look: Look, checks: Sequence[Checked], device: torch.device, late: bool) -> None:
        self.look, self._checks, self._late = look, list(checks), late
        gpu = device.type == "cuda"
        self._synchronize: Callable[[], None] = partial(torch.cuda.synchronize, device) if gpu else lambda: None
        with torch.inference_mode(False):
            self._found = torch.zeros(1 + _FIELDS * len(self._checks), dtype=torch.int64, device=device)
            self._seen = torch.zeros(self._found.shape, dtype=torch.int64, pin_memory=gpu) if late else self._found
        self._any = ctypes.c_int64.from_address(self._seen.data_ptr())
        weakref.finalize(self, _warn, self._seen, self._checks)
        _ALIVE.add(self)

    def checking(self, look: Look) -> Callable[[torch.Tensor, int, int, int], None]:
        """What a program calls for each check: ``check(index, low, high, number of the check)``.

        Raises:
            Exception: the check's own, at once, if no index can be right.
        """

        def check(index: torch.Tensor, low: int, high: int, number: int) -> None:
            if index.numel() == 0:
                return
            if high <= low:
                raise self._checks[number].error(f"{self._checks[number].op}: an index into an axis without elements")
            look(index.contiguous(), self._found, 1 + _FIELDS * number, low, high)

        return check

    def fetch(self) -> None:
        """Have what was found copied to the host, behind all that the current stream still has to do."""
        if self._late:
            self._seen.copy_(self._found, non_blocking=True)

    def raise_found(self) -> None:
        """Raise for an index out of range that the host knows of; it is raised once."""
        if self._any.value:
            self._raise()

    def wait(self) -> None:
        """Raise for an index out of range of any call that was made before."""
        self._synchronize()
        if self._late:
            self._seen.copy_(self._found)
        self.raise_found()

    def _raise(self) -> None:
        self._synchronize()  # or a copy on its way would bring the same again
        seen = self._seen.tolist()
        with torch.inference_mode():
            self._found.zero_()
            self._seen.zero_()
        check, text = next(_found(seen, self._checks))
        raise check.error(f"{text}; found in an earlier call, which read the nearest element and wrote none" if self._late else text)


def check_indices() -> None:
    """Wait for the GPUs, and raise for an index out of range that a compiled model of this process met in a call before.

    Raises:
        IndexError: or what else eager raises for such an index.
    """
    for flags in list(_ALIVE):
        flags.wait()


def _found(seen: Sequence[int], checks: Sequence[Checked]) -> Iterator[tuple[Checked, str]]:
    """The checks that found one, and what to say of it."""
    for k, check in enumerate(checks):
        is_set, *numbers = seen[1 + _FIELDS * k :][:_FIELDS]
        if is_set:
            yield check, check.message(*numbers)


def _warn(seen: torch.Tensor, checks: Sequence[Checked]) -> None:
    """What no call came to raise any more."""
    for _, text in _found(seen.tolist(), checks):
        warnings.warn(f"{text}; no later call was there to raise it", stacklevel=2)
