"""Which convolutions have vectors along the channels of their image, and their schedules. Looks at the IR only."""

from __future__ import annotations

from math import prod

from graphopt.autotune.space import Param
from graphopt.backends.forms.convform import ConvForm
from graphopt.target import Target

_PIXELS = 256  # of a line, at most, that a task computes before their epilogue
_ROWS = 10  # of a tile, at most: beyond some eight nothing is gained
_SINGLE = 2  # what a term by itself costs, in steps of a vector


def refusal(form: ConvForm, t: Target) -> str | None:
    """Why a convolution has its vectors along the filters, or None."""
    if form.groups != 1:
        return f"a convolution of {form.groups} groups"
    if form.packed is not None or form.transformed is not None:
        return "its weight is packed for vectors along the filters"
    if t.lanes(4) < 2 or form.inner < t.lanes(4):
        return f"{form.inner} channels do not fill a vector"
    if not t.conv_along_channels(prod(form.kernel), form.inner, form.filters):
        return f"{form.filters} filters of {form.inner} channels are better side by side in a vector"
    return None


def params(form: ConvForm, t: Target) -> tuple[Param, ...]:
    """The knobs.

    ``lanes``: elements of a vector. ``rows``: pixels of a tile. ``unroll``: vectors of the summed axis that are unrolled. ``pixels``: of
    a line, at most, of a task.
    """
    return (
        Param("lanes", _lanes(form, t)),
        Param("rows", _rows(form, t), "tile"),
        Param("unroll", (1, 2, 4)),
        Param("pixels", (_PIXELS, 64, 128, 512), "tasks"),
        Param("parallel", (True, False), "tasks"),
    )


def _lanes(form: ConvForm, t: Target) -> tuple[int, ...]:
    """Elements of a vector, the best first: a run of products is whole vectors of them, and terms that are taken one by one."""
    run = form.inner * (form.kernel[-1] if form.dilation[-1] == 1 else 1)
    most = t.lanes(max(4, form.node.result.dtype.itemsize))
    choices = [most >> k for k in range(3) if most >> k > 1]
    return tuple(sorted(choices, key=lambda n: run // n + _SINGLE * (run % n)))


def _rows(form: ConvForm, t: Target) -> tuple[int, ...]:
    """Pixels of a tile, the best first: registers hold a sum for each filter and pixel, the weight's vectors, and one of the image.

    A third of the registers is left to the weight, and to the shuffles that add up lanes: with more sums, short ones take twice as long.
    A step takes as long as its multiply-adds, or as its reads, and one for the loop; two units do each of them.
    """
    filters = form.filters
    most = max(1, min(_ROWS, 2 * t.vector_registers // 3 // filters, (t.vector_registers - 1 - filters) // filters))
    width = form.node.result.shape[-2]
    if isinstance(width, int):
        space, stride = int(form.x.shape[-2]), form.stride[-1]  # known where that of the result is
        reach = (form.kernel[-1] - 1) * form.dilation[-1]
        begin, end = -(-form.low[-1] // stride), min(width, max(0, space + form.low[-1] - reach - 1 + stride) // stride)
        width = max(1, end - begin)  # pixels with all taps inside of the image
        most = min(most, width)

    def cost(rows: int) -> float:
        tiles = -(-width // rows) if isinstance(width, int) else 1000 / rows
        return float(tiles * (max(rows * filters, rows + filters) + 1))

    return tuple(sorted(range(1, most + 1), key=lambda r: (cost(r), -r)))
