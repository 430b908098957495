"""Which derivation rules yield the sketches of the templates: (template, sketch) -> rules, in order. Needs no tvm."""

from __future__ import annotations

from graphopt.autotune.space import Rule

_FUSED = (Rule.INLINE, Rule.TILE, Rule.FUSE)
_TILED = (*_FUSED, Rule.PACK)

RULES: dict[tuple[str, str], tuple[Rule, ...]] = {
    ("nest", "default"): (Rule.FLAT, Rule.INLINE),
    ("nest", "factored"): (Rule.FLAT, Rule.INLINE, Rule.RFACTOR),
    ("rows", "default"): (Rule.ROWS, Rule.INLINE, Rule.FUSE),
    ("columns", "default"): (Rule.ROWS, Rule.INLINE, Rule.FUSE, Rule.CACHE_WRITE),
    ("tile", "default"): _TILED,
    ("tile", "rows-first"): (*_TILED, Rule.TURN),
    ("tile", "blocked"): (*_TILED, Rule.CACHE_WRITE),
    ("tile", "blocked-rows-first"): (*_TILED, Rule.CACHE_WRITE, Rule.TURN),
    ("tile", "split-depth"): (*_TILED, Rule.CACHE_WRITE, Rule.SPLIT_DEPTH),
    ("dots", "default"): _FUSED,
    ("pairs", "default"): (*_TILED, Rule.TENSORIZE),
    ("int8", "default"): (*_TILED, Rule.CACHE_WRITE, Rule.TENSORIZE),
    ("quantized", "default"): _TILED,  # what makes floats of its weight stands inline
    ("quantized-tiles", "default"): (*_TILED, Rule.SPLIT_NUMBERS, Rule.TENSORIZE),
    ("halves", "default"): (*_TILED, Rule.CACHE_WRITE, Rule.SPLIT_NUMBERS, Rule.TENSORIZE),
    ("thirds", "default"): (*_TILED, Rule.CACHE_WRITE, Rule.SPLIT_NUMBERS, Rule.TENSORIZE),
    ("conv", "default"): (*_TILED, Rule.CACHE_WRITE),
    ("conv-channels", "default"): _TILED,
    ("conv-thirds", "default"): (*_TILED, Rule.CACHE_WRITE, Rule.SPLIT_NUMBERS, Rule.TENSORIZE),
    ("winograd", "default"): (Rule.WINOGRAD, *_TILED),
    ("depthwise", "default"): _FUSED,
    ("depthwise", "pieces"): (*_FUSED, Rule.PIECES),
    ("conv-groups", "default"): _FUSED,
    ("conv-groups", "pieces"): (*_FUSED, Rule.PIECES),
    ("conv-pair", "default"): (*_TILED, Rule.CACHE_WRITE),
    ("decode-tiles", "default"): (Rule.ROWS, *_FUSED, Rule.CACHE_WRITE, Rule.SPLIT_NUMBERS, Rule.TENSORIZE),
    ("flash", "default"): (Rule.ROWS, *_FUSED, Rule.CACHE_WRITE),
    ("flash-tiles", "default"): (Rule.ROWS, *_FUSED, Rule.CACHE_WRITE, Rule.SPLIT_NUMBERS, Rule.TENSORIZE),
}
