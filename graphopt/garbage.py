"""Python's cyclic garbage collector while a model is compiled."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No collection meanwhile. What a compilation makes stays mostly alive, so that collections find little; and a full one goes through
    everything that lives, a million objects of PyTorch and of models' libraries: 0.3 s, where compiling with cached kernels takes one.
    Garbage in cycles waits for the next collection after it."""
    if not gc.isenabled():  # the user's choice, or another compilation goes on
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
