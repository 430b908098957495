"""Pipelines: the passes of a compilation, in order, and edits of that order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import graphopt.passes  # noqa: F401  (registers the passes)
from graphopt.errors import UsageError, nearest
from graphopt.pass_manager import Pass, make_pass, parse_pipeline
from graphopt.passes.precision.autocast import Autocast
from graphopt.passes.quantization.scheme import Scheme

_CLEAN_UP = ("canonicalize", "fold-constants", "casts", "algebra", "views", "cse", "dce")
_RECOMPOSE = (
    "recompose-softmax", "recompose-layer-norm", "recompose-rms-norm", "recompose-gelu", "recompose-silu", "recompose-rope",
    "recompose-lerp",
)  # fmt: skip
_LAYOUT = ("widen-convolutions", "conv-layout", "known-indices", "split-pools", "unflatten", "views", "dce")
_PACK = (
    "fuse-depthwise", "pack-quantized", "weights-in-place", "halve-weights", "pack-weights", "share-packed", "winograd-filters",
    "pack-filters", "turn-bias", "output-order",
)  # fmt: skip

LEVELS: Mapping[int, tuple[str, ...]] = {
    0: ("expand", "fuse"),
    1: (*_CLEAN_UP, "expand", *_CLEAN_UP, "fuse"),
    # composites are found before anything takes their parts for other ends, batch norms are folded while they are one node,
    # and what expansion leaves is cleaned up again before fusion looks at who uses what; views move reshapes down, unflatten
    # moves the ones that are left in fusion's way up again; sibling matmuls meet once their views stand as fusion will see them
    2: (
        *_CLEAN_UP, *_RECOMPOSE, "recognise-attention", "linear-attention", "causal-linear-attention", "fold-batch-norm",
        "channel-norms", "dce", "expand", *_CLEAN_UP, *_LAYOUT, "split-reductions", "sibling-matmuls", "mask-blocks", "narrow-weights",
        "pad-products", "fuse", *_PACK,
    ),
}  # fmt: skip

_EDITS = ("before", "after", "replace")


def default_pipeline(level: int = 2, quantize: str = "", precision: str = "") -> list[Pass]:
    """The passes of an optimization level.

    Args:
        level: 0, fuse only; 1, clean up and fuse; 2, everything.
        quantize: a scheme, such as ``int8-weight``: weights are quantized before fusion; empty for none.
        precision: ``bf16`` or ``f16``: what products, and attention, are computed in; empty for the model's own.

    Raises:
        UsageError: there is no such level.
    """
    if level not in LEVELS:
        raise UsageError(f"there is no optimization level {level!r}; levels are {', '.join(map(str, LEVELS))}")
    passes = [make_pass(name) for name in LEVELS[level]]
    before_fusion: list[Pass] = [*Scheme.parse(quantize).make()] if quantize else []
    if precision:
        before_fusion.append(Autocast(dtype=precision))
    at = next(i for i, p in enumerate(passes) if p.name in ("narrow-weights", "fuse"))
    return [*passes[:at], *before_fusion, *passes[at:]]


def edit_pipeline(passes: Sequence[Pass], edits: Any) -> list[Pass]:
    """A pipeline after the user's wishes.

    Args:
        passes: the pipeline to start from.
        edits: None for no change; a text such as ``"canonicalize,fuse{max_nodes=8}"`` or a list of passes (or such texts)
            for another pipeline altogether; or edits, each a pass, a text or a list of those by the name of a pass::

                {"before": {"fuse": [MyPass()]}, "after": {"expand": "dce"}, "replace": {"algebra": []}}

            A pass that stands in the pipeline several times is met at its last place by ``before`` and ``after``, and at
            each place by ``replace``.

    Raises:
        UsageError: an edit, or the name of a pass, is unknown, or a value is no pass.
    """
    if edits is None:
        return list(passes)
    if not isinstance(edits, Mapping):
        return _passes(edits, "pipeline")
    out = list(passes)
    for where, changes in edits.items():
        if where not in _EDITS:
            raise UsageError(f"pipeline: there is no edit {where!r}{nearest(str(where), _EDITS)}; edits are {', '.join(_EDITS)}")
        if not isinstance(changes, Mapping):
            raise UsageError(f"pipeline: {where!r} takes {{name of a pass: passes}}, got {changes!r}")
        for name, wanted in changes.items():
            out = _edit(out, where, name, _passes(wanted, f"pipeline: {where} {name!r}"))
    return out


def _edit(passes: list[Pass], where: str, name: str, new: list[Pass]) -> list[Pass]:
    places = [i for i, p in enumerate(passes) if p.name == name]
    if not places:
        having = list(dict.fromkeys(p.name for p in passes))
        raise UsageError(f"pipeline: {where} {name!r}: no such pass in it{nearest(str(name), having)}; it has {', '.join(having)}")
    if where == "replace":
        return [p for i, old in enumerate(passes) for p in (new if i in places else [old])]
    at = places[-1] + (where == "after")
    return [*passes[:at], *new, *passes[at:]]


def _passes(wanted: Any, what: str) -> list[Pass]:
    """Passes of a pass, a text, or a list of those."""
    match wanted:
        case Pass():
            return [wanted]
        case str():
            return parse_pipeline(wanted)
        case list() | tuple():
            return [p for item in wanted for p in _passes(item, what)]
        case type() if issubclass(wanted, Pass):
            return [wanted()]
    raise UsageError(f"{what}: {wanted!r} is no pass; give a Pass, the text of a pipeline, or a list of them")
