"""Loading and calling built kernels through tvm-ffi alone; tvm itself is not imported.

Parallel loops are launched in torch's own OpenMP pool: a few instructions of glue (built once into the kernel cache)
stand in for TVM's launcher and call GOMP_parallel. So ``torch.set_num_threads`` holds for kernels as it changes, and two
pools never fight for the cores. Without a libgomp in the process, TVM's own pool is used, sized like torch's.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import BuildError
from graphopt.openmp import find_libgomp, usable_processors
from graphopt.target import request_amx

_LAUNCH_SYMBOL = b"__TVMBackendParallelLaunch"
_lock = threading.Lock()
_state: dict[str, Any] = {}
_pools = threading.local()


def _prepare(directory: Path) -> None:
    """Load the runtime and set the launcher, once a process, before the first kernel is loaded."""
    with _lock:
        if "ffi" in _state:
            return
        import tvm_ffi

        spec = importlib.util.find_spec("tvm")
        if spec is None or not spec.submodule_search_locations:
            raise BuildError("apache-tvm is not installed: its runtime library is needed to run kernels")
        folder = Path(next(iter(spec.submodule_search_locations)))
        runtime = next((p for p in (folder / "lib" / "libtvm_runtime.so", folder / "libtvm_runtime.so") if p.exists()), None)
        if runtime is None:
            raise BuildError(f"no libtvm_runtime.so in {folder}")
        ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
        request_amx()  # for kernels that were built by another process
        _state["pool"] = "libgomp" if _use_libgomp(tvm_ffi, directory) else "tvm"
        _state["ffi"] = tvm_ffi


def _use_libgomp(tvm_ffi: Any, directory: Path) -> bool:
    path = find_libgomp()
    if path is None:
        return False
    from graphopt.backends.tvm.gomp import launcher

    _state["libgomp"] = ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    found = launcher(directory)
    if found is None:
        return False
    _state["launcher"], address = found
    register = ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi()).TVMFFIEnvModRegisterContextSymbol
    register.argtypes, register.restype = [ctypes.c_char_p, ctypes.c_void_p], ctypes.c_int
    return bool(register(_LAUNCH_SYMBOL, address) == 0)


def pool() -> str:
    """``libgomp`` or ``tvm``: where parallel loops run; ``unknown`` before the first kernel is loaded."""
    return str(_state.get("pool", "unknown"))


def changed_words() -> Callable[[int, int, int], int] | None:
    """``f(addresses, words, n)``: nonzero if any of the n addresses holds another 32-bit word; None before a kernel is loaded."""
    library = _state.get("launcher")
    if library is None:
        return None
    function = ctypes.PyDLL(library._name).graphopt_changed_words  # over in microseconds: not worth letting go of the GIL
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_int
    return function  # type: ignore[no-any-return]


def native() -> tuple[Callable[..., Any], int, Callable[[Any], int]] | None:
    """What runs tapes (the fields of ``graphopt.tape.Native``); None before a kernel is loaded, or where kernels are not called bare."""
    library = _state.get("launcher")
    if library is None or _state["pool"] != "libgomp":
        return None
    ffi = _state["ffi"]
    run = ffi.Function.__from_extern_c__(ctypes.cast(library.graphopt_run_tape, ctypes.c_void_p).value)
    call = ctypes.cast(ctypes.CDLL(ffi.libinfo.find_libtvm_ffi()).TVMFFIFunctionCall, ctypes.c_void_p).value
    assert call is not None
    return run, call, lambda kernel: int(kernel.__chandle__())


class LoadedKernel:
    """A kernel from a file. ``kernel(*operands, *outputs, *sizes)``; results of zero elements must not be asked for.

    The operands may be any views of the declared strides; sizes, dtypes and layouts are not checked again here.
    """

    __slots__ = ("_function", "_module", "name")

    def __init__(self, module: Any, function: Any, name: str) -> None:
        self._module, self._function, self.name = module, function, name

    def __call__(self, *args: Any) -> None:
        if _state["pool"] == "tvm":
            _configure_pool()
        self._function(*args)


def load(path: Path, name: str) -> Any:
    """The kernel ``name`` of a built file, as a callable. Raises BuildError for a file that cannot be loaded."""
    _prepare(path.parent)
    try:
        module = _load_object(path) if path.suffix == ".o" else _state["ffi"].load_module(str(path))
        function = module[name]
    except (RuntimeError, OSError, AttributeError, ValueError) as error:
        raise BuildError(f"kernel {name} could not be loaded from {path.name}: {error}") from error
    if _state["pool"] == "libgomp":
        _state.setdefault("modules", []).append(module)
        return function  # the bare function: the least work a call
    return LoadedKernel(module, function, name)


def _load_object(path: Path) -> Any:
    """An object file that could not be linked: full tvm has a loader for it."""
    import tvm

    return tvm.runtime.load_module(str(path))


def _configure_pool() -> None:
    """TVM's own pool, of this thread: as many workers as torch has, sharing all cores that this process may use."""
    n = torch.get_num_threads()
    if getattr(_pools, "n", None) != n:
        cpus = [str(c) for c in sorted(usable_processors())]
        _state["ffi"].get_global_func("runtime.config_threadpool")(-3, n, cpus)
        _pools.n = n
