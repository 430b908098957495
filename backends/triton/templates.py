"""The kernel templates, the preferred one first."""

from __future__ import annotations

from graphopt.backends.triton.attention_templates import ATTENTION, GRADIENT
from graphopt.backends.triton.loop_templates import POINTWISE, ROWS, SCAN, WINDOW
from graphopt.backends.triton.product_templates import CONV, GEMV, MATMUL
from graphopt.backends.triton.scatter_templates import SCATTER
from graphopt.backends.triton.template import Template

TEMPLATES: tuple[Template, ...] = (ATTENTION, GRADIENT, WINDOW, CONV, GEMV, MATMUL, ROWS, SCAN, SCATTER, POINTWISE)
