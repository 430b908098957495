"""The templates of attention and of its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from graphopt.autotune.space import Constraint, Param, Schedule, SearchSpace, Workload
from graphopt.backends.base import refused
from graphopt.backends.forms.flashform import Form, form_of, gradient_of
from graphopt.backends.triton import attention, gradient
from graphopt.backends.triton.code import Code, Launch, power_of_two
from graphopt.backends.triton.matmul import LEAST, precision
from graphopt.backends.triton.template import READS, Template, divide, first, largest, pieces_of, readable
from graphopt.ir import dims
from graphopt.target import Target

KEYS_PIECE = 32768  # bytes of keys and values

# --- attention ---------------------------------------------------------------------------------------------------------------


def _attention_form(w: Workload) -> Form | str:
    return form_of(w.graph) if w.kind in ("attention", "attention_forward") else "not an attention region"


def _heads(form: Form, queries: int, rows: int) -> int:
    """Heads whose queries are rows of one program by default: those that share keys and values, if these are then read half as often.

    Args:
        queries: of a head, at most.
        rows: of a program, at most.
    """
    return form.share if 2 * -(-form.share * queries // rows) <= form.share * -(-queries // rows) else 1


def _attention_spaces(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    form = _attention_form(w)
    assert isinstance(form, Form)
    itemsize = form.out.dtype.itemsize
    d, e = attention.side(form.depth), attention.side(form.width)
    wide = max(d, e) > (128 if t.kind == "cuda" else 64)  # sums that leave few registers
    most = 32 if itemsize >= 4 else 64 if wide else 128
    queries = dims.bounds(form.queries, form.symbols)[1] or 4096
    heads = _heads(form, queries, most)
    rows = heads * queries
    m = max(LEAST, min(most, power_of_two(rows)))
    n = max(LEAST, min(32 if itemsize >= 4 or wide else 64, power_of_two(largest(form.keys, 4096))))
    programs = max(1, largest(dims.numel(form.batch), 8) // heads) * -(-rows // m)
    seen = min([dims.bounds(form.keys, form.symbols)[1] or 4096, *(w for w in [form.node.attrs["window"]] if isinstance(w, int))])
    key = (form.depth + form.width) * itemsize
    knob, full = divide(pieces_of(programs, seen * key, max(KEYS_PIECE, n * key), t), form.keys, "n")
    one_at_a_time = t.kind == "hip" and itemsize >= 4  # keys, then values, where rows are multiplied by multiply-adds

    def shared(m: int, n: int, stages: int) -> int:
        """Bytes: keys and values of each stage, probabilities, and queries where the matrix unit reads them from there."""
        held = m * d if t.matrix_unit in ("wgmma", "tcgen05") else 0
        return int((held + n * (max(d, e) if one_at_a_time else d + e) * stages + m * n) * itemsize)

    stages = 2 if t.kind == "cuda" and shared(m, n, 2) <= t.shared_memory else 1
    params = (
        knob,
        Param("heads", first(heads, (1, form.share)), "tile"),
        Param("m", first(m, (16, 32, 64, 128)), "tile"),
        Param("n", first(n, (16, 32, 64, 128)), "tile"),
        Param("warps", first(8 if m >= 128 and t.kind == "cuda" else 4 if m >= 32 else 2, (2, 4, 8))),
        Param("stages", first(stages, (1, 2, 3))),
        READS,
    )

    def fits(s: Mapping[str, Any]) -> bool:
        return shared(s["m"], s["n"], s["stages"]) <= t.shared_memory

    def held(s: Mapping[str, Any]) -> bool:
        return bool(s["m"] * (e + s["n"]) <= 144 * s["warps"] * t.warp)  # of a thread: none of the six targets spills so

    limits = Constraint("queries, keys and values exceed the shared memory", fits), Constraint("the sums exceed the registers", held)
    return (SearchSpace("attention", ("flash",), params, (*limits, full, *_reads(w, t, form))),)


@lru_cache(maxsize=1024)
def _has_descriptors(w: Workload, t: Target) -> bool:
    """Whether queries, keys or values lie so in memory that a descriptor tells their tiles."""
    form = _attention_form(w)
    assert isinstance(form, Form)
    code, _ = attention.FlashKernel(w.graph, form, t, LEAST, LEAST, descriptors=True).emit(4, 1)
    return bool(code.descriptors)


def _reads(w: Workload, t: Target, form: Form) -> tuple[Constraint, ...]:
    """By what queries, keys and values may be read."""
    if t.has("tma") and form.out.dtype.itemsize >= 4 and precision(form.out.dtype, t) == "ieee":  # whole rows in registers, which spill
        return (Constraint("f32 is multiplied by multiply-adds, and not as the device copies tiles", lambda s: s["reads"] == "pointers"),)
    return readable(t, "queries, keys or values lie", lambda: _has_descriptors(w, t))


def _write_attention(w: Workload, s: Schedule, t: Target) -> tuple[Code, Launch]:
    form = _attention_form(w)
    assert isinstance(form, Form)
    kernel = attention.FlashKernel(w.graph, form, t, s["m"], s["n"], s["pieces"], s["heads"], s["reads"] == "descriptors")
    return kernel.emit(s["warps"], s["stages"])


# --- its gradient ------------------------------------------------------------------------------------------------------------


def _gradient_form(w: Workload) -> Form | str:
    return gradient_of(w.graph) if w.kind == "attention_backward" else "not a gradient of an attention"


def _gradient_spaces(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    form = _gradient_form(w)
    assert isinstance(form, Form)
    itemsize = form.out.dtype.itemsize
    d, e = attention.side(form.depth), attention.side(form.width)
    exact, wide = itemsize >= 4, max(d, e) > 64
    longest = power_of_two(max(largest(form.queries, 4096), largest(form.keys, 4096)))
    own = max(LEAST, min(32 if exact or max(d, e) > 128 else 64, longest))
    along = max(LEAST, min(16 if (exact and wide) or max(d, e) > 128 else 32, longest))
    params = (
        Param("own", first(own, (16, 32, 64, 128)), "tile"),
        Param("along", first(along, (16, 32, 64, 128)), "tile"),
        Param("warps", first(8 if wide and not exact and t.kind == "cuda" else 4, (2, 4, 8))),
        Param("stages", first(2 if t.kind == "cuda" else 1, (1, 2, 3))),
    )

    def fits(s: Mapping[str, Any]) -> bool:
        return bool(((s["own"] + s["along"] * s["stages"]) * (d + e) + 2 * s["own"] * s["along"]) * itemsize <= t.shared_memory)

    def held(s: Mapping[str, Any]) -> bool:
        return bool(s["own"] * (d + e + 2 * s["along"]) <= 128 * s["warps"] * t.warp)

    limits = Constraint("what the products read exceeds the shared memory", fits), Constraint("the sums exceed the registers", held)
    return (SearchSpace("attention-gradient", ("flash",), params, limits),)


def _write_gradient(w: Workload, s: Schedule, t: Target) -> tuple[Code, Launch]:
    form = _gradient_form(w)
    assert isinstance(form, Form)
    return gradient.emit(w.graph, form, t, s["own"], s["along"], s["warps"], s["stages"])


GRADIENT = Template("attention-gradient", refused(_gradient_form), _gradient_spaces, _write_gradient)
ATTENTION = Template("attention", refused(_attention_form), _attention_spaces, _write_attention)
