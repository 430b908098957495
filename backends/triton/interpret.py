"""Kernels under Triton's interpreter, on CPU tensors: slow, and true to what a GPU computes but for the order of sums.

Triton chooses the interpreter by an environment variable when it is imported. Here it is chosen for each kernel: the functions of a
loaded file become interpreted ones, and the language that they see has interpreted helpers. The interpreter patches Triton's language
while it runs, so one kernel runs at a time.

Three of its operations are wrong and are put right meanwhile (seen in 3.9): conversions to bf16 truncate, ``tl.dot`` multiplies the bits
of bf16, and a condition on scalars becomes integers where it meets one on tiles.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, interpreter_builder
from triton.runtime.jit import JITFunction

_ONE_AT_A_TIME = threading.RLock()


class _DeviceFunction(InterpretedFunction):  # type: ignore[misc]
    """A function that kernels call. Triton's own would patch the language at every call; the kernel's launch has done it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)


class _Language(ModuleType):
    """Triton's language as interpreted kernels see it: its functions that are written in Triton are interpreted, too."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(tl, name)
        if isinstance(value, JITFunction):
            value = _DeviceFunction(value.fn)
            setattr(self, name, value)
        return value


class _Vendor(ModuleType):
    """Functions of the GPU's vendor, by PyTorch's of that name."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(torch, name)

        def elementwise(*operands: Any) -> Any:
            result = function(*(torch.from_numpy(np.ascontiguousarray(x.handle.data)) for x in operands)).numpy()
            return tl.tensor(TensorHandle(result, operands[0].dtype), operands[0].type)

        return elementwise


_LANGUAGE, _VENDOR = _Language("triton.language"), _Vendor("libdevice")
_WORLDS: dict[int, dict[str, Any]] = {}  # by the identity of a module's names, which the interpreted ones keep alive


def _world(names: dict[str, Any]) -> dict[str, Any]:
    """The names of a module as its interpreted functions see them; the module stays as it is, for compilers."""
    if id(names) not in _WORLDS:
        # the last two are what the interpreter patches at a launch, and puts back
        world = _WORLDS[id(names)] = {**names, "_names": names, "_language": tl, "_core": tl.core}
        for name, value in names.items():
            if value is tl:
                world[name] = _LANGUAGE
            elif value is libdevice:
                world[name] = _VENDOR
            elif isinstance(value, JITFunction):
                home = value.fn.__globals__
                world[name] = _DeviceFunction(_within(value.fn, world if home is names else _world(home)))
            elif isinstance(value, FunctionType) and value.__globals__ is names:
                world[name] = _within(value, world)
    return _WORLDS[id(names)]


def _within(f: FunctionType, names: dict[str, Any]) -> FunctionType:
    """A function that sees other names."""
    copy = FunctionType(f.__code__, names, f.__name__, f.__defaults__, f.__closure__)
    copy.__annotations__, copy.__module__ = f.__annotations__, f.__module__
    return copy


def interpreted(module: ModuleType) -> Callable[..., None]:
    """The ``launch`` of a loaded kernel file, for CPU tensors."""
    launch: Callable[..., None] = _world(module.__dict__)["launch"]

    def run(*args: Any) -> None:
        with _ONE_AT_A_TIME, knobs.runtime.scope(), _corrected(), np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of rows that are all nan
            knobs.runtime.interpret = True
            launch(*args)

    return run


@contextmanager
def _corrected() -> Iterator[None]:
    """The interpreter without the errors that the module's text names."""
    cast, dot = interpreter_builder.cast_impl, interpreter_builder.create_dot

    def cast_impl(src: TensorHandle, to: Any) -> TensorHandle:
        source, target = src.dtype.scalar, to.scalar
        if tl.bfloat16 not in (source, target) or source == target:
            return cast(src, to)
        wide = from_bf16(src.data) if source == tl.bfloat16 else src.data.astype(np.float32)
        if target == tl.bfloat16:
            return TensorHandle(to_bf16(wide), tl.bfloat16)
        return cast(TensorHandle(wide, tl.float32), to)

    def create_dot(a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any) -> TensorHandle:
        a, b = (TensorHandle(from_bf16(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(a, b, d, *rest)

    def create_splat(to: Any, x: TensorHandle) -> TensorHandle:
        return TensorHandle(np.full(to.shape, x.data.reshape(-1)[0], dtype=x.data.dtype), x.dtype.scalar)

    options = replace(interpreter_builder.options, sanitize_overflow=False)  # integers wrap around, and are not looked at each time
    right = {"options": options, "cast_impl": cast_impl, "create_dot": create_dot, "create_splat": create_splat}
    before = dict(vars(interpreter_builder))
    vars(interpreter_builder).update(right)
    try:
        yield
    finally:
        for name in right:
            delattr(interpreter_builder, name)
            if name in before:
                setattr(interpreter_builder, name, before[name])


def from_bf16(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """f32 of the bits of bf16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Bits of f32 rounded to bf16, to nearest even; a nan stays one."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)
