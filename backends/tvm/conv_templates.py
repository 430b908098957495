"""Templates of convolutions. Needs no tvm until ``emit``."""

from __future__ import annotations

from typing import Any

from graphopt.autotune.space import Constraint, Param, Schedule, SearchSpace, Workload
from graphopt.backends.tvm.template import Template, loops_of
from graphopt.ir import dims
from graphopt.target import Target


def _conv_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.forms.convform import conv_of

    form = conv_of(w.graph) if w.kind == "conv" else "not a convolution region"
    return form if isinstance(form, str) else None


def _depthwise_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.forms.convform import conv_of

    form = conv_of(w.graph) if w.kind == "conv" else "not a convolution region"
    return form if isinstance(form, str) else None if form.depthwise else "not one channel a group"


def _groups_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.forms.convform import conv_of

    form = conv_of(w.graph) if w.kind == "conv" else "not a convolution region"
    if isinstance(form, str):
        return form
    if form.packed is not None:
        return "its weight is packed for vectors of one group's channels"
    fits = t.conv_by_groups(form.groups, form.inner, form.filters, max(4, form.node.result.dtype.itemsize))
    return None if fits else "its groups do not lie side by side in a vector"


def _depthwise_params(w: Workload, t: Target) -> tuple[Param, ...]:
    form = _conv_form(w)
    lanes = max(1, t.lanes(max(4, form.node.result.dtype.itemsize)))
    while lanes > form.groups * form.filters:
        lanes //= 2
    pixels = (8, 4, 6, 12, 2, 3, 5, 7, 10, 14) if t.vector_registers == 32 else (4, 6, 2, 3, 5)
    return (Param("lanes", (lanes,)), Param("pixels", pixels, "tile"), Param("parallel", (True, False)))


def _depthwise_variants(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    """Tasks of the size that suits most, and of any."""
    from graphopt.backends.tvm.loopnests import depthwise_loops

    own, loops = _depthwise_params(w, t), depthwise_loops(w.graph, t)
    lanes = own[0].choices[0]
    assert isinstance(lanes, int)
    pieces = (
        Param("lanes", tuple(dict.fromkeys((lanes, max(1, lanes // 2), 2 * lanes))), "tile"), *own[1:],
        Param("lines", (8, 1, 2, 4, 14, 28, 56), "tasks"), Param("tasks", (32, 1, 4, 8, 16, 64, 128), "tasks"),
    )  # fmt: skip
    form = _conv_form(w)
    channels, filters = form.groups * form.filters, form.filters
    whole = Constraint("vectors wider than there are channels", lambda k: k["lanes"] == lanes or int(str(k["lanes"])) <= channels)
    even = Constraint("vectors of a part of a group", lambda k: int(str(k["lanes"])) % filters == 0)
    name = "depthwise" if form.depthwise else "conv-groups"
    return SearchSpace(name, params=own, nest=loops), SearchSpace(name, ("pieces",), pieces, (whole, even), loops)


def _conv_form(w: Workload) -> Any:
    from graphopt.backends.forms.convform import conv_of

    return conv_of(w.graph)


def _write_depthwise(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.convgroups import ConvGroupsKernel
    from graphopt.backends.tvm.depthwise import LINES, TASKS, DepthwiseKernel

    form = _conv_form(w)
    lines, tasks = (s["lines"], s["tasks"]) if s.sketch == "pieces" else (LINES, TASKS)
    kernel = DepthwiseKernel if form.depthwise else ConvGroupsKernel
    return kernel(w.graph, form, s["lanes"], s["pixels"], s["parallel"], lines, tasks).emit()


def _winograd_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.forms.convform import conv_of

    form = conv_of(w.graph) if w.kind == "conv" else "not a convolution region"
    return form if isinstance(form, str) else None if form.transformed is not None else "its weight is not transformed"


def _winograd_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.forms.convform import ConvForm, conv_of, winograd_shares

    form = conv_of(w.graph)
    assert isinstance(form, ConvForm)
    shares = winograd_shares(form, t)
    return (
        Param("lanes", (max(1, t.lanes(4)),)),
        Param("share", shares),
        Param("unroll", (4, 2, 8)),
        Param("parallel", (True, False)),
    )


def _write_winograd(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.forms.convform import ConvForm, conv_of
    from graphopt.backends.tvm.winograd import WinogradKernel

    form = conv_of(w.graph)
    assert isinstance(form, ConvForm)
    rows, lines, groups = s["share"]
    return WinogradKernel(w.graph, form, s["lanes"], rows, lines, groups, s["unroll"], s["parallel"]).emit()


def _conv_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.forms.convform import USUAL_TILES, ConvForm, conv_of, even_tiles, tile_rows

    form = conv_of(w.graph)
    assert isinstance(form, ConvForm)
    itemsize = max(4, form.node.result.dtype.itemsize)
    lanes = max(1, t.lanes(itemsize))
    columns = int(form.packed.shape[-1]) if form.packed is not None else t.panel_width(form.filters, itemsize)
    vectors = max(1, columns // lanes)
    rows = tile_rows(form, vectors, t)
    written, read, weights = (dims.numel(v.shape) for v in (form.node.result, form.x, form.w))
    far = isinstance(written, int) and written * itemsize > t.cache[1]  # what it writes does not stay in the cache
    # a thread that takes the same pixels in every layer finds them in its own cache: worth it where they are more than the weights
    deep = isinstance(written, int) and isinstance(read, int) and written + read < weights
    block = 512 if t.cache[1] >= 1 << 20 else 256  # of a panel: an eighth of the cache that it is read from again and again
    split, tasks = "panels" if deep else "pixels", 4 * t.cores
    tiles = USUAL_TILES
    if isinstance(form.pixels, int):
        tiles = even_tiles(form.tiles(rows[0], vectors, form.pixels), form.groups * -(-form.filters // columns), tasks, split, t.cores)
    return (
        Param("lanes", (lanes if columns % lanes == 0 else columns,)),
        Param("rows", rows, "tile"),
        Param("columns", (columns,), "tile"),
        Param("unroll", (4, 2, 8)),
        Param("tiles", tuple(dict.fromkeys((tiles, 12, 8, 16, 6, 4, 24, 2, 48))), "tasks"),
        Param("block", tuple(dict.fromkeys((block, 64, 128, 256, 384, 512))), "tasks"),
        Param("fetch", (far, not far)),
        Param("split", (split, "pixels" if deep else "panels"), "tasks"),
        Param("ahead", (True, False)),
        Param("tasks", (tasks, t.cores, 32 * t.cores), "tasks"),
        Param("parallel", (True, False), "tasks"),
    )


def _write_conv(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.forms.convform import ConvForm, conv_of
    from graphopt.backends.tvm.conv import ConvKernel

    form = conv_of(w.graph)
    assert isinstance(form, ConvForm)
    return ConvKernel(w.graph, form, s["lanes"], s["rows"], s["columns"], s["unroll"], s["tiles"], s["block"], s["fetch"],
                      s["split"], s["ahead"], s["tasks"], s["parallel"]).emit()  # fmt: skip


def _thirds_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.forms.convform import conv_of
    from graphopt.backends.tvm.convthirdform import refusal

    form = conv_of(w.graph) if w.kind == "conv" else "not a convolution region"
    return form if isinstance(form, str) else refusal(form, t)


def _thirds_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.tvm.convthirdform import params

    return params(_conv_form(w), t)


def _thirds_space(w: Workload, t: Target) -> tuple[SearchSpace, ...]:
    from graphopt.backends.tvm.convthirdform import space

    return (space(_conv_form(w), t),)


def _write_thirds(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.convthirds import ConvThirdsKernel

    names = ("block", "rows", "group", "panels", "fetch", "ahead", "parallel")
    return ConvThirdsKernel(w.graph, _conv_form(w), **{n: s[n] for n in names}).emit()


def _channels_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.forms.convform import conv_of
    from graphopt.backends.tvm.convchannelform import refusal

    form = conv_of(w.graph) if w.kind == "conv" else "not a convolution region"
    return form if isinstance(form, str) else refusal(form, t)


def _channels_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.tvm.convchannelform import params

    return params(_conv_form(w), t)


def _write_channels(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.tvm.convchannels import ConvChannelsKernel

    return ConvChannelsKernel(w.graph, _conv_form(w), s["lanes"], s["rows"], s["unroll"], s["pixels"], s["parallel"]).emit()


def _pair_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.forms.convpair import KIND, pair_of

    pair = pair_of(w.graph) if w.kind == KIND else "not a region of two convolutions"
    return pair if isinstance(pair, str) else None


def _pair_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.forms.convpair import ConvPair, line_pixels, line_rows, pair_of, shares, strips

    pair = pair_of(w.graph)
    assert isinstance(pair, ConvPair) and pair.first.packed is not None
    columns, lanes = int(pair.first.packed.shape[-1]), max(1, t.lanes(4))
    while columns % lanes:
        lanes //= 2
    narrow = strips(pair, columns, t)
    return (
        Param("lanes", (lanes,)),
        Param("rows", line_rows(pair.least_columns(narrow[0]), columns // lanes, t), "tile"),
        Param("pixels", line_pixels(narrow[0], t), "tile"),
        Param("share", shares(pair, columns, t), "tasks"),
        Param("strip", narrow, "tasks"),
        Param("unroll", (4, 2, 8)),
        Param("parallel", (True, False), "tasks"),
    )


def _write_pair(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.forms.convpair import ConvPair, pair_of
    from graphopt.backends.tvm.convpair import ConvPairKernel

    pair = pair_of(w.graph)
    assert isinstance(pair, ConvPair)
    return ConvPairKernel(w.graph, pair, s["lanes"], s["rows"], s["pixels"], s["share"], s["strip"], s["unroll"], s["parallel"]).emit()


def _int8_refuse(w: Workload, t: Target) -> str | None:
    from graphopt.backends.tvm.convint8form import refusal

    return refusal(w.graph) if w.kind == "conv" else "not a convolution region"


def _int8_params(w: Workload, t: Target) -> tuple[Param, ...]:
    from graphopt.backends.tvm.convint8form import params

    return params(w.graph, t)


def _write_int8(w: Workload, s: Schedule, t: Target) -> Any:
    from graphopt.backends.forms.convform import ConvForm, conv_of
    from graphopt.backends.tvm.convint8 import ConvInt8Kernel

    form = conv_of(w.graph, integers=True)
    assert isinstance(form, ConvForm)
    names = ("engine", "lanes", "rows", "group", "panels", "block", "ahead", "parallel")
    return ConvInt8Kernel(w.graph, form, **{n: s[n] for n in names}).emit()


DEPTHWISE = Template("depthwise", _depthwise_refuse, _depthwise_params, _write_depthwise, _depthwise_variants)
CONV_GROUPS = Template("conv-groups", _groups_refuse, _depthwise_params, _write_depthwise, _depthwise_variants)
WINOGRAD = Template("winograd", _winograd_refuse, _winograd_params, _write_winograd)
CONV = Template("conv", _conv_refuse, _conv_params, _write_conv, nest=loops_of("conv_loops"))
CONV_THIRDS = Template("conv-thirds", _thirds_refuse, _thirds_params, _write_thirds, _thirds_space)
CONV_CHANNELS = Template("conv-channels", _channels_refuse, _channels_params, _write_channels)
CONV_INT8 = Template("conv-int8", _int8_refuse, _int8_params, _write_int8)
CONV_PAIR = Template("conv-pair", _pair_refuse, _pair_params, _write_pair)
