"""The systems that are compared in 8 and 4 bits, each as its makers recommend it.

ONNX Runtime: dynamic quantization of linear layers, static (QDQ, by channel) of models with convolutions. OpenVINO: NNCF's post-training
quantization, by its preset for transformers where one is. torchao: 4-bit weights under Inductor. Calibration is by the example inputs.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import graphopt
from graphopt.bench.float_systems import (
    TVM,
    convert_for_openvino,
    dynamo,
    export_onnx,
    load_compile,
    load_graphopt,
    load_onnxruntime,
    load_openvino,
    run_onnxruntime,
    run_openvino,
)  # fmt: skip
from graphopt.bench.system import ONNX, OPENVINO, Job, Prepared, System
from graphopt.passes.quantization.scheme import Scheme

GROUP = 64  # inputs of an output that share a scale, of torchao's weights: as graphopt's int4-weight
EXTRA = "bench-quantized"
_OURS = "graphopt-"


def by_scheme(name: str) -> System:
    """graphopt in a scheme of quantization. Raises KeyError if it is none, UsageError if its scheme is not understood."""
    if not name.startswith(_OURS):
        raise KeyError(name)
    scheme = str(Scheme.parse(name.removeprefix(_OURS)))
    return System(name, f"graphopt, {scheme}", TVM, True, load_graphopt, partial(_quantized, scheme=scheme), narrow=True)


def _quantized(job: Job, scheme: str) -> Prepared:
    """Rounded to the nearest, all that can be: nothing is put back because it was slower."""
    job.module = graphopt.quantize(job.module, job.args, job.kwargs, scheme=scheme, measure=False)
    return _ahead(job)


def _ahead(job: Job) -> Prepared:
    """Compiled ahead of time, as the other systems are: no guards are checked at each call."""
    graphopt.clear_reports()
    options: dict[str, Any] = {"cache_dir": job.cache_dir} if job.cache_dir else {}
    run = partial(graphopt.compile(job.module, job.args, job.kwargs, **options), *job.args, **job.kwargs)
    run()
    return Prepared(run)


# --- ONNX Runtime --------------------------------------------------------------------------------------------------------


def has_convolutions(module: nn.Module) -> bool:
    """More than the embedding of patches."""
    return sum(isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for m in module.modules()) > 1


def _quantized_onnx(job: Job) -> list[str]:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    convolutions = has_convolutions(job.module)
    export_onnx(job, beside=False)  # what prepares a model for quantization copies one file
    source, prepared, made = (job.folder / name for name in (ONNX, "prepared.onnx", "quantized.onnx"))
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    if convolutions:
        quantization.quantize_static(
            str(prepared), str(made), _Once(str(prepared), job), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip
    else:
        quantization.quantize_dynamic(str(prepared), str(made), per_channel=True, weight_type=quantization.QuantType.QInt8)
    made.replace(source)
    return ["static, QDQ, by channel" if convolutions else "dynamic"]


class _Once:
    """A reader of calibration data: the example inputs, once."""

    def __init__(self, file: str, job: Job) -> None:
        import onnx

        names = [i.name for i in onnx.load(file, load_external_data=False).graph.input]
        self.feeds = [dict(zip(names, job.arrays(len(names)), strict=True))]

    def get_next(self) -> dict[str, Any] | None:
        return self.feeds.pop() if self.feeds else None


# --- OpenVINO ------------------------------------------------------------------------------------------------------------


def _quantized_openvino(job: Job) -> list[str]:
    import nncf
    import openvino

    convolutions = has_convolutions(job.module)
    notes = convert_for_openvino(job)
    model = openvino.Core().read_model(str(job.folder / OPENVINO))
    feed = dict(enumerate(job.arrays(len(model.inputs))))
    kind = None if convolutions else nncf.ModelType.TRANSFORMER
    made = nncf.quantize(model, nncf.Dataset([feed]), model_type=kind, subset_size=1)
    del model
    for old in job.folder.glob("model.*"):
        old.unlink()
    openvino.save_model(made, str(job.folder / OPENVINO), compress_to_fp16=False)
    return notes


# --- torchao -------------------------------------------------------------------------------------------------------------


def _load_torchao() -> None:
    load_compile()
    import_module("torchao.quantization")


def _torchao(job: Job) -> Prepared:
    """4-bit weights in groups of 64 under Inductor; all else in bf16, for which its kernel is made: in f32 it takes ten times as long."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    job.module = job.module.to(torch.bfloat16)
    job.args, job.kwargs = pytree.tree_map(_narrow, (job.args, job.kwargs))
    quantize_(job.module, PrototypeInt4WeightOnlyConfig(group_size=GROUP))
    prepared = dynamo(job, import_module("torch._inductor.compile_fx").compile_fx)
    prepared.notes.append("all but the weights is in bf16")
    return prepared


def _narrow(x: Any) -> Any:
    return x.to(torch.bfloat16) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


FLOAT = System(f"{_OURS}float", "graphopt, f32, ahead of time", TVM, True, load_graphopt, _ahead)
QUANTIZED = (
    System("onnxruntime-int8", "ONNX Runtime, int8", ("onnxruntime", "onnx", "onnxscript"), False, load_onnxruntime, run_onnxruntime,
           _quantized_onnx, narrow=True),
    System("openvino-int8", "OpenVINO, int8", ("openvino", "nncf"), False, load_openvino, run_openvino, _quantized_openvino,
           EXTRA, narrow=True),
    System("torchao-int4", "torchao, int4", ("torchao",), True, _load_torchao, _torchao, extra=EXTRA, narrow=True),
)  # fmt: skip
