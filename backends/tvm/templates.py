"""The kernel templates, the preferred one first."""

from __future__ import annotations

from graphopt.backends.tvm.attention_templates import DECODE, DECODE_TILES, FLASH, FLASH_GRADIENT, FLASH_TILES
from graphopt.backends.tvm.conv_templates import CONV, CONV_CHANNELS, CONV_GROUPS, CONV_INT8, CONV_PAIR, CONV_THIRDS, DEPTHWISE, WINOGRAD
from graphopt.backends.tvm.loop_templates import COLUMNS, NEST, ROWS
from graphopt.backends.tvm.product_templates import BF16, DOTS, HALVES, INT8, PAIRS, QUANTIZED, QUANTIZED_TILES, THIRDS, TILE
from graphopt.backends.tvm.template import Template

TEMPLATES: tuple[Template, ...] = (
    DECODE_TILES, DECODE, FLASH_TILES, FLASH, FLASH_GRADIENT, DEPTHWISE, CONV_GROUPS, WINOGRAD, CONV_THIRDS,
    CONV_CHANNELS, CONV_INT8, CONV, CONV_PAIR,
    BF16, PAIRS, INT8, QUANTIZED, QUANTIZED_TILES, HALVES, THIRDS, DOTS, TILE, ROWS, COLUMNS, NEST,
)  # fmt: skip
