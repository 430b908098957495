"""One operator of PyTorch's OpInfo database, eager against a ``torch.compile`` backend.

A sample passes when the compiled call gives eager's dtypes, shapes, strides and values, and leaves its inputs as eager
does. An operator whose result is random or uninitialized is compared without values.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

SEED = 1234
PASSED = ("ok", "meta", "no_graph", "skip_eager")
"""meta: values not compared; no_graph: Dynamo gave the backend nothing; skip_eager: eager itself raises."""

RANDOM = """
empty empty_like empty_strided empty_permuted new_empty new_empty_strided bernoulli cauchy exponential geometric log_normal normal
normal.number_mean normal.in_place uniform rand_like randn randn_like randint randint_like multinomial pca_lowrank svd_lowrank
nn.functional.dropout nn.functional.dropout2d nn.functional.dropout3d nn.functional.alpha_dropout nn.functional.rrelu
nn.functional.feature_alpha_dropout nn.functional.fractional_max_pool2d nn.functional.fractional_max_pool3d
nn.functional.multi_head_attention_forward nn.functional.scaled_dot_product_attention
"""
"""Operators with random or uninitialized results."""


@dataclass(frozen=True)
class Outcome:
    """What became of one sample; ``status`` is one of PASSED, error, mismatch_value or mismatch_meta."""

    op: str
    sample: int
    status: str
    message: str = ""

    @property
    def passed(self) -> bool:
        return self.status in PASSED

    def __str__(self) -> str:
        return f"{self.op}[{self.sample}] {self.status}: {self.message}"


def operators(dtype: torch.dtype) -> dict[str, Any]:
    """The database's entries for a dtype on the CPU, by name, in its order."""
    warnings.filterwarnings("ignore")
    from torch.testing._internal.common_methods_invocations import op_db  # takes seconds to import

    found: dict[str, Any] = {}
    for op in op_db:
        if dtype in op.supported_dtypes("cpu"):
            found.setdefault(op.name + (f".{op.variant_test_name}" if op.variant_test_name else ""), op)
    return found


def unwrapped(op: Any) -> Any:
    """The function under test without the database's seeding wrapper, which would break the graph and hide it from the backend."""
    fn = op.op
    code = getattr(fn, "__code__", None)
    if code is None or "wrapper_set_seed" not in code.co_names:
        return fn
    found = None
    for name in (n for n in code.co_names if n != "wrapper_set_seed"):
        found = fn.__globals__.get(name) if found is None else getattr(found, name, None)
    if found is None and code.co_freevars:
        found = next((c.cell_contents for c in fn.__closure__ if callable(c.cell_contents)), None)
    return found if callable(found) else fn


def copied(tree: Any) -> Any:
    """A deep copy that keeps strides, even overlapping ones."""

    def copy(t: Any) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        if t.layout != torch.strided or t.is_quantized or t.numel() == 0:
            return t.detach().clone()
        base = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage().clone())  # type: ignore[call-overload]
        return base.as_strided(t.size(), t.stride(), t.storage_offset())

    return tree_map(copy, tree)


def difference(want: Any, got: Any, values: bool = True) -> str:
    """Empty when equal, else ``mismatch_meta: ...`` or ``mismatch_value: ...``."""
    expected, found = tree_flatten(want)[0], tree_flatten(got)[0]
    if len(expected) != len(found):
        return f"mismatch_meta: {len(expected)} results, got {len(found)}"
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        text = _leaf_difference(a, b, values)
        if text:
            return text.replace(":", f": result {i}:", 1)
    return ""


def _leaf_difference(a: Any, b: Any, values: bool) -> str:
    if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor):
        return f"mismatch_meta: {type(a).__name__}, got {type(b).__name__}"
    if not isinstance(a, torch.Tensor):
        close = a == b or (a != a and b != b) or (isinstance(a, float | complex) and abs(a - b) <= 1e-5 * max(1.0, abs(a)))
        return "" if close or not values else f"mismatch_value: {a!r}, got {b!r}"
    for what in ("dtype", "shape", "layout", "device", "requires_grad"):
        if getattr(a, what) != getattr(b, what):
            return f"mismatch_meta: {what} {getattr(a, what)}, got {getattr(b, what)}"
    if a.layout == torch.strided and a.numel() > 0:
        strides = [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (a, b)]
        if strides[0] != strides[1]:
            return f"mismatch_meta: strides {a.stride()}, got {b.stride()} for shape {tuple(a.shape)}"
    if values:
        try:
            torch.testing.assert_close(b.detach(), a.detach(), equal_nan=True)
        except AssertionError as error:
            return f"mismatch_value: {' '.join(str(error).split())[:300]}"
    return ""


def run(name: str, op: Any, dtype: torch.dtype, samples: int, backend: str, options: dict[str, Any] | None = None) -> Iterator[Outcome]:
    """Outcomes of an operator's first samples under a backend."""
    fn, values = unwrapped(op), name not in RANDOM.split() and op.name not in RANDOM.split()
    torch.manual_seed(SEED)
    try:
        inputs = list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=False), samples))
    except Exception as error:  # the database itself cannot make samples here
        yield Outcome(name, -1, "skip_eager", repr(error)[:300])
        return
    for i, sample in enumerate(inputs):
        arguments = ((sample.input, *sample.args), dict(sample.kwargs))
        plain, mine = copied(arguments), copied(arguments)
        try:
            torch.manual_seed(SEED)
            want = fn(*plain[0], **plain[1])
        except Exception as error:  # eager refuses the sample
            yield Outcome(name, i, "skip_eager", repr(error)[:300])
            continue
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        try:
            torch.manual_seed(SEED)
            # a wrapper of its own: Dynamo keeps what it knows by code object, and some operators are builtins
            compiled = torch.compile(lambda *a, **k: fn(*a, **k), backend=backend, dynamic=False, options=options)  # noqa: PLW0108
            got = compiled(*mine[0], **mine[1])
            text = difference(want, got, values) or difference(plain, mine, values)
        except Exception as error:  # any failure of the compiled call is what the sweep looks for
            yield Outcome(name, i, "error", f"{type(error).__name__}: {error}"[:600])
            continue
        if text:
            yield Outcome(name, i, *text.split(": ", 1))
        elif not torch._dynamo.utils.counters["stats"].get("unique_graphs"):
            yield Outcome(name, i, "no_graph")
        else:
            yield Outcome(name, i, "ok" if values else "meta")
