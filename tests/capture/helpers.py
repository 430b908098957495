"""Compile with library kernels only, so that what is tested is capture; compare with eager in every observable way."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt import clear_reports, kept, reports
from tests.opinfo.harness import copied, difference

EAGER = {"backend": "eager"}


def compiled(fn: Any, cache_dir: str | None = None, kernels: str = "eager", **kwargs: Any) -> Any:
    torch._dynamo.reset()
    clear_reports()
    return torch.compile(fn, backend="graphopt", options={**EAGER, "backend": kernels, "cache_dir": cache_dir}, **kwargs)


def check(fn: Callable[..., Any], *args: Any, library: tuple[str, ...] = (), **kwargs: Any) -> None:
    """Calls of a function without gradients, compiled anew and taken from the graphs that are kept: dtypes, strides, values and what
    happened to the arguments, their version counters included, are eager's.

    Args:
        library: the ATen operators that are expected to stay library calls; the graph may hold no other.
    """
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(2):
            mine, plain = copied(args), copied(args)
            before = versions(mine), versions(plain)
            torch.manual_seed(0)
            with torch.no_grad():
                want = fn(*plain)
                torch.manual_seed(0)
                got = compiled(fn, cache_dir=folder, **kwargs)(*mine)
            text = difference(want, got) or difference(plain, mine)
            assert not text, text
            raised, wanted = ([a > b for a, b in zip(versions(x), b, strict=True)] for x, b in zip((mine, plain), before, strict=True))
            assert raised == wanted, (raised, wanted)
            assert not turn or all("taken" in r.seconds or r.whole or any(m.rule == kept.NAME for m in r.remarks) for r in reports())
            called = sorted(set(library_calls()))
            assert called == sorted(library), called


def versions(args: Sequence[Any]) -> list[int]:
    return [x._version for x in args if isinstance(x, torch.Tensor)]


def library_calls() -> list[str]:
    """ATen operators in what was compiled since the last :func:`compiled`."""
    texts = [r.text_before for r in reports()]
    whole = [f.op for r in reports() for f in r.fallbacks if f.op == "whole graph"]
    return whole + [line.split('target = "')[1].split('"')[0] for t in texts for line in t.splitlines() if 'target = "' in line]
