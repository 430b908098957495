"""The backend as lowering sees it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from graphopt.autotune.space import Workload
from graphopt.backends.base import Kernel, KernelSource
from graphopt.backends.forms.support import ATTENTIONS, refusal
from graphopt.backends.tvm.cache import package_versions
from graphopt.backends.tvm.conv_templates import CONV, CONV_INT8, CONV_PAIR
from graphopt.backends.tvm.template import Template
from graphopt.backends.tvm.templates import TEMPLATES
from graphopt.backends.versions import package_version
from graphopt.ir.opset.window import WINDOWS
from graphopt.target import Target

KINDS = ("pointwise", "reduction", "rowwise", "matmul", "conv", "conv-depthwise", "scan", "scatter", "update", *ATTENTIONS, *WINDOWS)


class TvmBackend:
    """CPU kernels by TVM. ``templates`` and ``reason`` look at the IR only: they do not import tvm."""

    name = "tvm"

    def templates(self, w: Workload, t: Target) -> Sequence[Template]:
        """Templates that can compute the workload, the preferred one first."""
        return () if _refusal(w, t) is not None else [p for p in TEMPLATES if p.takes(w, t) is None]

    def reason(self, w: Workload, t: Target) -> str:
        """Why ``templates`` is empty, in words."""
        return _refusal(w, t) or ""

    def build(self, src: KernelSource, t: Target) -> Kernel:
        """Compile in this process, without a file; for experiments. Lowering builds through KernelBuilder."""
        from graphopt.backends.tvm.build import build_in_process

        return build_in_process(src, t)

    def versions(self) -> tuple[tuple[str, str], ...]:
        """(name, version) of everything but workload, schedule and target that decides what is the fastest; sorted."""
        packages = {name: package_version(name) for name in ("graphopt", "torch")}  # whose kernels are candidates, too
        return tuple(sorted({**packages, **package_versions()}.items()))


@lru_cache(maxsize=4096)
def _refusal(w: Workload, t: Target) -> str | None:
    if w.kind not in KINDS:
        return f"there is no family of kernels for {w.kind} regions"
    reason = refusal(w.graph, t)
    if reason is None and w.kind == "conv":
        return CONV.takes(w, t) and CONV_INT8.takes(w, t)
    if reason is None and w.kind == "conv-depthwise":
        return CONV_PAIR.takes(w, t)
    return reason


def template_named(name: str) -> Template:
    """The template of a schedule; raises KeyError."""
    return {p.name: p for p in TEMPLATES}[name]
