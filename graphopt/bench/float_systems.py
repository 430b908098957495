"""The systems that are compared in f32: each with the settings that are fair to it, as its makers recommend it.

All of them: the same number of threads, f32 as it is, inputs handed over without a copy. A package that is not there is
named with the command that installs it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch

import graphopt
from graphopt.bench.system import ONNX, OPENVINO, Job, Prepared, Run, System, in_a_line
from graphopt.capture.dynamo import backend

TVM = ("tvm", "tvm_ffi")  # packages without which graphopt has no kernels

# --- PyTorch itself ----------------------------------------------------------------------------------------------------


def nothing() -> None:
    """There is nothing to import."""


def _eager(job: Job) -> Prepared:
    return Prepared(lambda: job.module(*job.args, **job.kwargs))


def load_compile() -> None:
    import_module("torch._dynamo")
    import_module("torch._inductor.compile_fx")


def dynamo(job: Job, compiler: Callable[..., Any]) -> Prepared:
    """A model by ``torch.compile``; what passes until the backend gets the graph is Dynamo's."""
    start, arrived = time.perf_counter(), []

    def timed(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        arrived.append(time.perf_counter() - start)
        return compiler(gm, example_inputs)

    compiled = torch.compile(job.module, backend=timed)
    compiled(*job.args, **job.kwargs)
    notes = [f"{len(arrived)} graphs: the capture breaks"] if len(arrived) > 1 else []
    return Prepared(lambda: compiled(*job.args, **job.kwargs), arrived[0] if arrived else 0.0, notes=notes)


def _inductor(job: Job) -> Prepared:
    config: Any = import_module("torch._inductor.config")
    config.freezing = True
    return dynamo(job, import_module("torch._inductor.compile_fx").compile_fx)


# --- graphopt ----------------------------------------------------------------------------------------------------------


def load_graphopt() -> None:
    import tvm_ffi  # noqa: F401

    load_compile()
    import_module("graphopt.backends.tvm.provider")


def graphopt_model(job: Job) -> Prepared:
    options = {"cache_dir": job.cache_dir} if job.cache_dir else {}
    graphopt.clear_reports()
    prepared = dynamo(job, lambda gm, inputs: backend(gm, inputs, options=options))
    calls = [f.op for r in graphopt.reports() for f in r.fallbacks]
    if calls:
        prepared.notes.append(f"{len(calls)} library calls: {', '.join(dict.fromkeys(calls))}")
    return prepared


# --- ONNX Runtime and OpenVINO: converted in one process, run in another, as they are when they are deployed --------------


def export_onnx(job: Job, beside: bool = True) -> None:
    """The model as an ONNX file in the job's folder, by torch's exporter; weights ``beside`` it in another file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(job.module, job.args, str(job.folder / ONNX), kwargs=job.kwargs, dynamo=True, verbose=False, optimize=True,
                          external_data=beside)  # fmt: skip


def _convert_for_onnxruntime(job: Job) -> list[str]:
    export_onnx(job)
    return []


def load_onnxruntime() -> None:
    import onnxruntime  # noqa: F401


def run_onnxruntime(job: Job) -> Prepared:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    session = onnxruntime.InferenceSession(str(job.folder / ONNX), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    run: Run = partial(session.run, None, dict(zip(names, job.arrays(len(names)), strict=True)))
    run()
    return Prepared(run, keeps_module=False)


def convert_for_openvino(job: Job) -> list[str]:
    import openvino

    notes = []
    try:
        inputs = job.kwargs or (job.args if len(job.args) > 1 else job.args[0])
        model = openvino.convert_model(job.module, example_input=inputs)
    except Exception as error:
        notes.append(f"converted through ONNX, as openvino.convert_model fails: {in_a_line(error)}")
        export_onnx(job)
        model = openvino.Core().read_model(str(job.folder / ONNX))
    openvino.save_model(model, str(job.folder / OPENVINO), compress_to_fp16=False)
    return notes


def load_openvino() -> None:
    import openvino  # noqa: F401


def run_openvino(job: Job) -> Prepared:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(str(job.folder / OPENVINO)), "CPU", settings)
    request, feed = compiled.create_infer_request(), job.arrays(len(compiled.inputs))

    def run() -> list[Any]:
        return list(request.infer(feed, share_inputs=True, share_outputs=True).values())

    run()
    return Prepared(run, keeps_module=False)


FLOATS = (
    System("eager", "eager", (), False, nothing, _eager),
    System("graphopt", "graphopt", TVM, True, load_graphopt, graphopt_model),
    System("inductor", "Inductor", (), True, load_compile, _inductor),
    System("onnxruntime", "ONNX Runtime", ("onnxruntime", "onnx", "onnxscript"), False, load_onnxruntime, run_onnxruntime,
           _convert_for_onnxruntime),
    System("openvino", "OpenVINO", ("openvino",), False, load_openvino, run_openvino, convert_for_openvino),
)  # fmt: skip
