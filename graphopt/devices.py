"""Which target a compilation is for, which backend generates its kernels, and who builds them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from graphopt.autotune.space import Schedule, Workload
from graphopt.backends.base import Backend
from graphopt.errors import BuildError, DeviceError, UsageError
from graphopt.hidden import missing_here
from graphopt.options import Options
from graphopt.pages import Pages
from graphopt.target import Target, detect, detect_gpu


class KernelProvider(Protocol):
    """Builds kernels and finds those that were built; a module or an object of a backend."""

    def prestart(self, cache_dir: Path, workers: int, model: str = "") -> None:
        """Get ready to build, if kernels of this model will have to be built."""

    def remember(self, cache_dir: Path, model: str) -> None:
        """Note that all kernels of a model are in the cache."""

    def load_or_build(self, jobs: Sequence[tuple[Workload, Schedule]], target: Target, cache_dir: Path, workers: int,
                      progress: Callable[[str, int, int], None] | None) -> Sequence[Any | BuildError]:  # fmt: skip
        """A loaded artifact (``name``, ``kernel``, ``path``, ``cache``) a job, or the error."""

    def changed_words(self) -> Any:
        """Compares words of weights in native code; None where there is no such code."""

    def native(self) -> Any:
        """Runs tapes of calls (the fields of ``graphopt.tape.Native``); None where each call is made from Python."""

    def index_look(self) -> Any:
        """Looks through an index (``graphopt.index_flags.Look``); None where an index is looked at before a kernel reads by it."""


def choose_target(device: torch.device, options: Options) -> Target:
    """The device to compile for.

    Raises:
        DeviceError: a target whose kernels this machine cannot run.
        UsageError: ``backend="triton"`` for a model on the CPU, and no GPU is named.
    """
    if device.type == "cuda":
        return _with_settings(detect_gpu(device.index or 0))
    if device.type != "cpu":
        return Target(device.type, "unknown")
    target = Target.from_name(options.target)
    if options.backend == "triton":
        if target.is_gpu:
            return _with_settings(target)
        raise UsageError("the model is on the CPU, where backend=\"triton\" runs the kernels of a GPU under Triton's interpreter, to check "
                         "them; say of which GPU, for instance target=\"cuda:sm_90\"")  # fmt: skip
    if why := missing_here(target):
        hint = "; backend=\"triton\" runs them under Triton's interpreter, to check them" if target.is_gpu else ""
        raise DeviceError(f"kernels for target {options.target!r} cannot run here: {why}{hint}")
    return target


def _with_settings(target: Target) -> Target:
    """A GPU with PyTorch's setting of whether products of f32 may be rounded to tf32: it decides which kernels are right."""
    if torch.get_float32_matmul_precision() == "highest" or target.kind != "cuda":
        return target
    return replace(target, features=tuple(sorted((*target.features, "tf32"))))


def choose_backend(target: Target, options: Options) -> tuple[Any, str]:
    """The backend that generates kernels for a target, or None and the reason that there is none."""
    if options.backend == "eager":
        return None, "library kernels were asked for"
    name = "triton" if target.is_gpu else "tvm"
    if target.kind not in ("cpu", "cuda", "hip"):
        return None, f"no kernels are generated for {target.kind} devices yet"
    if options.backend not in ("auto", name):
        return None, f"the {options.backend} backend generates no kernels for {target.kind} devices"
    missing = [p for p in {"tvm": ("tvm", "tvm_ffi"), "triton": ("triton",)}[name] if importlib.util.find_spec(p) is None]
    if missing:
        return None, f"{', '.join(missing)} is not installed"
    if name == "triton":
        from graphopt.backends.triton.backend import TritonBackend  # triton is an optional package

        return TritonBackend(), ""
    from graphopt.backends.tvm.backend import TvmBackend  # tvm is an optional package

    return TvmBackend(), ""


def interpreting(target: Target, device: torch.device) -> Target | None:
    """The processor that interprets a GPU's kernels, for a model whose tensors it has; None where kernels run as what they are."""
    return detect() if target.is_gpu and device.type == "cpu" else None


def kernel_provider(backend: Backend, device: torch.device) -> KernelProvider:
    """Who builds a backend's kernels for tensors of a device; imported when it is first needed."""
    module: Any = import_module(f"graphopt.backends.{backend.name}.provider")  # an optional package
    provider: KernelProvider = module.Provider(interpret=device.type == "cpu") if backend.name == "triton" else module
    return provider


def prestart(options: Options, examples: Iterable[Any], packed: Iterable[torch.Tensor] = ()) -> Pages:
    """Before a model is captured: start the build processes, where it is clear already that kernels must be built, and get memory ready.

    Args:
        packed: weights that may be packed.

    Returns:
        Where packed weights shall lie.
    """
    on_cpu = all(x.device.type == "cpu" for x in examples if isinstance(x, torch.Tensor))
    backend = choose_backend(detect(), options)[0] if on_cpu and options.backend in ("auto", "tvm") else None
    if backend is None:
        return Pages()
    kernel_provider(backend, torch.device("cpu")).prestart(options.kernels_dir, options.workers)
    if options.own_weights or not options.freeze:  # who gives the weights away wants to have each in memory once, at any time
        return Pages()
    sizes = {x.untyped_storage().data_ptr(): x.nbytes for x in packed if x.device.type == "cpu"}
    return Pages(ahead=sum(sizes.values()))
