"""Operators that read memory by steps, and windows of an axis."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from graphopt import reports
from tests.capture.helpers import check, compiled

X = torch.arange(64.0 * 48).reshape(64, 48)

STRIDED: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: (x + 1).as_strided((2, 3), (4, 1), 3).neg(),
    lambda x: (x + 1).as_strided((3, 5), (2, 1)).neg(),  # windows that overlap
    lambda x: (x + 1).as_strided((3, 5), (1, 1), 2).neg(),
    lambda x: (x + 1).as_strided((5, 3), (1, 2), 2).neg(),  # the shorter step first
    lambda x: (x + 1).as_strided((3, 2, 5, 2), (16, 0, 5, 2), 2).neg(),
    lambda x: (x + 1).as_strided((300, 100), (2, 1), 2).neg(),
    lambda x: (x + 1).as_strided((), ()).neg(),
    lambda x: (x + 1)[3:, 4:].as_strided((3, 5), (2, 1)).neg(),  # of the memory behind a view
    lambda x: (x + 1)[1:].as_strided((2, 2), (1, 1), 0).neg(),
    lambda x: (x.t() + 1).as_strided((2, 3), (1, 2), 1).neg(),
    lambda x: (x[None] + 1).as_strided((2, 64), (70, 1), 2).neg(),
    lambda x: x.as_strided((3, 5), (2, 1)).neg(),
    lambda x: (x > 5).as_strided((3, 5), (2, 1)).logical_not(),
]


@pytest.mark.parametrize("fn", STRIDED, ids=range(len(STRIDED)))
def test_memory_by_steps(fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Arguments that begin their storage, that do not, and that lie in another order."""
    for given in (X, torch.arange(70.0 * 48).reshape(70, 48)[3:67], X.t().contiguous().t()):
        check(fn, given)


def test_what_is_not_cut_is_called() -> None:
    """Too many windows that overlap, nothing, and what writes by steps are calls of the library, which counts from the operand."""
    call = ("aten.as_strided_copy.default",)
    later = torch.arange(70.0 * 48).reshape(70, 48)[3:67]
    for given in (X, later):
        check(lambda x: (x + 1).as_strided((300, 300), (1, 1), 3).neg(), given, library=call)
        check(lambda x: (x + 1).as_strided((0, 5), (1, 1), 3).neg(), given, library=call)
        check(lambda x: x.as_strided((300, 300), (1, 1)).neg(), given, library=call)
        check(lambda x: torch.as_strided_scatter(x + 1, x[0, :4], (4,), (9,), 5).neg(), given, library=("aten.as_strided_scatter.default",))
    check(lambda x: x.as_strided((2, 2), (4, 1), 0).neg(), torch.arange(12.0)[2:], library=("whole graph",))
    check(lambda x: x.as_strided((2, 2), (1, 1)).neg(), torch.arange(4.0).expand(3, 4), library=("whole graph",))


@pytest.mark.parametrize("kernels", ["eager", "tvm"])
def test_the_library_counts_from_an_operand_in_the_arena(kernels: str) -> None:
    """Values inside a program share one block of memory, of which only one is at its beginning."""

    def program(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = torch.mm(x, x.t()), torch.mm(x.t(), x)
        scattered = torch.as_strided_scatter(torch.cos(b @ b), a[0, :9], (9,), (7,), 5)
        return a.softmax(0) @ a, (torch.sin(a @ a)).as_strided((300, 300), (1, 1)) * 2, scattered @ scattered  # fmt: skip

    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) / 64
    with torch.no_grad():
        torch.testing.assert_close(compiled(program, kernels=kernels)(x), program(x))


def test_an_offset_into_an_argument_holds_at_every_call() -> None:
    """Where an argument begins in its storage is not guarded; what counts from there is right wherever it begins."""
    flat = torch.arange(24.0)
    explicit, relative = compiled(lambda x: x.as_strided((2, 3), (4, 1), 3) + 1), compiled(lambda x: x.as_strided((2, 3), (4, 1)) + 1)
    for start in (2, 3, 0, 4):
        x = flat[start : start + 12]
        torch.testing.assert_close(explicit(x), x.as_strided((2, 3), (4, 1), 3) + 1)
        torch.testing.assert_close(relative(x), x.as_strided((2, 3), (4, 1)) + 1)


@pytest.mark.parametrize(("size", "step"), [(3, 2), (2, 2), (2, 3), (40, 1), (40, 30), (48, 1), (1, 1)])
def test_windows_of_an_axis(size: int, step: int) -> None:
    check(lambda x: ((x + 1).unfold(1, size, step) * 2, x.unfold(0, size, step).neg()), X)


def test_windows_by_index() -> None:
    check(lambda x: x.unfold(0, 100, 1).neg(), torch.arange(300.0))
    text = reports()[-1].text_before
    assert "take(" in text and "concat(" not in text
    check(lambda x: x.unfold(0, 30, 10).neg(), torch.arange(300.0))
    text = reports()[-1].text_before
    assert "take(" not in text and text.count("slice(") <= 4


def test_a_broadcast_axis_beside_axes_of_one_element() -> None:
    """Elements of one place read through a division that is 0 within an axis, and not beyond its end."""
    x = torch.randn(3, 1, 5, generator=torch.Generator().manual_seed(0)).permute(2, 1, 0)

    def program(x: torch.Tensor) -> torch.Tensor:
        return (x.unsqueeze(3).expand(5, 1, 3, 2) * 1).as_strided((2, 2), (0, 1), 0).relu()

    with torch.no_grad():
        assert torch.equal(compiled(program, kernels="tvm")(x), program(x))
