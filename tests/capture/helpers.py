"""Compile with library kernels only, so that what is tested is capture; compare with eager in every observable way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphopt import clear_reports, reports
from tests.opinfo.harness import copied, difference

EAGER = {"backend": "eager"}


def compiled(fn: Any, **kwargs: Any) -> Any:
    torch._dynamo.reset()
    clear_reports()
    return torch.compile(fn, backend="graphopt", options=EAGER, **kwargs)


def check(fn: Callable[..., Any], *args: Any, library: tuple[str, ...] = (), **kwargs: Any) -> None:
    """One call of a function without gradients: dtypes, strides, values and what happened to the arguments are eager's.

    Args:
        library: the ATen operators that are expected to stay library calls; the graph may hold no other.
    """
    mine, plain = copied(args), copied(args)
    torch.manual_seed(0)
    with torch.no_grad():
        want = fn(*plain)
        torch.manual_seed(0)
        got = compiled(fn, **kwargs)(*mine)
    text = difference(want, got) or difference(plain, mine)
    assert not text, text
    called = sorted(set(library_calls()))
    assert called == sorted(library), called


def library_calls() -> list[str]:
    """ATen operators in what was compiled since the last :func:`compiled`."""
    texts = [r.text_before for r in reports()]
    whole = [f.op for r in reports() for f in r.fallbacks if f.op == "whole graph"]
    return whole + [line.split('target = "')[1].split('"')[0] for t in texts for line in t.splitlines() if 'target = "' in line]
