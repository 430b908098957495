"""Templates of attention. Needs no tvm until ``emit``."""

from __future__ import annotations

from typing import Any

from graphopt.autotune.space import Param, Schedule, SearchSpace, Workload
from graphopt.backends.base import refused
from graphopt.backends.tvm.template import Template
from graphopt.ir import types
from graphopt.target import Target


def _attention_form(w: Workload) -> Any:
    from graphopt.backends.forms.flashform import form_of

    return form_of(w.graph) if w.kind in ("attention", "attention_forward") else "not an attention region"


_flash_refuse = refused(_attention_form)


def _flash_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.forms.flashform import flash_params

    return flash_params(_attention_form(w), t)


def _flash_spaces(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    from graphopt.backends.forms.flashform import flash_constraints

    return (SearchSpace("flash", params=_flash_params(w, t), constraints=flash_constraints(t)),)


def _write_flash(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.flash import FlashKernel

    names = ("lanes", "vectors", "rows", "block", "groups", "unroll", "stage", "parallel")
    return FlashKernel(w.graph, _attention_form(w), **{n: s[n] for n in names}).emit()


def _flash_tiles_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.forms.flashform import tiles_refusal

    return _flash_refuse(w, t) or tiles_refusal(_attention_form(w), t)


def _flash_tiles_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.forms.flashform import tiles_params

    return tiles_params(_attention_form(w), t)


def _write_flash_tiles(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.flashtiles import FlashTilesKernel

    return FlashTilesKernel(w.graph, _attention_form(w), s["block"], s["groups"], s["parallel"]).emit()


def _decode_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.forms.flashform import decode_refusal

    return _flash_refuse(w, t) or decode_refusal(_attention_form(w), t)


def _decode_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.forms.flashform import decode_params

    return decode_params(_attention_form(w), t)


def _write_decode(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.decode import DecodeKernel

    names = ("lanes", "sums", "keys", "block", "ahead", "splits", "parallel")
    abreast = bool(dict(s.knobs).get("abreast"))
    return DecodeKernel(w.graph, _attention_form(w), **{n: s[n] for n in names}, abreast=abreast, table=t.has("avx512f")).emit()


def _decode_tiles_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.forms import cachedform

    return _flash_refuse(w, t) or cachedform.refusal(_attention_form(w), t)


def _decode_tiles_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.forms import cachedform

    return cachedform.params(_attention_form(w), t)


def _write_decode_tiles(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.decodetiles import DecodeTilesKernel

    names, abreast = ("block", "ahead", "splits", "parallel"), bool(dict(s.knobs).get("abreast"))
    return DecodeTilesKernel(w.graph, _attention_form(w), **{n: s[n] for n in names}, abreast=abreast).emit()


def _gradient_form(w: Workload) -> Any:
    from graphopt.backends.forms.flashform import gradient_of

    form = gradient_of(w.graph) if w.kind == "attention_backward" else "not the gradient of an attention"
    if isinstance(form, str) or not form.node.attrs["bias_gradient"] or form.out.dtype == types.f32:
        return form
    return "the gradient of a bias that is of halves"


def _gradient_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.forms.flashform import gradient_params

    return gradient_params(_gradient_form(w), t)


def _gradient_spaces(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    from graphopt.backends.forms.flashform import flash_constraints

    return (SearchSpace("flash-gradient", params=_gradient_params(w, t), constraints=flash_constraints(t)),)


def _write_gradient(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.flashgradient import FlashGradientKernel

    names = ("lanes", "vectors", "rows", "block", "unroll", "parallel")
    return FlashGradientKernel(w.graph, _gradient_form(w), **{n: s[n] for n in names}).emit()


DECODE_TILES = Template("decode-tiles", _decode_tiles_refuse, _decode_tiles_params, _write_decode_tiles)
DECODE = Template("decode", _decode_refuse, _decode_params, _write_decode)
FLASH_TILES = Template("flash-tiles", _flash_tiles_refuse, _flash_tiles_params, _write_flash_tiles)
FLASH = Template("flash", _flash_refuse, _flash_params, _write_flash, _flash_spaces)
FLASH_GRADIENT = Template("flash-gradient", refused(_gradient_form), _gradient_params, _write_gradient, _gradient_spaces)
