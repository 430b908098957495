"""The systems that are compared: each turns a module and example inputs into a callable, with the settings that are fair to it.

All of them: the same number of threads, f32 as it is, inputs handed over without a copy. A package that is not there is
named with the command that installs it.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

import graphopt
from graphopt.capture.dynamo import backend
from graphopt.errors import GraphoptError

Run = Callable[[], Any]
ONNX, OPENVINO = "model.onnx", "model.xml"  # what is converted, in the folder of a job


class SystemFailure(GraphoptError):
    """A system cannot run a model; the message says why, in a line."""


@dataclass
class Job:
    """What a system is given.

    Attributes:
        module, args, kwargs: the model and example inputs.
        threads: how many it may use.
        folder: a folder of its own, for what it writes.
        cache_dir: graphopt's kernel cache; None for the user's own.
    """

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    threads: int
    folder: Path
    cache_dir: Path | None = None

    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the inputs, in the order of the arguments."""
        return [x for x in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(x, torch.Tensor)]


@dataclass
class Prepared:
    """A model that is ready to run.

    Attributes:
        run: takes nothing; returns the results.
        capture_seconds: of the preparation: until the compiler had the graph.
        keeps_module: whether it still needs the module's weights. If not, they are freed.
        notes: what a reader should know.
    """

    run: Run
    capture_seconds: float = 0.0
    keeps_module: bool = True
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class System:
    """A system by its name on the command line.

    Attributes:
        title: how people write it.
        packages: what must be installed; ``cached``: whether it keeps compiled code from one process to the next.
        load: imports what it needs, before the memory's baseline is taken.
        prepare: compiles, or loads what was converted, and runs once.
        convert: writes a file for ``prepare`` into the job's folder, in another process; returns notes.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    cached: bool
    load: Callable[[], None]
    prepare: Callable[[Job], Prepared]
    convert: Callable[[Job], list[str]] | None = None

    def missing(self) -> str | None:
        """What to install, or None."""
        absent = [p for p in self.packages if importlib.util.find_spec(p) is None]
        return f"{', '.join(absent)} not installed: pip install {' '.join(absent)} (or 'graphopt[bench]')" if absent else None


# --- PyTorch itself ----------------------------------------------------------------------------------------------------


def _load_eager() -> None:
    """Nothing."""


def _eager(job: Job) -> Prepared:
    return Prepared(lambda: job.module(*job.args, **job.kwargs))


def _load_compile() -> None:
    import_module("torch._dynamo")
    import_module("torch._inductor.compile_fx")


def _compiled(job: Job, compiler: Callable[..., Any]) -> Prepared:
    """``torch.compile``; what passes until the backend gets the graph is Dynamo's."""
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
    return _compiled(job, import_module("torch._inductor.compile_fx").compile_fx)


# --- graphopt ----------------------------------------------------------------------------------------------------------


def _load_graphopt() -> None:
    import tvm_ffi  # noqa: F401

    _load_compile()
    import_module("graphopt.backends.tvm.provider")


def _graphopt(job: Job) -> Prepared:
    options = {"cache_dir": job.cache_dir} if job.cache_dir else {}
    graphopt.clear_reports()
    prepared = _compiled(job, lambda gm, inputs: backend(gm, inputs, options=options))
    calls = [f.op for r in graphopt.reports() for f in r.fallbacks]
    if calls:
        prepared.notes.append(f"{len(calls)} library calls: {', '.join(dict.fromkeys(calls))}")
    return prepared


# --- ONNX Runtime and OpenVINO: converted in one process, run in another, as they are when they are deployed --------------


def export_onnx(job: Job) -> None:
    """The model as an ONNX file in the job's folder (weights beside it), by torch's exporter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(job.module, job.args, str(job.folder / ONNX), kwargs=job.kwargs, dynamo=True, verbose=False, optimize=True)


def _convert_for_onnxruntime(job: Job) -> list[str]:
    export_onnx(job)
    return []


def _load_onnxruntime() -> None:
    import onnxruntime  # noqa: F401


def _onnxruntime(job: Job) -> Prepared:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    session = onnxruntime.InferenceSession(str(job.folder / ONNX), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    run: Run = partial(session.run, None, dict(zip(names, _arrays(job, len(names)), strict=True)))
    run()
    return Prepared(run, keeps_module=False)


def _convert_for_openvino(job: Job) -> list[str]:
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


def _load_openvino() -> None:
    import openvino  # noqa: F401


def _openvino(job: Job) -> Prepared:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(str(job.folder / OPENVINO)), "CPU", settings)
    request, feed = compiled.create_infer_request(), _arrays(job, len(compiled.inputs))

    def run() -> list[Any]:
        return list(request.infer(feed, share_inputs=True, share_outputs=True).values())

    run()
    return Prepared(run, keeps_module=False)


def _arrays(job: Job, wanted: int) -> list[Any]:
    """The input tensors as NumPy arrays that share their memory."""
    tensors = job.tensors()
    if len(tensors) != wanted:
        raise SystemFailure(f"the converted model takes {wanted} inputs, not {len(tensors)}")
    return [t.detach().numpy() for t in tensors]


def in_a_line(error: BaseException, limit: int = 160) -> str:
    """An exception in one line: the first line of its message that says something."""
    lines = [x.strip() for x in str(error).splitlines()]
    text = next((x for x in lines if len(x.split()) > 2), lines[0] if lines else "")
    whole = f"{type(error).__name__}: {text}".rstrip(": ")
    return whole if len(whole) <= limit else whole[: limit - 3] + "..."


SYSTEMS = {
    s.name: s
    for s in (
        System("eager", "eager", (), False, _load_eager, _eager),
        System("graphopt", "graphopt", ("tvm", "tvm_ffi"), True, _load_graphopt, _graphopt),
        System("inductor", "Inductor", (), True, _load_compile, _inductor),
        System("onnxruntime", "ONNX Runtime", ("onnxruntime", "onnx", "onnxscript"), False, _load_onnxruntime, _onnxruntime,
               _convert_for_onnxruntime),
        System("openvino", "OpenVINO", ("openvino",), False, _load_openvino, _openvino, _convert_for_openvino),
    )
}  # fmt: skip
PEERS = ("inductor", "onnxruntime", "openvino")
CONVERTERS = ("onnxruntime", "openvino")  # the best of these on each model is a peer of its own
