"""Options: everything that a user may choose for one compilation, in one frozen object."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from graphopt.autotune import DEFAULT_NAME
from graphopt.errors import UsageError, nearest
from graphopt.passes.precision.autocast import PRECISIONS
from graphopt.passes.quantization.scheme import Scheme

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
VERIFY = ("off", "structure", "each-pass")
TUNE_SECONDS = 60.0  # of mode="max-autotune"
BACKENDS = ("auto", "tvm", "triton", "eager")


def default_cache_dir() -> Path:
    """Where kernels are kept: ``~/.cache/graphopt``."""
    return Path.home() / ".cache" / "graphopt"


@dataclass(frozen=True)
class Options:
    """Options of one compilation.

    Attributes:
        mode: as in ``torch.compile``; ``reduce-overhead`` asks for ``cuda_graphs``, ``max-autotune`` tunes the kernels that the tuning
            database does not know well yet.
        tune_budget: seconds for which kernels are tuned before they are built, for each graph that is compiled; None for 60 under
            ``mode="max-autotune"``, else 0.
        verify: ``off``, or False; ``structure`` (check the IR after every pass); ``each-pass`` (also run the graph before and
            after every pass against the f64 interpreter, and name the pass, rule and node that breaks the budget), or True.
        strict: a library fallback that was not asked for is an error.
        pipeline: passes to run: a text such as ``"canonicalize,fuse"``, a list of passes, or edits of the default one:
            ``{"before": {"fuse": [MyPass()]}, "after": {...}, "replace": {...}}``.
        fuel: make at most this many rewrites; ``skip_rewrites``: leave out rewrites of these numbers.
        quantize: the scheme by which the weights of matmuls are quantized when they are packed: ``int8-weight``, ``int4-weight``,
            ``int4-weight-g128-zp``; empty for none. See docs/quantization.md.
        precision: ``bf16`` or ``f16``: products with frozen weights, and attention, are computed in these, summed in f32; empty for what
            the model says. See docs/precision.md.
        backend: ``auto`` (``tvm`` on the CPU, ``triton`` on a GPU), or ``eager`` (library kernels only: asked for, so no fallback).
            ``triton`` for a model on the CPU runs the kernels of the GPU that ``target`` names under Triton's interpreter: slow, to
            check them without that GPU.
        target: the processor whose instructions kernels may use, such as ``cpu:x86-64-v3`` or ``cuda:sm_90``; ``cpu`` for all that this
            one has. A model on a GPU is compiled for that GPU.
        freeze: treat parameters and buffers as frozen in inference graphs; they are watched for changes.
        own_weights: let the compiled model own the weights (``graphopt.compile`` only): those that were packed or folded leave the
            model, unless they are read as they are, too; changes are not followed any more.
        hot_sizes: which sizes of a graph with symbolic ones get a variant of their own, tried before the general program:
            ``auto`` (those of the example inputs), ``none``, or sizes by name: ``{"input_ids[1]": [128, (1, 16)], "B": [1]}``,
            where a name is an argument and its axis, or a symbol's own, and a pair is a range, both ends included.
        cuda_graphs: record the launches of a call on a GPU, and replay them at later calls of the same sizes; None for
            ``mode="reduce-overhead"`` only. See docs/runtime.md.
        keep_graphs: keep what became of a graph until its kernels are built, and take it up where ``torch.compile`` hands over the same
            graph again; not where single passes are asked for (``pipeline``, ``fuel``, ``verify="each-pass"``). See docs/runtime.md.
        cache_dir: where built kernels and prepared graphs are kept; None for ``~/.cache/graphopt``.
        tuning_db: the tuning database whose records choose schedules; ``auto`` for ``tuning.db`` in the folder of the kernels, None for
            default schedules.
        workers: processes that build kernels; 0 for one a core.
        name: what reports call the model.
    """

    mode: str = "default"
    verify: str = "structure"
    strict: bool = False
    pipeline: Any = None
    fuel: int | None = None
    skip_rewrites: tuple[int, ...] = ()
    quantize: str = ""
    precision: str = ""
    backend: str = "auto"
    target: str = "cpu"
    freeze: bool = True
    own_weights: bool = False
    hot_sizes: Any = "auto"
    cuda_graphs: bool | None = None
    keep_graphs: bool = True
    cache_dir: Path | None = None
    tuning_db: Path | str | None = "auto"
    tune_budget: float | None = None
    workers: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.verify, bool):
            self._set("verify", "each-pass" if self.verify else "off")
        if isinstance(self.skip_rewrites, list):
            self._set("skip_rewrites", tuple(self.skip_rewrites))
        if self.cache_dir is not None:
            if not isinstance(self.cache_dir, str | os.PathLike):
                raise UsageError(f"option cache_dir={self.cache_dir!r} must be a path, or None for {default_cache_dir()}")
            self._set("cache_dir", Path(self.cache_dir).expanduser())
        for name, kind in (("strict", bool), ("freeze", bool), ("own_weights", bool), ("keep_graphs", bool), ("target", str), ("name", str),
                           ("quantize", str)):  # fmt: skip
            if type(getattr(self, name)) is not kind:
                raise UsageError(f"option {name}={getattr(self, name)!r} must be a {kind.__name__}")
        if self.cuda_graphs not in (True, False, None):
            raise UsageError(f"option cuda_graphs={self.cuda_graphs!r} must be a bool, or None for what the mode says")
        if type(self.workers) is not int or self.workers < 0:
            raise UsageError(f"option workers={self.workers!r} must be a nonnegative int")
        if self.fuel is not None and (type(self.fuel) is not int or self.fuel < 0):
            raise UsageError(f"option fuel={self.fuel!r} must be a nonnegative int or None")
        if self.own_weights and not self.freeze:
            raise UsageError("own_weights=True needs frozen weights; it does not go with freeze=False")
        if not isinstance(self.skip_rewrites, tuple) or not all(type(n) is int and n > 0 for n in self.skip_rewrites):
            raise UsageError(f"option skip_rewrites={self.skip_rewrites!r} must be a list of rewrite numbers, from 1")
        if not isinstance(self.tuning_db, str | os.PathLike | None) or self.tuning_db == "":
            raise UsageError(f"option tuning_db={self.tuning_db!r} must be a path, \"auto\", or None for default schedules")
        if self.tune_budget is not None and (type(self.tune_budget) not in (int, float) or not 0 <= self.tune_budget < float("inf")):
            raise UsageError(f"option tune_budget={self.tune_budget!r} must be a number of seconds")
        if self.quantize:
            Scheme.parse(self.quantize).make()
            if not self.freeze:
                raise UsageError("quantize needs frozen weights; it does not go with freeze=False")
        _check_hot_sizes(self.hot_sizes)
        for name, value, allowed in (("mode", self.mode, MODES), ("verify", self.verify, VERIFY), ("backend", self.backend, BACKENDS),
                                     ("precision", self.precision, ("", *PRECISIONS))):  # fmt: skip
            if value not in allowed:
                raise UsageError(f"option {name}={value!r} is none of {', '.join(filter(None, allowed))}{nearest(str(value), allowed)}")

    def _set(self, name: str, value: object) -> None:
        """Give an option, while it is made, the form that the rest of the code knows."""
        object.__setattr__(self, name, value)

    @staticmethod
    def make(mode: str | None = None, options: Mapping[str, Any] | None = None) -> Options:
        """Options from what ``torch.compile`` hands over. Raises UsageError with the nearest name for an unknown one."""
        given = dict(options or {})
        if mode is not None:
            given.setdefault("mode", mode)
        known = [f.name for f in fields(Options)]
        for key in given:
            if key not in known:
                raise UsageError(f"there is no option {key!r}{nearest(key, known)}; options are {', '.join(known)}")
        return Options(**given)

    @property
    def kernels_dir(self) -> Path:
        """Folder of the kernel cache."""
        return self.cache_dir or default_cache_dir()

    @property
    def graphs_dir(self) -> Path | None:
        """Folder of prepared graphs; None where each is to be made."""
        single = self.pipeline is not None or self.fuel is not None or self.skip_rewrites or self.verify == "each-pass"
        return self.kernels_dir / "graphs" if self.keep_graphs and not single else None

    @property
    def records(self) -> bool:
        """Whether calls are recorded and replayed, where that can be."""
        return self.mode == "reduce-overhead" if self.cuda_graphs is None else self.cuda_graphs

    @property
    def tune_seconds(self) -> float:
        """For how long kernels are tuned before they are built."""
        if self.tune_budget is not None:
            return float(self.tune_budget)
        return TUNE_SECONDS if self.mode.startswith("max-autotune") else 0.0

    @property
    def tuning_path(self) -> Path | None:
        """The tuning database; None for default schedules."""
        if self.tuning_db is None:
            return None
        return self.kernels_dir / DEFAULT_NAME if self.tuning_db == "auto" else Path(self.tuning_db).expanduser()


def _check_hot_sizes(value: Any) -> None:
    """Raises UsageError for a value that ``hot_sizes`` cannot have."""
    if isinstance(value, str) and value in ("auto", "none"):
        return
    form = 'option hot_sizes must be "auto", "none", or sizes by name, for instance {"input_ids[1]": [128, (1, 16)]}'
    if not isinstance(value, Mapping):
        raise UsageError(f"{form}; it is {value!r}")
    for name, sizes in value.items():
        if not isinstance(name, str) or not isinstance(sizes, list | tuple) or not sizes:
            raise UsageError(f"{form}; {name!r} has {sizes!r}")
        for s in sizes:
            one = type(s) is int and s >= 0
            span = isinstance(s, tuple | list) and len(s) == 2 and all(type(n) is int and n >= 0 for n in s) and s[0] <= s[1]
            if not one and not span:
                raise UsageError(f"{form}; {name!r} has {s!r}, which is neither a size nor a range of sizes")
